"""``rlhfkit merge RUN DST``: a LoRA adapter and its base become one model, proved before it is put in place."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from rlhfkit import __version__
from rlhfkit.config.load import RESOLVED
from rlhfkit.errors import CheckpointError, ConfigError, Interrupted, ModelError, first_line
from rlhfkit.models.converted import kept_tokenizer
from rlhfkit.models.folder import RECORD, ModelSource, open_model
from rlhfkit.models.precision import DTYPES, current_device
from rlhfkit.models.save import carry_code
from rlhfkit.repair.files import reason_to_copy
from rlhfkit.repair.merge import Merge, Proof
from rlhfkit.repair.tensors import torch_dtype, write_safetensors
from rlhfkit.words import tr
from rlhfkit.words.lines import shown

PROOF = "merge.json"
# Scripts, digits, code: what a model may have learned about.
_PROBES = (
    "The quick brown fox jumps over the lazy dog, and then it counts: 1, 2, 3, 4, 5, 6, 7.",
    "请用三句话介绍一下强化学习：它是什么，它怎样工作，它有什么用处。",
    "def mean(values):\n    total = sum(values)\n    return total / len(values) if values else 0.0\n",
)
_CHAT = ({"role": "user", "content": "What is a film?"}, {"role": "assistant", "content": "A story told in pictures."})


def run(run: Path, dst: Path, *, base: str, dtype: str, device: str) -> Proof:
    """Write the merged model beside DST, compare it with the adapted one, and rename it into place.

    Args:
        run: run folder, its ``final/``, or any peft LoRA folder.
        dst: made by this.
        base: folder or hub id of the base; empty for the one that the adapter names.
        dtype: number format of the merged weights: ``fp32``, ``bf16``, ``fp16``, or ``auto``: the base's, and float32
            for a reward model, as `save_model` writes one: rounding its layers moves its scores.
        device: where the comparison is computed; ``auto`` is the GPU if there is one.

    Raises:
        ModelError: nothing to merge, or something that cannot be merged.
        CheckpointError: DST is taken, the disk is full, or the comparison failed; DST is not there.
    """
    console = Console()
    if dtype not in ("auto", *DTYPES):
        raise ConfigError(f"--dtype {dtype}: there is no such format", hint=f"give auto, {', '.join(DTYPES)}")
    if device not in ("auto", "cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        found = "there is no GPU here" if device == "cuda" else "there is no such device"
        raise ConfigError(f"--device {device}: {found}", hint="give auto, cpu or cuda")
    if dst.exists() or dst.is_symlink():
        raise CheckpointError(f"{dst} is there already", hint="name a folder that does not exist, or move it away")
    adapter = _find_adapter(run)
    source = open_model(base, adapter=str(adapter)) if base else open_model(str(adapter))
    merge = Merge(source, _local(source.base))
    own_format = torch.float32 if merge.is_reward_model else None
    files = merge.files(own_format if dtype == "auto" else DTYPES[dtype])
    total = sum(tensor.nbytes for group in files.values() for tensor in group.values())
    parent = dst.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(parent).free
    if total > free:
        raise CheckpointError(f"the merged model takes {_gib(total)}, and {parent} has {_gib(free)} left")
    partial = parent / f".{dst.name}.rlhfkit-merge"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir()
        with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task(tr("writing weights"), total=total)
            for file, tensors in files.items():
                write_safetensors(partial / file, tensors, lambda count: progress.advance(task, count))
        _write_rest(merge, partial, files)
        _carry(merge, run, adapter, partial)
        proof = _prove(console, merge, partial, adapter, files, device)
        os.replace(partial, dst)
    except KeyboardInterrupt:
        raise Interrupted(f"{dst} was not written") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console.print(shown(f"{dst}: {_gib(total)} in {len(files)} file(s), base {source.base}"), soft_wrap=True)
    return proof


def _find_adapter(run: Path) -> Path:
    """The LoRA folder that a path means."""
    for folder in (run, run / "final"):
        if (folder / "adapter_config.json").is_file():
            return folder
        if (folder / "config.json").is_file():
            raise ModelError(
                f"{folder} holds all weights, not an adapter: there is nothing to merge",
                hint=f"it loads as it is: rlhfkit generate --model {folder}",
            )
    if not run.is_dir():
        raise ModelError(f"no folder at {run}", hint="give a run folder, its final/, or a LoRA folder of peft")
    if (run / "checkpoints").is_dir():
        raise ModelError(
            f"{run} is a run that has not finished: it has no final/",
            hint="go on with it first: the command that started it, with --resume",
        )
    raise ModelError(f"{run} is neither a run nor a LoRA folder: it has no adapter_config.json")


def _local(base: str) -> Path:
    """The base's folder on this machine; a hub id is fetched, safetensors rather than pickles."""
    if Path(base).is_dir():
        return Path(base)
    from huggingface_hub import HfApi, snapshot_download

    try:
        names = HfApi().list_repo_files(base) if os.environ.get("HF_HUB_OFFLINE") != "1" else []
        pickles = not any(name.endswith(".safetensors") for name in names)
        patterns = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*", "*.safetensors"]
        return Path(snapshot_download(base, allow_patterns=patterns + (["pytorch_model*.bin"] if pickles else [])))
    except Exception as error:  # each layer of the hub client has its own errors
        raise ModelError(
            f"the base '{base}' is no folder here, and the hub did not give it: {first_line(error)}",
            hint="name its folder: --base FOLDER",
        ) from error


