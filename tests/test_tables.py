"""All tables: what every one of them must do, in both suites, and the values of Tables 1 and 3 to 11 from records made
by hand, against sums done here."""

from __future__ import annotations

import csv
import io
import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import gate_records
import pytest
import speed_records
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mobie.config import config_names, load_method, load_model_config
from mobie.errors import ConfigError
from mobie.paper.printed import printed_rows
from mobie.paths import PACKAGE, Layout, paper_table
from mobie.records import Measurement, Record, write_record
from mobie.results import Cell, Model, Results
from mobie.tables import TABLES, build_table, table_records
from mobie.tables.architectures import architecture_of
from mobie.tables.table import (
    WRITERS,
    Column,
    Row,
    Table,
    is_best,
    latex_escape,
    markdown_text,
    to_csv,
    to_latex,
    to_markdown,
)
from mobie.tables.table1 import difference_error
from mobie.tables.table4 import PARTS
from mobie.tables.table4 import ROWS as ABLATIONS
from mobie.tables.table10 import average_perplexity, rank, sweep_method, text_names

SUITES = ("smoke", "paper")
NANO = "nano-olmoe"
every_table = pytest.mark.parametrize("name", TABLES)
every_suite = pytest.mark.parametrize("suite", SUITES)


def write(
    layout: Layout,
    method: str,
    kind: str,
    values: Mapping[str, float],
    *,
    model: str = NANO,
    suite: str = "smoke",
    **how: object,
) -> None:
    """A record with these values, each with a standard error of a tenth of it."""
    found = tuple(Measurement(name, value, abs(value) / 10, 100) for name, value in values.items())
    keys = {"suite": suite, "model": model, "method": method, "seed": 0, "protocol": "p"}
    record = Record(kind, **({"status": "ok", "reason": None} | how), **keys, measurements=found)
    write_record(layout.record(suite, model, method, 0, kind), record)


def read(table: Table) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(to_csv(table))))


def row_of(table: Table, **wanted: str) -> Row:
    """The row with this model, label, config, section."""
    (found,) = [row for row in table.rows if all(getattr(row, key) == value for key, value in wanted.items())]
    return found


def holes(table: Table) -> Iterator[tuple[str, Cell]]:
    """Cells without a value, with their column; a text column has one only where its text is missing."""
    for row in table.rows:
        for column, cell in row.cells.items():
            if cell.value is None and column not in row.texts:
                yield f"{row.label}: {column}", cell


def fill(layout: Layout, suite: str, name: str) -> None:
    """Write every record that a table reads, all with the same values."""
    results = Results(suite, layout)
    texts, tasks = results.protocol.texts, results.protocol.tasks.tasks
    nll = [2.0, 3.0, 4.0]
    shift = ("full_weights.full_routing", "full_weights.shifted_routing")
    shift += ("quantized_weights.full_routing", "quantized_weights.shifted_routing")
    prompts = [entry["prompt"] for entry in _prompts()]
    sample = {"text": "so | it goes", "tokens": 4, "finished": True, "repetition": 0.5}
    contents = {
        "quantize": ({"bits_paper": 1.5, "bits_codes": 1.2, "bits_stored": 2.0}, {"bits_by_component": _components()}),
        "perplexity": ({f"{t}.perplexity": 20.0 for t in texts}, {"window_nll": dict.fromkeys(texts, nll)}),
        "tasks": ({f"{t}.{m}": 0.5 for t in tasks for m in ("acc", "acc_norm")}, {}),
        "routing": ({"similarity": 0.9, "expert_shift": 0.1}, {}),
        "shift": (dict.fromkeys(shift, 20.0), {"window_nll": dict.fromkeys(shift, nll)}),
        "hard": ({"mmlu.acc": 0.3, "gsm8k.exact_match": 0.2, "mathqa.acc": 0.2}, {}),
        "code": ({"mbpp.pass@1": 0.1, "humaneval.pass@1": 0.1}, {}),
        "generations": (
            {"tokens": 4.0, "repetition": 0.5},
            {"samples": [{"id": f"prompt-{i}", "model": "m", "prompt": p} | sample for i, p in enumerate(prompts, 1)]},
        ),
        "speed": ({"tokens_per_second": 50.0}, speed_records.details("table")),
        "gate": ({m.name: m.value for m in gate_records.MEASUREMENTS}, gate_records.details()),
    }
    for path in table_records(name, suite, layout):
        model, method, _, file = path.relative_to(layout.root).parts[2:]
        values, details = contents[file.removesuffix(".json")]
        write(layout, method, file.removesuffix(".json"), values, model=model, suite=suite, details=details)


def _components() -> dict[str, dict[str, float]]:
    return {
        "experts": {"paper": 3.1, "codes": 1.6, "stored": 1.9, "weights": 6291456},
        "attention": {"paper": 1.1, "codes": 1.1, "stored": 3.0, "weights": 1048576},
    }


