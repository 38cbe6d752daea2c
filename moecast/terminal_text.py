"""Text and tables on a terminal of any width, for the answers of the planner; rich is imported inside the functions."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text


class Say:
    """Prints text from job files as it is: no markup, no control characters."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def text(self, said: str, style: str = "") -> Text:
        """`said` without what a terminal would act on."""
        from rich.text import Text

        shown = "".join(c if c.isprintable() else " " for c in said)
        if self.console.options.ascii_only:
            shown = shown.replace("µ", "u").encode("ascii", "replace").decode("ascii")
        return Text(shown, style=style, overflow="fold")

    def line(self, said: str, style: str = "") -> None:
        """One paragraph."""
        self.console.print(self.text(said, style))

    def table(self, table: Table) -> None:
        """A table made by `new`."""
        self.console.print(table)

    def new(self, *heads: tuple[str, str]) -> Table:
        """A table without lines; each column has a head and how it is justified, `wrap` for text that may wrap."""
        from rich.table import Table

        table = Table(
            box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim", show_header=any(h for h, _ in heads)
        )
        for head, how in heads:
            table.add_column(
                head, justify="right" if how == "right" else "left", no_wrap=how != "wrap", overflow="fold"
            )
        return table

    def bar(self, share: float, width: int, style: str) -> Text:
        """A bar of up to `width` characters, filled to `share` (0 to 1); what is there at all shows."""
        length = max(1 if share > 0 else 0, round(share * width))
        return self.text(("#" if self.console.options.ascii_only else "█") * min(length, width), style)
