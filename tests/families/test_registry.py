"""Families of strangers are found as ours are, and each way to get none is told in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path

import pytest

from rlhfkit.errors import FamilyError
from rlhfkit.families.base import Family
from rlhfkit.families.registry import find_family, installed_families

OURS = (
    "baichuan (baichuan; from rlhfkit); llama (llama, mistral; from rlhfkit); qwen (qwen2, qwen3, qwen; from rlhfkit)"
)
Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    """Puts a distribution on sys.path: a name, one module, and its entry points."""

    def write(package: str, module: str, source: str, *entries: str) -> None:
        root = tmp_path / package
        info = root / f"{package}-0.3.dist-info"
        info.mkdir(parents=True)
        (root / f"{module}.py").write_text(source, encoding="utf-8")
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.3\n", encoding="utf-8")
        (info / "entry_points.txt").write_text("\n".join(["[rlhfkit.adapters]", *entries, ""]), encoding="utf-8")
        monkeypatch.syspath_prepend(str(root))
        monkeypatch.delitem(sys.modules, module, raising=False)
        installed_families.cache_clear()

    installed_families.cache_clear()
    yield write
    installed_families.cache_clear()


def family_source(name: str, model_type: str, variable: str = "FAMILY") -> str:
    return (
        "from rlhfkit.families.base import Family\n"
        f"{variable} = Family(name={name!r}, title='T', model_types=({model_type!r},), template='chatml',\n"
        "    pad_candidates=('<pad>',), stop_candidates=(), lora_targets=('q_proj',))\n"
    )


def test_ours_are_installed_under_our_name() -> None:
    found = installed_families()
    assert [item.family.name for item in found] == ["baichuan", "llama", "qwen"]
    assert {(item.package, item.version) for item in found} == {("rlhfkit", version("rlhfkit"))}


def test_a_family_of_another_package_is_found(install: Install) -> None:
    install("yi-adapter", "yi_adapter", family_source("yi", "yi"), "yi = yi_adapter:FAMILY")
    assert find_family({"model_type": "yi"}).name == "yi"
    item = next(item for item in installed_families() if item.family.name == "yi")
    assert (item.package, item.version) == ("yi-adapter", "0.3")


def test_model_type_decides() -> None:
    assert [find_family({"model_type": t}).name for t in ("qwen3", "qwen", "llama", "mistral", "baichuan")] == [
        "qwen",
        "qwen",
        "llama",
        "llama",
        "baichuan",
    ]


def test_name_decides_between_types_it_accepts() -> None:
    assert find_family({"model_type": "llama"}, name="baichuan").name == "baichuan"
    assert find_family({"model_type": "llama"}, name="llama").name == "llama"


def refused(config: dict[str, str], *, name: str = "auto", where: str = "the model in /m") -> FamilyError:
    with pytest.raises(FamilyError) as caught:
        find_family(config, name=name, where=where)
    assert isinstance(caught.value, LookupError)
    return caught.value


def test_adapter_that_does_not_load(install: Install) -> None:
    install("broken-adapter", "broken_adapter", "import no_such_module_here\n", "broken = broken_adapter:FAMILY")
    error = refused({"model_type": "llama"})
    assert error.message == (
        "the adapter 'broken' of package 'broken-adapter' does not load: "
        "ModuleNotFoundError: No module named 'no_such_module_here'"
    )
    assert error.hint == "mend or remove it: pip uninstall broken-adapter"


def test_adapter_that_is_no_family(install: Install) -> None:
    install("odd-adapter", "odd_adapter", "FAMILY = {'name': 'odd'}\n", "odd = odd_adapter:FAMILY")
    error = refused({"model_type": "llama"})
    assert error.message == "the adapter 'odd' of package 'odd-adapter' is a dict, not a Family"
    assert error.hint == "point its entry point at a module-level rlhfkit.families.base.Family"


def test_name_that_two_packages_claim(install: Install) -> None:
    install("other-llama", "other_llama", family_source("llama", "llama"), "llama = other_llama:FAMILY")
    error = refused({"model_type": "llama"})
    assert error.message in (
        "two packages bring a family called 'llama': other-llama and rlhfkit",
        "two packages bring a family called 'llama': rlhfkit and other-llama",
    )
    assert error.hint == "uninstall one of them; a duplicate is never renamed in silence"


def test_name_that_one_package_claims_twice(install: Install) -> None:
    source = family_source("yi", "yi", "ONE") + family_source("yi", "yi2", "TWO")
    install("yi-adapter", "yi_adapter", source, "one = yi_adapter:ONE", "two = yi_adapter:TWO")
    error = refused({"model_type": "llama"})
    assert error.message == "the package 'yi-adapter' brings two families called 'yi'"
    assert error.hint == "give one of them another name, or remove the package: pip uninstall yi-adapter"


def test_one_family_under_two_entry_points_is_one(install: Install) -> None:
    entries = ("yi = yi_adapter:FAMILY", "yi-chat = yi_adapter:FAMILY")
    install("yi-adapter", "yi_adapter", family_source("yi", "yi"), *entries)
    assert find_family({"model_type": "yi"}).name == "yi"


def test_unknown_name() -> None:
    error = refused({"model_type": "llama"}, name="bloom")
    assert str(error) == f"no family called 'bloom' is installed\n  → installed: {OURS}"


def test_name_that_does_not_fit_the_type() -> None:
    error = refused({"model_type": "qwen2"}, name="baichuan")
    assert error.message == (
        "the model in /m has model_type 'qwen2', which the family 'baichuan' does not hold (it holds: baichuan, llama)"
    )
    assert error.hint == "use --family qwen, or leave it out"


def test_name_that_does_not_fit_a_type_which_nobody_holds() -> None:
    error = refused({"model_type": "bloom"}, name="qwen")
    assert error.message == (
        "the model in /m has model_type 'bloom', which the family 'qwen' does not hold (it holds: qwen2, qwen3, qwen)"
    )
    assert error.hint == f"installed: {OURS}"


def test_type_that_nobody_holds() -> None:
    error = refused({"model_type": "bloom"})
    assert error.message == "the model in /m has model_type 'bloom', and no installed family holds it"
    assert error.hint == f"installed: {OURS}. A package of your own can add one: docs/adapters.md"


def test_type_that_several_hold(install: Install) -> None:
    install("other-llama", "other_llama", family_source("alpine", "llama"), "alpine = other_llama:FAMILY")
    error = refused({"model_type": "llama"})
    assert error.message == "the model in /m has model_type 'llama', which several families hold: alpine, llama"
    assert error.hint == "choose one with --family"
    assert find_family({"model_type": "llama"}, name="alpine").name == "alpine"


@pytest.mark.parametrize("config", [{}, {"model_type": ""}, {"model_type": None}])
def test_config_without_a_type(config: dict[str, str]) -> None:
    error = refused(config, name="llama")
    assert error.message == "the model in /m names no model_type in its config.json"
    assert (
        error.hint == "if the folder lost its config, bring it back from the original: rlhfkit fix-checkpoint SRC DST"
    )


# -- which template a checkpoint without one gets ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "vocabulary", "template"),
    [
        ("llama", {"<|eot_id|>": 9, "<|start_header_id|>": 8}, "llama3"),
        ("llama", {"<|im_start|>": 1, "<|im_end|>": 2}, "chatml"),
        ("llama", {"<s>": 1, "</s>": 2}, "llama2"),
        ("llama", {"<reserved_106>": 195, "<reserved_102>": 191}, "baichuan2"),
        ("llama", {"<reserved_106>": 199, "<reserved_102>": 195}, "baichuan"),
        ("baichuan", {"<reserved_106>": 195, "<reserved_102>": 191}, "baichuan2"),
        ("baichuan", {"<reserved_106>": 199, "<reserved_102>": 195}, "baichuan"),
        ("qwen", {"<|im_start|>": 1, "<|im_end|>": 2}, "qwen"),
    ],
)
def test_default_template_follows_the_vocabulary(family: str, vocabulary: dict[str, int], template: str) -> None:
    facts: Family = next(item.family for item in installed_families() if item.family.name == family)
    assert facts.choose_template({}, vocabulary) == template
