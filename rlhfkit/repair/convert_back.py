"""A converted checkpoint, trained or not, in its original layout again: for serving code that knows no other.

The tensors are those of the native files, put together as they were; config, vocabulary and code come from the original
folder, of which every conversion keeps the files that are no weights.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rlhfkit import __version__
from rlhfkit.errors import RepairRefusedError
from rlhfkit.families.legacy import LegacyLayout
from rlhfkit.families.registry import find_family
from rlhfkit.repair.beside import beside
from rlhfkit.repair.convert import (
    ORIGINALS,
    PROOF_FILE,
    RECORD,
    Step,
    native_config,
    needs_conversion,
    open_folder,
    same_names,
    tensor_names,
    write_json,
)
from rlhfkit.repair.convert_proof import Proof, compare_logits, require
from rlhfkit.repair.folder import Folder
from rlhfkit.repair.stream import CHUNK, Part, Target, TensorReader, write_tensors

# How far the length of a row of a scaled head may be from one: rounding, in each format.
_DRIFT = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 4e-3}
_MUST_AGREE = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_theta",
)


@dataclass(frozen=True, slots=True)
class WayBack:
    """A conversion to the original layout that fits, not carried out yet."""

    src: Folder
    originals: Folder
    layout: LegacyLayout
    config: dict[str, Any]
    targets: tuple[Target, ...]
    steps: tuple[Step, ...]

    @property
    def nbytes(self) -> int:
        return sum(target.nbytes for target in self.targets)


def plan_way_back(path: Path, originals: Path | None) -> WayBack:
    """Read a native folder and the files of its original, and say what would be written.

    Args:
        path: the native folder.
        originals: the original model folder; None finds what the conversion kept.

    Raises:
        RepairRefusedError: the original cannot be found or does not fit, or its layout cannot hold these weights.
    """
    src = open_folder(path)
    own = src.json("config.json") or {}
    if needs_conversion(find_family(own, where=str(path)), own):
        raise RepairRefusedError(
            f"{path} is in its original layout already: its model_type is '{own['model_type']}'",
            hint="there is nothing to convert",
        )
    kept = open_folder(originals or _kept_originals(src), "the original")
    config = kept.json("config.json") or {}
    family = find_family(config, where=str(kept.path))
    if not needs_conversion(family, config) or family.legacy_layout is None:
        raise RepairRefusedError(
            f"{kept.path} is no legacy checkpoint: its model_type is '{config['model_type']}'",
            hint="name the original folder, with the config.json of its own code: --original FOLDER",
        )
    reader = TensorReader(src)
    embedding = src.weights.tensors.get("model.embed_tokens.weight")
    if embedding is None:
        raise RepairRefusedError(f"{path} holds no model.embed_tokens.weight: it is no converted language model")
    layout = family.legacy_layout(config, embedding.shape[0])
    native = native_config(layout, config, kept.path)
    _refuse_other_model(src, native, kept.path, layout)
    targets = tuple(_original_targets(layout, src, reader, native["num_hidden_layers"]))
    for rule in layout.tensors:
        if rule.unit_rows:
            _refuse_drifted(src, reader, rule.native[0], layout)
    dtype = str(targets[0].dtype).removeprefix("torch.")
    config = {**config, "vocab_size": embedding.shape[0], "torch_dtype": dtype}
    files = ", ".join(sorted(kept.files - {"config.json"} - set(_weights(kept)))) or "none"
    steps = (
        Step(
            "weights",
            f"{len(src.weights.tensors)} tensors of {layout.native_class} to the {len(targets)} of {layout.name}",
            "put together, not one number changed",
        ),
        Step("config.json", f"the original's, {embedding.shape[0]} rows, {dtype}", "what its own code reads"),
        Step("other files", files, f"from {kept.path}; none of them is run here"),
        Step(PROOF_FILE, "logits compared with the native class's", "nothing is put in place unproved"),
    )
    return WayBack(src, kept, layout, config, targets, steps)


def convert_back(plan: WayBack, dst: Path) -> Proof:
    """Write, prove, and put in place.

    Raises:
        RepairRefusedError: the destination is not free.
        CheckpointError: the result computes something else; nothing is put in place.
    """
    with beside(dst, plan.nbytes) as new:
        for name in sorted(plan.originals.files - set(_weights(plan.originals))):
            shutil.copyfile(plan.originals.path / name, new / name)
        write_json(new / "config.json", plan.config)
        native = TensorReader(plan.src)
        written = write_tensors(new, plan.targets, native)
        settings = native_config(plan.layout, plan.config, plan.src.path)
        original = TensorReader(Folder(new, "DST"))
        found = compare_logits(plan.layout, settings, original, native, plan.config["vocab_size"])
        proof = Proof(*found, ids_equal=0, ids_compared=0)
        require(proof, f"the way back of {plan.src.path}")
        record = {
            "rlhfkit": __version__,
            "from": {"folder": str(plan.src.path.resolve()), "class": plan.layout.native_class},
            "to": {"layout": plan.layout.name, "files": list(written)},
            "proof": asdict(proof),
        }
        write_json(new / PROOF_FILE, record)
    return proof


def _weights(folder: Folder) -> list[str]:
    """Weight files, indexes and records, which do not travel."""
    endings = (".safetensors", ".bin", ".index.json", ".pt")
    return [name for name in folder.files if name.endswith(endings) or name in (PROOF_FILE, RECORD)]


def _kept_originals(src: Folder) -> Path:
    base = Path(str((src.json(RECORD) or {}).get("base", "")))
    for folder in (src.path / ORIGINALS, base / ORIGINALS):
        if (folder / "config.json").is_file():
            return folder
    raise RepairRefusedError(
        f"{src.path} does not say what it was converted from: neither it nor its base has a folder '{ORIGINALS}'",
        hint="name the original model folder: rlhfkit convert SRC DST --to original --original FOLDER",
    )


def _refuse_other_model(src: Folder, expected: dict[str, Any], originals: Path, layout: LegacyLayout) -> None:
    config = dict(src.json("config.json") or {})
    rope = config.get("rope_parameters") or {}
    config.setdefault("rope_theta", rope.get("rope_theta"))
    if config.get("model_type") != layout.native_type:
        raise RepairRefusedError(
            f"{src.path} has model_type '{config.get('model_type')}', and a converted {layout.name} has "
            f"'{layout.native_type}'",
            hint="only a model that was converted from this layout goes back to it",
        )
    if rope.get("rope_type", "default") != "default":
        raise RepairRefusedError(
            f"{src.path}/config.json stretches its positions ({rope['rope_type']}), which {layout.name} cannot say"
        )
    for key in _MUST_AGREE:
        if config.get(key) != expected[key]:
            raise RepairRefusedError(
                f"{src.path} has {key} {config.get(key)}, its original in {originals} comes to {expected[key]}",
                hint="name the folder that this very model was converted from: --original FOLDER",
            )


def _original_targets(layout: LegacyLayout, src: Folder, reader: TensorReader, layers: int) -> Iterator[Target]:
    expected = list(tensor_names(layout, layers))
    same_names(
        {n for _, natives, _ in expected for n in natives}, set(src.weights.tensors), src.path, layout.native_class
    )
    for original, natives, _ in expected:
        shapes = [reader.shape(name) for name in natives]
        parts = tuple(Part(name, 0, shape[0]) for name, shape in zip(natives, shapes, strict=True))
        yield Target(original, (sum(shape[0] for shape in shapes), *shapes[0][1:]), reader.dtype(natives[0]), parts)


def _refuse_drifted(src: Folder, reader: TensorReader, name: str, layout: LegacyLayout) -> None:
    """The original scales each row of this tensor again: right only where the rows have length one already."""
    rows, width = reader.shape(name)
    allowed = _DRIFT.get(reader.dtype(name), 1e-5)
    step = max(1, CHUNK // (4 * width))
    worst = 0.0
    for start in range(0, rows, step):
        length = reader.rows(name, start, min(start + step, rows)).float().norm(dim=1)
        worst = max(worst, float(torch.where(length == 0, 0.0, (length - 1).abs()).max()))
    if worst > allowed:
        raise RepairRefusedError(
            f"{src.path}: rows of {name} have lengths up to {worst:.1e} away from one; {layout.name} scales them to "
            "one whenever it is used, so it would answer otherwise than the model that was trained",
            hint="keep the native folder; only a model whose head did not train (LoRA leaves it alone) goes back",
        )
