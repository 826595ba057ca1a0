"""A table that can be printed and written."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import rich.table


@dataclass(frozen=True)
class Table:
    """The first columns are text, the others numbers."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    num_text: int = 1
    note: str = ""

    def rich(self) -> "rich.table.Table":
        # Imported here, because records are written where rich may not be installed.
        import rich.box
        import rich.table

        table = rich.table.Table(
            title=self.title,
            title_justify="left",
            box=rich.box.SIMPLE_HEAD,
            caption=self.note or None,
            caption_justify="left",
        )
        for number, column in enumerate(self.columns):
            table.add_column(column, justify="left" if number < self.num_text else "right", no_wrap=True)
        for row in self.rows:
            table.add_row(*row)
        return table

    def rows_in_markdown(self) -> str:
        rule = ["---" if number < self.num_text else "---:" for number in range(len(self.columns))]
        rows = ([cell.replace("|", "\\|") for cell in row] for row in (self.columns, rule, *self.rows))
        return "\n".join("| " + " | ".join(row) + " |" for row in rows)

    def markdown(self) -> str:
        note = (self.note, "") if self.note else ()
        return "\n".join((f"### {self.title}", "", self.rows_in_markdown(), "", *note))


def mark(reached: bool) -> str:
    return "pass" if reached else "short"


def digits(value: float) -> str:
    """Three digits that matter.

    >>> digits(0.08349), digits(2.5), digits(20.34), digits(443.4)
    ('0.0835', '2.50', '20.3', '443')
    """
    if value == 0:
        return "0"
    decimals = max(0, 2 - int(f"{abs(value):e}".partition("e")[2]))
    return f"{value:.{decimals}f}"
