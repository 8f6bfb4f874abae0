"""Tables of README.md."""

from __future__ import annotations

from collections.abc import Iterable


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table, first column left, the others right."""
    header = list(header)
    lines = [header, [":--"] + ["--:"] * (len(header) - 1), *map(list, rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + "\n"