# -- what stands beside the weights ------------------------------------------------------------------------------------


def _write_rest(merge: Merge, folder: Path, files: dict[str, dict[str, Any]]) -> None:
    """config.json and, for several files, the index."""
    config = dict(merge.folder.json("config.json") or {})
    config["vocab_size"] = merge.config.vocab_size
    config["architectures"] = [type(merge.plain).__name__]
    stored = next(group[merge.embedding_name].dtype for group in files.values() if merge.embedding_name in group)
    config["dtype"] = str(torch_dtype(stored)).removeprefix("torch.")
    if "torch_dtype" in config:
        config["torch_dtype"] = config["dtype"]
    if merge.unties:
        config["tie_word_embeddings"] = False
    if merge.is_reward_model:
        labels = {str(i): f"LABEL_{i}" for i in range(merge.labels)}
        config |= {"id2label": labels, "label2id": {label: int(i) for i, label in labels.items()}}
    config |= _token_ids(merge.source)
    _write_json(folder / "config.json", config)
    if len(files) > 1:
        size = sum(tensor.nbytes for group in files.values() for tensor in group.values())
        where = {name: file for file, group in files.items() for name in group}
        index = {"metadata": {"total_size": size}, "weight_map": where}
        _write_json(folder / "model.safetensors.index.json", index)


def _token_ids(source: ModelSource) -> dict[str, int]:
    """Special tokens as training left them in the tokenizer; a reward model needs its pad in config.json."""
    from transformers import AutoTokenizer

    path = source.tokenizer_path
    tokenizer = kept_tokenizer(source.layout, path) or AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    names = ("pad_token_id", "eos_token_id", "bos_token_id")
    return {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}


def _carry(merge: Merge, run: Path, adapter: Path, folder: Path) -> None:
    """Tokenizer and template of the adapter, generation settings, value function, licence of the base, our record."""
    if (own := kept_tokenizer(merge.source.layout, merge.source.tokenizer_path)) is not None:
        own.save_pretrained(folder)
    tokenizer = _local(merge.source.tokenizer_path)
    for origin in (adapter, tokenizer, merge.folder.path):
        for path in sorted(origin.iterdir()):
            is_code = path.suffix in (".py", ".cpp", ".cu", ".cuh", ".h")
            if not path.is_file() or not reason_to_copy(path.name) or is_code:
                continue
            is_text_side = path.name != "generation_config.json" and not _is_licence(path.name)
            if not (folder / path.name).exists() and (origin == tokenizer or not is_text_side):
                shutil.copy(path, folder / path.name)
    if merge.source.layout is not None:
        carry_code(merge.folder.path, folder)
    for value in (adapter / "value_head.safetensors", adapter / "value", run / "value", adapter.parent / "value"):
        target = folder / value.name
        if value.is_dir() and not target.exists():
            shutil.copytree(value, target)
        elif value.is_file():
            shutil.copy(value, target)
    record = dict(merge.source.record)
    if "quantize" in record:
        record["quantize"] = "none"  # scores are computed on a base as the record says, and this one is not rounded
    if record:
        _write_json(folder / RECORD, {**record, "vocab_rows": merge.config.vocab_size, "merged_from": str(adapter)})


