"""The table of installed model families."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from rlhfkit.families.registry import installed_families


def run() -> None:
    """Print families, the model types they hold, what they fix, and the package each comes from."""
    table = Table(title="model families", show_lines=True)
    for heading in ("family", "holds", "template", "what it sees to", "from"):
        table.add_column(heading, overflow="fold")
    for item in installed_families():
        family = item.family
        table.add_row(
            family.name,
            f"{family.title}\n({', '.join(family.model_types)})",
            family.template,
            "\n".join(family.notes),
            f"{item.package} {item.version}",
        )
    Console().print(table)
