"""What `--plan` counts without weights is what the loaded modules hold and keep."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import make_model, write_jsonl

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import PpoConfig, RmConfig, SftConfig
from rlhfkit.data.sources import load_records
from rlhfkit.data.tokenize import tokenize_pairs, tokenize_prompts, tokenize_sft
from rlhfkit.errors import ConfigError
from rlhfkit.models.load import LoadedModel, load_model
from rlhfkit.models.precision import DTYPES
from rlhfkit.models.wrappers import LanguageModel, PolicyModel, RewardModel
from rlhfkit.stages import memory, plan, ppo_models, reward, sft
from rlhfkit.stages.common import open_text_side

CPU = torch.device("cpu")
BF16 = {"model__precision": "bf16"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Wide enough for quantisation, which works on blocks of 64 weights."""
    return make_model(tmp_path_factory.mktemp("models") / "wide", hidden_size=64, intermediate_size=128)


def planned(config: Any) -> tuple[memory.Estimate, list[Any], Any, Any]:
    source, text = open_text_side(config)
    groups, _ = load_records(config.data.train, config.stage, on_bad_row="error")
    tokenize: Any = {"sft": tokenize_sft, "rm": tokenize_pairs, "ppo": tokenize_prompts}[config.stage]
    limit = config.row_limit
    rows, _ = tokenize(groups[0], text.encoder, limit)
    return memory.estimate(config, source, text, rows, CPU), rows, source, text


def loaded_for(config: Any, source: Any, text: Any) -> LoadedModel:
    dtype = torch.bfloat16 if config.model.precision == "bf16" else torch.float32
    return load_model(
        source, text, "reward" if config.stage == "rm" else "causal", lora=config.lora, dtype=dtype,
        quantize=config.model.quantize, fresh_head=True, device=CPU,
        gradient_checkpointing=config.optim.gradient_checkpointing, kernels=config.optim.kernels,
        packing=config.optim.packing,
    )  # fmt: skip


def held_by(module: torch.nn.Module) -> float:
    return float(sum(p.numel() * p.element_size() for p in module.parameters()))


def kept_by(module: torch.nn.Module, config: Any, rows: list[Any]) -> float:
    """Bytes that a real pass keeps for its backward pass."""
    batch, _ = memory._largest(config, rows, CPU)
    own = {p.untyped_storage().data_ptr() for p in module.parameters()}
    kept: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    narrow = config.model.precision == "bf16"
    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t), torch.autocast("cpu", enabled=narrow):
        module.train()(*(batch if config.stage == "rm" else (batch,)))
    return float(sum(s.nbytes() for number, s in kept.items() if number not in own))


FORMS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "all weights, bf16": BF16,
    "LoRA": {"lora__rank": 4},
    "LoRA, bf16": {"lora__rank": 4, **BF16},
    "transformers' own kernels": {"optim__kernels": "plain"},
    "padded rows": {"optim__packing": False},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stage", ["sft", "rm", "ppo"])
