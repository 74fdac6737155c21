"""The table of installed model families."""

from __future__ import annotations

from rich.console import Console, Group
from rich.table import Table

from rlhfkit.families.registry import installed_families
from rlhfkit.words import tr
from rlhfkit.words.lines import shown


def run() -> None:
    """Print families, the model types they hold, what they fix, and the package each comes from."""
    table = Table(title=tr("model families"), show_lines=True)
    for heading in (tr("family"), tr("holds"), tr("template"), tr("what it sees to"), tr("from")):
        table.add_column(heading, overflow="fold")
    for item in installed_families():
        family = item.family
        table.add_row(
            family.name,
            Group(shown(family.title), f"({', '.join(family.model_types)})"),
            family.template,
            Group(*map(shown, family.notes)),
            f"{item.package} {item.version}",
        )
    Console().print(table)
