"""The report in a real browser, from a file, without a network: cells open, tables sort, nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mobie.paths import PACKAGE, Layout
from mobie.records import Measurement, Record, write_record
from mobie.report.build import write_report
from mobie.results import Results
from mobie.verdicts import judge

webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
from selenium.webdriver.common.by import By  # noqa: E402
from selenium.webdriver.common.keys import Keys  # noqa: E402
from selenium.webdriver.support.ui import Select, WebDriverWait  # noqa: E402

BROWSERS, DRIVERS = ("chromium", "chromium-browser", "google-chrome"), ("chromedriver",)
PERPLEXITIES = {"fp16": 9.5, "billm": 101.25, "arb-llm": 20.75, "mobie": 12.5}
EVIL = "broken </script><b id='evil'>bold</b>"
GRID = "#table2 .pair > :first-child .scroll:first-child"  # ours; the paper's stands behind it


def find(names: tuple[str, ...]) -> str | None:
    return next(filter(None, map(shutil.which, names)), None)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> Layout:
    """A repository with four perplexities, one of them from a job that failed, and a report."""
    root = tmp_path_factory.mktemp("browser") / "repository"
    shutil.copytree(PACKAGE.parent / "workflow", root / "workflow")
    shutil.copy(PACKAGE.parent / "Snakefile", root)
    found = Layout(root)
    for method, value in PERPLEXITIES.items():
        measured = (Measurement("wiki.perplexity", value, 0.25, 4321),)
        record = Record(
            *("perplexity", "ok", None, "smoke", "nano-olmoe", method, 0, "p7", measured),
            provenance={
                "command": ["python", "-m", "mobie", "x"],
                "inputs": {"text wiki": "beef"},
                "host": {"cpus": 2},
            },
        )
        write_record(found.record("smoke", "nano-olmoe", method, 0, "perplexity"), record)
    for method, bits in (("arb-llm", 1.5), ("mobie", 2.5)):
        measured = tuple(Measurement(f"bits_{name}", bits, None, 99) for name in ("paper", "codes", "stored"))
        sizes = {"file_bytes": 900, "kept_bytes": 300, "blocks": [], "bytes_by_item": {}, "gradient_cpu_seconds": None}
        record = Record("quantize", "ok", None, "smoke", "nano-olmoe", method, 0, "p9", measured, sizes)
        write_record(found.record("smoke", "nano-olmoe", method, 0, "quantize"), record)
    failed = Record("tasks", "failed", EVIL, "smoke", "nano-olmoe", "mobie", 0, "p8")
    write_record(found.record("smoke", "nano-olmoe", "mobie", 0, "tasks"), failed)
    log = found.log("smoke", "nano-olmoe", "mobie", "s0", "perplexity")
    log.parent.mkdir(parents=True)
    log.write_text("one\ntwo words in the log\n")
    write_report("smoke", found)
    return found


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    binary, driver = find(BROWSERS), find(DRIVERS)
    if binary is None or driver is None:
        pytest.skip("no browser: on Debian `apt-get install chromium chromium-driver`")
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    found = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
    yield found
    found.quit()


@pytest.fixture
def page(browser: Any, layout: Layout) -> Any:
    """The report, freshly loaded on a wide screen."""
    resize(browser, 1280)
    browser.get(layout.report.as_uri())
    return browser


def resize(browser: Any, width: int) -> None:
    metrics = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)


def one(page: Any, selector: str) -> Any:
    (found,) = page.find_elements(By.CSS_SELECTOR, selector)
    return found


def column_of(page: Any, heading: str) -> int:
    """Place of a column in the first grid of Table 2, counting from 1."""
    headers = page.find_elements(By.CSS_SELECTOR, f"{GRID} thead th")
    return [header.text.split("\n")[0].strip() for header in headers].index(heading) + 1


def mobie_rows(page: Any) -> list[Any]:
    """Rows of Table 2's first grid that are shown under MoBiE's name."""
    rows = page.find_elements(By.CSS_SELECTOR, f"{GRID} tbody tr")
    return [row for row in rows if row.find_element(By.TAG_NAME, "th").text == "MoBiE"]


def mobie_cell(page: Any, heading: str) -> Any:
    (row,) = WebDriverWait(page, 20).until(mobie_rows)  # a busy browser shows the page late
    return row.find_element(By.CSS_SELECTOR, f"td:nth-child({column_of(page, heading)}) button.cell")


def dialog_text(page: Any) -> str:
    dialog = one(page, "dialog")
    assert dialog.get_attribute("open") is not None
    return dialog.text


def test_a_click_on_a_cell_tells_its_record(page: Any, layout: Layout) -> None:
    cell = mobie_cell(page, "Perplexity")
    assert cell.text == "12.50 ± 0.25"
    page.execute_script("arguments[0].scrollIntoView({block: 'center', inline: 'center'})", cell)
    cell.click()
    text = dialog_text(page)
    path = "results/smoke/nano-olmoe/mobie/s0/perplexity.json"
    for part in (
        *("Table 2: nano-olmoe, MoBiE, Perplexity", "12.5", "0.25", "4321", "p7", "beef", "python -m mobie x"),
        *("two words in the log", f"snakemake --cores 1 --force {path}"),
    ):
        assert part in text, part
    link = page.find_element(By.LINK_TEXT, path).get_attribute("href")
    assert Path(link.removeprefix("file://")).samefile(layout.root / path)
    one(page, "dialog .close").click()
    assert one(page, "dialog").get_attribute("open") is None


@pytest.mark.parametrize("key", [Keys.ENTER, Keys.SPACE])
def test_the_keyboard_opens_and_closes_a_record(page: Any, key: str) -> None:
    cell = mobie_cell(page, "Perplexity")
    page.execute_script("arguments[0].focus()", cell)
    cell.send_keys(key)
    assert "4321" in dialog_text(page)
    page.switch_to.active_element.send_keys(Keys.ESCAPE)
    assert one(page, "dialog").get_attribute("open") is None
    assert page.switch_to.active_element == cell


def test_a_hole_tells_its_reason_as_text(page: Any) -> None:
    cell = mobie_cell(page, "PIQA")
    assert cell.text == "–"
    page.execute_script("arguments[0].click()", cell)
    text = dialog_text(page)
    assert EVIL in text and "failed" in text
    assert not page.find_elements(By.ID, "evil")


def natural(name: str) -> list[str | int]:
    """The order of names with numbers in them: 5 before 10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name.lower())]


