"""The report without a browser: well-formed, self-contained, escaped, the same bytes, holes with their reasons."""

from __future__ import annotations

import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mobie.config import load_suite
from mobie.errors import DataError
from mobie.figures import FIGURES, collect_figure, figures_of
from mobie.figures.figure import to_csv
from mobie.figures.seal import seal_svg
from mobie.paths import PACKAGE, Layout
from mobie.records import Measurement, Record, write_record
from mobie.report.build import TEMPLATES, build_report, report_records
from mobie.report.record_view import log_tail, path_stripper, shortened
from mobie.report.svg import inline_svg
from mobie.results import Results
from mobie.tables import TABLES, tables_of

VOID = {"meta", "link", "br", "hr", "img", "input"}
EVIL = "failed </script><b id='evil'>&amp; \"quoted\" 'so'</b> <!-- "

SVG = """<?xml version="1.0"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"
 width="400pt" height="9pt" viewBox="0 0 4 9">
<metadata><a href="http://elsewhere.example"/></metadata><script>alert(1)</script>
<defs><style type="text/css">*{stroke-linejoin: round}</style>
<clipPath id="c"><rect width="1" height="1"/></clipPath></defs>
<g id="g" clip-path="url(#c)" onclick="alert(2)"><use xlink:href="#g0" style="fill: url('#c')"/></g><path id="g0"/>
<image xlink:href="data:image/png;base64,AAAA"/><image xlink:href="http://elsewhere.example/x.png"/></svg>"""


class Page(HTMLParser):
    """Elements with their attributes and own text; asserts that every tag is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.words: list[str] = []
        self._open: list[int] = []
        self.feed(text)
        self.close()
        assert not self._open, f"never closed: {[self.elements[i][0] for i in self._open]}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self.elements[self._open[-1]][0] == tag, f"</{tag}> closes nothing, at {self.getpos()}"
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if self._open:
            self.texts[self._open[-1]] += data
            if self.elements[self._open[-1]][0] not in ("script", "style"):
                self.words.append(data)

    @property
    def visible(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, tag: str, **wanted: str) -> list[tuple[dict[str, str | None], str]]:
        return [
            (attributes, text)
            for (name, attributes), text in zip(self.elements, self.texts, strict=True)
            if name == tag and wanted.items() <= attributes.items()
        ]

    @property
    def records(self) -> dict[str, dict]:
        found = self.all("script", type="application/json")
        assert len({attributes["data-path"] for attributes, _ in found}) == len(found)
        return {attributes["data-path"]: json.loads(text) for attributes, text in found}

    @property
    def cells(self) -> list[dict]:
        """What the dialogs of tables' cells say, apart from their records."""
        found = [json.loads(a["data-about"]) for a, _ in self.all("button", **{"class": "cell"}) if "data-about" in a]
        return [about for about in found if "record" in about]


def make_record(layout: Layout, kind: str = "perplexity", **changes: object) -> Path:
    """A record of MoBiE in the smoke suite."""
    path = layout.record("smoke", "nano-olmoe", "mobie", 0, kind)
    values = {
        "status": "ok",
        "reason": None,
        "measurements": (Measurement("wiki.perplexity", 41.25, 0.5, 1234),),
        "details": {"window_nll": {"wiki": [0.125] * 777}, "seconds": 3.5},
        "provenance": {
            "command": ["python", "-m", "mobie", "score-perplexity", "--method", "mobie"],
            "inputs": {"checkpoint": "c0ffee"},
            "versions": {"torch": "9.9.9"},
            "host": {"machine": "abacus"},
            "git_commit": "0123abcd",
        },
    } | changes
    write_record(path, Record(kind, suite="smoke", model="nano-olmoe", method="mobie", seed=0, protocol="p7", **values))
    return path


def make_log(layout: Layout, kind: str, text: str) -> None:
    log = layout.log("smoke", "nano-olmoe", "mobie", "s0", kind)
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text(text)


