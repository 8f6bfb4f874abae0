"""The paper as data: its tables, formulas, prompts, architectures and claims, and what its audit finds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import yaml

from mobie.paper.audit import Report, audit
from mobie.paper.audit.formulas import find_facts, formula_value
from mobie.paper.audit.tables import Paper
from mobie.paper.formulas import (
    Bits,
    ExpertShape,
    active_average_bits,
    active_factor,
    base_bits,
    cejd_active_bits,
    cejd_bits,
    cejd_weights,
    count_factor,
    count_overhead,
    static_average_bits,
    storage_factor,
    table6,
)
from mobie.paths import PACKAGE

FOLDER = PACKAGE / "paper"


@pytest.fixture(scope="module")
def report() -> Report:
    return audit(FOLDER)


@pytest.fixture(scope="module")
def architectures() -> dict[str, dict[str, str]]:
    with (FOLDER / "architectures.csv").open(newline="", encoding="utf-8") as file:
        return {row["model"]: row for row in csv.DictReader(file)}


# --- tables ----------------------------------------------------------------------------------------

ROWS = {"table1": 8, "table2": 30, "table3": 6, "table4": 14, "table5": 8, "table7": 20, "table8": 20, "table9": 14}


@pytest.mark.parametrize(("name", "rows"), [*ROWS.items(), ("table10", 27)])
def test_tables_have_all_rows_as_printed(name: str, rows: int) -> None:
    with (FOLDER / "tables" / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        table = list(csv.DictReader(file))
    assert len(table) == rows
    assert all(None not in row and None not in row.values() for row in table)


@pytest.mark.parametrize(
    ("reference", "text"),
    [
        ("table2/OLMoE, AWQ, 3/wikitext2_ppl", "7e2"),  # one digit is printed, and one is kept
        ("table2/DeepSeekV2-Lite, NoWag/bits", "2.10"),
        ("table2/Qwen3-MoE, MoBiE/winogrande", "65.90"),
        ("table4/Qwen3-Next-80B-A3B, true, true, true/avg4", "71.46"),
        ("table5/Qwen1.5-MoE, 4/avg7", "44.49"),
        ("table7/Mixtral, MxMoE/avg7", "67.89"),
        ("table8/OLMoE, AWQ, 2/humaneval", "0"),
        ("table9/DeepSeekMoE-16B-Chat, MoBiE/humaneval", "25.66"),
        ("table10/0.9, ptb/avg_ppl", "25.47"),
    ],
)
def test_entries_as_printed(reference: str, text: str) -> None:
    assert Paper(FOLDER).entry(reference).text == text


# --- formulas --------------------------------------------------------------------------------------

OLMOE_GATE = ExpertShape(experts=64, outputs=1024, inputs=2048, active=8)


def test_formulas_on_olmoe() -> None:
    """Gate projection: r = 1024, UΣ 1024², N·O·I = 134 217 728."""
    assert cejd_weights(OLMOE_GATE) == 1024**2 + 64 * 1024 * 2048
    assert count_factor(OLMOE_GATE) == pytest.approx(1 + 1 / 128)
    assert static_average_bits(OLMOE_GATE, Bits()) == pytest.approx(1 + 8 / 128)
    assert active_average_bits(OLMOE_GATE, Bits()) == pytest.approx(1.5)
    assert active_average_bits(OLMOE_GATE, Bits(shared=16)) == pytest.approx(2.0)
    assert storage_factor(OLMOE_GATE, Bits()) == pytest.approx((1 + 8 / 128) / 16)


@pytest.mark.parametrize(
    "shape", [OLMOE_GATE, ExpertShape(8, 14336, 4096, 2), ExpertShape(2, 64, 16, 1), ExpertShape(4, 12, 12, 4)]
)
def test_factors_are_the_printed_sums(shape: ExpertShape) -> None:
    """Right-hand sides of eqs. 39, 40, 42, 43, 44, for a rank below O (third shape) too."""
    n, o, i, k, r = shape.experts, shape.outputs, shape.inputs, shape.active, shape.rank
    bits = Bits(full=32, shared=8, expert=1.05)
    assert r == (o if n * i > o else n * i)
    assert count_factor(shape) == pytest.approx(r / (n * i) + r / o)
    assert storage_factor(shape, bits) == pytest.approx(r / (n * i) * 8 / 32 + r / o * 1.05 / 32)
    assert active_factor(shape, bits) == pytest.approx(r / (k * i) * 8 / 32 + r / o * 1.05 / 32)
    assert static_average_bits(shape, bits) == pytest.approx(r / (n * i) * 8 + r / o * 1.05)
    assert active_average_bits(shape, bits) == pytest.approx(r / (k * i) * 8 + r / o * 1.05)


def test_table6_at_full_rank() -> None:
    """The closed forms that Table 6 prints with r = O."""
    n, o, i, k = 64, 1024, 2048, 8
    rows = {row.quantity: (row.baseline, row.cejd) for row in table6(OLMOE_GATE, Bits())}
    assert rows == {
        "Static params (count)": (n * o * i, o * o + n * o * i),
        "Static storage (bits)": (n * o * i * 16, o * o * 8 + n * o * i),
        "Static CF (bits)": (None, pytest.approx(o / (n * i) * 8 / 16 + 1 / 16)),
        "Activation storage (bits)": (k * o * i * 16, o * o * 8 + k * o * i),
        "Activation CF (bits)": (None, pytest.approx(o / (k * i) * 8 / 16 + 1 / 16)),
        "Count-level overhead": (None, o * o),
    }
    assert count_overhead(OLMOE_GATE) == o * o
    assert cejd_bits(OLMOE_GATE, Bits()) < base_bits(OLMOE_GATE, Bits())
    assert cejd_active_bits(OLMOE_GATE, Bits()) < cejd_bits(OLMOE_GATE, Bits())


def test_claims_file_evaluates_the_same_equation() -> None:
    """Equation 44 as text in `claims.yaml` and as code in `formulas.py`, for every model and both V widths."""
    paper = Paper(FOLDER)
    formula = next(f for f in paper.document.formulas if f.name == "bits with an 8-bit UΣ")
    readings = {reading.name: reading for reading in formula.readings}
    for reference in formula.printed:
        facts = find_facts(paper, formula, paper.row(reference))
        hidden, width, experts, top_k = (
            int(facts[name].text) for name in ("hidden", "intermediate", "routed_experts", "top_k")
        )
        gate = ExpertShape(experts, width, hidden, top_k)
        down = ExpertShape(experts, hidden, width, top_k)
        for name, expert_bits in (("V 1 bit", 1.0), ("V 1.05 bits", 1.05)):
            bits = Bits(expert=expert_bits)
            assert formula_value(formula, readings[f"gate and up only, {name}"], facts) == pytest.approx(
                active_average_bits(gate, bits)
            )
            assert formula_value(formula, readings[f"three projections, {name}"], facts) == pytest.approx(
                (2 * active_average_bits(gate, bits) + active_average_bits(down, bits)) / 3
            )


# --- facts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "per_layer", "elsewhere"),
    [
        # per layer beside attention and experts: norms, router, biases; elsewhere: embeddings, head, last norm
        ("OLMoE-1B-7B-0125", 2 * 2048 + 2 * 2048 + 64 * 2048, 2 * 50304 * 2048 + 2048),
        ("Qwen1.5-MoE-A2.7B", 2 * 2048 + 3 * 2048 + 60 * 2048 + 2048, 2 * 151936 * 2048 + 2048),
        ("Qwen3-30B-A3B", 2 * 2048 + 2 * 128 + 128 * 2048, 2 * 151936 * 2048 + 2048),
        ("Mixtral-8x7B", 2 * 4096 + 8 * 4096, 2 * 32000 * 4096 + 4096),
    ],
)
def test_parameter_counts_follow_from_the_shapes(
    architectures: dict[str, dict[str, str]], model: str, per_layer: int, elsewhere: int
) -> None:
    row = {name: int(text) for name, text in architectures[model].items() if text.isdigit()}
    expert = 3 * row["hidden"] * row["intermediate"]
    layer = row["attention_parameters"] + (row["routed_experts"] + row["shared_experts"]) * expert + per_layer
    assert row["layers"] * layer + elsewhere == row["parameters"]


def test_prompts_are_of_models_of_the_paper(architectures: dict[str, dict[str, str]]) -> None:
    table = yaml.safe_load((FOLDER / "prompts.yaml").read_text(encoding="utf-8"))
    models = [entry["model"] for entry in table["prompts"]]
    assert len(models) == len(set(models)) == 4
    assert set(models) <= set(architectures)
    assert all(entry["prompt"].strip() == entry["prompt"] for entry in table["prompts"])


# --- claims and audit ------------------------------------------------------------------------------


CLAIMS = """
ppl-qwen3 acc-qwen3 speed memory bits-cost vs-gptq3 best-binary global-bits cejd-largest ablation-15 shift-cost routing
routing-qwen u8-enough time acc-gain calib-robust lambda hard-tasks instruct moe-specific plug-in fp16-1b
"""


def test_claims_are_told_in_full(report: Report) -> None:
    assert set(CLAIMS.split()) <= {claim.id for claim in report.claims}
    for claim in report.claims:
        assert claim.where and claim.claim and claim.reason and claim.tolerance and claim.needs


CONTRADICTED = {
    "best-binary": "MoBiE, 1.47 (25.34) is in place 2 of 3 after DeepSeekV2-Lite, ARB-LLM, 1.11 (26.28)",
    "best-all": "OLMoE, MoBiE, 1.46 (67.46) is in place 2 of 9 after OLMoE, GPTQ, 3 (69.29)",
    "bits-linear": "the entries give 2.217, stated 2.000",
    "active-savings": "the entries give 0.02734, stated below 0",  # 1024/2048 · (1/8 - 1/64) · 8/16
    "small-k": "the entries give 3.5, stated below 0",  # 1024/2048 · (1 - 1/8) · 8
    "six-models": "Mixtral of table7/*/model is not in table3/*/model",
    "vs-gptq3-more": "Mixtral: the entries give 0.5333, stated below 0.5",
    "moe-specific": "Qwen1.5-MoE, QuantMoE-Bench: the entries give 32.67, stated above 40",
    "moe-specific-every-task": "MoBiE, 1.35 (29.35) is in place 2 of 3 after Qwen1.5-MoE, MoEQuant, 2 (35.09)",
    "tasks-table9": "the entries give 3, stated 5",
    "lambda": "0.2, ptb (25.00) is in place 4 of 9 after 0.4, ptb (24.41), 0.6, ptb (24.79), 0.8, ptb (24.95)",
}


def test_contradicted_statements(report: Report) -> None:
    contradicted = {c.id: c.reason for c in report.claims if c.verdict.startswith("contradicted")}
    assert set(contradicted) == set(CONTRADICTED)
    for name, told in CONTRADICTED.items():
        assert told in contradicted[name]


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ppl-qwen3", "the entries give 52.17, stated 52.2"),
        ("acc-qwen3", "the entries give 43.45, stated 43.4"),
        ("bits-cost", "the entries give 0.23, stated 0.23"),
        ("speed", "the entries give 2.33, stated 2.33"),
        ("instruct", "the entries give 78.55, stated about 80"),
        ("instruct-humaneval", "the entries give 26.19, stated below 28"),
        ("shift-increments", "the entries give 12.46, stated 12.46"),
    ],
)
def test_supported_statements(report: Report, name: str, told: str) -> None:
    claim = next(c for c in report.claims if c.id == name)
    assert claim.verdict == "supported by the entries"
    assert told in claim.reason


@pytest.mark.parametrize(
    ("name", "reading"),
    [
        ("ablation-15", "read as: in points; not as: relative"),
        ("mxmoe-quality", "read as: mean of the two models; not as: for each model"),
        ("hard-drop", "read as: mean of the generative tasks; not as: every generative task"),
        ("hard-tasks", "read as: against every row but the 3-bit ones; not as: against every quantized row"),
    ],
)
def test_statements_that_hold_under_one_reading(report: Report, name: str, reading: str) -> None:
    claim = next(c for c in report.claims if c.id == name)
    assert (claim.verdict, claim.reading) == ("supported by the entries", reading)


def test_averages_that_are_not_the_mean(report: Report) -> None:
    """Each worked out by hand from the printed entries."""
    found = {f.where: f.sentence for f in report.findings if f.check == "average" and f.outcome == "differs"}
    assert found == {
        "Table 7, Qwen1.5-MoE, QuantMoE-Bench, 2.3, avg7": "the entries give 37.70, printed 37.74",
        "Table 8, OLMoE, Baseline, 16, avg5": "the entries give 33.49, printed 33.45",
        "Table 8, Qwen1.5-MoE, GPTQ, 3, avg5": "the entries give 37.62, printed 37.48",
        "Table 8, Qwen1.5-MoE, AWQ, 2, avg5": "the entries give 6.10, printed 12.10",
        "Table 9, Qwen-MoE-14B-Chat, MoBiE, 1.35, avg3": "the entries give 29.05, printed 29.08",
        "Table 10, 0.2, ptb, avg_ppl": "the entries give 25.00, printed 24.67",
        "Table 10, 0.6, ptb, avg_ppl": "the entries give 24.79, printed 24.82",
    }


def test_the_full_precision_row_of_two_models_is_one(report: Report) -> None:
    repeats = [f for f in report.findings if f.check == "repeated row" and f.severity == "inconsistency"]
    assert [f.where for f in repeats] == ["Table 2, OLMoE, Baseline, 16 and Table 7, Qwen1.5-MoE, Baseline, 16"]


def test_settings_given_differently(report: Report) -> None:
    found = {f.where: f.sentence for f in report.findings if f.check == "setting" and f.severity == "inconsistency"}
    assert found == {
        "default of the NGES regularization λ": "the places give 5.1: 0.2, B.4.6, Table 10: 0.2, Algorithm 4: 0.1",
        "bits of Qwen1.5-MoE with an 8-bit UΣ": "the places give 5.4: 1.37, Table 5: 1.35, "
        "Table 7: 1.35, Table 8: 1.35",
        "average accuracy of Qwen1.5-MoE in full precision": "the places give Table 5: 67.98, Table 7: 69.88",
    }


def test_activated_memory_is_that_of_four_tokens(report: Report) -> None:
    """2 · (24 · (4·2048² + 20 · 3·2048·1408) + 2 · 151936 · 2048) bytes = 9.64 GiB; blocks at 1.35 bits: 1.88 GiB."""
    embeddings = 2 * 151936 * 2048
    blocks = 24 * (4 * 2048**2 + 20 * 3 * 2048 * 1408)
    assert round(2 * (blocks + embeddings) / 2**30, 2) == 9.64
    assert round((blocks * 1.35 / 8 + 2 * embeddings) / 2**30, 2) == 1.88
    found = {f.where: f.outcome for f in report.findings if f.where.startswith("text, memory")}
    assert found == {
        "text, memory-fp16: activated memory in FP16": "agrees",
        "text, memory-mobie: activated memory with MoBiE": "agrees",
    }


@pytest.mark.parametrize("path", sorted(FOLDER.rglob("*.yaml")), ids=lambda path: Path(path).name)
def test_words_are_neutral(path: Path) -> None:
    text = path.read_text(encoding="utf-8").lower()
    for word in ("fabricat", "fraud", "fake", "suspicious", "dishonest", "cherry-pick", "misconduct", "invented"):
        assert word not in text
