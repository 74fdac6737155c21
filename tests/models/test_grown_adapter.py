"""A LoRA run whose template brought tokens: its folder loads in peft, in transformers and here."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from conftest import make_model, make_tokenizer, run_card, write_jsonl
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhfkit.chat.messages import Message
from rlhfkit.config.blocks import LoraConfig
from rlhfkit.config.load import load_config
from rlhfkit.config.stages import RmConfig, SftConfig
from rlhfkit.models.adapter_folders import load_frozen_adapter
from rlhfkit.models.adapters import POLICY, VALUE, active_adapter, add_value_adapter
from rlhfkit.models.folder import open_model
from rlhfkit.models.load import load_model
from rlhfkit.models.scoring import RewardScorer
from rlhfkit.models.text_side import load_text_side
from rlhfkit.stages import merge, reward, sft

TEMPLATE = "llama3"  # four tokens that the tiny tokenizer has not
PAIRS = [{"prompt": f"say {i}", "chosen": f"it was good {i}", "rejected": "bad"} for i in range(8)]
ROWS = [{"prompt": row["prompt"], "response": row["chosen"]} for row in PAIRS]


class Trained(NamedTuple):
    final: Path
    ids: torch.Tensor
    logits: torch.Tensor  # of the tokens, without padding rows


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def base(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a row for each token, so that any further token makes the vocabulary grow."""
    tokens = len(make_tokenizer())
    return make_model(tmp_path_factory.mktemp("base"), vocab_size=tokens, tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def trained(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("run")
    ids, logits = torch.tensor([[5, 60, len(make_tokenizer()) + 1, 7]]), []

    def spy(path: Path, accelerator: Any, wrapped: Any, loaded: Any, *further: Any) -> None:
        logits.append(loaded.model(ids).logits.detach()[..., : loaded.text.vocabulary])
        real(path, accelerator, wrapped, loaded, *further)

    with pytest.MonkeyPatch.context() as patch:
        real = sft.save_model
        patch.setattr(sft, "save_model", spy)
        result = sft.run(load_config(SftConfig, flags=flags(base, folder, ROWS)))
    return Trained(result.final, ids, logits[-1])


def flags(base: Path, folder: Path, rows: list[dict[str, str]]) -> dict[str, Any]:
    return {
        "model.path": str(base), "model.precision": "fp32", "model.template": TEMPLATE, "lora.rank": 4,
        "data.train": [str(write_jsonl(folder / "rows.jsonl", rows))], "data.max_length": 128, "optim.lr": 1e-2,
        "optim.batch_size": 4, "run.out": str(folder / "run"), "run.trackers": ["none"],
    }  # fmt: skip


def stored(folder: Path) -> dict[str, tuple[int, ...]]:
    """Shapes of what is no LoRA weight."""
    with safe_open(folder / "adapter_model.safetensors", framework="pt") as weights:
        return {key: tuple(weights.get_slice(key).get_shape()) for key in weights.keys() if ".lora_" not in key}  # noqa: SIM118


def test_the_card_loads_it_in_peft(trained: Trained) -> None:
    model = run_card(trained.final)["model"]
    torch.testing.assert_close(model(trained.ids).logits[..., : trained.logits.shape[-1]], trained.logits)


def test_a_resized_base_takes_it(trained: Trained, base: Path) -> None:
    """As people write it themselves, with the adapter methods of transformers."""
    model = AutoModelForCausalLM.from_pretrained(base)
    model.resize_token_embeddings(len(AutoTokenizer.from_pretrained(trained.final)))
    model.load_adapter(str(trained.final))
    torch.testing.assert_close(model(trained.ids).logits[..., : trained.logits.shape[-1]], trained.logits)


def test_beside_the_adapter_are_embedding_and_head_alone(trained: Trained) -> None:
    """Not the base's own, and none of the copies that peft makes of them; a tied head it writes out as well."""
    tokens = len(AutoTokenizer.from_pretrained(trained.final))
    assert stored(trained.final) == {
        "base_model.model.model.embed_tokens.weight": (tokens, 32),
        "base_model.model.lm_head.weight": (tokens, 32),
    }


@pytest.mark.parametrize("lora", [None, LoraConfig(rank=4), LoraConfig(rank=0)], ids=["use", "go on", "merge"])
def test_it_loads_here_with_padding_rows(trained: Trained, lora: LoraConfig | None) -> None:
    source = open_model(str(trained.final))
    loaded = load_model(source, load_text_side(source), "causal", lora=lora, dtype=torch.float32)
    model = loaded.model.eval()
    rows = model.get_input_embeddings().weight.shape[0]
    assert rows % 64 == 0
    torch.testing.assert_close(model(trained.ids).logits[..., : trained.logits.shape[-1]], trained.logits)
    assert any(p.requires_grad for p in model.parameters()) is (lora is not None)
    if lora is not None and lora.rank:
        load_frozen_adapter(model, str(trained.final), "reference")
        model.set_adapter("reference")
        torch.testing.assert_close(model(trained.ids).logits[..., : trained.logits.shape[-1]], trained.logits)


def test_it_merges(trained: Trained, tmp_path: Path) -> None:
    merge.run(trained.final, tmp_path / "merged", base="", dtype="auto", device="cpu")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert model.get_input_embeddings().weight.shape[0] % 64 == 0
    torch.testing.assert_close(model(trained.ids).logits[..., : trained.logits.shape[-1]], trained.logits)


def test_a_reward_model_goes_on_from_it(trained: Trained, tmp_path: Path) -> None:
    """With the vocabulary of the SFT run beside its adapter, and a head: the card's code gives the score of ours."""
    given = flags(trained.final, tmp_path, PAIRS) | {"model.template": "auto"}
    final = reward.run(load_config(RmConfig, flags=given)).final
    ours = RewardScorer(str(final), device=torch.device("cpu"), dtype=torch.float32)
    names = run_card(final)
    asked, answer = (message["content"] for message in names["chat"])
    assert names["score"] == pytest.approx(ours.score([[Message("user", asked)]], [answer])[0], abs=2e-5)


def test_a_value_function_goes_beside_an_embedding_that_grew(trained: Trained) -> None:
    source = open_model(str(trained.final))
    loaded = load_model(source, load_text_side(source), "causal", lora=LoraConfig(rank=4), dtype=torch.float32)
    before = loaded.model(trained.ids).logits
    add_value_adapter(loaded.model, POLICY)
    torch.testing.assert_close(loaded.model(trained.ids).logits, before, rtol=0, atol=0)
    with active_adapter(loaded.model, VALUE):  # it starts as the policy, whose embedding it shares
        torch.testing.assert_close(loaded.model(trained.ids).logits, before, rtol=1e-5, atol=1e-6)
    with active_adapter(loaded.model, None):
        assert not torch.allclose(loaded.model(trained.ids).logits, before, atol=1e-3)