def make_repository(root: Path) -> Layout:
    """The configuration with a record that is there, one of a job that failed, their logs, and two drawings."""
    shutil.copytree(PACKAGE.parent / "workflow", root / "workflow")
    shutil.copy(PACKAGE.parent / "Snakefile", root)
    layout = Layout(root)
    make_record(layout)
    make_log(layout, "perplexity", f"read {root / 'workflow' / 'x.yaml'}\nfrom {Path.home() / '.cache' / 'y'}\n")
    make_record(layout, "tasks", status="failed", reason=EVIL, measurements=(), details={"traceback": [f"{root}/a.py"]})
    make_log(layout, "tasks", EVIL + "\n")
    layout.figure("fig6", "svg").parent.mkdir()
    for name in ("fig6", "fig7"):  # the same ids in both
        layout.figure(name, "svg").write_bytes(seal_svg(SVG.encode()))
    layout.figure("fig6", "csv").write_text(to_csv(collect_figure("fig6", Results("smoke", layout))))
    layout.figure("fig7", "csv").write_text(to_csv(collect_figure("fig7", Results("paper", layout))))
    return layout


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    return make_repository(tmp_path_factory.mktemp("report") / "repository")


@pytest.fixture(scope="module")
def text(layout: Layout) -> str:
    """The report of `layout`."""
    return build_report("smoke", layout)


@pytest.fixture(scope="module")
def page(text: str) -> Page:
    return Page(text)


PERPLEXITY = "results/smoke/nano-olmoe/mobie/s0/perplexity.json"
TASKS = "results/smoke/nano-olmoe/mobie/s0/tasks.json"


def test_without_any_record_everything_is_a_hole_with_its_reason(repository: Layout) -> None:
    page = Page(build_report("smoke", repository))
    ids = {attributes.get("id") for _, attributes in page.elements}
    assert {*TABLES, *FIGURES, "claims", "audit", "records", "rerun"} <= ids
    assert "its job has not run" in page.visible
    assert "snakemake --cores 1 paper_figures/fig6.svg" in page.visible
    assert {record["status"] for record in page.records.values()} == {"missing"}
    assert "not a verdict" in page.visible


def test_a_comparison_per_stored_bit_is_shown_once_it_has_records(repository: Layout) -> None:
    shown = {*tables_of(load_suite("beyond", repository)), *figures_of(load_suite("beyond", repository))}
    ids = {attributes.get("id") for _, attributes in Page(build_report("smoke", repository)).elements}
    assert shown.isdisjoint(ids)
    path = repository.record("beyond", "nano-olmoe", "billm", 0, "quantize")
    bits = (Measurement("bits_stored", 2.9625, None, 99),)
    write_record(path, Record("quantize", "ok", None, "beyond", "nano-olmoe", "billm", 0, "p", bits))
    page = Page(build_report("smoke", repository))
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert {*TABLES, *FIGURES, *shown} <= set(ids)
    assert len(ids) == len(set(ids))
    assert "2.962" in page.visible
    assert page.records[path.relative_to(repository.root).as_posix()]["status"] == "ok"


