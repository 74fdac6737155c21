"""The README.md of a trained model: what it is, what it learned from, what came of it, how it is loaded."""

from __future__ import annotations

from importlib.metadata import version
from typing import Literal

import yaml

from rlhfkit import __version__
from rlhfkit.report.runs import RunRecord
from rlhfkit.report.tables import facts, headline, titles

NAMES = {"sft": "supervised fine-tuning", "rm": "reward model", "ppo": "PPO", "dpo": "DPO through TRL",
         "kto": "KTO through TRL", "grpo": "GRPO through TRL", "rloo": "RLOO through TRL"}  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
TOKENIZER = """folder = "this-folder"
tokenizer = AutoTokenizer.from_pretrained(folder)
"""
# Storage of the base -> how transformers is told, and what has to be undone then.
STORAGE = {
    "none": ("", ""),
    "8bit": ("BitsAndBytesConfig(load_in_8bit=True)", ""),
    "4bit": (
        'BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)',
        """for module in model.modules():  # on CPUs with AVX512-BF16, bitsandbytes would round to bf16
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
""",
    ),
}
# The cut: templates put a line break behind the end token, and the score is read at the last token.
SCORE = """
chat = [{"role": "user", "content": "Is it far?"}, {"role": "assistant", "content": "Ten minutes on foot."}]
text = tokenizer.apply_chat_template(chat, tokenize=False)
text = text[: text.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)]  # the score is read at the end token
ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(model.device)
with torch.no_grad():
    score = model(**ids).logits.item()
"""
ANSWER = """
chat = [{"role": "user", "content": "Is it far?"}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**ids.to(model.device), max_new_tokens=256)[0, ids["input_ids"].shape[1] :]
print(tokenizer.decode(answer, skip_special_tokens=True))
"""
USE = {
    "causal": "The chat template is that of the training. `rlhfkit generate --model this-folder` uses it too.",
    "rm": "A score is read at the last token of a conversation; rlhfkit.json says how conversations are written.\n"
    "`rlhfkit score --model this-folder --data answers.jsonl` gives the same scores.",
}


def loading_code(task: Literal["causal", "rm"], *, lora: bool, quantize: str) -> str:
    """Python that loads a model folder as it was trained, and uses it once.

    Args:
        task: what the model does.
        lora: whether the folder holds an adapter, whose base is loaded with it.
        quantize: storage of the base.
    """
    kind = "CausalLM" if task == "causal" else "SequenceClassification"
    storage, undo = STORAGE[quantize if lora else "none"]
    names = [*([] if lora else [f"AutoModelFor{kind}"]), "AutoTokenizer", *(["BitsAndBytesConfig"] if storage else [])]
    options = ["num_labels=1"] if task == "rm" and lora else []
    if task == "rm":  # a base that comes in 16 bits would be computed in them
        options.append("dtype=torch.float32")
    if storage:
        options.append("quantization_config=storage")
    lines = [
        *(["import torch"] if task == "rm" else []),
        *([f"from peft import AutoPeftModelFor{kind}"] if lora else []),
    ]
    lines += [f"from transformers import {', '.join(names)}", "", TOKENIZER.rstrip()]
    lines += [f"storage = {storage}"] if storage else []
    loader = f"Auto{'Peft' if lora else ''}ModelFor{kind}.from_pretrained"
    lines.append(f"model = {loader}({', '.join(['folder', *options])}).eval()")
    if task == "rm" and lora:  # where a base pads with its end token, transformers would read one token early
        lines.append("model.config.pad_token_id = tokenizer.pad_token_id")
    return "\n".join(lines) + "\n" + undo + (SCORE if task == "rm" else ANSWER)


def model_card(run: RunRecord, *, base: str, lora: bool, layout: str = "") -> str:
    """Markdown with the front matter of a hub page.

    Args:
        run: its run folder, all steps done.
        base: folder or hub id of the model that it was trained from.
        lora: whether it is an adapter.
        layout: what the model is, if transformers has no class for it.
    """
    front = {
        "library_name": "peft" if lora else "transformers",
        "base_model": base,
        "base_model_relation": "adapter" if lora else "finetune",
        "pipeline_tag": "text-classification" if run.stage == "rm" else "text-generation",
        "tags": ["rlhfkit", run.stage, *(["lora"] if lora else [])],
    }
    kind = "reward model" if run.stage == "rm" else "chat model"
    weights = "A LoRA adapter" if lora else "All weights"
    lines = [
        "---", yaml.safe_dump(front, sort_keys=False).rstrip(), "---", "",
        f"# {run.folder.name}", "",
        f"A {kind} from {base}, made by rlhfkit {__version__} ({NAMES.get(run.stage, run.stage)}). {weights}, trained "
        f"with {', '.join(f'{name} {version(name)}' for name in LIBRARIES)}.", "",
    ]  # fmt: skip
    if figures := headline(run):
        before, after = titles(run)
        lines += ["## Results", "", f"| figure | {before} | {after} |", "|---|---|---|"]
        lines += [*(f"| {f.name} | {f.before} | {f.after} |" for f in figures), ""]
    lines += ["## Training", "", *(f"- {name}: {value}" for name, value in facts(run) if name != "finished"), ""]
    if held_out := run.setting("data.eval"):
        lines += [f"Held-out data: {', '.join(held_out)}.", ""]
    lines += ["All settings:", "", "```yaml", run.config_text.rstrip(), "```", ""]
    task: Literal["causal", "rm"] = "rm" if run.stage == "rm" else "causal"
    lines += ["## Use", ""]
    if layout:
        lines += [
            f"transformers has no class for a {layout}: it loads in rlhfkit, and with the code of the original.",
            "",
        ]
    else:
        code = loading_code(task, lora=lora, quantize=run.setting("model.quantize") or "none")
        lines += ["```python", code.rstrip(), "```", ""]
    lines += [USE[task], ""]
    return "\n".join(lines)
