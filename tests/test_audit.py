"""The audit on a made-up paper, every finding worked out by hand, and its errors."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mobie.errors import ConfigError, DataError
from mobie.paper.audit import Finding, Report, audit, to_json, to_markdown, to_text
from mobie.paper.audit.command import audit_command
from mobie.paper.audit.entries import chance_of_passing, possible_fraction
from mobie.paper.audit.expressions import evaluate, parse_entry, shown
from mobie.paper.audit.rows import _tail

EXAMPLE = Path(__file__).parent / "data" / "example_paper"


@pytest.fixture(scope="module")
def report() -> Report:
    return audit(EXAMPLE)


@pytest.fixture
def paper(tmp_path: Path) -> Path:
    """A copy of the example to spoil."""
    return Path(shutil.copytree(EXAMPLE, tmp_path / "paper"))


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) >= 1
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def found(report: Report, check: str, outcome: str) -> list[Finding]:
    return [f for f in report.findings if f.check == check and f.outcome == outcome]


# --- findings --------------------------------------------------------------------------------------


def test_an_average_that_is_not_the_mean_of_its_parts(report: Report) -> None:
    (finding,) = found(report, "average", "differs")
    assert finding.where == "Table 1, Ear, Tiny, mean"
    assert finding.severity == "inconsistency"
    assert finding.sentence == "the entries give 83.31, printed 83.91"
    assert finding.arithmetic == "(90.63 + 82.03 + 77.27) / 3 = 83.3100"
    (agreeing,) = found(report, "average", "agrees")
    assert agreeing.sentence.startswith("7 averages")


@pytest.mark.parametrize(("printed", "differs"), [("83.31", False), ("83.32", False), ("83.33", True), ("83.29", True)])
def test_an_average_may_be_off_by_the_rounding_of_its_parts(paper: Path, printed: str, differs: bool) -> None:
    """Mean 83.31; half a unit of the parts and half a unit of the average: 0.01 in all."""
    edit(paper / "main.csv", "83.91", printed)
    assert bool(found(audit(paper), "average", "differs")) is differs


def test_one_row_that_two_tables_print_differently(report: Report) -> None:
    """`BigNose` of Table 2 is `Nose` of Table 1."""
    (finding,) = found(report, "same row", "differs")
    assert finding.where == "Table 1 and Table 2, Nose, Tiny, size_mb"
    assert finding.sentence == "Table 1 prints 7.0, Table 2 7.2"
    (agreeing,) = found(report, "same row", "agrees")
    assert agreeing.sentence == "2 entries that both print agree"


def test_rows_that_repeat(report: Report) -> None:
    """Whole differences come once in 640/20, 1280/20 and 330/10 pairs; there are 28 pairs."""
    template, identical = sorted(found(report, "repeated row", "differs"), key=lambda f: f.severity, reverse=True)
    expected = 28 * (20 / 640) * (20 / 1280) * (10 / 330)
    assert identical.where == "Table 1, Ear, Original and Table 1, Nose, Original"
    assert identical.severity == "inconsistency"
    assert identical.sentence == (
        f"all 3 accuracies are equal under different names; {expected:.1g} such pairs are expected among unrelated rows"
    )
    assert template.where == "Table 1, Ear, Round and Table 1, Nose, Sketch"
    assert template.severity == "notice"
    assert template.sentence.startswith("3 of 3 accuracies differ by a whole number (0 by 0.00)")
    (rest,) = found(report, "repeated row", "agrees")
    assert rest.sentence.startswith("26 of 28 pairs")


def test_rows_under_one_name_do_not_repeat(paper: Path) -> None:
    """Once `Nose` is another name of `Ear`, their equal rows are one row and no finding."""
    edit(paper / "claims.yaml", "  Nose: [BigNose]", "  Ear: [Nose, BigNose]")
    edit(paper / "facts.csv", "Nose,16,1\n", "")
    pairs = {f.where for f in found(audit(paper), "repeated row", "differs")}
    assert pairs == {"Table 1, Ear, Round and Table 1, Nose, Sketch"}


def test_binomial_tail_against_enumeration() -> None:
    rates = [0.01, 0.2, 0.5]
    exact = sum(
        math.prod(r if bit else 1 - r for r, bit in zip(rates, bits, strict=True))
        for bits in [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1)]
        if sum(bits) >= 2
    )
    assert _tail(rates, 2) == pytest.approx(exact, rel=1e-12)


def test_a_printed_number_against_a_formula(report: Report) -> None:
    """Ear: 8·2/8 + 0.5·2 = 3. Nose: 16·2/8 + 1·4 = 8 or 16·2/8 + 1·2 = 6, neither is 7.0."""
    (agreeing,) = found(report, "formula", "agrees")
    assert agreeing.sentence == "printed 3.0, which the reading 'codebook in 2 bytes' gives"
    (finding,) = found(report, "formula", "differs")
    assert finding.sentence.startswith("none of 2 readings gives the printed 7.0")
    assert finding.entries == ("printed 7.0", "codebook in 4 bytes: 8.000", "codebook in 2 bytes: 6.000")


def test_settings(report: Report) -> None:
    """0.1 and 0.10 are one number; 7.0 and 7.2 are not."""
    (agreeing,) = found(report, "setting", "agrees")
    (finding,) = found(report, "setting", "differs")
    assert (agreeing.where, finding.where) == ("learning rate", "size of Nose")
    assert finding.sentence == "the places give section 4: 7.0, Table 2: 7.2"
    assert finding.severity == "inconsistency"
    assert finding.explanations == ("another file format",)


def test_possible_fractions(report: Report) -> None:
    """764/1280 = 59.69, 1088/1280 = 85.00, 110/330 = 33.33; all of `digits` are fractions of 640."""
    letters, words = found(report, "fraction", "differs")
    assert letters.entries == (
        "Nose, Sketch 59.70 (nearest 764/1280 = 59.69)",
        "Nose, Tiny 84.99 (nearest 1088/1280 = 85.00)",
    )
    assert words.entries == ("Nose, Sketch 33.30 (nearest 110/330 = 33.33)",)
    assert words.sentence.startswith("7 of 8 entries are a fraction of 330 items; of unrelated numbers 3.3 % are")
    assert letters.severity == words.severity == "notice"
    assert any("another number of items" in text for text in letters.explanations)
    (digits,) = found(report, "fraction", "agrees")
    assert digits.sentence.startswith("8 of 8 entries are a fraction of 640 items")


def test_a_check_that_every_number_passes_says_nothing(paper: Path) -> None:
    edit(paper / "claims.yaml", "items: 1280", "items: 20000")
    (finding,) = found(audit(paper), "fraction", "not checkable")
    assert finding.severity == "info"
    assert finding.sentence.startswith("100 % of all numbers")


@pytest.mark.parametrize("items", [1, 7, 164, 500, 1172])
def test_possible_fractions_against_enumeration(items: int) -> None:
    """Every rounded k/n passes, and the chance rate is the share of all two-decimal numbers that pass."""
    passing = {c for c in range(10001) if possible_fraction(parse_entry(f"{c / 100:.2f}"), items)}
    reachable = {round(10000 * k / items) for k in range(items + 1)}
    assert reachable <= passing
    assert len(passing - reachable) <= items  # only where k/n lies half way between two numbers
    assert chance_of_passing(items, 0.005) == pytest.approx(len(reachable) / 10001)


def test_below_chance_and_above_the_reference(report: Report) -> None:
    """4 standard errors below 10 % of 330 items: 10 - 4·1.6514 = 3.39; 98.44 is 4.4 standard errors above 93.75."""
    (chance,) = found(report, "chance", "differs")
    assert chance.entries == ("Nose, Round 1.52",)
    assert chance.arithmetic == "standard error at 10 % of 330 items: 1.65; limit 3.39"
    (reference,) = found(report, "reference", "differs")
    assert reference.entries == ("Nose, Tiny, digits 98.44, reference 93.75 (4.4 standard errors)",)
    assert len(found(report, "chance", "agrees")) == 1


VERDICTS = {
    "smaller": "supported by the entries",  # 32.0 / 3.0 = 10.67
    "faster": "contradicted by the paper's own entries",  # (40 - 18) / 40 = 55 %
    "best-words": "supported by the entries",
    "best-mean": "contradicted by the paper's own entries",  # only by the means of the entries: 83.31 < 83.53
    "round-second": "contradicted by the paper's own entries",  # Nose, letters: third
    "gain": "supported by the entries",  # as points
    "halved": "not checkable",  # Nose: 7 / 16 > 0.4, but the check rests on a supposition
    "figure": "not checkable",
    "same-size": "supported by the entries",
    "all-models-timed": "contradicted by the paper's own entries",
}


def test_verdicts(report: Report) -> None:
    assert {claim.id: claim.verdict for claim in report.claims} == VERDICTS


def test_what_a_statement_is_told_with(report: Report) -> None:
    claims = {claim.id: claim for claim in report.claims}
    assert claims["faster"].reason == "fall in per cent: the entries give 55, stated 60"
    assert "Ear, Tiny (83.31) is in place 2 of 3 after Ear, Plain (83.53)" in claims["best-mean"].reason
    assert "Nose, Round (54.69) is in place 3 of 3" in claims["round-second"].reason
    assert claims["gain"].reading == "read as: points; not as: relative"
    assert "0.4375, stated at most 0.4 (supposing that" in claims["halved"].reason
    assert claims["figure"].reason == "the values stand in Figure 1 only"
    assert "Round of main/*/method is not in latency/*/method" in claims["all-models-timed"].reason


def test_severities_of_statements(report: Report) -> None:
    statements = {f.where.split("(")[1].split(")")[0]: f.severity for f in report.findings if f.check == "statement"}
    assert statements == {
        "smaller": "info",
        "faster": "inconsistency",
        "best-words": "info",
        "best-mean": "inconsistency",
        "round-second": "notice",  # as declared
        "gain": "notice",  # one reading fails
        "halved": "notice",
        "same-size": "info",
        "all-models-timed": "inconsistency",
    }


@pytest.mark.parametrize(
    ("relation", "printed", "verdict"),
    [
        ("equals", "55", "supported"),
        ("equals", "55.0", "supported"),  # 40 and 18 are rounded: 55 may be 53.3 to 56.8
        ("equals", "57.5", "contradicted"),
        ("at_least", "55", "supported"),
        ("at_least", "58", "contradicted"),
        ("above", "50", "supported"),
        ("at_most", "52", "contradicted"),
        ("below", "58", "supported"),
        ("below", "52", "contradicted"),
    ],
)
def test_relations_within_rounding(paper: Path, relation: str, printed: str, verdict: str) -> None:
    edit(paper / "claims.yaml", 'printed: "60"', f'printed: "{printed}"\n        relation: {relation}')
    faster = next(claim for claim in audit(paper).claims if claim.id == "faster")
    assert faster.verdict.split()[0] == verdict


def test_about_allows_more_than_rounding(paper: Path) -> None:
    edit(paper / "claims.yaml", 'printed: "60"', 'printed: "60"\n        about: 5')
    faster = next(claim for claim in audit(paper).claims if claim.id == "faster")
    assert faster.verdict == "supported by the entries"


# --- arithmetic ------------------------------------------------------------------------------------


def test_printed_numbers_know_their_rounding() -> None:
    assert (parse_entry("14.37").value, parse_entry("14.37").half) == (14.37, pytest.approx(0.005))
    assert (parse_entry("7e2").value, parse_entry("7e2").half) == (700.0, pytest.approx(50.0))
    assert parse_entry("0", decimals=2).half == pytest.approx(0.005)
    assert parse_entry("64", exact=True).half == 0.0
    assert parse_entry("fp16").value is None
    assert parse_entry("").value is None


def test_rounding_is_carried_through_arithmetic() -> None:
    a, b = parse_entry("26.76"), parse_entry("12.80")
    value, tolerance = evaluate("100 * (a - b) / a", {"a": a, "b": b})
    assert value == pytest.approx(100 * (26.76 - 12.80) / 26.76)
    extremes = [100 * (x - y) / x for x in (26.755, 26.765) for y in (12.795, 12.805)]
    assert tolerance == pytest.approx(max(abs(e - value) for e in extremes), rel=1e-2)
    assert shown("100 * (a - b) / a", {"a": a, "b": b}) == "100 * (26.76 - 12.80) / 26.76"


def test_functions_over_lists() -> None:
    values = {"x": [parse_entry("1.0"), parse_entry("3.0")], "y": parse_entry("2.0")}
    assert evaluate("mean(x)", values) == (pytest.approx(2.0), pytest.approx(0.05))
    assert evaluate("max(x, y) - min(x)", values)[0] == pytest.approx(2.0)
    assert evaluate("count(x) + sum(x) + abs(-y) + y ** 2", values)[0] == pytest.approx(12.0)
    assert evaluate("count(names)", {"names": [parse_entry("a"), parse_entry("b")]}) == (2.0, 0.0)


@pytest.mark.parametrize(
    ("expression", "message"),
    [
        ("a +", "is no arithmetic"),
        ("b", "unknown value 'b'"),
        ("a / (a - a)", "1 and 0: truediv gives no number"),
        ("(-a) ** 0.5", "gives no number"),
        ("10 ** 10 ** 10", "gives no number"),
        ("mean()", "mean() of 0 values"),
        ("abs(a, a)", "abs() of 2 values"),
        ("mena(x)", "unknown function 'mena'; did you mean mean"),
        ("x", "x is a list"),
        ("mean(names)", "an entry is no number"),
        ("label + 1", "got 'text' in arithmetic"),
        ("a.real", "is not understood"),
        ("__import__('os')", "is not understood"),
        ("a < 1", "is not understood"),
    ],
)
def test_arithmetic_that_is_refused(expression: str, message: str) -> None:
    values = {
        "a": parse_entry("1"),
        "x": [parse_entry("1")],
        "names": [parse_entry("n")],
        "label": parse_entry("text"),
    }
    used = {name: entry for name, entry in values.items() if name != "label" or "label" in expression}
    with pytest.raises(ConfigError, match=re.escape(message)):
        evaluate(expression, used)


# --- bad input -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("where: Table 1", "wher: Table 1", "unknown key in tables.main 'wher'; did you mean where"),
        ("tolerance: timing", "tolerence: timing", r"unknown key in claims.1 'tolerence'; did you mean tolerance"),
        ("tolerance: timing\n", "\n", "missing key 'claims.1.tolerance'"),
        ('printed: "60"', "printed: 60", "claims.1.checks.0.printed: .*; got 60"),
        ("role: accuracy", "role: acuracy", "columns.digits.role: .*'acuracy'"),
        (
            "main/Ear, Original/size_mb",
            "mian/Ear, Original/size_mb",
            "claim smaller: unknown table 'mian'; did you mean main",
        ),
        (
            "main/Ear, Original/size_mb",
            "main/Ear, Orignal/size_mb",
            "unknown row 'Ear, Orignal'; did you mean Ear, Original",
        ),
        ("main/Ear, Original/size_mb", "main/Ear, Original/size", "unknown column 'size'; did you mean size_mb"),
        ("main/Ear, Original/size_mb", "main/Ear/size_mb", "4 rows fit"),
        ("main/Ear, Original/size_mb", "main/Ear, Original, 32/size_mb", "unknown row 'Ear, Original, 32'"),
        ("main/Ear, Original/size_mb", "main/size_mb", "got 2 parts, expected TABLE/ROW/COLUMN"),
        ("latency/BigNose, Tiny/size_mb", "latency/BigNose, Tony/size_mb", "setting size of Nose: .*unknown row"),
        ("id: faster", "id: smaller", "claim 'smaller' is there twice"),
        ("compute: a / b, ", "", "exactly one of"),
        ('value: "0.10"', 'value: "0.10", entry: x', "expected either `value` or `entry`"),
        ("not_checkable: the values", "quote: the values", "expected `checks`, or `not_checkable`"),
        ("columns: [words]", "columns: [wrods]", "unknown column of main 'wrods'; did you mean words"),
        ("method: [Tiny]}, excluding", "method: [Teeny]}, excluding", "compares nothing: no row fits"),
        ("key: [model, method], reference", "key: [model, metod], reference", "table main: unknown column 'metod'"),
        ("file: facts.csv", "file: fact.csv", "fact.csv: cannot be read"),
        ("facts: facts\n", "facts: fact\n", "unknown table 'fact'"),
        ("  digits: {role", "  digit: {role", "unknown column 'digits'; did you mean digit"),
        ("paper:\n", "paper: [\n", "not valid YAML"),
    ],
)
def test_mistakes_in_the_yaml_are_named(paper: Path, old: str, new: str, message: str) -> None:
    edit(paper / "claims.yaml", old, new)
    with pytest.raises((ConfigError, DataError), match=message):
        audit(paper)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a table"),
        ("model,weights,codebook\nEar,8\n", "line 2: got 2 fields, expected 3"),
        ("model,weights,codebook\nEar,8,0.5\n", "formula size: unknown model 'Nose'"),
        ("model,weights,codebook\nEar,8,1\nEar,9,1\n", "two rows have the key Ear"),
        ("model,weights,codebooks\nEar,8,1\n", "unknown column 'codebooks'; did you mean codebook"),
        ("model,weights,codebook\nEar,8,many\nNose,16,1\n", "unknown value 'codebook'"),
    ],
)
def test_damaged_tables_are_named(paper: Path, text: str, message: str) -> None:
    (paper / "facts.csv").write_text(text)
    with pytest.raises((ConfigError, DataError), match=message):
        audit(paper)


def test_a_folder_without_claims(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected the folder of a paper: claims.yaml"):
        audit(tmp_path)
    (tmp_path / "claims.yaml").write_text("- a list\n")
    with pytest.raises(ConfigError, match="got list, expected keys paper"):
        audit(tmp_path)


# --- output ----------------------------------------------------------------------------------------


def test_json_holds_everything(report: Report) -> None:
    value = json.loads(to_json(report))
    assert value["counts"] == {"inconsistency": 6, "notice": 10, "info": 0, "agrees": 10}
    assert value["verdicts"] == {
        "contradicted by the paper's own entries": 4,
        "not checkable": 2,
        "supported by the entries": 4,
    }
    assert len(value["findings"]) == len(report.findings) and len(value["claims"]) == 10
    assert {"check", "where", "outcome", "severity", "sentence", "entries", "arithmetic", "explanations"} <= set(
        value["findings"][0]
    )


@pytest.mark.parametrize("render", [to_text, to_markdown])
def test_text_shows_differences_and_agreement(report: Report, render: object) -> None:
    text = render(report)  # type: ignore[operator]
    assert "the entries give 83.31, printed 83.91" in text
    assert "7 averages are the mean of their 3 parts" in text
    assert "halved" in text and "Figure 1 shows the models of Table 1" in text
    assert text.count("another number of items") == 1  # explanations of a kind are told once
    assert text.endswith("\n")


def test_command_prints_and_saves(tmp_path: Path) -> None:
    runner = CliRunner()
    printed = runner.invoke(audit_command, [str(EXAMPLE), "--json"], catch_exceptions=False)
    assert printed.exit_code == 0
    files = [tmp_path / name for name in ("a.json", "a.md", "a.txt")]
    options = [option for file in files for option in ("--save", str(file))]
    saved = runner.invoke(audit_command, [str(EXAMPLE), *options], catch_exceptions=False)
    assert saved.output.split() == [str(file) for file in files]
    assert files[0].read_text(encoding="utf-8") == printed.output
    assert files[1].read_text(encoding="utf-8").startswith("# Audit")
    with pytest.raises(ConfigError, match="got suffix '.pdf', expected .json, .md, .txt"):
        runner.invoke(audit_command, [str(EXAMPLE), "--save", "a.pdf"], catch_exceptions=False)


def test_audit_of_the_paper_needs_no_torch_and_less_than_a_second() -> None:
    """Processor time, so that a busy machine does not count."""
    code = (
        "import sys, time; from click.testing import CliRunner\n"
        "from mobie.paper.audit.command import audit_command\n"
        "result = CliRunner().invoke(audit_command, ['--json'], catch_exceptions=False)\n"
        "assert result.exit_code == 0 and result.output.startswith('{')\n"
        "assert not {'torch', 'transformers', 'numpy'} & set(sys.modules)\n"
        "print(time.process_time())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.0