def test_ids_are_unique_and_inner_links_lead_somewhere(page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    targets = [a["href"][1:] for _, a in page.elements if (a.get("href") or "").startswith("#")]
    assert targets and set(targets) <= set(ids)
    labels = [a["aria-labelledby"] for _, a in page.elements if "aria-labelledby" in a]
    assert labels and set(labels) <= set(ids)


def test_nothing_is_loaded_from_elsewhere(page: Page) -> None:
    for tag, attributes in page.elements:
        for key in ("src", "href", "srcset", "data", "poster", "action", "xlink:href"):
            value = attributes.get(key)
            assert tag == "a" or value is None or value.startswith(("#", "data:")), (tag, key, value)
    styles = "".join(text for _, text in page.all("style"))
    assert styles and "@import" not in styles and "url(" not in styles
    (policy,) = page.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy[0]["content"].startswith("default-src 'none'")


def test_hostile_text_stays_text(page: Page) -> None:
    assert not page.all("b", id="evil")
    assert " ".join(EVIL.split()) in page.visible
    record = page.records[TASKS]
    assert record["reason"] == EVIL
    assert record["log"] == [EVIL]
    assert any(["Reason", EVIL] in cell["facts"] for cell in page.cells)


def test_a_record_is_embedded_once_with_what_made_it(page: Page, layout: Layout) -> None:
    record = page.records[PERPLEXITY]
    assert record["command"] == "python -m mobie score-perplexity --method mobie"
    assert record["inputs"] == {"checkpoint": "c0ffee"}
    assert (record["protocol"], record["git_commit"], record["host"]) == ("p7", "0123abcd", {"machine": "abacus"})
    assert record["measurements"] == [["wiki.perplexity", 41.25, 0.5, 1234, None]]
    assert record["details"] == {"seconds": 3.5, "window_nll": "777 values left out"}
    assert record["rerun"] == f"snakemake --cores 1 --force {PERPLEXITY}"
    assert (layout.report.parent / record["href"]).samefile(layout.root / PERPLEXITY)


def test_every_cell_opens_a_record_of_the_page(page: Page) -> None:
    cells = [cell for cell in page.cells if cell["record"]]
    assert cells and {cell["record"] for cell in cells} <= set(page.records)
    (cell,) = [cell for cell in page.cells if cell["title"] == "Table 2: nano-olmoe, MoBiE, Perplexity"]
    facts = dict(cell["facts"])
    assert (facts["Value"], facts["Standard error"], facts["Sample size n"]) == ("41.25", "0.5", "1234")
    assert "41.25 ± 0.50" in page.visible


def test_records_are_counted_by_status(page: Page) -> None:
    missing = len(page.records) - 2
    assert f"{len(page.records)} records: 1 failed, {missing} missing, 1 ok." in re.sub(r" (?=[,.])", "", page.visible)


def test_the_papers_entries_stand_beside_ours(repository: Layout) -> None:
    path = repository.record("paper", "olmoe-1b-7b", "mobie", 0, "perplexity")
    measured = (Measurement("wikitext2.perplexity", 15.5, 0.25, 99),)
    write_record(path, Record("perplexity", "ok", None, "paper", "olmoe-1b-7b", "mobie", 0, "p", measured))
    page = Page(build_report("paper", repository))
    (cell,) = [cell for cell in page.cells if cell["title"] == "Table 2: OLMoE, MoBiE, Perplexity"]
    facts = dict(cell["facts"])
    assert (facts["Value"], facts["The paper's value"]) == ("15.5", "14.37")
    assert float(facts["Ours less the paper's"]) == pytest.approx(15.5 - 14.37)
    assert facts["Within two standard errors"] == "higher"
    assert "paper 14.37" in page.visible
    assert "not a verdict" not in page.visible


def test_the_papers_table_is_shown_where_no_row_has_its_entries(page: Page) -> None:
    assert page.visible.count("The paper's table as printed") >= 5
    assert "61.03" in page.visible  # MoBiE, OLMoE, ARC-e in the paper's Table 2


def test_the_verb_writes_the_same_bytes_in_another_folder_without_torch(text: str, tmp_path: Path) -> None:
    other = make_repository(tmp_path / "elsewhere")
    code = (
        "import sys\nfrom mobie.cli import main\n"
        "try:\n    main(['report', '--suite', 'smoke'])\n"
        "except SystemExit as end:\n    status = end.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else status)"
    )
    environment = os.environ | {"PYTHONPATH": str(PACKAGE.parent), "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=environment, cwd=other.root
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith("results/report.html")
    assert other.report.read_bytes() == text.encode()


def test_no_path_of_the_machine_is_in_it(text: str, page: Page, layout: Layout) -> None:
    assert str(layout.root) not in text
    assert page.records[PERPLEXITY]["log"] == ["read workflow/x.yaml", "from ~/.cache/y"]
    assert page.records[TASKS]["details"]["traceback"] == ["a.py"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/srv/repo/a.py line 3", "a.py line 3"),
        ("in /srv/repo.", "in .."),
        ("(/srv/repo)", "(.)"),
        ("/home/u/x:/srv/repo/y", "~/x:y"),
        ("/srv/repo2/a", "/srv/repo2/a"),
        ("/srv/repo.old/a", "/srv/repo.old/a"),
        ("/data/srv/repo/a", "/data/srv/repo/a"),
        ("/home/u/work/deep", "deep"),  # the longer place first
    ],
)
def test_paths_are_stripped_at_their_borders_only(text: str, expected: str) -> None:
    root = Path("/home/u/work") if "deep" in text else Path("/srv/repo")
    assert path_stripper(root, Path("/home/u"))(text) == expected


def test_the_plan_lists_exactly_the_records_that_the_page_reads(page: Page, layout: Layout) -> None:
    planned = {path.relative_to(layout.root).as_posix() for path in report_records("smoke", layout)}
    assert planned == set(page.records)


def test_a_damaged_record_is_refused_by_name(repository: Layout) -> None:
    path = make_record(repository)
    path.write_text(path.read_text()[:-9])
    with pytest.raises(DataError, match=r"mobie/s0/perplexity\.json"):
        build_report("smoke", repository)


def test_a_drawing_has_ids_of_its_own_and_loads_nothing() -> None:
    text = inline_svg(SVG, "fig9", 'ours & "theirs"')
    page = Page(text)
    assert {a["id"] for _, a in page.elements if "id" in a} == {"fig9", "fig9-c", "fig9-g", "fig9-g0"}
    (group,), (use,) = page.all("g"), page.all("use")
    assert group[0]["clip-path"] == "url(#fig9-c)" and "onclick" not in group[0]
    assert use[0] == {"href": "#fig9-g0", "style": "fill: url(#fig9-c)"}
    assert [a.get("href") for a, _ in page.all("image")] == ["data:image/png;base64,AAAA", None]
    assert not page.all("script") and not page.all("metadata") and "elsewhere" not in text and "http" not in text
    assert page.all("style")[0][1] == "#fig9 *{stroke-linejoin: round}"
    (svg,) = page.all("svg")
    assert (svg[0]["role"], svg[0]["aria-label"], svg[0]["viewbox"]) == ("img", 'ours & "theirs"', "0 0 4 9")
    assert svg[0]["style"] == "max-width: 400pt" and "width" not in svg[0]


def test_figures_are_inlined_with_text_for_those_who_do_not_see_them(page: Page) -> None:
    drawings = page.all("svg", role="img")
    assert [a["id"] for a, _ in drawings] == ["fig6-drawing", "fig7-drawing"]
    assert all("Figure" in a["aria-label"] for a, _ in drawings)
    assert page.visible.count("Drawn from other values than the records hold now") == 1  # Figure 7, another suite's
    assert "Draw it again: snakemake --cores 1 paper_figures/fig7.svg" in page.visible
    assert "../paper_figures/fig6.svg" in {a.get("href") for a, _ in page.all("a")}


@pytest.mark.parametrize("text", ["", "<svg", "<html/>"])
def test_a_damaged_drawing_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="fig9.*python -m mobie figure"):
        inline_svg(text, "fig9", "")