def _prompts() -> list[dict[str, str]]:
    import yaml

    return yaml.safe_load((PACKAGE / "paper" / "prompts.yaml").read_text())["prompts"]


@pytest.fixture(scope="module")
def states(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Layout]:
    """Repositories with no record, with every record that a table reads, and with records of jobs that failed.

    Nothing but this writes into them.
    """
    layouts = {}
    for state in ("empty", "filled", "failed"):
        root = tmp_path_factory.mktemp(state)
        shutil.copytree(PACKAGE.parent / "workflow", root / "workflow")
        layouts[state] = Layout(root)
    for suite in SUITES:
        for name in TABLES:
            fill(layouts["filled"], suite, name)
            for path in table_records(name, suite, layouts["failed"]):
                model, method, _, file = path.relative_to(layouts["failed"].root).parts[2:]
                how = {"status": "oom", "reason": "no memory"}
                write(layouts["failed"], method, file.removesuffix(".json"), {}, model=model, suite=suite, **how)
    return layouts


# --- every table ------------------------------------------------------------------------------------------------------


@every_suite
@every_table
def test_a_plan_asks_for_what_building_reads_whatever_is_there(
    states: dict[str, Layout], suite: str, name: str
) -> None:
    for layout in states.values():
        planned = table_records(name, suite, layout)
        assert len(planned) == len(set(planned))
        results = Results(suite, layout)
        build_table(name, results)
        assert list(results.asked) == planned
    assert {path.exists() for path in planned} <= {True}


@every_suite
@every_table
def test_every_hole_has_a_reason_and_every_entry_of_the_paper_a_column(
    states: dict[str, Layout], suite: str, name: str
) -> None:
    for state, layout in states.items():
        table = build_table(name, Results(suite, layout))
        columns = {column.key for column in table.columns}
        assert table.rows
        for row in table.rows:
            assert set(row.cells) | set(row.texts) | set(row.paper) <= columns
            assert set(row.texts) <= {column.key for column in table.columns if not column.numeric}
            for column in table.columns:  # a text or a hole, never both missing, where a row has the column
                assert (
                    column.numeric or column.key in row.texts or row.section == "All prompts" or column.key in row.cells
                )
        for where, cell in holes(table):
            assert cell.status != "ok" and cell.reason, where
            statuses = {
                "empty": ("missing", "absent"),
                "filled": ("absent", "unsupported"),
                "failed": ("oom", "absent"),
            }
            assert cell.status in statuses[state], where
        markdown = to_markdown(table)
        for _, cell in holes(table):
            assert f"{cell.status}: {cell.reason}" in markdown


@every_suite
@every_table
def test_the_same_records_give_the_same_bytes(states: dict[str, Layout], suite: str, name: str) -> None:
    once, again = (build_table(name, Results(suite, states["filled"])) for _ in range(2))
    for suffix, writer in WRITERS.items():
        assert writer(once) == writer(again)
        assert writer(once).endswith("\n"), suffix
        assert str(states["filled"].root) not in writer(once)


@every_suite
@every_table
def test_the_latex_is_well_formed(states: dict[str, Layout], suite: str, name: str) -> None:
    check_latex(to_latex(build_table(name, Results(suite, states["filled"]))))


def check_latex(text: str) -> None:
    """Plain characters, balanced braces, dollars and environments, and as many cells in a row as columns."""
    first, *lines = text.splitlines()
    assert first.startswith("% ")
    body = "\n".join(lines)
    assert body.isascii() and "[U+" not in body
    bare = re.sub(r"\\[&%$#_{}]", "", body)  # without escaped characters
    assert not re.search(r"[%#_~^]", re.sub(r"\$\^\d\$", "", bare))
    depth = 0
    for character in bare:
        depth += {"{": 1, "}": -1}.get(character, 0)
        assert depth >= 0
    assert depth == 0 and bare.count("$") % 2 == 0
    for environment in ("table", "tabular"):
        assert body.count(rf"\begin{{{environment}}}") == body.count(rf"\end{{{environment}}}") > 0
    for align, rows in re.findall(r"\\begin\{tabular\}\{(.*?)\}\n(.*?)\\end\{tabular\}", bare, re.DOTALL):
        count = len(re.sub(r"\{.*?\}", "", align))
        for line in rows.splitlines():
            if line.endswith(r"\\"):
                assert line.count("&") == count - 1, line


@every_table
def test_the_papers_columns_stand_in_the_csv(states: dict[str, Layout], name: str) -> None:
    """By the same names; Table 10's are one group of columns for each calibration text."""
    if not paper_table(name).exists() or name == "table10":
        return
    header = paper_table(name).read_text().splitlines()[0].split(",")
    for suite in SUITES:
        ours = list(read(build_table(name, Results(suite, states["empty"])))[0])
        assert [column for column in ours if column in header] == header