def test_a_table_sorts_both_ways_with_holes_last(page: Any) -> None:
    place = column_of(page, "Perplexity")
    header = one(page, f"{GRID} thead th:nth-child({place})")

    def values() -> list[str]:
        cells = page.find_elements(By.CSS_SELECTOR, f"{GRID} tbody td:nth-child({place})")
        return [cell.get_attribute("textContent").split("±")[0].strip() for cell in cells]

    before, shown = values(), sorted(PERPLEXITIES.values())
    for expected, order in ((shown, "ascending"), (shown[::-1], "descending")):
        button = header.find_element(By.TAG_NAME, "button")
        page.execute_script("arguments[0].focus()", button)
        button.send_keys(Keys.ENTER)
        assert header.get_attribute("aria-sort") == order
        now = values()
        assert [float(value) for value in now[: len(shown)]] == expected
        assert set(now[len(shown) :]) == {"–"} and len(now) == len(before)
    one(page, f"{GRID} thead th:first-child button").click()
    assert header.get_attribute("aria-sort") is None
    names = [e.text for e in page.find_elements(By.CSS_SELECTOR, f"{GRID} tbody th")]
    assert names == sorted(names, key=natural)


def test_claims_are_filtered_by_verdict(page: Any, layout: Layout) -> None:
    verdicts = judge(Results("smoke", layout))
    verdict, count = next(iter(verdicts.counts.items()))
    assert 0 < count < len(verdicts.claims)
    choices = Select(one(page, "#verdict-filter"))

    def shown() -> int:
        return sum(row.is_displayed() for row in page.find_elements(By.CSS_SELECTOR, "#claims tbody tr"))

    assert shown() == len(verdicts.claims)
    choices.select_by_value(verdict)
    assert shown() == count
    assert one(page, "#verdict-shown").text == f"{count} of {len(verdicts.claims)} shown"
    choices.select_by_value("")
    assert shown() == len(verdicts.claims)


def test_a_claim_leads_to_its_records(page: Any) -> None:
    buttons = page.find_elements(By.CSS_SELECTOR, "#claims tbody button.cell")
    with_records = [b for b in buttons if json.loads(b.get_attribute("data-about"))["records"]]
    about = json.loads(with_records[0].get_attribute("data-about"))
    page.execute_script("arguments[0].click()", with_records[0])
    assert about["title"] in dialog_text(page) and about["comparisons"][0][0] in dialog_text(page)
    first = page.find_elements(By.CSS_SELECTOR, "dialog button.cell")[0]
    assert first.text == about["records"][0]
    page.execute_script("arguments[0].click()", first)
    assert f"--force {about['records'][0]}" in dialog_text(page)


@pytest.mark.parametrize("width", [360, 1280])
def test_the_page_is_no_wider_than_the_screen(page: Any, width: int) -> None:
    resize(page, width)
    whole, screen = page.execute_script("return [document.documentElement.scrollWidth, window.innerWidth]")
    assert whole <= screen == width
    box = one(page, GRID)
    first = box.find_element(By.CSS_SELECTOR, "tbody th")
    left = first.rect["x"]
    page.execute_script("arguments[0].scrollLeft = 200", box)
    assert page.execute_script("return arguments[0].scrollLeft", box) > 50
    assert first.rect["x"] == pytest.approx(left, abs=1)
    page.execute_script("arguments[0].click()", mobie_cell(page, "Perplexity"))
    rect = one(page, "dialog").rect
    assert rect["x"] >= 0 and rect["x"] + rect["width"] <= width


def test_the_skip_link_is_first_and_leads_to_the_results(page: Any) -> None:
    one(page, "body").send_keys(Keys.TAB)
    link = page.switch_to.active_element
    assert link.text == "Skip to the results" and link.is_displayed() and link.rect["x"] >= 0
    link.send_keys(Keys.ENTER)
    assert page.current_url.endswith("#content")


@pytest.mark.parametrize(("scheme", "dark"), [("light", False), ("dark", True)])
def test_the_scheme_follows_the_system(page: Any, scheme: str, dark: bool) -> None:
    page.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    )
    colour = page.execute_script("return getComputedStyle(document.body).backgroundColor")
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    red = int(colour.removeprefix("rgb(").split(",")[0])
    assert (red < 64) == dark


def test_nothing_is_requested_and_nothing_complains(page: Any, layout: Layout) -> None:
    for kind in ("browser", "performance"):
        page.get_log(kind)  # forget what earlier tests did
    page.get(layout.report.as_uri())
    page.execute_script("arguments[0].click()", mobie_cell(page, "Perplexity"))
    assert "4321" in dialog_text(page)
    events = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert layout.report.as_uri() in asked
    assert {url for url in asked if not url.startswith("data:")} == {layout.report.as_uri()}
    assert page.get_log("browser") == []