def test_the_end_of_a_log(tmp_path: Path) -> None:
    path = tmp_path / "a.log"
    lines = [f"line {i}" for i in range(50)]
    path.write_bytes("\n".join([*lines, "", "10%\r50%\r\x1b[1m100%\x1b[0m", "end\r"]).encode() + b"\xff\n")
    assert log_tail(path) == [*lines[32:], "100%", "end\r\ufffd".rpartition("\r")[2]]
    path.write_text("x" * 200_000 + "\nlast")
    assert log_tail(path)[-1] == "last"
    assert log_tail(tmp_path / "none.log") == []


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=1200),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(max_size=5), inner, max_size=40),
    max_leaves=80,
)


@settings(max_examples=60, deadline=None)
@given(JSON)
def test_details_stay_short(value: object) -> None:
    def check(short: object, depth: int = 0) -> None:
        if isinstance(short, str):
            assert len(short) <= 540
        if isinstance(short, list | dict):
            assert len(short) <= (12 if isinstance(short, list) else 24)
            for item in short.values() if isinstance(short, dict) else short:
                check(item, depth + 1)

    check(shortened(value))


def test_what_is_left_out_is_counted() -> None:
    assert shortened({"answers": {"a": [0, 1, 1], "b": [1]}, "few": [1, 2], "many": [[1, 2]] * 20}) == {
        "answers": "4 values left out",
        "few": [1, 2],
        "many": "40 values left out",
    }
    assert shortened({"traceback": ["line"] * 30})["traceback"] == ["line"] * 30


def test_colours_have_contrast_in_both_schemes() -> None:
    css = (TEMPLATES / "report.css").read_text()
    light, dark, *_ = css.split("@media")
    schemes = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", block)) for block in (light, dark)]

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for scheme in schemes:
        for front in ("text", "quiet", "link", "good", "bad", "open"):
            for ground in ("ground", "raised"):
                high, low = sorted((luminance(scheme[front]), luminance(scheme[ground])), reverse=True)
                assert (high + 0.05) / (low + 0.05) >= 4.5, (front, ground)


def test_the_templates_ship_with_the_package() -> None:
    project = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mobie"]
    for file in TEMPLATES.iterdir():
        relative = file.relative_to(PACKAGE).as_posix()
        assert any(fnmatch.fnmatch(relative, pattern) for pattern in patterns), relative
