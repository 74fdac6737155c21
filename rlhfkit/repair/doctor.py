"""What is wrong with a model folder, and what mends it: one function a check, each reading files and none running code.

Of weights only names and shapes are read. A tokenizer is built by transformers' own classes; one that is code of the
folder is left alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from rlhfkit.errors import RlhfkitError
from rlhfkit.repair import check_files, check_text
from rlhfkit.repair.files import is_vocabulary
from rlhfkit.repair.fit import SCORING_HEADS
from rlhfkit.repair.patient import ADAPTER_CONFIG, Finding, Patient, some
from rlhfkit.repair.tensors import read_tensors


def examine(path: Path) -> list[Finding]:
    """All checks that apply to a folder: a whole model, or a LoRA adapter.

    Raises:
        RepairRefusedError: ``path`` is no folder.
    """
    patient = Patient(path)
    checks = _MODEL_CHECKS if patient.adapter is None else _ADAPTER_CHECKS
    findings: list[Finding] = []
    for check in checks:
        try:
            findings += check(patient)
        except RlhfkitError as error:  # a path that leads out of the folder, and the like
            name = check.__name__.removeprefix("check_").strip("_").replace("_", " ")
            findings.append(Finding(name, "fail", error.message, error.hint))
    return findings


def _adapter_files(patient: Patient) -> Iterator[Finding]:
    settings = patient.adapter or {}
    if not settings:
        yield Finding("adapter", "fail", f"{ADAPTER_CONFIG} holds no JSON object", "save the adapter again")
        return
    base = str(settings.get("base_model_name_or_path") or "")
    kind = f"{settings.get('peft_type')} adapter, rank {settings.get('r')}, on {base or 'an unnamed base'}"
    local = base.startswith((".", "/", "~")) or base.count("/") != 1
    if not base or (local and not Path(base).expanduser().is_dir()):
        fix = f"mend base_model_name_or_path in {ADAPTER_CONFIG}, or: rlhfkit merge {patient.path} DST --base FOLDER"
        yield Finding("adapter", "fail", f"{kind}: its base is not there", fix)
    else:
        yield Finding("adapter", "pass", f"{kind}; as one model: rlhfkit merge {patient.path} DST")
        if Path(base).is_dir():
            yield from _base_of(patient, Path(base))


def _base_of(patient: Patient, base: Path) -> Iterator[Finding]:
    faults = [f.detail for f in examine(base) if f.state == "fail" and f.check not in ("stop ids",)]
    if faults:
        yield Finding("base", "fail", f"{len(faults)} fault(s), first: {faults[0]}", f"rlhfkit doctor {base}")
    else:
        yield Finding("base", "pass", f"{base} is whole")


def _adapter_weights(patient: Patient) -> Iterator[Finding]:
    name = next((n for n in ("adapter_model.safetensors", "adapter_model.bin") if n in patient.folder.files), None)
    if name is None:
        yield Finding("weights", "fail", "neither adapter_model.safetensors nor adapter_model.bin", "train it again")
        return
    tensors = read_tensors(patient.path / name)
    alone = sorted(n for n in tensors if ".lora_A." in n and n.replace(".lora_A.", ".lora_B.") not in tensors)
    own = sorted(n.removeprefix("base_model.model.") for n in tensors if ".lora_" not in n)
    pairs = sum(1 for n in tensors if ".lora_A." in n or n.endswith(".lora_embedding_A"))
    if alone or not tensors:
        yield Finding(
            "weights", "fail", f"{name}: {alone[0] if alone else 'nothing'} is without its pair", "train it again"
        )
    else:
        whole = f"; trained whole: {some(own)}" if own else ""
        yield Finding("weights", "pass", f"{name}: {pairs} pairs of LoRA matrices{whole}")
    if name.endswith(".bin"):
        yield Finding(
            "pickles",
            "warn",
            f"{name}: a pickle can run code wherever it is loaded carelessly",
            "save it as safetensors",
        )
    else:
        yield Finding("pickles", "pass", "none")
    scores = (patient.adapter or {}).get("task_type") == "SEQ_CLS" or patient.is_reward_model
    if scores and not any(n.split(".")[0] in SCORING_HEADS for n in own):
        yield Finding("reward head", "fail", "no score.weight: scores would be random", "rlhfkit rm --model BASE")
    elif scores:
        yield Finding("reward head", "pass", "score.weight is in the adapter")


def _adapter_tokenizer(patient: Patient) -> Iterator[Finding]:
    if not any(map(is_vocabulary, patient.folder.files)):
        yield Finding("tokenizer", "pass", "none in the folder: the base's is used")
        return
    yield from check_text.check_tokenizer(patient)
    yield from check_text.check_special_tokens(patient)
    yield from check_text.check_template(patient)
    yield from check_text.check_generation(patient)


Check = Callable[[Patient], Iterator[Finding]]
_MODEL_CHECKS: tuple[Check, ...] = (
    check_files.check_files,
    check_files.check_config,
    check_files.check_weights,
    check_files.check_tensors,
    check_files.check_rows,
    check_files.check_tied,
    check_files.check_dtype,
    check_files.check_reward_head,
    check_files.check_pickles,
    check_files.check_code,
    check_text.check_tokenizer,
    check_text.check_special_tokens,
    check_text.check_template,
    check_text.check_generation,
)
_ADAPTER_CHECKS: tuple[Check, ...] = (_adapter_files, _adapter_weights, _adapter_tokenizer)