@every_table
def test_every_printed_entry_stands_in_the_paper_suite(states: dict[str, Layout], name: str) -> None:
    """The CSV beginning with keys; every model of a table is one of the suite's for it, be it absent."""
    keys = {"model", "method", "lambda", "calibration", *("quantized", "expert_shift", "backbone_bits"), *PARTS}
    table = build_table(name, Results("paper", states["empty"]))
    shown = sorted(value for row in table.rows for value in row.paper.values())
    expected = []
    for row in printed_rows(name):
        expected += [float(text) for key, text in row.items() if key not in keys and text]
    if name == "table1":  # and the increase in parentheses, computed from them
        expected += [4.18, 6.47, 8.84, 5.90, 9.02, 12.46]
    assert shown == sorted(expected)


@every_table
def test_the_papers_table_is_folded_where_no_row_has_an_entry(states: dict[str, Layout], name: str) -> None:
    folded = "<details><summary>The paper's table"
    paper, smoke = (to_markdown(build_table(name, Results(suite, states["empty"]))) for suite in ("paper", "smoke"))
    assert folded not in paper
    assert (folded in smoke) == (paper_table(name).exists() and name != "table3")  # which has entries in any suite
    if folded in smoke:
        last = list(printed_rows(name)[-1].values())
        assert re.search(r"\| +".join(re.escape(text) + " *" for text in last), smoke)


def test_what_the_nano_model_shows_is_no_verdict(states: dict[str, Layout]) -> None:
    for name in TABLES:
        text = to_markdown(build_table(name, Results("smoke", states["empty"])))
        assert "**nano-olmoe** shows a direction only" in text, name
        assert "shows a direction only" not in to_markdown(build_table(name, Results("paper", states["empty"])))


def test_an_unknown_table_is_refused(states: dict[str, Layout]) -> None:
    with pytest.raises(ConfigError, match="table22"):
        build_table("table22", Results("smoke", states["empty"]))


