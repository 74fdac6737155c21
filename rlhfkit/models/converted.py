"""Legacy checkpoints as a model path: converted on their way in, once, and found again by what is in them.

Config and tokenizer are converted when a model is opened, weights when they are loaded: looking at data, or at a plan,
reads no weight. The copies lie in ``$RLHFKIT_CACHE``, or ``~/.cache/rlhfkit``. A layout that no class of transformers
computes is not converted: its adapter brings a class, which reads and writes the original's files.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhfkit.data.store import cache_folder
from rlhfkit.errors import ModelError
from rlhfkit.families.base import Family
from rlhfkit.families.legacy import LegacyLayout
from rlhfkit.families.registry import installed_families
from rlhfkit.repair.beside import beside
from rlhfkit.repair.convert import (
    PROOF_FILE,
    Conversion,
    convert,
    has_bare_vocabulary,
    kept_layout,
    make_tokenizer,
    needs_conversion,
    plan_conversion,
    write_text_side,
)
from rlhfkit.repair.files import reason_to_copy
from rlhfkit.repair.folder import Folder
from rlhfkit.runtime.screen import Screen

_BEGINNING = 2**20  # bytes of each weight file that its fingerprint reads


def is_legacy(config: dict[str, Any]) -> bool:
    """Whether a config.json is that of a checkpoint to be converted."""
    return any(needs_conversion(item.family, config) for item in installed_families())


def own_layout(config: dict[str, Any]) -> LegacyLayout | None:
    """The layout of a checkpoint that stays as it is; transformers' Auto classes know it from here on."""
    layouts = (kept_layout(item.family, config) for item in installed_families())
    layout = next((layout for layout in layouts if layout is not None), None)
    if layout is not None and layout.classes is not None:
        from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

        settings, *classes = layout.classes()
        AutoConfig.register(settings.model_type, settings, exist_ok=True)
        autos = (AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification)
        for auto, own in zip(autos, classes, strict=True):
            auto.register(settings, own, exist_ok=True)
    return layout


def folder_of(path: str) -> Path:
    """A model folder, or the snapshot of a hub id."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import snapshot_download

        folder = Path(snapshot_download(path))
    return folder.resolve()


def open_legacy(path: str) -> tuple[Path, str]:
    """The converted copy of a legacy folder or hub id, its weights perhaps still to come.

    Returns:
        the copy, and the folder it is made from.

    Raises:
        RepairRefusedError: no native class computes what the checkpoint does.
    """
    src = folder_of(path)
    copy = _cache() / f"{src.name}-{_fingerprint(src)}"
    if not copy.is_dir():
        with _alone(copy):
            if not copy.is_dir():  # another process was faster
                with beside(copy, 0) as new:
                    write_text_side(plan_conversion(src), new)
    return copy, str(src)


def convert_weights(copy: Path, src: Path) -> None:
    """Put the weights into a copy that lacks them; the proof is written last and says that all is there."""
    if (copy / PROOF_FILE).is_file():
        return
    with _alone(copy):
        if (copy / PROOF_FILE).is_file():
            return
        plan = plan_conversion(src)
        screen, started = Screen(os.environ.get("RANK", "0") == "0"), time.monotonic()
        screen.line(f"{src} is {_described(plan)}: its weights are converted once, into {copy}")
        whole = copy.with_name(f".{copy.name}.whole")
        shutil.rmtree(whole, ignore_errors=True)  # of a run that was stopped
        try:
            proof, _ = convert(plan, whole)
            names = sorted(p.name for p in whole.iterdir() if p.is_file() and p.name != PROOF_FILE)
            for name in [*names, PROOF_FILE]:
                os.replace(whole / name, copy / name)
        finally:
            shutil.rmtree(whole, ignore_errors=True)
        for sentence in proof.sentences():
            screen.line(f"  {sentence}")
        screen.line(f"  converted in {time.monotonic() - started:.0f} s; adapters trained on it need that folder")


def bare_tokenizer(family: Family, path: str) -> Any:
    """The tokenizer of a folder whose vocabulary transformers 5 reads wrongly; None where it does not."""
    if family.bare_sentencepiece is None or not has_bare_vocabulary(family, Path(path)):
        return None
    return make_tokenizer(family.bare_sentencepiece, Path(path))


def kept_tokenizer(layout: LegacyLayout | None, path: str) -> Any:
    """The tokenizer of a checkpoint in its own layout, whose class is code of the folder; None where data gives it."""
    folder = Path(path)
    if layout is None or (folder / "tokenizer.json").is_file():
        return None
    return make_tokenizer(layout.tokenizer, folder)


def _described(plan: Conversion) -> str:
    return plan.layout.name if plan.layout else "a checkpoint with a bare vocabulary"


def _cache() -> Path:
    folder = cache_folder().resolve() / "converted"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ModelError(
            f"a legacy checkpoint is converted into {folder}, which cannot be made: {error.strerror}",
            hint="name a writable folder in RLHFKIT_CACHE, or convert it yourself: rlhfkit convert SRC DST",
        ) from error
    return folder


def _fingerprint(src: Path) -> str:
    """A short name for what is in a folder: small files whole, of weights the name, size, time and beginning."""
    from rlhfkit import __version__

    digest = hashlib.sha256(__version__.encode())
    folder = Folder(src, "SRC")
    for name in sorted(folder.files):
        weights = name in folder.weights.files
        if not weights and name != "config.json" and reason_to_copy(name) is None:
            continue
        stat = (src / name).stat()
        digest.update(json.dumps([name, stat.st_size, stat.st_mtime_ns if weights else 0]).encode())
        with (src / name).open("rb") as file:
            digest.update(file.read(_BEGINNING if weights else -1))
    return digest.hexdigest()[:12]


@contextmanager
def _alone(copy: Path) -> Iterator[None]:
    """One process at a time: several may open the same model at once."""
    with copy.with_name(f".{copy.name}.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
