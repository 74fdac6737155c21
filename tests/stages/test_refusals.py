"""Models in places where they do not belong, and formats the hardware cannot train in."""

from __future__ import annotations

import pytest
from conftest import read_metrics

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import GenerateConfig, PpoConfig, RmConfig, SftConfig
from rlhfkit.errors import ConfigError, ModelError
from rlhfkit.stages import generate, ppo, reward, sft


@pytest.fixture
def reward_model(settings, pairs_file):
    return reward.run(load_config(RmConfig, flags=settings("rm", data__train=[str(pairs_file)]))).final


def test_a_reward_model_writes_no_answers(reward_model):
    with pytest.raises(ModelError, match="is a reward model: it scores answers and cannot write any"):
        generate.run(load_config(GenerateConfig, flags={"model": str(reward_model), "prompt": "hi"}))


def test_a_reward_model_is_no_policy(reward_model, settings, prompts_file):
    flags = settings(
        "ppo", model__path=str(reward_model), data__train=[str(prompts_file)], ppo__reward=[str(reward_model)],
        ppo__max_new_tokens=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match="is a reward model"):
        ppo.run(load_config(PpoConfig, flags=flags))


def test_fp16_on_a_cpu_is_refused(settings, sft_file):
    flags = settings("run", data__train=[str(sft_file)], model__precision="fp16")
    with pytest.raises(ConfigError, match="fp16 does not train on a CPU"):
        sft.run(load_config(SftConfig, flags=flags))


def test_a_plain_model_is_no_reward(settings, prompts_file, tiny_model):
    flags = settings("ppo", data__train=[str(prompts_file)], ppo__reward=[str(tiny_model)], ppo__max_new_tokens=8)
    with pytest.raises(ModelError, match="has no reward head"):
        ppo.run(load_config(PpoConfig, flags=flags))


def test_continuing_an_adapter_with_another_rank_is_refused(settings, sft_file):
    first = sft.run(load_config(SftConfig, flags=settings("a", data__train=[str(sft_file)], lora__rank=4)))
    flags = settings("b", model__path=str(first.final), data__train=[str(sft_file)], lora__rank=8)
    with pytest.raises(ConfigError, match=r"lora\.rank: 8, but the adapter .* has rank 4"):
        sft.run(load_config(SftConfig, flags=flags))


def test_an_adapter_folder_is_merged_where_all_weights_train(settings, sft_file):
    first = sft.run(load_config(SftConfig, flags=settings("a", data__train=[str(sft_file)], lora__rank=4)))
    second = sft.run(
        load_config(SftConfig, flags=settings("b", model__path=str(first.final), data__train=[str(sft_file)]))
    )
    assert read_metrics(second.out)[0]["grad_norm"] > 0
    assert (second.final / "model.safetensors").is_file()
    assert not (second.final / "adapter_config.json").exists()


def test_unknown_lora_targets_are_named(settings, sft_file):
    flags = settings("run", data__train=[str(sft_file)], lora__rank=4, lora__targets="q_proj,qq_proj")
    with pytest.raises(ConfigError, match="no linear layer called qq_proj"):
        sft.run(load_config(SftConfig, flags=flags))


def test_a_context_longer_than_the_model_is_refused(settings, sft_file):
    with pytest.raises(ConfigError, match=r"data\.max_length: 4096 is more than the 512 positions"):
        sft.run(load_config(SftConfig, flags=settings("run", data__train=[str(sft_file)], data__max_length=4096)))
