"""A table of the suite: rows of cells with the paper's entries, and how it is written.

    NAME.csv       the paper's layout; numbers in the table's units; a hole is an empty field
    NAME.md        to read: standard errors, the paper's values, chance level marked, holes with their reasons
    NAME.tex       the same for a document (booktabs)
    NAME.long.csv  one line per value, with sample size, the paper's value and the record it comes from

Nothing in them depends on time or place: the same records give the same bytes.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

from mobie.comparable import Comparability
from mobie.paper.printed import printed_rows
from mobie.paths import Layout
from mobie.results import Cell, Model, Results

Item = TypeVar("Item")
LONG_COLUMNS = (
    *("suite", "table", "model", "section", "row", "config", "column", "ours", "stderr", "n", "chance", "at_chance"),
    *("paper", "difference", "tolerance", "verdict", "comparable", "status", "reason", "record"),
)
TOLERANCE_STDERRS = 2.0
CHANCE_MARK, OWN_MARK, GATE_MARK = "†", "*", "‡"
CHECK, NO_CHECK = "✓", ""
FLAGS = {"true": CHECK, "false": NO_CHECK}  # how a flag of the paper's CSV is shown
LATEX = {
    "\\": r"\textbackslash{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
    "^": r"\textasciicircum{}",
    "~": r"\textasciitilde{}",
    "<": "$<$",
    ">": "$>$",
    "±": r"$\pm$",
    "†": r"$\dagger$",
    "‡": r"$\ddagger$",
    "✓": r"$\checkmark$",
    "×": r"$\times$",
    "·": r"$\cdot$",
    "–": "--",
    "—": "---",
    "’": "'",
    "‘": "`",
    "“": "``",
    "”": "''",
    "…": r"\ldots{}",
    "¹": "$^1$",
    "²": "$^2$",
    "³": "$^3$",
    "⁹": "$^9$",
    "λ": r"$\lambda$",
    "Σ": r"$\Sigma$",
    "σ": r"$\sigma$",
    "β": r"$\beta$",
}
#: characters that mean something in Markdown or HTML
MARKDOWN = {character: f"\\{character}" for character in "\\`*_[]#|$~"} | {"<": "&lt;", ">": "&gt;", "&": "&amp;"}


@dataclass(frozen=True)
class Column:
    """A column of values.

    heading: for people.
    digits:  decimals; None: none where the value is whole, else four.
    better:  which end is best; None: none is.
    extra:   shown in a second table under the first: not a column of the paper's.
    text:    the cells' values are not numbers: they are taken from `Row.texts`.
    flag:    a text column of true and false, shown as a check mark or nothing.
    group:   columns of a group are shown in a table of their own; one file holds them all.
    """

    key: str
    heading: str
    digits: int | None = 2
    better: Literal["higher", "lower"] | None = None
    extra: bool = False
    text: bool = False
    flag: bool = False
    group: str = ""

    @property
    def numeric(self) -> bool:
        return not (self.text or self.flag)


@dataclass(frozen=True)
class Row:
    """One line.

    model:   as the table calls it; rows of one model stand together.
    label:   the line's name.
    cells:   column → cell; a text column has one too where its text is a hole.
    texts:   text column → text.
    paper:   column → the paper's entry.
    config:  method config, empty where the line has none.
    ranked:  whether it takes part in the comparison that sets the best in bold.
    own:     not a line of the paper's table.
    section: rows of a model's section stand together under its heading.
    marks:   column → a mark behind the value.
    """

    model: str
    label: str
    cells: Mapping[str, Cell]
    texts: Mapping[str, str] = field(default_factory=dict)
    paper: Mapping[str, float] = field(default_factory=dict)
    config: str = ""
    ranked: bool = False
    own: bool = False
    section: str = ""
    marks: Mapping[str, str] = field(default_factory=dict)

    def difference(self, column: str) -> float | None:
        """Ours less the paper's."""
        cell, paper = self.cells.get(column), self.paper.get(column)
        return None if cell is None or cell.value is None or paper is None else cell.value - paper

    def tolerance(self, column: str) -> float | None:
        """Two standard errors of ours; the paper prints none of its own."""
        cell = self.cells.get(column)
        return None if cell is None or cell.stderr is None else TOLERANCE_STDERRS * cell.stderr

    def verdict(self, column: str) -> str:
        """Whether ours lies within the tolerance of the paper's entry; empty where either is missing."""
        difference, tolerance = self.difference(column), self.tolerance(column)
        if difference is None or tolerance is None:
            return ""
        return "within noise" if abs(difference) <= tolerance else "higher" if difference > 0 else "lower"


