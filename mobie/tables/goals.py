"""The goals of our method, each with its verdict and the two numbers behind it."""

from __future__ import annotations

from mobie.goals import Judged, judge_goals
from mobie.results import Cell, Results
from mobie.tables.table import Column, Row, Table, model_notes

COLUMNS = (
    Column("budget", "Budget, bits", 1),
    Column("ours", "Ours", 4),
    Column("theirs", "The other", 4),
    Column("against", "The other is", text=True),
    Column("share", "Ours / other", 3),
    Column("allowed", "Allowed", 3),
    Column("texts", "Holds on texts", text=True),
    Column("verdict", "Verdict", text=True),
)


def build(results: Results) -> Table:
    """Judge every goal with the records of a suite."""
    models = results.models("goals")
    return Table(
        "goals",
        results.suite_name,
        "what our method was to reach, and whether it does",
        "goal",
        COLUMNS,
        tuple(map(_row, judge_goals(results))),
        model_notes(results, models),
        (
            "Excess: nats per token over full precision, mean over texts and calibration seeds; the verdict is on this "
            "mean, and beside it stands on how many texts the goal holds by itself.",
            "A lower perplexity: the row that comes nearest, on the text where it does. It counts as lower where the "
            "95 % t-interval of the difference over seeds, runs of one seed compared with each other, lies below zero "
            "(of a row with one seed: two standard errors over windows).",
            "Routing: similarity to full precision in the layer where ours is lowest against the other.",
        ),
        tuple(models),
        section="scope",
    )


def _row(judged: Judged) -> Row:
    goal = judged.goal
    cells = {"ours": judged.ours, "theirs": judged.theirs}
    if judged.budget is not None:
        cells["budget"] = Cell(judged.budget)
    if goal.measure == "excess":
        cells |= {"share": judged.share, "allowed": Cell(goal.share)}
    texts = {"against": judged.against, "texts": judged.texts, "verdict": judged.verdict}
    return Row(judged.model.label, goal.statement, cells, texts, config=judged.method, section=judged.scope.label)