def _is_licence(name: str) -> bool:
    return (reason_to_copy(name) or "").startswith("the terms")


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# -- proof -------------------------------------------------------------------------------------------------------------


def _prove(
    console: Console, merge: Merge, folder: Path, adapter: Path, files: dict[str, dict[str, Any]], device: str
) -> Proof:
    ids, mask = _probe(folder)
    where = current_device() if device == "auto" else torch.device(device)
    quantize = _trained_on(merge, adapter)
    exact = all(tensor.dtype == "F32" for group in files.values() for tensor in group.values())
    console.print(
        shown(
            f"Comparing, in float32 on {where}: the base with the adapter in peft's layers, against the merged folder."
        ),
        soft_wrap=True,
    )
    proof = merge.prove(folder, ids, mask, quantize=quantize, device=where, exact=exact)
    facts = {
        "rlhfkit": __version__,
        "adapter": str(adapter),
        "base": merge.source.base,
        "compared": "base + adapter (peft, not merged) with the merged folder, both computed in float32",
        "quantised_base": quantize,
        **proof.as_dict(),
    }
    _write_json(folder / PROOF, facts)
    for line in _sentences(proof, quantize):
        console.print(shown(line), soft_wrap=True)
    if proof.fault:
        raise CheckpointError(
            f"the merge was not kept, and nothing is written: {proof.fault}",
            hint="--dtype fp32 rounds nothing" if not exact else f"is {merge.source.base} the base it was trained on?",
        )
    return proof


def _sentences(proof: Proof, quantize: str) -> Sequence[str]:
    same = "" if proof.agreement is None else f", same next token at {proof.agreement:.1%}"
    lines = []
    if proof.unrounded is not None:
        lines.append(f"  before rounding to 16 bits: max |difference| {proof.unrounded.max:.3g}")
    lines += [
        f"  merged: max |difference| {proof.merged.max:.3g} over {proof.positions} positions "
        f"({proof.share:.2%} of what the adapter changes{same})",
        f"  adapter: changes the {proof.what} by up to {proof.effect.max:.3g} (root mean square {proof.effect.rms:.3g} "
        f"of {proof.size:.3g})",
    ]
    if proof.share > 0.1:
        lines.append("  rounding costs more than a tenth of what was learned: --dtype fp32 keeps all of it")
    if proof.quantised is not None:
        lines.append(
            f"  quantisation: it was trained on a {quantize} base, whose {proof.what} differ from those on the full "
            f"one by up to {proof.quantised.max:.3g} (root mean square {proof.quantised.rms:.3g}); no merge keeps both"
        )
    return lines


def _probe(folder: Path) -> tuple[Tensor, Tensor]:
    """Probe text as one batch, padded on the right."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    rows = [list(tokenizer(text)["input_ids"]) for text in _PROBES]
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template(list(_CHAT), tokenize=False)
        rows.append(list(tokenizer(text, add_special_tokens=False)["input_ids"]))
    rows = [row[:128] for row in rows if row]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return ids, mask


def _trained_on(merge: Merge, adapter: Path) -> str:
    """``4bit`` or ``8bit`` if the run held its base so; ``none`` if not, or if nothing tells."""
    if recorded := merge.source.record.get("quantize"):
        return str(recorded)
    resolved = adapter.parent / RESOLVED
    if resolved.is_file():
        settings = yaml.safe_load(resolved.read_text(encoding="utf-8")) or {}
        return str((settings.get("model") or {}).get("quantize") or "none")
    return "none"


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
