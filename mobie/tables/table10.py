"""Table 10: perplexity by the strength of NGES's regularization λ, for three calibration texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from mobie.config import method_spec
from mobie.paired import log_ratio
from mobie.paper.printed import printed_rows, same_model
from mobie.results import Cell, Model, Results, average
from mobie.tables.table import Column, Row, Table, model_notes
from mobie.tables.table2 import text_perplexity

PAPERS_MODEL = "OLMoE-1B-7B-0125"  # the table's caption names it; its rows do not
PAPERS_CHOICE = 0.2  # λ of the paper's experiments (section 5.1)
AVERAGE = "avg"
RANKS = ("¹", "²", "³")


def sweep_method(results: Results, regularization: float, text: str) -> str:
    """MoBiE with a λ, calibrated on one of the paper's calibration texts (`wikitext2`, `c4`, `ptb`) or its stand-in.

    Everything is spelled in full, the default λ too, since a sweep may use fewer calibration sequences than the tables.
    """
    sweep = results.suite.sweep
    return method_spec(
        "mobie",
        regularization=regularization,
        calibration__text=sweep.texts[text],
        calibration__sequences=sweep.sequences,
    )


def text_names(results: Results) -> dict[str, str]:
    """The paper's text → the protocol's, which stand in the same order."""
    return dict(zip(results.suite.sweep.texts, results.protocol.texts, strict=True))


def average_perplexity(results: Results, model: Model, method: str, *, seed: int | None = None) -> Cell:
    """Mean perplexity over the texts of the protocol (Table 10's Avg., Figure 9); the texts are independent samples."""
    return average([text_perplexity(results, model, method, text, seed=seed) for text in results.protocol.texts])


def build(results: Results) -> Table:
    """Read the perplexities of the sweep."""
    models = results.models("table10")
    rows, told = [], []
    for model in models:
        cells = {value: _cells(results, model, value) for value in results.suite.sweep.regularization}
        ranks = {
            text: rank({value: row[f"{text}/{AVERAGE}"].value for value, row in cells.items()})
            for text in text_names(results)
        }
        rows += [_row(model, value, row, ranks) for value, row in cells.items()]
        told += [_comparison(results, model, text, found) for text, found in ranks.items()]
    return Table(
        "table10",
        results.suite_name,
        "perplexity by the regularization λ and the calibration text",
        "lambda",
        _columns(results),
        tuple(rows),
        (*model_notes(results, models), *_notes(results, models)),
        (
            f"{', '.join(RANKS)} mark the first, second and third best average for a calibration text.",
            *told,
            f"The best of {len(results.suite.sweep.regularization)} values is picked after the fact: by noise alone it "
            "is lower than another.",
        ),
        tuple(models),
        label="λ",
    )


def _columns(results: Results) -> tuple[Column, ...]:
    """A group of columns for each calibration text, named by the paper's names of the texts."""
    scored = text_names(results)
    return tuple(
        Column(f"{calibration}/{text}", heading, group=f"Calibrated on `{name}`")
        for calibration, name in results.suite.sweep.texts.items()
        for text, heading in (*scored.items(), (AVERAGE, "Avg."))
    )


def _cells(results: Results, model: Model, regularization: float) -> dict[str, Cell]:
    found = {}
    for calibration in results.suite.sweep.texts:
        method = sweep_method(results, regularization, calibration)
        for text, name in text_names(results).items():
            found[f"{calibration}/{text}"] = text_perplexity(results, model, method, name)
        found[f"{calibration}/{AVERAGE}"] = average_perplexity(results, model, method)
    return found


def _row(model: Model, value: float, cells: Mapping[str, Cell], ranks: Mapping[str, Mapping[float, int]]) -> Row:
    marks = {
        f"{text}/{AVERAGE}": RANKS[places[value] - 1]
        for text, places in ranks.items()
        if places.get(value, len(RANKS) + 1) <= len(RANKS)
    }
    return Row(model.label, f"{value:g}", cells, paper=_paper(model, value), config="mobie", marks=marks)


def _paper(model: Model, value: float) -> dict[str, float]:
    if not same_model(model.label, PAPERS_MODEL):
        return {}
    rows = [row for row in printed_rows("table10") if float(row["lambda"]) == value]
    return {
        f"{row['calibration']}/{text.removesuffix('_ppl')}": float(row[text])
        for row in rows
        for text in row
        if text.endswith("_ppl")
    }


def rank(values: Mapping[float, float | None]) -> dict[float, int]:
    """Place of each value, the smallest first; equal values share the better place. A hole has none."""
    known = [value for value in values.values() if value is not None]
    return {key: 1 + sum(other < value for other in known) for key, value in values.items() if value is not None}


def _comparison(results: Results, model: Model, text: str, places: Mapping[float, int]) -> str:
    """Whether the best λ differs from the paper's by more than its standard error, in words."""
    where = f"{model.label}, calibrated on `{results.suite.sweep.texts[text]}`"
    best = min(places, key=lambda value: (places[value], value != PAPERS_CHOICE), default=PAPERS_CHOICE)
    if PAPERS_CHOICE not in places or len(places) < 2:
        return f"{where}: too few values of λ have a perplexity for a comparison."
    if best == PAPERS_CHOICE:
        return f"{where}: λ = {PAPERS_CHOICE:g} has the lowest average."
    ours, papers = (sweep_method(results, value, text) for value in (best, PAPERS_CHOICE))
    found = log_ratio(results, model, ours, papers, results.protocol.texts)
    if found.value is None or found.stderr is None:
        return f"{where}: λ = {best:g} has the lowest average; {found.reason}."
    size = "more" if abs(found.value) > found.stderr else "not more"
    return (
        f"{where}: λ = {best:g} has the lowest average; its mean log perplexity differs from that of "
        f"λ = {PAPERS_CHOICE:g} by {found.value:+.4f} ± {found.stderr:.4f} (one standard error, paired over windows), "
        f"{size} than one standard error."
    )


def _notes(results: Results, models: Sequence[Model]) -> tuple[str, ...]:
    names = text_names(results)
    notes = []
    if any(text != name for text, name in names.items()):
        notes.append(f"The texts {', '.join(f'`{name}`' for name in names.values())} stand in for {', '.join(names)}.")
    size = results.suite.sweep.sequences
    for model in models:
        if size is not None and model.config is not None:
            usual = model.config.calibration.sequences
            notes.append(f"{model.label} is calibrated on {size} sequences here, on {usual} in the other tables.")
    return tuple(notes)