def test_tables_are_built_without_torch(states: dict[str, Layout]) -> None:
    code = (
        "import sys\nfrom mobie.config import default_layout\nfrom mobie.results import Results\n"
        "from mobie.tables import TABLES, build_table\nfrom mobie.tables.table import WRITERS\n"
        "tables = [build_table(n, Results(s, default_layout())) for n in TABLES for s in ('smoke', 'paper')]\n"
        "[w(t) for t in tables for w in WRITERS.values()]\n"
        "print([m for m in ('torch', 'transformers', 'matplotlib') if m in sys.modules])"
    )
    environment = {"PYTHONPATH": str(PACKAGE.parent), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout.strip() == "[]", done.stderr


# --- writing ----------------------------------------------------------------------------------------------------------


def small(*rows: Row, columns: Sequence[Column] = (Column("a", "A", better="lower"),), **how: object) -> Table:
    return Table("table4", "smoke", "title", "method", tuple(columns), tuple(rows), **how)


def test_numbers_are_written_as_asked() -> None:
    columns = (Column("x", "X", None), Column("y", "Y", 1))
    table = small(Row("m", "r", {"x": Cell(1234567.0), "y": Cell(-0.04, 0.5)}, marks={"y": "²"}), columns=columns)
    assert read(table)[0] == {"model": "m", "method": "r", "x": "1234567", "y": "0.0", "config": ""}
    assert re.search(r"\| 1,234,567 +\| 0.0 ± 0.5 ² \|", re.sub(" +", " ", to_markdown(table)))
    assert r"1,234,567 & 0.0 $\pm$ 0.5 $^2$ \\" in to_latex(table)
    assert "0.2500" in to_csv(small(Row("m", "r", {"x": Cell(0.25)}), columns=columns))


def test_sections_are_compared_apart() -> None:
    rows = [
        Row("m", f"r{i}", {"a": Cell(float(v))}, ranked=True, section=s)
        for i, (v, s) in enumerate(((1, "s"), (2, "s"), (3, "t"), (4, "t")))
    ]
    table = small(*rows, section="part")
    assert [is_best(table, row, table.columns[0]) for row in rows] == [True, False, True, False]
    assert [line["part"] for line in read(table)] == ["s", "s", "t", "t"]
    assert "### s" in to_markdown(table) and "**3.00**" in to_markdown(table)


def test_column_groups_are_tables_of_their_own_in_one_file() -> None:
    columns = (Column("a", "A", group="first"), Column("b", "B", group="second"))
    table = small(Row("m", "r", {"a": Cell(1.0), "b": Cell(2.0)}), columns=columns)
    assert read(table)[0]["a"] == "1.00" and read(table)[0]["b"] == "2.00"
    assert to_markdown(table).count("| Method") == 2 and "second:" in to_markdown(table)
    assert to_latex(table).count(r"\begin{tabular}") == 2


def test_foreign_text_stays_itself() -> None:
    text = "a|b *c* <d> `e` & f_g\nh \\ $i$ # [j](k) ~ \x00"
    shown = markdown_text(text)
    assert "\n" not in shown and not re.search(r"(?<!\\)[|*`_]", shown)
    import html

    back = re.sub(r"\\(.)", r"\1", html.unescape(shown.replace("<br>", "\n")))
    assert back == text.replace("\x00", "\N{REPLACEMENT CHARACTER}")
    row = Row("m_1", "100% & more", {}, {"t": text + " é \\"})
    table = small(row, columns=(Column("t", "T", text=True), Column("f", "F", flag=True)))
    latex = to_latex(table)
    assert "[U+00E9]" in latex and r"100\% \& more" in latex and r"m\_1" in latex
    check_latex(latex.replace("[U+", "[u+"))
    assert read(table)[0]["t"] == text + " é \\"


@given(st.text())
def test_any_text_can_be_set(text: str) -> None:
    shown = latex_escape(text)
    assert shown.isascii() and "\n" not in shown
    bare = re.sub(r"\\[&%$#_{}]", "", shown)
    assert bare.count("{") == bare.count("}") and bare.count("$") % 2 == 0


# --- Table 1 ----------------------------------------------------------------------------------------------------------


def test_table1_by_hand(repository: Layout) -> None:
    nll = {
        "full_weights.full_routing": [2.0, 3.0],
        "full_weights.shifted_routing": [2.5, 3.1],
        "quantized_weights.full_routing": [3.0, 4.0],
        "quantized_weights.shifted_routing": [3.5, 4.5],
    }
    values = {name: math.exp(statistics.fmean(losses)) for name, losses in nll.items()}
    write(repository, "arb-llm", "shift", values, details={"window_nll": nll})
    table = build_table("table1", Results("smoke", repository))
    ours = [row for row in read(table) if row["config"] == "arb-llm"]
    flags = [(row["quantized"], row["expert_shift"]) for row in ours]
    assert flags == [("false", "false"), ("false", "true"), ("true", "false"), ("true", "true")]
    assert [row["wikitext2_ppl"] for row in ours] == [f"{value:.2f}" for value in values.values()]
    full = values["full_weights.full_routing"]
    assert [row["increase"] for row in ours] == ["", *(f"{value - full:.2f}" for value in list(values.values())[1:])]
    shifted = table.rows[1].cells["increase"]
    value = values["full_weights.shifted_routing"]
    changes = [value * 2.5 - full * 2.0, value * 3.1 - full * 3.0]
    assert shifted.stderr == pytest.approx(statistics.stdev(changes) / math.sqrt(2))
    assert [row.own for row in table.rows] == [False] * 4 + [True] * 4  # the paper's table is of ARB-LLM
    assert {row.config for row in table.rows[4:]} == {"mobie"}


def test_the_error_of_a_difference_is_that_of_many_draws() -> None:
    """Against the spread of the difference over samples of windows, drawn anew each time."""
    import numpy as np

    draws = np.random.default_rng(0)
    windows, samples = 400, 2000
    common = draws.normal(3, 0.5, (samples, windows))
    one = common + draws.normal(0.2, 0.05, (samples, windows))
    differences = np.exp(one.mean(1)) - np.exp(common.mean(1))
    error = difference_error(math.exp(one[0].mean()), one[0].tolist(), math.exp(common[0].mean()), common[0].tolist())
    assert error == pytest.approx(differences.std(), rel=0.1)
    assert difference_error(5.0, [1.0], 4.0, [1.0]) is None


# --- Tables 3 and 6: no records of quality ----------------------------------------------------------------------------


def test_table3_by_hand(repository: Layout) -> None:
    table = build_table("table3", Results("smoke", repository))
    config = json.loads((PACKAGE / "assets" / NANO / "config.json").read_text())
    rows = {row["model"]: row for row in read(table)}
    assert len(rows) == 7 and len(read(build_table("table3", Results("paper", repository)))) == 6
    nano = rows[NANO]
    assert (nano["routed_experts"], nano["top_k"]) == (str(config["num_experts"]), str(config["num_experts_per_tok"]))
    assert nano["fp16_memory_gb"] == f"{2 * 9457920 / 2**30:.2f}"
    assert nano["difference"] == ""
    # 0.1 GiB below and 12 GiB below the printed 12.9 and 160.7
    assert (rows["OLMoE-1B-7B-0125"]["fp16_memory_gb"], rows["OLMoE-1B-7B-0125"]["difference"]) == ("12.89", "-0.01")
    assert rows["Qwen3-Next-80B-A3B"]["difference"] == f"{2 * 79674391296 / 2**30 - 160.7:.2f}"
    assert rows["Qwen1.5-MoE-A2.7B"]["shared_experts"] == "4"


@pytest.mark.parametrize(("name", "parameters"), [(NANO, 9457920), ("nano-qwen2-moe", 8657664)])
def test_parameters_of_an_embedded_model_are_those_of_its_files(name: str, parameters: int) -> None:
    from safetensors import safe_open

    with safe_open(PACKAGE / "assets" / name / "model.safetensors", "np") as file:
        count = sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    assert count == parameters == load_model_config(name).parameters


def test_a_shared_expert_counts_as_several_routed_ones() -> None:
    found = architecture_of(load_model_config("nano-qwen2-moe"))
    assert found is not None
    assert (found.intermediate, found.routed_experts, found.shared_experts, found.top_k) == (96, 24, 192 // 96, 4)


def test_table6_by_hand(repository: Layout) -> None:
    fill(repository, "smoke", "table6")
    table = build_table("table6", Results("smoke", repository))
    section = "gate, up: 64 experts, 8 active, O = 1024, I = 2048"
    # N·O·I = 64·1024·2048; after: O² + N·O·I
    static = row_of(table, model="OLMoE-1B-7B-0125", section=section, label="Static params (count)")
    assert (static.cells["before"].value, static.cells["after"].value) == (134217728, 134217728 + 1024**2)
    active = row_of(table, model="OLMoE-1B-7B-0125", section=section, label="Activation storage (bits)")
    assert active.cells["after"].value == 8 * 1024**2 + 8 * 1024 * 2048
    assert active.cells["ratio"].value == pytest.approx((8 * 1024**2 + 8 * 1024 * 2048) / (16 * 8 * 1024 * 2048))
    down = "down: 64 experts, 8 active, O = 2048, I = 1024"
    eq44 = row_of(table, model="OLMoE-1B-7B-0125", section=down, label="Average bits, read for one token (eq. 44)")
    assert eq44.cells["after"].value == 2048 / (8 * 1024) * 8 + 1
    both = "gate, up and down: formulas and the stored checkpoint"
    # nano: 16 experts, 4 active, 128 × 256: two of 128/(4·256)·8 + 1 = 2 bits, one of 256/(4·128)·8 + 1 = 5 bits
    mean = row_of(table, model=NANO, section=both, label="Average bits, read for one token (eq. 44)")
    assert mean.cells["after"].value == 3.0
    stored = {row.label: row.cells["after"] for row in table.rows if row.section == both and row.config == "mobie"}
    assert [cell.value for cell in stored.values()] == [3.1, 1.6, 1.9]  # of the experts, not of attention
    assert {cell.record for cell in stored.values()} == {"results/smoke/nano-olmoe/mobie/s0/quantize.json"}
    write(repository, "mobie", "quantize", {"bits_paper": 1.0, "bits_codes": 1.0, "bits_stored": 1.0})
    old = build_table("table6", Results("smoke", repository))
    assert {cell.reason for _, cell in holes(old)} == {"the record has no bits of the component 'experts'"}


# --- Tables 4, 5, 7, 8, 9 ---------------------------------------------------------------------------------------------


def test_table4_flags_are_the_options_of_its_methods(repository: Layout) -> None:
    for name, flags in ABLATIONS.items():
        if name == "fp16":
            continue
        method = load_method(name, repository).build()
        on = (method.joint_svd != "off", method.glas, method.nges)
        assert flags == tuple(str(part).lower() for part in on), name
    assert list(ABLATIONS)[0] == "fp16" and len(PARTS) == 3


def test_table4_by_hand(repository: Layout) -> None:
    tasks = {
        "arc_easy.acc": 0.6,
        "arc_challenge.acc_norm": 0.3,
        "piqa.acc": 0.7,
        "winogrande.acc": 0.5,
        "arc_easy.acc_norm": 0.9,
    }
    write(repository, "mobie-cejd", "tasks", tasks)
    write(
        repository,
        "mobie-cejd",
        "perplexity",
        {"wiki.perplexity": 30.0, "web.perplexity": 31.0, "books.perplexity": 32.0},
    )
    write(repository, "mobie-cejd", "quantize", {"bits_stored": 1.7})
    table = build_table("table4", Results("smoke", repository))
    row = next(row for row in read(table) if row["config"] == "mobie-cejd")
    assert [row[part] for part in PARTS] == ["true", "false", "false"]
    assert [row[c] for c in ("arc_easy", "arc_challenge", "piqa", "winogrande", "avg4")] == [
        "60.00",
        "30.00",
        "70.00",
        "50.00",
        "52.50",
    ]
    assert [row[c] for c in ("wikitext2_ppl", "ppl_web", "ppl_books", "bits_stored")] == [
        "30.00",
        "31.00",
        "32.00",
        "1.70",
    ]
    assert re.search(r"\| CEJD only +\| ✓ +\| +\| +\| +60.00 ± 6.00", to_markdown(table))
    asked = {path.name for path in table_records("table4", "smoke", repository)}
    assert asked == {"tasks.json", "perplexity.json", "quantize.json", "gate.json"}


def test_table4_of_the_paper_asks_for_its_two_models_and_shows_the_printed_values_beside_holes(
    repository: Layout,
) -> None:
    asked = table_records("table4", "paper", repository)
    assert {path.parents[2].name for path in asked} == {"gpt-oss-20b", "qwen3-next-80b-a3b"}
    table = build_table("table4", Results("paper", repository))
    fp16 = row_of(table, model="GPT-OSS-20B", config="fp16")
    assert fp16.paper == {"avg4": 67.03}
    assert row_of(table, model="Qwen3-Next-80B-A3B", config="mobie").paper["arc_easy"] == 80.35
    assert {cell.status for _, cell in holes(table)} == {"missing"}


def test_table5_by_hand(repository: Layout) -> None:
    write(
        repository,
        "mobie",
        "quantize",
        {"bits_paper": 1.46, "bits_codes": 1.2, "bits_stored": 1.9},
        model="olmoe-1b-7b",
        suite="paper",
    )
    write(repository, "mobie", "perplexity", {"wikitext2.perplexity": 14.0}, model="olmoe-1b-7b", suite="paper")
    table = build_table("table5", Results("paper", repository))
    eight = row_of(table, model="OLMoE", label="8")
    assert eight.config == "mobie"
    assert eight.paper == {"bits": 1.46, "wikitext2_ppl": 14.37, "avg7": 49.89}
    assert eight.cells["wikitext2_ppl"].value == 14.0
    assert eight.verdict("wikitext2_ppl") == "within noise" and eight.difference("wikitext2_ppl") == pytest.approx(
        -0.37
    )
    assert row_of(table, model="Qwen1.5-MoE", label="4").paper["wikitext2_ppl"] == 17.81
    assert [row["backbone_bits"] for row in read(table)[:4]] == ["fp16", "16", "8", "4"]
    for row in table.rows:
        if row.label != "fp16":
            assert str(load_method(row.config, repository).build().basis_bits) == row.label
    assert "14.00 ± 1.40 (paper 14.37)" in to_markdown(table)


@pytest.mark.parametrize("name", ["table7", "table8", "table9"])
@pytest.mark.parametrize("suite", ["smoke", "tiny", "paper"])
def test_rows_are_the_papers_in_its_order(repository: Layout, suite: str, name: str) -> None:
    table = build_table(name, Results(suite, repository))
    first = printed_rows(name)[0]["model"]
    expected = [(row["method"], row["bits"]) for row in printed_rows(name) if row["model"] == first]
    for rows in table.groups.values():
        assert [row.label for row in rows] == [method for method, _ in expected]
        configs = dict(zip(expected, (row.config for row in rows), strict=True))
        mobie = next(config for (method, _), config in configs.items() if method == "MoBiE")
        assert (mobie, configs.get(("GPTQ", "3")) or "") == ("mobie", "gptq-w3" if has_gptq(suite, name) else "")
        lacking = [row for row in rows if not row.config]
        assert bool(lacking) == (suite == "tiny")  # the other suites have a method for every row of the paper
        assert {cell.status for row in lacking for cell in row.cells.values()} <= {"absent"}
        assert all(row.cells for row in lacking)


def test_the_papers_entries_stand_in_a_row_that_a_suite_cannot_fill(repository: Layout) -> None:
    path = repository.config_file("suites", "paper")
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | {"methods": ["fp16", "gptq-w3"]}))
    rows = [row for row in build_table("table7", Results("paper", repository)).rows if row.model == "Mixtral"]
    assert [(row.config, row.paper["avg7"]) for row in rows if row.label == "GPTQ"] == [("gptq-w3", 62.38), ("", 26.1)]


