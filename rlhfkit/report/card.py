"""The README.md of a trained model: what it is, what it learned from, what came of it, how it is loaded."""

from __future__ import annotations

from importlib.metadata import version

import yaml

from rlhfkit import __version__
from rlhfkit.report.runs import RunRecord
from rlhfkit.report.tables import facts, headline, titles

NAMES = {"sft": "supervised fine-tuning", "rm": "reward model", "ppo": "PPO", "dpo": "DPO through TRL",
         "kto": "KTO through TRL", "grpo": "GRPO through TRL", "rloo": "RLOO through TRL"}  # fmt: skip
LIBRARIES = ("torch", "transformers", "peft", "accelerate")
LOADING = {
    "causal": """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForCausalLM.from_pretrained(FOLDER)""",
    "rm": """from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1)""",
    "causal lora": """from peft import AutoPeftModelForCausalLM
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoPeftModelForCausalLM.from_pretrained(FOLDER)""",
    "rm lora": """from peft import AutoPeftModelForSequenceClassification
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER)
model = AutoPeftModelForSequenceClassification.from_pretrained(FOLDER, num_labels=1)""",
}

USE = {
    "causal": "The chat template is that of the training: `tokenizer.apply_chat_template`, or\n"
    "`rlhfkit generate --model this-folder`.",
    "rm": "A score is read at the last token of a conversation; rlhfkit.json says how conversations are written.\n"
    "`rlhfkit score --model this-folder --data answers.jsonl` does it as the training did.",
}


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
    loading = LOADING[("rm" if run.stage == "rm" else "causal") + (" lora" if lora else "")]
    lines += ["## Use", ""]
    if layout:
        lines += [
            f"transformers has no class for a {layout}: it loads in rlhfkit, and with the code of the original.",
            "",
        ]
    else:
        lines += ["```python", loading.replace("FOLDER", '"this-folder"'), "```", ""]
    lines += [USE["rm" if run.stage == "rm" else "causal"], ""]
    return "\n".join(lines)