def test_weights_and_what_is_kept_are_those_of_the_loaded_model(
    stage: str, form: str, settings: Callable[..., Any], model: Path, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    data = request.getfixturevalue({"sft": "sft_file", "rm": "pairs_file", "ppo": "prompts_file"}[stage])
    more: dict[str, Any] = {"model__path": str(model), "data__train": [str(data)], **FORMS[form]}
    if stage == "ppo":
        (tmp_path / "r.py").write_text("def f(prompts, responses):\n    raise SystemExit\n")
        more |= {"ppo__reward": [f"{tmp_path}/r.py:f"], "ppo__max_new_tokens": 8}
    cls: Any = {"sft": SftConfig, "rm": RmConfig, "ppo": PpoConfig}[stage]
    config = load_config(cls, flags=settings("run", **more))
    found, rows, source, text = planned(config)
    loaded = loaded_for(config, source, text)
    wrapped = {"sft": LanguageModel, "rm": RewardModel, "ppo": lambda m: PolicyModel(m, "shared")}[stage](loaded.model)
    weights = next(size for name, size in found.held.items() if name.startswith("weights of the"))
    assert weights == pytest.approx(held_by(loaded.model), rel=0.01)  # a reward head is float32 at last
    trained = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert found.held[f"{memory.OPTIMISER} (adamw)"] == 8 * trained
    kept = next(size for name, size in found.update.items() if name.startswith("kept for"))
    # These prompts are all as long as each other: transformers sees it, and leaves out a mask that is counted here.
    tolerance = 0.02 if config.optim.packing or stage != "ppo" else 0.15
    assert kept == pytest.approx(memory.SPARE * kept_by(wrapped, config, rows), rel=tolerance)
    if stage == "ppo":
        copies = [size for name, size in found.held.items() if "reference" in name]
        run: Any = SimpleNamespace(dtype=DTYPES[config.model.precision], device=torch.device("cpu"))
        reference = None if "LoRA" in form else ppo_models.load_reference(loaded, run)
        assert copies == ([held_by(reference)] if reference else [])


def test_a_reward_model_that_goes_on_from_an_sft_adapter_can_be_planned(
    settings: Callable[..., Any], model: Path, sft_file: Path, pairs_file: Path
) -> None:
    more = {"model__path": str(model), "lora__rank": 4, **BF16}
    tuned = sft.run(load_config(SftConfig, flags=settings("sft", data__train=[str(sft_file)], **more))).final
    more |= {"model__path": str(tuned), "data__train": [str(pairs_file)]}
    config = load_config(RmConfig, flags=settings("run", **more))
    found, _, source, text = planned(config)
    weights = next(size for name, size in found.held.items() if name.startswith("weights of the"))
    assert weights == pytest.approx(held_by(loaded_for(config, source, text).model), rel=0.01)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_new_tokens_train_the_embedding_and_the_head(
    stage: str, tied: bool, settings: Callable[..., Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    model = make_model(tmp_path / "model", tie_word_embeddings=tied)
    data = request.getfixturevalue({"sft": "sft_file", "ppo": "prompts_file"}[stage])
    more: dict[str, Any] = {"model__path": str(model), "data__train": [str(data)], "lora__rank": 4}
    more |= {"model__template": "llama3"}  # whose tokens the model does not have
    if stage == "ppo":
        (tmp_path / "r.py").write_text("def f(prompts, responses):\n    raise SystemExit\n")
        more |= {"ppo__reward": [f"{tmp_path}/r.py:f"], "ppo__max_new_tokens": 8}
    cls: Any = {"sft": SftConfig, "ppo": PpoConfig}[stage]
    config = load_config(cls, flags=settings("run", **more))
    source, text = open_text_side(config)
    assert text.encoder.added_controls
    found, rows, *_ = planned(config)
    loaded = loaded_for(config, source, text)
    module = LanguageModel(loaded.model) if stage == "sft" else PolicyModel(loaded.model, "shared")
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert trained > 384 * 32 * (1 if tied else 2)
    assert found.held[f"{memory.OPTIMISER} (adamw)"] == 8 * trained
    weights = next(size for name, size in found.held.items() if name.startswith("weights of the"))
    assert weights == pytest.approx(held_by(loaded.model), rel=0.01)
    kept = next(size for name, size in found.update.items() if name.startswith("kept for"))
    assert kept == pytest.approx(memory.SPARE * kept_by(module, config, rows), rel=0.02)


def test_settings_that_an_adapter_does_not_have_are_refused_in_the_plan(
    settings: Callable[..., Any], model: Path, sft_file: Path
) -> None:
    more = {"model__path": str(model), "data__train": [str(sft_file)], "lora__rank": 4}
    tuned = sft.run(load_config(SftConfig, flags=settings("sft", **more))).final
    config = load_config(SftConfig, flags=settings("run", **(more | {"model__path": str(tuned), "lora__rank": 8})))
    with pytest.raises(ConfigError, match=r"lora\.rank: 8, but the adapter in .* has rank 4"):
        planned(config)


def test_a_quantised_base_takes_its_bytes(settings: Callable[..., Any], model: Path, sft_file: Path) -> None:
    more = {"model__path": str(model), "data__train": [str(sft_file)], "lora__rank": 4, "model__quantize": "4bit"}
    config = load_config(SftConfig, flags=settings("run", **more, **BF16))
    found, rows, source, text = planned(config)
    module = LanguageModel(loaded_for(config, source, text).model)
    weights = next(size for name, size in found.held.items() if name.startswith("weights of the"))
    assert weights == pytest.approx(held_by(module), rel=0.05)
    kept = next(size for name, size in found.update.items() if name.startswith("kept for"))
    assert kept == pytest.approx(memory.SPARE * kept_by(module, config, rows), rel=0.25)


# The model of these tests, by hand: embedding, and in each of 2 layers q, k, v, o (4 heads of 16, 2 of them with keys
# and values), gate, up, down, and two norms.
EMBEDDING, LINEAR, NORMS = 384 * 64, 2 * (64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128), 2 * 2 * 64 + 64
WEIGHTS = EMBEDDING + LINEAR + NORMS
# A pair of LoRA matrices of rank 4 beside each of the linear layers.
ADAPTER = 2 * 4 * ((64 + 64) + 2 * (64 + 32) + (64 + 64) + 3 * (64 + 128))
HEAD = 64 + 1  # the value function's
CACHE = 2 * 2 * 2 * 16  # numbers per token: keys and values, of 2 layers and 2 heads of 16


@pytest.mark.parametrize(
    ("changes", "held", "trained", "beside", "size"),
    [
        ({}, 4 * WEIGHTS, WEIGHTS + HEAD, ("the reference, a copy", 4 * WEIGHTS), 4),
        (BF16, 4 * WEIGHTS, WEIGHTS + HEAD, ("the reference, a copy", 2 * LINEAR + 4 * (EMBEDDING + NORMS)), 2),
        ({"ppo__value_model": "separate"}, 4 * WEIGHTS, 2 * WEIGHTS + HEAD, ("the value model", 4 * WEIGHTS), 4),
        ({"lora__rank": 4, **BF16}, 2 * WEIGHTS + 4 * ADAPTER, ADAPTER + HEAD, None, 2),
        (
            {"lora__rank": 4, "ppo__value_model": "adapter", **BF16},
            2 * WEIGHTS + 4 * ADAPTER,
            2 * ADAPTER + HEAD,
            ("the value adapter", 4 * ADAPTER),
            2,
        ),
        (
            {"lora__rank": 4, "model__quantize": "4bit", **BF16},
            0.52 * LINEAR + 4 * (EMBEDDING + NORMS) + 4 * ADAPTER,
            ADAPTER + HEAD,
            None,
            2,
        ),
    ],
    ids=("full", "full-bf16", "separate", "lora", "value-adapter", "4bit"),
)
def test_bytes_by_hand(
    settings: Callable[..., Any], model: Path, prompts_file: Path, changes: Any, held: float, trained: int,
    beside: tuple[str, float] | None, size: int,
) -> None:  # fmt: skip
    (model.parent / "r.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    more = {"model__path": str(model), "data__train": [str(prompts_file)], "ppo__max_new_tokens": 8, **changes}
    more |= {"ppo__reward": [f"{model.parent}/r.py:f"], "ppo__episodes": 16}
    found, rows, *_ = planned(load_config(PpoConfig, flags=settings("run", **more)))
    weights = {name: bytes_ for name, bytes_ in found.held.items() if name.startswith("weights of ")}
    assert next(iter(weights.values())) == pytest.approx(held)
    if beside is not None:
        assert weights[f"weights of {beside[0]}"] == beside[1]
    assert found.held["states of the optimiser (adamw)"] == 2 * 4 * trained  # two moments in float32
    assert found.held[f"gradients ({trained / 1e6:,.1f} million train)"] == 4 * trained
    longest = max(len(row.prompt) for row in rows)
    assert found.rollout["keys and values of 16 answers"] == 16 * (longest + 8) * CACHE * size
    assert found.rollout["drawing tokens"] == 16 * 384 * memory.DRAWING
    # What is kept and what passes add up; the two phases of a step follow each other, and nothing counts twice.
    assert found.total == sum(found.held.values()) + max(sum(found.rollout.values()), sum(found.update.values()))


def test_the_largest_micro_batch_of_ppo_is_the_fullest(
    settings: Callable[..., Any], model: Path, tmp_path: Path
) -> None:
    """The longest prompts are cut into micro-batches of two; three of the others fill one better."""
    prompts = [{"prompt": f"{'abcdefghijklmnop'[i]} {'one two ' * (24 if i < 4 else 12)}"} for i in range(16)]
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    more: dict[str, Any] = {"model__path": str(model), "data__train": [str(write_jsonl(tmp_path / "p.jsonl", prompts))]}
    more |= {"ppo__reward": [f"{tmp_path}/r.py:f"], "ppo__max_new_tokens": 8, "ppo__rollout_size": 4}
    config = load_config(PpoConfig, flags=settings("run", **more))
    _, rows, *_ = planned(config)
    lengths = sorted(len(row.prompt) + 8 for row in rows)
    least, most = lengths[0], lengths[-1]
    limit = 4 * least
    assert 2 * most <= limit < 3 * most
    config = load_config(PpoConfig, flags=settings("run", **more, optim__micro_batch_tokens=limit))
    found, *_ = planned(config)
    assert 2 * most < found.tokens <= limit


def test_what_fits_is_what_fills_the_memory(settings: Callable[..., Any], model: Path, sft_file: Path) -> None:
    more = {"model__path": str(model), "data__train": [str(sft_file)], "optim__batch_size": 12}
    config = load_config(SftConfig, flags=settings("run", **more))
    found, *_ = planned(config)
    assert found.tokens == 373  # all rows in one micro-batch
    room = found.total + 10_000 * found.per_token
    assert found.tokens_that_fit(room) == (10_000 + 373) // 256 * 256
    assert found.tokens_that_fit(found.total / 2) == 0


def test_checkpointing_keeps_less(settings: Callable[..., Any], tmp_path: Path, sft_file: Path) -> None:
    deep = make_model(tmp_path / "deep", num_hidden_layers=12)
    more = {"model__path": str(deep), "data__train": [str(sft_file)]}
    kept = []
    for checkpointing in (False, True):
        flags = settings("run", **more, optim__gradient_checkpointing=checkpointing)
        found, *_ = planned(load_config(SftConfig, flags=flags))
        kept.append(found.per_token)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("value", ["shared", "adapter", "separate"])
def test_models_of_ppo_are_named_and_a_shared_backbone_is_counted_once(
    value: str, settings: Callable[..., Any], model: Path, pairs_file: Path, prompts_file: Path
) -> None:
    more = {"model__path": str(model), "lora__rank": 4, **BF16}
    judge = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)], **more))).final
    more |= {"data__train": [str(prompts_file)], "ppo__reward": [str(judge), "http://127.0.0.1:1/score"]}
    more["ppo__episodes"] = 64
    config = load_config(PpoConfig, flags=settings("run", **more, ppo__max_new_tokens=8, ppo__value_model=value))
    found, *_ = planned(config)
    weights = {name: size for name, size in found.held.items() if name.startswith("weights")}
    policy = next(iter(weights.values()))
    words = ", ".join(found.models)
    assert "the reference (the base without the adapter)" in words
    assert f"reward {judge} (an adapter on the policy's base)" in words
    assert "reward http://127.0.0.1:1/score: no model here" in words
    assert f"weights of the reward adapter {judge}" in weights
    assert len(weights) == {"shared": 2, "adapter": 3, "separate": 3}[value]
    assert weights.get("weights of the value adapter", 0) < policy / 3
    assert (weights.get("weights of the value model", 0) > policy) == (value == "separate")
    assert found.answers == 64
    assert found.answers_that_fit(found.total + 100.5 * found.per_answer) >= 164
    laid_out = found.rollout["weights laid out for sampling"]
    assert policy / 2 < laid_out < policy  # in bf16 as they are held; the embeddings are no layers
    few = load_config(
        PpoConfig, flags=settings("few", **more, ppo__max_new_tokens=8, ppo__value_model=value, ppo__rollout_size=4)
    )
    assert "weights laid out for sampling" not in planned(few)[0].rollout