def has_gptq(suite: str, table: str) -> bool:
    """Whether a suite has a method for the paper's row of GPTQ at 3 bits, which not every table has."""
    return suite != "tiny" and table != "table9"


def test_table7_by_hand(repository: Layout) -> None:
    tasks = {"arc_easy": "acc", "arc_challenge": "acc_norm", "hellaswag": "acc_norm", "lambada_openai": "acc"}
    tasks |= {"lambada_standard": "acc", "piqa": "acc", "winogrande": "acc"}
    for method, bits, start in (("gptq-w3", 3.0, 0.1), ("mobie", 1.4, 0.2)):
        quantized = {"bits_paper": bits, "bits_codes": bits + 0.1, "bits_stored": bits + 0.5}
        write(repository, method, "quantize", quantized)
        accuracies = {f"{task}.{metric}": start + i / 10 for i, (task, metric) in enumerate(tasks.items())}
        write(repository, method, "tasks", accuracies)
        write(
            repository, method, "perplexity", {f"{text}.perplexity": 100 * start for text in ("wiki", "web", "books")}
        )
    rows = {row["config"]: row for row in read(build_table("table7", Results("smoke", repository)))}
    gptq, mobie = rows["gptq-w3"], rows["mobie"]
    assert [gptq[c] for c in ("bits", "bits_codes", "bits_stored")] == ["3.00", "3.10", "3.50"]
    assert [mobie[c] for c in ("bits", "bits_codes", "bits_stored")] == ["1.40", "1.50", "1.90"]
    assert [gptq[task] for task in tasks] == ["10.00", "20.00", "30.00", "40.00", "50.00", "60.00", "70.00"]
    assert (gptq["avg7"], mobie["avg7"]) == ("40.00", "50.00")
    assert [mobie[c] for c in ("wikitext2_ppl", "ppl_web", "ppl_books")] == ["20.00"] * 3


