"""The README: its generated parts are known, filled from results, and its commands exist."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobie.cli import main
from mobie.config import default_layout, load_suite
from mobie.errors import DataError
from mobie.figures.seal import seal_svg
from mobie.goals import judge_goals
from mobie.paths import Layout
from mobie.report.goals import verdict_table
from mobie.report.markdown import markdown_table
from mobie.report.readme import PART, PARTS, fill_readme
from mobie.results import Cell, Results
from mobie.storage import write_bytes, write_json
from mobie.tables import build_table
from mobie.tables.table import write_table
from mobie.verdicts import judge, write_claims

README = (default_layout().root / "README.md").read_text()


def test_every_generated_part_stands_in_the_readme_and_is_filled() -> None:
    parts = {match["name"]: match[0] for match in PART.finditer(README)}
    assert parts.keys() == PARTS.keys()
    for name, text in parts.items():
        images = re.findall(r"!\[.+\]\((.+)\)", text)
        assert images or text.count("\n|") >= 3, f"{name} is empty: run `python -m mobie readme`"
        for image in images:
            assert (default_layout().root / image).stat().st_size > 0


def test_the_figure_is_copied_to_where_it_is_committed(repository: Layout) -> None:
    path = repository.root / "README.md"
    path.write_text("<!-- generated: pareto -->\n<!-- end -->\n")
    with pytest.raises(DataError, match=r"pareto\.svg: no such file"):
        fill_readme(repository)
    write_bytes(repository.figure("pareto", "svg"), seal_svg(b"<svg/>"))
    fill_readme(repository)
    assert "](paper_figures/readme/pareto.svg)" in path.read_text()
    assert repository.readme_figure("pareto", "svg").read_bytes() == seal_svg(b"<svg/>")


def test_claims_are_counted_and_listed(repository: Layout) -> None:
    path = repository.root / "README.md"
    path.write_text("<!-- generated: claims -->\n<!-- end -->\n")
    verdicts = judge(Results("smoke", repository))
    write_claims(verdicts, repository)
    fill_readme(repository)
    text = path.read_text()
    for verdict, count in verdicts.counts.items():
        assert f"| this suite: {verdict} | {count} |" in text
    for claim in verdicts.claims:
        assert f"| {claim.id} |" in text
    file = repository.table("claims", "json")
    file.write_text(file.read_text().replace('"not run"', '"holds"', 1))
    with pytest.raises(DataError, match=r"claims\.json: not what the records"):
        fill_readme(repository)
    assert path.read_text() == text


def test_goals_are_told_with_both_numbers(repository: Layout) -> None:
    path = repository.root / "README.md"
    path.write_text("<!-- generated: goals -->\n<!-- end -->\n")
    with pytest.raises(DataError, match=r"goals\.md: no such file"):
        fill_readme(repository)
    write_table(build_table("goals", Results("beyond", repository)), repository)
    fill_readme(repository)
    judged = judge_goals(Results("beyond", repository))
    goals = Counter((one.model.label, one.scope.label) for one in judged)
    assert {model for model, _ in goals} == set(load_suite("beyond", repository).models)
    for (model, scope), count in goals.items():
        assert f"| {model}, {scope} | 0 | 0 | {count} |" in path.read_text()
    excess = next(one for one in judged if one.goal.measure == "excess")
    lower = replace(excess, verdict="holds", ours=Cell(0.25), theirs=Cell(0.5))
    higher = replace(excess, verdict="does not hold", ours=Cell(0.75), theirs=Cell(0.5))
    assert "| holds: 0.250 / 0.500 |" in verdict_table([lower])
    assert "| **does not hold**: 0.750 / 0.500 |" in verdict_table([higher])


def test_parts_are_rewritten_and_the_rest_is_left(repository: Layout) -> None:
    path = repository.root / "README.md"
    path.write_text("before\n<!-- generated: audit -->\nold\n<!-- end -->\nafter\n")
    assert fill_readme(repository) == ["audit"]
    first = path.read_text()
    assert first.startswith("before\n<!-- generated: audit -->\n") and first.endswith("<!-- end -->\nafter\n")
    assert "old" not in first and "| audit | count |" in first
    fill_readme(repository)
    assert path.read_text() == first


def test_table2_is_embedded_under_the_readmes_headings_without_the_papers_own(repository: Layout) -> None:
    paths = write_table(build_table("table2", Results("smoke", repository)), repository)
    table = next(path for path in paths if path.suffix == ".md").read_text()
    assert "<details>" in table and "14.37" in table  # the paper's, folded
    path = repository.root / "README.md"
    path.write_text("# Project\n\n## Results\n\n<!-- generated: table2 -->\n<!-- end -->\n")
    assert fill_readme(repository) == ["table2"]
    text = path.read_text()
    assert re.findall(r"^#+ ", text, re.MULTILINE) == ["# ", "## ", "### ", "#### "]
    assert "<details>" not in text and "14.37" not in text
    assert "| MoBiE " in text and "[1] missing: its job has not run" in text
    markdown = repository.table("table2", "md")
    markdown.write_text(markdown.read_text().replace("MoBiE", "MoBiF", 1))
    with pytest.raises(DataError, match=r"table2\.md: not what the records"):
        fill_readme(repository)


def test_measured_blocks_are_told_as_the_record_has_them(repository: Layout) -> None:
    method = {"cpu_seconds": 300.0, "statistics_seconds": 60.0, "peak_mb": 2048.0}
    shape = {"experts": 4, "hidden": 8, "width": 6, "top_k": 2, "tokens": 32}
    machine = {"cpu": "Abacus", "cores": 3, "memory_gb": 5}
    loop = {"mobie": {"experts": 2, "cpu_seconds": 10.0, "loop_cpu_seconds": 40.0, "ratio": 4.0}}
    loop["mobie"] |= {"weight_error": 0.5, "loop_weight_error": 0.25}
    record = {"shape": shape, "machine": machine, "blocks": 20, "methods": {"mobie": method}, "loop": loop}
    write_json(repository.measured("true_size"), record)
    path = repository.root / "README.md"
    path.write_text("<!-- generated: true-size -->\n<!-- end -->\n")
    assert fill_readme(repository) == ["true-size"]
    text = path.read_text()
    assert "| `mobie` | 300 | 60 | 2.0 | 2.0 |" in text  # 20 · 360 s are 2 hours
    assert "Abacus, 3 cores, 5 GiB" in text
    assert (
        "10 against 40 CPU seconds, 4.0 times as fast, at the same error of the weights (0.5000 against 0.2500)" in text
    )


def test_missing_results_and_unknown_parts_are_named(repository: Layout) -> None:
    path = repository.root / "README.md"
    path.write_text("<!-- generated: table2 -->\n<!-- end -->\n")
    with pytest.raises(DataError, match="table2.md: no such file, needed for the part 'table2'"):
        fill_readme(repository)
    path.write_text("<!-- generated: tabel2 -->\n<!-- end -->\n")
    with pytest.raises(DataError, match="tabel2"):
        fill_readme(repository)
    assert path.read_text() == "<!-- generated: tabel2 -->\n<!-- end -->\n"


def test_commands_of_the_readme_exist() -> None:
    verbs = set(re.findall(r"python -m mobie ([a-z][a-z0-9-]*)", README))
    assert len(verbs) >= 4
    for verb in verbs:
        assert CliRunner().invoke(main, [verb, "--help"]).exit_code == 0, verb
    for path in re.findall(r"`((?:mobie|workflow|benchmarks)/[\w./-]+)`", README):
        assert (default_layout().root / Path(path)).exists(), path


def test_markdown_table_by_hand() -> None:
    assert markdown_table(["a", "b"], [["x", "1"]]) == "| a | b |\n| :-- | --: |\n| x | 1 |\n"