@dataclass(frozen=True)
class Table:
    """A table that is built.

    name:      `table2`.
    title:     what it shows, without its number.
    row_label: heading of the rows' labels in the CSV.
    notes:     what limits the numbers: shown above the table.
    legend:    how to read it: shown below.
    section:   heading of the sections' column; empty where rows have none.
    label:     heading of the rows' labels for people; empty: `row_label` in words.
    flat:      each row is a model: one grid without a heading for each.
    gate:      model → whether its values can be compared with the paper's; empty where that is no question.
    """

    name: str
    suite: str
    title: str
    row_label: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    legend: tuple[str, ...] = ()
    models: tuple[Model, ...] = ()
    section: str = ""
    label: str = ""
    flat: bool = False
    gate: Mapping[str, Comparability] = field(default_factory=dict)

    @property
    def heading(self) -> str:
        name = f"Table {self.name[5:]}" if self.name.startswith("table") else self.name.capitalize()
        return f"{name}, suite `{self.suite}`: {self.title}"

    @property
    def main(self) -> list[Column]:
        return [column for column in self.columns if not column.extra]

    @property
    def extra(self) -> list[Column]:
        return [column for column in self.columns if column.extra]

    @property
    def column_groups(self) -> dict[str, list[Column]]:
        """Main columns by group, in order."""
        return _grouped(self.main, lambda column: column.group)

    @property
    def groups(self) -> dict[str, list[Row]]:
        """Rows by model, in order; all together where each row is a model."""
        return _grouped(self.rows, lambda row: "" if self.flat else row.model)

    def marked(self, model: str) -> str:
        """Heading of a model's rows, with a mark unless they can be compared with the paper's."""
        found = self.gate.get(model)
        return model if found is None or found.state == "yes" else f"{model} {GATE_MARK}"

    @property
    def gate_lines(self) -> list[str]:
        """What the protocol gate says of each model, behind the mark that its heading has."""
        lines = []
        for model, found in self.gate.items():
            mark = self.marked(model).removeprefix(model).strip()
            lines.append(f"{mark} {model}: {found.sentence}.".strip())
        return lines

    @property
    def has_paper(self) -> bool:
        """Whether any row has an entry of the paper's."""
        return any(row.paper for row in self.rows)