def test_table8_averages_only_what_is_whole(repository: Layout) -> None:
    programs = {"mbpp.pass@1": 0.1, "humaneval.pass@1": 0.15}
    for method in ("fp16", "billm", "mobie"):
        write(repository, method, "hard", {"mmlu.acc": 0.5, "gsm8k.exact_match": 0.2, "mathqa.acc": 0.3})
    write(repository, "fp16", "code", programs)
    write(repository, "billm", "code", {"humaneval.pass@1": 0.15}, details={"holes": {"mbpp": "no problems"}})
    write(repository, "mobie", "code", {}, status="skipped", reason="no container")
    table = build_table("table8", Results("smoke", repository))
    fp16, billm = (row_of(table, config=name) for name in ("fp16", "billm"))
    assert fp16.cells["avg5"].value == pytest.approx(25.0)
    assert billm.cells["avg5"].value is None and billm.cells["avg5"].reason == "no problems"
    assert billm.cells["mbpp"].status == "unsupported" and billm.cells["mmlu"].value == 50.0
    mobie = row_of(table, config="mobie").cells
    assert mobie["humaneval"].reason == mobie["avg5"].reason == "no container" and mobie["mmlu"].value == 50.0
    assert "greedy program passes the base tests" in to_markdown(table)
    nine = build_table("table9", Results("smoke", repository))
    assert row_of(nine, config="billm").cells["avg3"].value == pytest.approx((50 + 20 + 15) / 3)
    assert "nano-olmoe is not tuned to follow instructions" in to_markdown(nine)
    assert "not tuned" not in to_markdown(build_table("table9", Results("paper", repository)))


