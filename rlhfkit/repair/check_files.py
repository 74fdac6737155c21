"""Checks of a model folder's files: whole, fitting together, and holding no code. Of weights only headers are read."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from rlhfkit.errors import FamilyError, RepairRefusedError, first_line
from rlhfkit.families.base import Family
from rlhfkit.families.legacy import Sentencepiece, Tiktoken
from rlhfkit.repair.auto_map import code_files, owners
from rlhfkit.repair.convert import kept_layout, needs_conversion
from rlhfkit.repair.files import imported_files
from rlhfkit.repair.fit import SCORING_HEADS, WRAPPERS, is_recomputed, size_of
from rlhfkit.repair.folder import INDEX_FILE, KINDS, WeightSet, embedding_name, head_name, highest_token
from rlhfkit.repair.patient import ADAPTER_CONFIG, Finding, Patient, quiet, some
from rlhfkit.repair.plan import is_interrupted
from rlhfkit.repair.rules import CONFIG, TOKENIZER_CONFIG
from rlhfkit.repair.tensors import is_lfs_pointer, torch_name
from rlhfkit.repair.verify import is_remote


def check_files(patient: Patient) -> Iterator[Finding]:
    folder = patient.folder
    if is_interrupted(patient.path):
        detail = "a repair was stopped while files were being exchanged: old and new ones stand side by side"
        yield Finding("files", "fail", detail, f"{patient.repair} --yes")
    pointers = sorted(name for name in folder.files if is_lfs_pointer(folder.path / name))
    if pointers:
        yield Finding(
            "files", "fail", f"Git LFS pointers, not the files: {some(pointers)}", f"git -C {patient.path} lfs pull"
        )
    broken = sorted(name for name in folder.files - set(pointers) if name.endswith(".json") and folder.is_broken(name))
    if broken:
        yield Finding("files", "fail", f"no JSON object in {some(broken)}", patient.repair)
    if not pointers and not broken and CONFIG in folder.files:
        yield Finding("files", "pass", f"{len(folder.files)} files, none empty or damaged")
    if CONFIG not in folder.files:
        inside = sorted(p.name for p in patient.path.iterdir() if p.is_dir() and _is_model_folder(p))
        fix = f"rlhfkit doctor {patient.path / inside[0]}" if inside else f"{patient.repair} --yes"
        yield Finding("files", "fail", "config.json is missing: no loader knows what this is", fix)


def _is_model_folder(path: Path) -> bool:
    return (path / CONFIG).is_file() or (path / ADAPTER_CONFIG).is_file()


def check_config(patient: Patient) -> Iterator[Finding]:
    if not patient.config:
        return
    model_type = patient.config.get("model_type")
    if not model_type:
        yield Finding("config", "fail", "config.json names no model_type", patient.repair)
        return
    family = patient.family
    if isinstance(family, FamilyError):
        yield Finding("config", "warn", f"model_type '{model_type}': no installed family holds it", family.hint)
    elif (layout := kept_layout(family, patient.config)) is not None:
        detail = (
            f"model_type '{model_type}', a {layout.name}: trains and generates in its own layout, none of its code run"
        )
        yield Finding("config", "pass", detail)
    elif model_type in family.requires_conversion:
        detail = (
            f"model_type '{model_type}': its own code loads wrongly under today's transformers, without an error "
            "(random projections, uninitialised rotary tables)"
        )
        yield Finding("config", "warn", detail, f"rlhfkit convert {patient.path} NEW_FOLDER")
    else:
        yield Finding("config", "pass", f"model_type '{model_type}', family {family.name}")
    flags = [key for key in ("fp32", "bf16", "fp16") if patient.config.get(key) is True]
    if flags:
        detail = f"{', '.join(flags)} is pinned in config.json: asking for another precision raises an assertion"
        yield Finding("precision flags", "warn", detail, patient.repair)


def check_weights(patient: Patient) -> Iterator[Finding]:
    weights = patient.weights
    if isinstance(weights, RepairRefusedError):
        yield Finding("weights", "fail", weights.message, weights.hint)
        return
    size = weights.total_size / 2**30
    detail = f"{len(weights.tensors)} tensors in {len(weights.files)} file(s), {size:.2f} GiB"
    wrapper = next(
        (w for p, w in WRAPPERS.items() if weights.tensors and all(n.startswith(p) for n in weights.tensors)), ""
    )
    lora = next((name for name in weights.tensors if ".lora_A." in name), "")
    hollow = next((name for name, tensor in weights.tensors.items() if 0 in tensor.shape), "")
    if hollow:
        fix = "join the partitions with zero_to_fp32.py of the checkpoint folder"
        yield Finding("weights", "fail", f"empty tensors ({hollow}), as ZeRO-3 leaves them", fix)
    elif lora:
        detail = f"LoRA matrices that were never merged ({lora})"
        yield Finding("weights", "fail", detail, "save the adapter alone, then: rlhfkit merge ADAPTER DST")
    elif wrapper:
        yield Finding(
            "weights", "fail", f"saved with {wrapper} around the model: no loader finds them", "save the inner model"
        )
    else:
        yield Finding("weights", "pass", detail)
    stale = [INDEX_FILE[kind] for kind in KINDS if patient.folder.index_is_stale(INDEX_FILE[kind])]
    if weights.index and patient.folder.index_map(weights.index) != weights.weight_map:
        missing = weights.index not in patient.folder.files
        word = "is missing: no loader finds the shards" if missing else "does not say where the tensors are"
        yield Finding("weight index", "fail", f"{weights.index} {word}", patient.repair)
    elif stale:
        yield Finding("weight index", "warn", f"{some(stale)} names files that are absent", patient.repair)
    else:
        yield Finding("weight index", "pass", f"{weights.index} fits" if weights.index else "one file needs none")


def check_pickles(patient: Patient) -> Iterator[Finding]:
    weights = patient.weights
    if isinstance(weights, WeightSet) and weights.kind == "bin":
        fix = f"rlhfkit fix-checkpoint {patient.path} {patient.path} --safetensors"
        yield Finding(
            "pickles", "warn", f"{some(weights.files)}: a pickle can run code wherever it is loaded carelessly", fix
        )
        return
    others = sorted(n for n in patient.folder.files if Path(n).suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt"))
    if others:
        detail = f"{some(others)} beside the weights: pickles, which nothing here loads"
        yield Finding("pickles", "warn", detail, "delete them before you publish the folder")
    else:
        yield Finding("pickles", "pass", "none")


def check_tensors(patient: Patient) -> Iterator[Finding]:
    """Names and shapes against what transformers builds from config.json, without data."""
    weights = patient.weights
    if not isinstance(weights, WeightSet) or not patient.config.get("model_type"):
        return
    if is_remote(patient.folder, "AutoConfig"):
        yield Finding("tensors", "pass", "not compared: the model's class is code of the folder, which is not run")
        return
    try:
        expected = _expected_shapes(patient)
    except Exception as error:  # no class for the type, sizes that do not divide
        detail = f"transformers cannot build the model that config.json describes: {first_line(error)}"
        yield Finding("tensors", "fail", detail, patient.repair)
        return
    vocabulary = {embedding_name(weights.tensors), head_name(weights.tensors)}
    tied = {head_name(expected)} if patient.config.get("tie_word_embeddings") is True else set()
    missing = sorted(n for n in expected.keys() - weights.tensors.keys() - tied if not is_recomputed(n))
    other = sorted(
        n for n in expected.keys() & weights.tensors.keys() - vocabulary if expected[n] != weights.tensors[n].shape
    )
    unknown = sorted(n for n in weights.tensors.keys() - expected.keys() - tied if not is_recomputed(n))
    if missing:
        yield Finding(
            "tensors", "fail", f"{len(missing)} missing, which would be random: {some(missing)}", patient.repair
        )
    elif other:
        name = other[0]
        detail = f"{name} is {list(weights.tensors[name].shape)}, config.json asks for {list(expected[name])}"
        yield Finding("tensors", "fail", detail, patient.repair)
    elif unknown:
        yield Finding(
            "tensors", "warn", f"{len(unknown)} that no loader reads: {some(unknown)}", "is config.json the right one?"
        )
    else:
        yield Finding("tensors", "pass", f"{len(expected)} expected, all there with their shapes")


def _expected_shapes(patient: Patient) -> dict[str, tuple[int, ...]]:
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    with quiet():
        config = AutoConfig.from_pretrained(patient.path, trust_remote_code=False, local_files_only=True)
        auto = AutoModelForSequenceClassification if patient.is_reward_model else AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            model = auto.from_config(config)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def check_rows(patient: Patient) -> Iterator[Finding]:
    """The four numbers that people confuse."""
    weights = patient.weights
    if not isinstance(weights, WeightSet):
        return
    embedding, head = embedding_name(weights.tensors), head_name(weights.tensors)
    if embedding is None:
        yield Finding("vocabulary", "warn", "no embedding that is known here", "is it a language model?")
        return
    rows = weights.tensors[embedding].shape[0]
    stated = size_of(patient.config, ("vocab_size",))
    base, tokens = _token_counts(patient)
    numbers = (
        f"tokenizer.vocab_size {_number(base)} (without added tokens), len(tokenizer) {_number(tokens)}, "
        f"config.vocab_size {_number(stated)}, embedding rows {rows}"
    )
    if head and weights.tensors[head].shape[0] != rows:
        detail = f"{numbers}; but the head has {weights.tensors[head].shape[0]} rows: no vocab_size fits both"
        yield Finding("vocabulary", "fail", detail, "resize embedding and head together, and save again")
    elif stated != rows:
        detail = f"{numbers}. config.vocab_size must be the rows: loading stops, or draws a new embedding in silence"
        yield Finding("vocabulary", "fail", detail, patient.repair)
    elif tokens is not None and tokens > rows:
        detail = f"{numbers}. Tokens from {rows} on have no row: an index error as soon as one is used"
        yield Finding("vocabulary", "fail", detail, f"{patient.repair} --pad-vocab 64")
    elif tokens is not None and rows > tokens:
        detail = f"{numbers}. {rows - tokens} rows are padding and belong there: never shrink to len(tokenizer)"
        yield Finding("vocabulary", "pass", detail)
    else:
        yield Finding("vocabulary", "pass", numbers)


def _number(value: int | None) -> str:
    return "unknown" if value is None else str(value)


def _token_counts(patient: Patient) -> tuple[int | None, int | None]:
    """tokenizer.vocab_size and len(tokenizer), from the tokenizer or, where that is code, from its files."""
    if not isinstance(patient.tokenizer, str):
        return patient.tokenizer.vocab_size, len(patient.tokenizer)
    folder = patient.folder
    ranks = next((name for name in folder.files if name.endswith(".tiktoken")), None)
    if ranks:
        with (folder.path / ranks).open("rb") as file:
            count = sum(1 for line in file if line.strip())
        facts = _legacy_vocabulary(patient)
        return count, count + len(facts.specials) if isinstance(facts, Tiktoken) else None
    if "tokenizer.model" in folder.files:
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = int(SentencePieceProcessor(model_file=str(folder.path / "tokenizer.model")).vocab_size())
        except (OSError, RuntimeError):
            return None, None
        return pieces, max(pieces, highest_token(folder)[0] + 1)
    return None, None


def _legacy_vocabulary(patient: Patient) -> Tiktoken | Sentencepiece | None:
    """What the family says of a vocabulary that comes with code of its own."""
    family = patient.family
    if not isinstance(family, Family) or not needs_conversion(family, patient.config) or family.legacy_layout is None:
        return None
    return family.legacy_layout(patient.config, size_of(patient.config, ("vocab_size",)) or 0).tokenizer


def check_tied(patient: Patient) -> Iterator[Finding]:
    weights = patient.weights
    if not isinstance(weights, WeightSet) or patient.is_reward_model or embedding_name(weights.tensors) is None:
        return
    head, tied = head_name(weights.tensors), patient.config.get("tie_word_embeddings")
    if tied is True and head:
        detail = (
            f"tie_word_embeddings is true, and {head} is in the file as well: loaders read the embedding in its place"
        )
        yield Finding("head", "warn", detail, "if the head was trained apart, set tie_word_embeddings to false")
    elif head is None and tied is not True:
        detail = "there is no output head, and config.json does not tie it to the embedding: it would be random"
        yield Finding("head", "fail", detail, patient.repair)
    else:
        yield Finding("head", "pass", "tied to the embedding" if tied is True else f"{head}, a tensor of its own")


def check_dtype(patient: Patient) -> Iterator[Finding]:
    weights = patient.weights
    if not isinstance(weights, WeightSet):
        return
    tables = {n: t for n, t in weights.tensors.items() if not is_recomputed(n) and n.split(".")[0] not in SCORING_HEADS}
    sizes: Counter[str] = Counter()
    for tensor in tables.values():
        sizes[torch_name(tensor.dtype)] += tensor.nbytes
    stated = str(patient.config.get("dtype") or patient.config.get("torch_dtype") or "").removeprefix("torch.")
    main = sizes.most_common(1)[0][0] if sizes else ""
    if len(sizes) > 1:
        yield Finding("dtype", "warn", f"mixed: {', '.join(sorted(sizes))}; config.json says {stated or 'nothing'}")
    elif stated and main and stated != main:
        detail = f"the weights are {main}, config.json says {stated}: loaders with dtype='auto' follow config.json"
        key = "dtype" if patient.config.get("dtype") else "torch_dtype"
        change = f's/"{key}": "{patient.config[key]}"/"{key}": "{main}"/'
        fix = f"sed -i {shlex.quote(change)} {shlex.quote(str(patient.path / CONFIG))}"
        yield Finding("dtype", "warn", detail, fix)
    elif main:
        yield Finding("dtype", "pass", main if stated else f"{main}; config.json does not say")


def check_reward_head(patient: Patient) -> Iterator[Finding]:
    weights = patient.weights
    if not patient.is_reward_model or not isinstance(weights, WeightSet):
        return
    head = next((n for n in weights.tensors if n.split(".")[0] in SCORING_HEADS and n.endswith("weight")), None)
    if head is None:
        yield Finding("reward head", "fail", "no score.weight: scores would be random", _train_again(patient))
    elif weights.tensors[head].shape[0] != 1:
        detail = f"{head} gives {weights.tensors[head].shape[0]} numbers: a classifier, not a reward model"
        yield Finding("reward head", "fail", detail, _train_again(patient))
    else:
        yield Finding("reward head", "pass", f"{head}, one score a conversation")


def _train_again(patient: Patient) -> str:
    return f"rlhfkit rm --model {patient.original}"


def check_code(patient: Patient) -> Iterator[Finding]:
    folder = patient.folder
    maps = [(name, (folder.json(name) or {}).get("auto_map")) for name in (CONFIG, TOKENIZER_CONFIG)]
    elsewhere = sorted({owner for _, auto_map in maps for owner in owners(auto_map)})
    needed = {file for _, auto_map in maps for file in code_files(auto_map)}
    for name in sorted(n for n in folder.files if n.endswith(".py")):
        needed |= imported_files(folder.path / name) - {"__init__.py"}
    absent = sorted(needed - folder.files)
    if elsewhere:
        detail = f"auto_map fetches code from {some(elsewhere)} on the hub, not from this folder"
        yield Finding("remote code", "fail", detail, patient.repair)
    family = patient.family
    unused = isinstance(family, Family) and needs_conversion(family, patient.config)
    runs = "none of them is run here, other programs need them" if unused else "nothing loads without them"
    if absent:
        yield Finding("remote code", "fail", f"code files missing: {some(absent)}; {runs}", patient.repair)
    if not elsewhere and not absent:
        if any(auto_map for _, auto_map in maps):
            runs = runs if unused else "they run only with --trust-remote-code, which pins the hashes"
            detail = f"{', '.join(sorted(needed))}: all there; {runs}"
            yield Finding("remote code", "warn", detail, "read the code before you trust it")
        else:
            yield Finding("remote code", "pass", "none")