def _grouped(items: Iterable[Item], key: Callable[[Item], str]) -> dict[str, list[Item]]:
    found: dict[str, list[Item]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def sections(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows of a model by section, in order."""
    return _grouped(rows, lambda row: row.section)


def used(rows: Sequence[Row], columns: Sequence[Column]) -> list[Column]:
    """Columns that at least one row has."""
    return [c for c in columns if any(c.key in part for row in rows for part in (row.cells, row.texts, row.paper))]


def is_best(table: Table, row: Row, column: Column) -> bool:
    """Whether a cell is the best of the ranked rows of its section and above chance; False where it is the only one."""
    cell = row.cells.get(column.key)
    if cell is None or cell.value is None or not row.ranked or column.better is None or cell.at_chance:
        return False
    peers = [r for r in table.rows if r.ranked and (r.model, r.section) == (row.model, row.section)]
    values = [value for r in peers if (value := _value(r, column)) is not None]
    return len(values) > 1 and cell.value == (min if column.better == "lower" else max)(values)


def model_notes(results: Results, models: Sequence[Model]) -> tuple[str, ...]:
    """What a reader must know about a suite and the models of a table."""
    notes = [results.suite.description]
    notes += [f"**{model.label}**: {model.config.notes}" for model in models if model.config and model.config.notes]
    notes += [
        f"**{model.label}** shows a direction only: nothing here is a verdict on the paper's numbers."
        for model in models
        if not model.in_paper
    ]
    return tuple(notes)


def stand_in_note(results: Results, text: str | None = None) -> tuple[str, ...]:
    """That another text stands in for WikiText-2, where it does; by default the one that the suite names."""
    text = text or results.suite.wikitext2_text
    if text == "wikitext2":
        return ()
    return (f"The column of WikiText-2 perplexity holds that of the text `{text}`, which stands in for it.",)


# --- comma-separated values ------------------------------------------------------------------------------------------


def number(value: float | None, digits: int | None) -> str:
    """A number to write; empty for a hole. See `Column.digits`."""
    return "" if value is None else _format(value, digits)


def _format(value: float, digits: int | None, separator: str = "") -> str:
    decimals = _digits(value, digits)
    return f"{round(value, decimals) + 0.0:{separator}.{decimals}f}"  # + 0.0: no minus before a zero


def _digits(value: float, digits: int | None) -> int:
    if digits is not None:
        return digits
    return 0 if float(value).is_integer() else 4


def to_csv(table: Table) -> str:
    """The paper's layout: model, row, its columns, then ours."""
    columns = (*table.main, *table.extra)
    names = [*([] if table.flat else ["model"]), *([table.section] if table.section else []), table.row_label]
    header = [*names, *(column.key for column in columns), "config"]
    lines = []
    for row in table.rows:
        place = [*([] if table.flat else [row.model]), *([row.section] if table.section else []), row.label]
        values = [
            number(_value(row, column), column.digits) if column.numeric else row.texts.get(column.key, "")
            for column in columns
        ]
        lines.append(dict(zip(header, [*place, *values, row.config], strict=True)))
    return csv_text(header, lines)


def _value(row: Row, column: Column) -> float | None:
    cell = row.cells.get(column.key)
    return None if cell is None else cell.value


def to_long_csv(table: Table) -> str:
    """One line per value."""
    return csv_text(LONG_COLUMNS, _long_lines(table))


def _long_lines(table: Table) -> Iterator[dict[str, str]]:
    for row in table.rows:
        gate = table.gate.get(row.model)
        for column in table.columns:
            cell, text = row.cells.get(column.key), row.texts.get(column.key)
            place = {"suite": table.suite, "table": table.name, "model": row.model, "section": row.section}
            place |= {} if gate is None else {"comparable": gate.state}
            line = {**place, "row": row.label, "config": row.config, "column": column.key}
            if text is not None:
                yield {**line, "ours": text, "status": "ok", "record": cell.record if cell else ""}
            elif cell is not None:
                yield {**line, **_long_values(row, column, cell)}


def _long_values(row: Row, column: Column, cell: Cell) -> dict[str, str]:
    digits = None if column.digits is None else max(4, column.digits)
    paper = row.paper.get(column.key)
    return {
        "ours": number(cell.value, digits),
        "stderr": number(cell.stderr, digits),
        "n": "" if cell.n is None else str(cell.n),
        "chance": number(cell.chance, digits),
        "at_chance": "" if cell.chance is None else str(cell.at_chance).lower(),
        "paper": "" if paper is None else f"{paper:g}",
        "difference": number(row.difference(column.key), digits),
        "tolerance": number(row.tolerance(column.key), digits) if paper is not None else "",
        "verdict": row.verdict(column.key),
        "status": cell.status,
        "reason": cell.reason or "",
        "record": cell.record,
    }


def csv_text(columns: Sequence[str], lines: Iterable[Mapping[str, str]]) -> str:
    """A CSV file as text."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    return buffer.getvalue()


# --- Markdown and LaTeX -----------------------------------------------------------------------------------------------


class Footnotes:
    """Reasons of holes, numbered in the order in which they are first met."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def mark(self, cell: Cell) -> str:
        """`–[1]`, the number of the cell's reason."""
        text = f"{cell.status}: {cell.reason}" if cell.reason else cell.status
        return f"–[{self._numbers.setdefault(text, len(self._numbers) + 1)}]"

    def lines(self) -> list[str]:
        return [f"[{number}] {' '.join(text.split())}" for text, number in self._numbers.items()]


@dataclass(frozen=True)
class Markup:
    """How a kind of document writes: `plain` what the suite says, `text` what a model or a data set says, `bold`."""

    plain: Callable[[str], str]
    text: Callable[[str], str]
    bold: Callable[[str], str]


def show(cell: Cell, column: Column, *, mark: str = "", paper: float | None = None) -> tuple[str, str]:
    """A value that is there, and what stands behind it: its standard error, its marks and the paper's entry."""
    assert cell.value is not None
    rest = []
    if cell.stderr is not None:
        rest.append(f"± {number(cell.stderr, column.digits)}")
    if cell.at_chance:
        rest.append(CHANCE_MARK)
    rest += [mark] if mark else []
    rest += [] if paper is None else [f"(paper {paper:g})"]
    return _format(cell.value, column.digits, ","), " ".join(rest)


def _body(
    table: Table, rows: Sequence[Row], columns: Sequence[Column], notes: Footnotes, markup: Markup
) -> list[list[str]]:
    """Cells of a group of rows."""

    def entry(row: Row, column: Column) -> str:
        cell, paper, text = row.cells.get(column.key), row.paper.get(column.key), row.texts.get(column.key)
        if text is not None:
            return markup.plain(FLAGS.get(text, text)) if column.flag else markup.text(text)
        if cell is None:
            return "" if paper is None else markup.plain(f"(paper {paper:g})")
        if cell.value is None:
            return markup.plain(notes.mark(cell) + ("" if paper is None else f" (paper {paper:g})"))
        value, rest = show(cell, column, mark=row.marks.get(column.key, ""), paper=paper)
        value = markup.plain(value)
        return f"{markup.bold(value) if is_best(table, row, column) else value} {markup.plain(rest)}".rstrip()

    label = [row.label + (f" {OWN_MARK}" if row.own else "") for row in rows]
    return [
        [markup.plain(name), *(entry(row, column) for column in columns)] for name, row in zip(label, rows, strict=True)
    ]


def _header(table: Table, columns: Sequence[Column]) -> list[str]:
    label = table.label or table.row_label.replace("_", " ").capitalize()
    return [label, *(column.heading for column in columns)]


def markdown_text(text: str) -> str:
    """Foreign text in a cell of a Markdown table, as it is; a line break stays one."""
    shown = "".join(MARKDOWN.get(c, c) if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)
    return shown.replace("\n", "<br>")


def _inert(text: str) -> str:
    """Our own sentence for Markdown; what an error's text brought along makes no element and no link."""
    return text.replace("<", "&lt;").replace("](", "]\\(")


MARKDOWN_MARKUP = Markup(
    plain=lambda text: _inert(text).replace("|", "\\|").replace("\n", " "), text=markdown_text, bold="**{}**".format
)


def to_markdown(table: Table) -> str:
    """The table with its notes and footnotes, one part per model, and the paper's own table where no row is in it."""
    from tabulate import tabulate

    def grid(rows: Sequence[Row], columns: Sequence[Column]) -> list[str]:
        body = _body(table, rows, columns, footnotes, MARKDOWN_MARKUP)
        align = ["left", *("right" if column.numeric else "left" for column in columns)]
        shown = tabulate(body, _header(table, columns), tablefmt="pipe", colalign=align, disable_numparse=True)
        return [shown, ""]

    footnotes = Footnotes()
    lines = [f"# {table.heading}", "", *(f"- {note}" for note in table.notes), *([""] if table.notes else [])]
    for model, model_rows in table.groups.items():
        lines += [] if table.flat else [f"## {table.marked(model)}", ""]
        for section, rows in sections(model_rows).items():
            lines += [f"### {section}", ""] if section else []
            for group, columns in table.column_groups.items():
                lines += [f"{group}:", ""] if group else []
                lines += grid(rows, used(rows, columns))
            measured = [row for row in rows if row.config and any(c.key in row.cells for c in table.extra)]
            if measured:
                lines += ["Beside the paper's columns:", "", *grid(measured, table.extra)]
    lines += [f"{_inert(line)}  " for line in table.gate_lines]
    lines += [f"{line}  " for line in (*table.legend, *_marks(table))]
    lines += ["", *(f"{_inert(line)}  " for line in footnotes.lines())] if footnotes.lines() else []
    lines += ["", *_papers_table(table)]
    return "\n".join(lines).rstrip() + "\n"


def _marks(table: Table) -> list[str]:
    """The marks that occur."""
    cells = [cell for row in table.rows for cell in row.cells.values()]
    marks = []
    if any(cell.stderr is not None for cell in cells):
        marks.append("± one standard error.")
    if any(cell.at_chance for cell in cells):
        marks.append(f"{CHANCE_MARK} not above chance by more than two standard errors.")
    if any(is_best(table, row, column) for row in table.rows for column in table.columns):
        marks.append("**Bold**: best of the binary methods, where it is above chance.")
    if any(row.own for row in table.rows):
        marks.append(f"Rows marked {OWN_MARK} are not in the paper's table.")
    return [" ".join(marks)] if marks else []


def _papers_table(table: Table) -> list[str]:
    """The paper's table as printed, to compare by eye, where none of our rows has an entry in it."""
    from tabulate import tabulate

    rows = printed_rows(table.name)
    if table.has_paper or not rows:
        return []
    grid = tabulate([list(row.values()) for row in rows], list(rows[0]), tablefmt="pipe", disable_numparse=True)
    return ["<details><summary>The paper's table, of its own models</summary>", "", grid, "", "</details>", ""]


def to_latex(table: Table) -> str:
    """A `table` environment with booktabs rules for each grid of the Markdown but the second ones.

    Notes and footnotes stand in the last caption.
    """
    footnotes, parts = Footnotes(), []
    for model, model_rows in table.groups.items():
        for section, rows in sections(model_rows).items():
            for group, columns in table.column_groups.items():
                title = " ".join(
                    name if name[-1] in ".?!" else f"{name}." for name in (table.marked(model), section, group) if name
                )
                parts.append((title, _latex_grid(table, rows, used(rows, columns), footnotes)))
    told = " ".join([*table.notes, *table.gate_lines, *table.legend, *_marks(table), *footnotes.lines()])
    lines = [r"% \usepackage{amssymb, booktabs}"]
    for index, (title, grid) in enumerate(parts, start=1):
        caption = f"{table.heading}. {title}" + (f" {told}" if index == len(parts) else "")
        lines += [r"\begin{table}", r"\centering", rf"\caption{{{latex_escape(_unmarked(caption))}}}"]
        lines += [*grid, r"\end{table}", ""]
    return "\n".join(lines)


def _latex_grid(table: Table, rows: Sequence[Row], columns: Sequence[Column], notes: Footnotes) -> list[str]:
    width = 0.5 / max(1, sum(column.text for column in columns))
    paragraph = f"p{{{width:.2g}\\linewidth}}"
    align = "".join(paragraph if column.text else "r" if column.numeric else "c" for column in columns)
    lines = [
        [latex_escape(name) for name in _header(table, columns)],
        *_body(table, rows, columns, notes, LATEX_MARKUP),
    ]
    header, *body = [" & ".join(line) + r" \\" for line in lines]
    start = [rf"\begin{{tabular}}{{l{align}}}", r"\toprule", header, r"\midrule"]
    return [*start, *body, r"\bottomrule", r"\end{tabular}"]


def latex_escape(text: str) -> str:
    """Text for LaTeX on one line; a character that has no form here is named by its number."""
    return "".join(LATEX.get(c, c if " " <= c <= "~" else " " if c.isspace() else f"[U+{ord(c):04X}]") for c in text)


def _unmarked(text: str) -> str:
    """Our own sentences without Markdown's marks."""
    return text.replace("**", "").replace("`", "")


LATEX_MARKUP = Markup(plain=latex_escape, text=latex_escape, bold=r"\textbf{{{}}}".format)
WRITERS = {"csv": to_csv, "md": to_markdown, "tex": to_latex, "long.csv": to_long_csv}


def write_table(table: Table, layout: Layout) -> list[Path]:
    """Write the four files of a table; returns their paths. Raises `StorageError`."""
    from mobie.storage import write_text

    for suffix, writer in WRITERS.items():
        write_text(layout.table(table.name, suffix), writer(table))
    return [layout.table(table.name, suffix) for suffix in WRITERS]