# --- Table 10 ---------------------------------------------------------------------------------------------------------


def sweep(layout: Layout, calibration: str, values: Mapping[float, Sequence[float]]) -> None:
    """Perplexity records of a sweep: the losses of two windows, the same on each text."""
    results = Results("smoke", layout)
    for regularization, losses in values.items():
        texts = results.protocol.texts
        perplexities = {f"{text}.perplexity": math.exp(statistics.fmean(losses)) for text in texts}
        details = {"window_nll": dict.fromkeys(texts, list(losses))}
        write(layout, sweep_method(results, regularization, calibration), "perplexity", perplexities, details=details)


def test_sweep_methods_are_spelled_in_full(repository: Layout) -> None:
    smoke, paper = (Results(suite, repository) for suite in SUITES)
    expected = "mobie+calibration.sequences=32+calibration.text=web-calibration+regularization=0.2"
    assert sweep_method(smoke, 0.2, "c4") == expected
    assert smoke.method(expected).build().regularization == 0.2
    assert smoke.method(expected).calibration.text == "web-calibration"
    assert sweep_method(paper, 0.9, "ptb") == "mobie+calibration.text=ptb-calibration+regularization=0.9"
    assert len(table_records("table10", "smoke", repository)) == 27 + 1  # and the gate
    assert text_names(smoke) == {"wikitext2": "wiki", "c4": "web", "ptb": "books"}


def test_table10_by_hand(repository: Layout) -> None:
    sweep(repository, "c4", {0.1: [3.0, 3.2], 0.2: [2.9, 3.0], 0.3: [2.8, 3.0], 0.4: [3.0, 2.8], 0.5: [4.0, 4.0]})
    table = build_table("table10", Results("smoke", repository))
    rows = {row.label: row for row in table.rows}
    assert rows["0.1"].cells["c4/ptb"].value == pytest.approx(math.exp(3.1))
    assert rows["0.1"].cells["c4/avg"].value == pytest.approx(math.exp(3.1))
    # 0.3 and 0.4 share the first place, so 0.2 is third
    marks = {label: row.marks for label, row in rows.items() if row.marks}
    assert marks == {"0.2": {"c4/avg": "³"}, "0.3": {"c4/avg": "¹"}, "0.4": {"c4/avg": "¹"}}
    header = list(read(table)[0])
    assert header[:6] == ["model", "lambda", "wikitext2/wikitext2", "wikitext2/c4", "wikitext2/ptb", "wikitext2/avg"]
    text = to_markdown(table)
    assert "18.17 ± 1.05 ¹" in text
    # windows: −0.1 and 0.0 on each of three texts: −0.05 ± 0.05/√3
    assert "by -0.0500 ± 0.0289 (one standard error, paired over windows), more than one standard error" in text
    assert text.count("too few values of λ") == 2
    assert "calibrated on 32 sequences here, on 128 in the other tables" in text


