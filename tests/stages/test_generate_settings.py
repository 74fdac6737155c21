"""Answers in a file are of one model and one way of sampling."""

from __future__ import annotations

import json
import shutil

import pytest

from rlhfkit.config.load import load_config
from rlhfkit.config.stages import GenerateConfig
from rlhfkit.errors import DataError, TemplateError
from rlhfkit.models.folder import ModelSource
from rlhfkit.stages import generate


def test_going_on_with_other_settings_is_refused(tiny_model, prompts_file, tmp_path):
    flags = {
        "model": str(tiny_model), "input": str(prompts_file), "output": str(tmp_path / "answers.jsonl"),
        "max_new_tokens": 4, "precision": "fp32",
    }  # fmt: skip
    generate.run(load_config(GenerateConfig, flags=flags))
    before = (tmp_path / "answers.jsonl").read_text()
    generate.run(load_config(GenerateConfig, flags=flags))
    assert (tmp_path / "answers.jsonl").read_text() == before
    with pytest.raises(DataError, match=r"made with other settings: temperature: 0\.7 -> 0\.1"):
        generate.run(load_config(GenerateConfig, flags={**flags, "temperature": 0.1}))
    assert (tmp_path / "answers.jsonl").read_text() == before


def test_separators_inside_texts_do_not_cut_lines(tiny_model, tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(json.dumps({"prompt": "good\u2028film"}, ensure_ascii=False) + "\n", encoding="utf-8")
    flags = {
        "model": str(tiny_model), "input": str(prompts), "output": str(tmp_path / "a.jsonl"), "max_new_tokens": 2,
        "precision": "fp32",
    }  # fmt: skip
    for _ in range(2):
        generate.run(load_config(GenerateConfig, flags=flags))
    assert len((tmp_path / "a.jsonl").read_text(encoding="utf-8").split("\n")) == 2


def test_the_number_format_that_auto_took_is_remembered(tiny_model, prompts_file, tmp_path, monkeypatch):
    flags = {
        "model": str(tiny_model),
        "input": str(prompts_file),
        "output": str(tmp_path / "a.jsonl"),
        "max_new_tokens": 2,
    }
    settings = tmp_path / "a.jsonl.settings.json"
    config = load_config(GenerateConfig, flags=flags)
    monkeypatch.setattr("rlhfkit.models.precision._cpu_has_bf16", lambda: False)
    generate.run(config)
    assert json.loads(settings.read_text())["precision"] == "fp32"
    monkeypatch.setattr("rlhfkit.models.precision._cpu_has_bf16", lambda: True)
    with pytest.raises(DataError, match="made with other settings: precision: 'fp32' -> 'bf16'"):
        generate.run(config)
    settings.write_text(settings.read_text().replace('"fp32"', '"auto"'))  # of an older version
    generate.run(config)


def test_a_prompt_that_the_template_refuses_is_named_before_the_first_answer(tiny_model, tmp_path, monkeypatch):
    """Of a model whose number of positions nobody knows, too."""
    prompts = tmp_path / "p.jsonl"
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a film"}]
    rows = [{"prompt": "a film"}, {"prompt": turns}]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    model = shutil.copytree(tiny_model, tmp_path / "model")
    tokens = json.loads((model / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens["chat_template"] = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turn here') }}{% endif %}"
        "[{{ m.content }}]{{ eos_token }}{% endfor %}"
    )
    (model / "tokenizer_config.json").write_text(json.dumps(tokens), encoding="utf-8")
    flags = {
        "model": str(model), "input": str(prompts), "output": str(tmp_path / "a.jsonl"), "max_new_tokens": 2,
        "precision": "fp32", "batch_size": 1,
    }  # fmt: skip
    monkeypatch.setattr(ModelSource, "positions", 0)
    with pytest.raises(TemplateError, match=r"p\.jsonl:2: the template .* refuses .*no system turn here"):
        generate.run(load_config(GenerateConfig, flags=flags))
    assert not (tmp_path / "a.jsonl").exists()
