"""One row a family: what its checkpoints bring, and what training must make of it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from rlhfkit.chat.template import ChatEncoder, load_template
from rlhfkit.families.conformance import byte_tokenizer
from rlhfkit.families.registry import find_family
from rlhfkit.families.tokens import TokenPolicy, align_model, apply_token_policy

QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA2 = ("<unk>", "<s>", "</s>")
LLAMA30 = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|reserved_special_token_2|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
)
LLAMA31 = tuple(
    {"<|reserved_special_token_2|>": "<|finetune_right_pad_id|>", "<|reserved_special_token_1|>": "<|eom_id|>"}.get(
        t, t
    )
    for t in LLAMA30
)
FAMILIES = {name: find_family({"model_type": kind}) for name, kind in (("qwen", "qwen2"), ("llama", "llama"))}
FAMILIES["baichuan"] = find_family({"model_type": "llama"}, name="baichuan")


def decide(
    family: str, template: str, tokenizer: Any, pad: str | None = None, **generation: Any
) -> tuple[TokenPolicy, list[str]]:
    """The policy, and the stops as strings."""
    tokenizer.pad_token = pad
    encoder = ChatEncoder(tokenizer, load_template(template))
    policy = apply_token_policy(FAMILIES[family], tokenizer, encoder, **generation)
    assert (tokenizer.pad_token, tokenizer.eos_token) == (policy.pad_token, policy.eos_token)
    assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (policy.pad_id, policy.eos_id)
    assert policy.pad_id != policy.eos_id
    assert policy.stop_ids[0] == policy.eos_id == encoder.turn_end_id
    return policy, tokenizer.convert_ids_to_tokens(list(policy.stop_ids))


def test_qwen_base_gets_the_turn_end_as_eos_and_keeps_its_pad() -> None:
    policy, stops = decide("qwen", "qwen", byte_tokenizer(QWEN, eos="<|endoftext|>"), pad="<|endoftext|>")
    assert (policy.pad_token, policy.eos_token, policy.bos_id) == ("<|endoftext|>", "<|im_end|>", None)
    assert stops == ["<|im_end|>", "<|endoftext|>"]
    assert policy.changes == (
        "eos_token was '<|endoftext|>' (256) and is now '<|im_end|>' (258): the template 'qwen' ends a turn with it, "
        "so this is the stop that training teaches.",
    )


def test_qwen_instruct_is_fine() -> None:
    policy, stops = decide("qwen", "qwen", byte_tokenizer(QWEN, eos="<|im_end|>"), pad="<|endoftext|>")
    assert policy.changes == ()
    assert stops == ["<|im_end|>", "<|endoftext|>"]


def test_first_qwen_declares_nothing() -> None:
    policy, stops = decide("qwen", "qwen", byte_tokenizer(QWEN))
    assert (policy.pad_token, policy.eos_token) == ("<|endoftext|>", "<|im_end|>")
    assert stops == ["<|im_end|>", "<|endoftext|>"]
    assert [change.split(":")[0] for change in policy.changes] == [
        "eos_token was not set and is now '<|im_end|>' (258)",
        "pad_token was not set and is now '<|endoftext|>' (256)",
    ]


def test_pad_is_added_where_every_candidate_ends_a_turn() -> None:
    tokenizer = byte_tokenizer(QWEN, eos="<|endoftext|>")
    policy, stops = decide("qwen", "alpaca", tokenizer, pad="<|endoftext|>")
    assert (policy.pad_token, policy.pad_id, policy.eos_token) == ("<|pad|>", 259, "<|endoftext|>")
    assert len(tokenizer) == 260
    assert stops == ["<|endoftext|>", "<|im_end|>"]
    assert policy.changes == (
        "'<|pad|>' (259) was added to the vocabulary: "
        "none of the family's pad tokens (<|endoftext|>) is there and free.",
        "pad_token was '<|endoftext|>' (256) and is now '<|pad|>' (259): with pad equal to eos the end of a turn "
        "counts as padding, and a reward is read one token early.",
    )


def test_llama2_pads_with_unk() -> None:
    policy, stops = decide("llama", "llama2", byte_tokenizer(LLAMA2, bos="<s>", eos="</s>"))
    assert (policy.pad_token, policy.eos_token, policy.bos_id) == ("<unk>", "</s>", 257)
    assert stops == ["</s>"]
    assert policy.changes == ("pad_token was not set and is now '<unk>' (256): batches cannot be filled without one.",)


@pytest.mark.parametrize(
    ("vocabulary", "pad"), [(LLAMA30, "<|reserved_special_token_2|>"), (LLAMA31, "<|finetune_right_pad_id|>")]
)
def test_llama3_base_pads_with_a_reserved_token_and_stops_at_the_turn_end(
    vocabulary: tuple[str, ...], pad: str
) -> None:
    tokenizer = byte_tokenizer(vocabulary, bos="<|begin_of_text|>", eos="<|end_of_text|>")
    policy, stops = decide("llama", "llama3", tokenizer)
    assert (policy.pad_token, policy.eos_token, policy.bos_id) == (pad, "<|eot_id|>", 256)
    assert len(tokenizer) == 256 + len(vocabulary)
    assert [s for s in stops if s != "<|eom_id|>"] == ["<|eot_id|>", "<|end_of_text|>"]


def test_stops_of_the_generation_config_stay() -> None:
    vocabulary = (*LLAMA31, "<|python_tag|>")
    tokenizer = byte_tokenizer(vocabulary, bos="<|begin_of_text|>", eos="<|eot_id|>")
    old = tokenizer.convert_tokens_to_ids(["<|end_of_text|>", "<|python_tag|>", "<|eot_id|>"])
    policy, stops = decide("llama", "llama3", tokenizer, generation_eos=old)
    assert stops == ["<|eot_id|>", "<|eom_id|>", "<|end_of_text|>", "<|python_tag|>"]
    assert decide("llama", "llama3", tokenizer, generation_eos=old[1])[0].stop_ids == policy.stop_ids


def test_former_eos_goes_on_to_stop() -> None:
    _, stops = decide("llama", "chatml", byte_tokenizer((*QWEN, "<end>"), eos="<end>"))
    assert stops == ["<|im_end|>", "<|endoftext|>", "<end>"]


def test_smollm2_gets_a_pad_that_is_not_its_eos() -> None:
    tokenizer = byte_tokenizer(QWEN, bos="<|im_start|>", eos="<|im_end|>")
    policy, stops = decide("llama", "chatml", tokenizer, pad="<|im_end|>")
    assert (policy.pad_token, policy.eos_token, policy.bos_id) == ("<|endoftext|>", "<|im_end|>", 257)
    assert stops == ["<|im_end|>", "<|endoftext|>"]


@pytest.mark.parametrize("family", ["baichuan", "llama"])
def test_converted_baichuan2_pads_with_unk(family: str) -> None:
    tokenizer = byte_tokenizer(LLAMA2, bos="<s>", eos="</s>", pieces=("<reserved_106>", "<reserved_107>"))
    policy, stops = decide(family, "baichuan2", tokenizer)
    assert (policy.pad_token, policy.eos_token, stops) == ("<unk>", "</s>", ["</s>"])


def test_a_pad_of_its_own_stays() -> None:
    policy, _ = decide("llama", "llama2", byte_tokenizer((*LLAMA2, "<x>"), bos="<s>", eos="</s>"), pad="<x>")
    assert (policy.pad_token, policy.changes) == ("<x>", ())


def test_new_control_tokens_are_told() -> None:
    policy, stops = decide("llama", "chatml", byte_tokenizer(LLAMA2, bos="<s>", eos="</s>"), pad="<unk>")
    assert policy.changes[0] == (
        "'<|im_start|>' (259), '<|im_end|>' (260) came into the vocabulary: the template 'chatml' is written with them."
    )
    assert stops == ["<|im_end|>", "</s>"]


def test_second_application_changes_nothing_more() -> None:
    tokenizer = byte_tokenizer(LLAMA30, bos="<|begin_of_text|>", eos="<|end_of_text|>")
    tokenizer.padding_side = "left"
    first, _ = decide("llama", "llama3", tokenizer)
    again = apply_token_policy(FAMILIES["llama"], tokenizer, ChatEncoder(tokenizer, load_template("llama3")))
    assert again.changes == ()
    assert (again.pad_id, again.eos_id, again.stop_ids) == (first.pad_id, first.eos_id, first.stop_ids)
    assert tokenizer.padding_side == "left"


# -- the model ---------------------------------------------------------------------------------------------------------


POLICY = TokenPolicy("<p>", 5, "<e>", 7, 3, (7, 8), ())


def tiny_model() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))


def test_model_and_generation_agree_with_the_policy_after_a_reload(tmp_path: Path) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = [2, 8]
    align_model(POLICY, model)
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert (again.config.pad_token_id, again.config.eos_token_id, again.config.bos_token_id) == (5, 7, 3)
    generation = again.generation_config
    assert (generation.pad_token_id, generation.eos_token_id, generation.bos_token_id) == (5, [7, 8, 2], 3)
    assert not generation.do_sample


def test_generation_config_of_llama2_chat_can_be_saved_again(tmp_path: Path) -> None:
    """It is greedy and has sampling values: it saves as it was loaded, and raises once its pad was touched."""
    GenerationConfig(do_sample=False, temperature=0.6, top_p=0.9, eos_token_id=2).to_json_file(
        tmp_path / "generation_config.json"
    )
    touched = GenerationConfig.from_pretrained(tmp_path)
    touched.pad_token_id = 0
    with pytest.raises(ValueError, match="do_sample"):
        touched.save_pretrained(tmp_path / "out")

    model = tiny_model()
    model.generation_config = GenerationConfig.from_pretrained(tmp_path)
    align_model(POLICY, model)
    model.save_pretrained(tmp_path / "out")
    saved = GenerationConfig.from_pretrained(tmp_path / "out")
    assert (saved.do_sample, saved.temperature, saved.top_p, saved.eos_token_id) == (True, 0.6, 0.9, [7, 8, 2])


@pytest.mark.parametrize(
    "value",
    [
        {"temperature": 0.5},
        {"top_k": 20},
        {"top_p": 0.5},
        {"min_p": 0.1},
        {"top_h": 0.4},
        {"typical_p": 0.5},
        {"epsilon_cutoff": 3e-4},
        {"eta_cutoff": 3e-4},
    ],
)
def test_every_sampling_value_is_seen(value: dict[str, float], tmp_path: Path) -> None:
    generation = GenerationConfig(do_sample=False, **value)
    align_model(POLICY, SimpleNamespace(config=SimpleNamespace(), generation_config=generation))
    assert generation.do_sample is True
    generation.save_pretrained(tmp_path)


def test_temperature_zero_meant_greedy(tmp_path: Path) -> None:
    generation = GenerationConfig(do_sample=False, temperature=0.0)
    align_model(POLICY, SimpleNamespace(config=SimpleNamespace(), generation_config=generation))
    assert (generation.do_sample, generation.temperature) == (False, 1.0)
    generation.save_pretrained(tmp_path)


def test_bos_that_the_tokenizer_lacks_stays_as_it_was() -> None:
    model = SimpleNamespace(config=SimpleNamespace(bos_token_id=1), generation_config=GenerationConfig(bos_token_id=1))
    align_model(TokenPolicy("<p>", 5, "<e>", 7, None, (7,), ()), model)
    assert (model.config.bos_token_id, model.generation_config.bos_token_id) == (1, 1)


def test_classifier_without_generation_config() -> None:
    model = SimpleNamespace(config=SimpleNamespace(), generation_config=None)
    align_model(POLICY, model)
    assert vars(model.config) == {"pad_token_id": 5, "eos_token_id": 7, "bos_token_id": 3}


def test_families_load_without_torch() -> None:
    code = (
        "import sys, rlhfkit.families.tokens, rlhfkit.families.conformance, rlhfkit.families.registry as r;"
        "r.installed_families(); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