def test_table10_says_where_the_papers_value_is_best_or_close(repository: Layout) -> None:
    sweep(repository, "wikitext2", {0.2: [2.0, 3.0], 0.3: [2.1, 3.0]})
    sweep(repository, "ptb", {0.2: [2.0, 3.0], 0.3: [2.5, 2.4]})
    text = to_markdown(build_table("table10", Results("smoke", repository)))
    assert "calibrated on `wiki-calibration`: λ = 0.2 has the lowest average." in text
    # windows: 0.5 and −0.6: −0.05 ± 0.55/√3
    assert "λ = 0.3 has the lowest average" in text
    assert "by -0.0500 ± 0.3175 (one standard error, paired over windows), not more than one" in text


def test_table10_has_the_papers_ranks(repository: Layout) -> None:
    """Its caption: λ = 0.2 has two first places and one second; the places are those of the averages."""
    table = build_table("table10", Results("paper", repository))
    places = []
    for text in ("wikitext2", "c4", "ptb"):
        places.append(rank({float(row.label): row.paper[f"{text}/avg"] for row in table.rows})[0.2])
    assert places == [1, 1, 2]
    row = row_of(table, label="0.4")
    assert row.paper["ptb/avg"] == 24.41 and row.paper["wikitext2/c4"] == 26.95


def test_the_average_perplexity_needs_all_texts(repository: Layout) -> None:
    write(
        repository, "billm", "perplexity", {"wiki.perplexity": 10.0, "web.perplexity": 20.0, "books.perplexity": 60.0}
    )
    write(repository, "mobie", "perplexity", {"wiki.perplexity": 10.0, "web.perplexity": 20.0})
    results = Results("smoke", repository)
    (model,) = results.models("table10")
    assert average_perplexity(results, model, "billm").value == pytest.approx(30.0)
    assert average_perplexity(results, model, "mobie").value is None


@given(st.dictionaries(st.integers(), st.one_of(st.none(), st.floats(0, 10)), max_size=9))
def test_ranks_are_those_of_sorting(values: dict[int, float | None]) -> None:
    known = sorted(value for value in values.values() if value is not None)
    assert rank(values) == {key: known.index(value) + 1 for key, value in values.items() if value is not None}


# --- Table 11 ---------------------------------------------------------------------------------------------------------


def test_table11_by_hand(repository: Layout) -> None:
    prompts = [entry["prompt"] for entry in _prompts()]
    samples = [
        {"id": f"prompt-{i}", "model": "m", "prompt": prompt, "text": f" text {i}\nnext"}
        | {"tokens": 9, "finished": i == 1, "repetition": i / 4}
        for i, prompt in enumerate(prompts, start=1)
    ]  # fmt: skip
    samples[1] |= {"tokens": 2, "repetition": None}
    write(repository, "mobie", "generations", {"tokens": 7.25, "repetition": 0.6}, details={"samples": samples[:3]})
    table = build_table("table11", Results("smoke", repository))
    first, second, third, fourth = (row_of(table, config="mobie", section=prompt) for prompt in prompts)
    assert (first.texts["continuation"], first.texts["finished"]) == ("text 1\nnext", "true")
    assert first.cells["repetition"].value == 25.0 and third.cells["repetition"].value == 75.0
    assert second.cells["repetition"].reason == "fewer than four tokens: nothing can repeat"
    assert fourth.cells["continuation"].reason == "the record has no such prompt" and not fourth.texts
    mean = row_of(table, config="mobie", section="All prompts")
    assert (mean.cells["repetition"].value, mean.cells["tokens"].value) == (60.0, 7.25)
    assert [row.config for row in table.rows[:4]] == ["fp16", "billm", "arb-llm", "mobie"]
    long = list(csv.DictReader(io.StringIO(WRITERS["long.csv"](table))))
    (line,) = [
        r for r in long if r["config"] == "mobie" and r["section"] == prompts[0] and r["column"] == "continuation"
    ]
    assert (line["ours"], line["record"]) == ("text 1\nnext", "results/smoke/nano-olmoe/mobie/s0/generations.json")
    text = to_markdown(table)
    assert "text 1<br>next" in text and f"### {prompts[0]}" in text


def test_models_of_a_target_are_configs_or_absent(repository: Layout) -> None:
    for suite in SUITES:
        results = Results(suite, repository)
        for name in TABLES:
            for model in results.models(name):
                assert isinstance(model, Model)
                assert (model.config is None) == (model.absent is not None)
                assert model.absent or model.name in config_names("models", repository)
    assert Path(results.layout.root).exists()
