"""Families found through entry points; ours enter by the same door as strangers'."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from rlhfkit.errors import FamilyError
from rlhfkit.families.base import Family

GROUP = "rlhfkit.adapters"


@dataclass(frozen=True, slots=True)
class InstalledFamily:
    """A family and where it comes from."""

    family: Family
    package: str
    version: str


def _origin(entry: EntryPoint) -> tuple[str, str]:
    if entry.dist is None:
        return entry.value.split(":")[0], "?"
    return entry.dist.name, entry.dist.version


@lru_cache(maxsize=1)
def installed_families() -> tuple[InstalledFamily, ...]:
    """All families of all installed packages, by name.

    Raises:
        FamilyError: an entry point does not load, is no Family, or two of them claim one name.
    """
    found: dict[str, InstalledFamily] = {}
    for entry in entry_points(group=GROUP):
        package, version = _origin(entry)
        try:
            family = entry.load()
        except Exception as error:
            raise FamilyError(
                f"the adapter '{entry.name}' of package '{package}' does not load: {type(error).__name__}: {error}",
                hint=f"mend or remove it: pip uninstall {package}",
            ) from error
        if not isinstance(family, Family):
            raise FamilyError(
                f"the adapter '{entry.name}' of package '{package}' is a {type(family).__name__}, not a Family",
                hint="point its entry point at a module-level rlhfkit.families.base.Family",
            )
        earlier = found.setdefault(family.name, InstalledFamily(family, package, version))
        if earlier.package != package:
            raise FamilyError(
                f"two packages bring a family called '{family.name}': {earlier.package} and {package}",
                hint="uninstall one of them; a duplicate is never renamed in silence",
            )
        if earlier.family != family:
            raise FamilyError(
                f"the package '{package}' brings two families called '{family.name}'",
                hint=f"give one of them another name, or remove the package: pip uninstall {package}",
            )
    return tuple(found[name] for name in sorted(found))


def _listing() -> str:
    return "; ".join(
        f"{item.family.name} ({', '.join(item.family.model_types)}; from {item.package})"
        for item in installed_families()
    )


def named_family(name: str) -> Family:
    """The family of this name.

    Raises:
        FamilyError: none is installed.
    """
    family = next((item.family for item in installed_families() if item.family.name == name), None)
    if family is None:
        raise FamilyError(f"no family called '{name}' is installed", hint=f"installed: {_listing()}")
    return family


def find_family(config: Mapping[str, Any], *, name: str = "auto", where: str = "the model") -> Family:
    """The family of a checkpoint.

    Args:
        config: config.json as a dict; its ``model_type`` decides unless ``name`` does.
        name: a family's name, or ``auto``.
        where: how to call the checkpoint in messages.

    Raises:
        FamilyError: no model type, unknown name, a name that does not fit the type, or no or several families for it.
    """
    model_type = str(config.get("model_type") or "")
    if not model_type:
        raise FamilyError(
            f"{where} names no model_type in its config.json",
            hint="if the folder lost its config, bring it back from the original: rlhfkit fix-checkpoint SRC DST",
        )
    families = [item.family for item in installed_families()]
    if name != "auto":
        family = named_family(name)
        accepted = family.model_types + family.compatible_model_types
        if model_type not in accepted:
            fitting = [f.name for f in families if model_type in f.model_types]
            raise FamilyError(
                f"{where} has model_type '{model_type}', which the family '{name}' does not hold "
                f"(it holds: {', '.join(accepted)})",
                hint=f"use --family {fitting[0]}, or leave it out" if fitting else f"installed: {_listing()}",
            )
        return family
    fitting_families = [f for f in families if model_type in f.model_types]
    if len(fitting_families) == 1:
        return fitting_families[0]
    if not fitting_families:
        raise FamilyError(
            f"{where} has model_type '{model_type}', and no installed family holds it",
            hint=f"installed: {_listing()}. A package of your own can add one: docs/adapters.md",
        )
    names = ", ".join(f.name for f in fitting_families)
    raise FamilyError(
        f"{where} has model_type '{model_type}', which several families hold: {names}", hint="choose one with --family"
    )