@pytest.mark.parametrize("rank", [4, 8])
def test_a_value_adapter_is_as_large_as_the_reward_model_it_starts_as(
    rank: int, settings: Callable[..., Any], model: Path, pairs_file: Path, prompts_file: Path
) -> None:
    more = {"model__path": str(model), "lora__rank": rank}
    judge = reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)], **more))).final
    more |= {"data__train": [str(prompts_file)], "ppo__reward": [str(judge)], "ppo__value_model": "adapter"}
    config = load_config(PpoConfig, flags=settings("run", **(more | {"lora__rank": 4}), ppo__max_new_tokens=8))
    found, *_ = planned(config)
    assert found.held["weights of the value adapter"] == rank * ADAPTER  # 4 bytes for each of rank/4 times as many
    assert found.held["states of the optimiser (adamw)"] == 8 * (ADAPTER + rank // 4 * ADAPTER + HEAD)


def test_answers_of_an_evaluation_count_as_those_of_a_rollout(
    settings: Callable[..., Any], model: Path, prompts_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "r.py").write_text("def f(prompts, responses):\n    return [0.0] * len(responses)\n")
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"prompt": f"{'one two ' * 30}{i}"} for i in range(6)])
    more = {"model__path": str(model), "data__train": [str(prompts_file)], "ppo__reward": [f"{tmp_path}/r.py:f"]}
    more |= {"ppo__max_new_tokens": 8, "ppo__rollout_size": 4, "data__eval": [str(held_out)], "ppo__eval_samples": 3}
    config = load_config(PpoConfig, flags=settings("run", **more))
    text = open_text_side(config)[1]
    rows, held = (
        tokenize_prompts(load_records([path], "ppo", on_bad_row="error")[0][0], text.encoder, config.row_limit)[0]
        for path in (str(prompts_file), str(held_out))
    )
    found = plan.run(config)
    assert found.answers == 18
    longest = max(len(row.prompt) for row in held)
    assert longest > max(len(row.prompt) for row in rows)
    assert found.rollout["keys and values of 18 answers"] == 18 * (longest + 8) * CACHE * 4


def test_the_plan_says_what_fits(settings: Callable[..., Any], sft_file: Path, capfd: Any) -> None:
    plan.run(load_config(SftConfig, flags=settings("run", data__train=[str(sft_file)])))
    out = capfd.readouterr().out
    assert "models held: the model" in out
    assert "GiB of system memory are free" in out
    assert "What fits: --micro-batch-tokens up to " in out
