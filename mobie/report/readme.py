"""The generated parts of README.md: everything between `<!-- generated: NAME -->` and `<!-- end -->`.

A number in the README is never typed: it is read from the records of the last run, from Snakemake's benchmark files,
from the records of the benchmarks, or from the records of how the embedded models were made.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

from mobie.config import config_names, load_model_config, load_suite
from mobie.errors import DataError
from mobie.figures.seal import read_svg
from mobie.paths import PACKAGE, Layout, embedded_model
from mobie.records import read_record
from mobie.report.markdown import markdown_table
from mobie.report.measured import streaming_memory, true_size
from mobie.storage import write_bytes, write_text

PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)
JOBS = ("quantize", "perplexity", "tasks", "routing")


def _checked(path: Path, expected: str, suite: str = "smoke") -> str:
    """Text of a file, which is to be what the records of a suite give now.

    Raises:
        DataError: it is damaged, older than the records, or of another suite.
    """
    if path.read_text(encoding="utf-8", errors="replace") != expected:
        raise DataError(
            f"{path}: not what the records of the suite {suite} give; delete it and make it again with "
            f"`snakemake --cores all --config suite={suite}`"
        )
    return expected


def _table(name: str, layout: Layout, suite: str = "smoke") -> str:
    """A table of a suite as Markdown."""
    from mobie.results import Results
    from mobie.tables import build_table
    from mobie.tables.table import to_markdown

    return _checked(layout.table(name, "md"), to_markdown(build_table(name, Results(suite, layout))), suite)


def _table2(layout: Layout) -> str:
    """The table under the README's own headings, without the paper's table, which is folded at its end."""
    text = _table("table2", layout)
    text = re.sub(r"<details>.*?</details>\n*", "", text, flags=re.DOTALL)
    return re.sub(r"^#", "###", text, flags=re.MULTILINE).rstrip() + "\n"


def _benchmark(path: Path) -> dict[str, str]:
    with path.open(newline="") as file:
        return next(csv.DictReader(file, delimiter="\t"))


def _times(layout: Layout) -> str:
    """Seconds of the jobs behind Table 2, and time and peak memory of all jobs of the default suite."""
    suite = load_suite("smoke", layout)
    rows = []
    for method in suite.methods:
        paths = [layout.benchmark("smoke", suite.models[0], method, f"s{suite.seed}", job) for job in JOBS]
        cells = [float(_benchmark(path)["s"]) for path in paths]
        rows.append([f"`{method}`", *(f"{cell:.0f}" for cell in cells), f"{sum(cells):.0f}"])
    every = [_benchmark(path) for path in layout.benchmarks("smoke")]
    total, peak = sum(float(one["s"]) for one in every), max(float(one["max_rss"]) for one in every)
    note = (
        f"\nAll {len(every)} jobs of the suite that use a model, one after the other: {total / 60:.0f} minutes. "
        f"Peak memory of a job: {peak / 1024:.2f} GiB.\n"
    )
    return markdown_table(["seconds per job", *JOBS, "sum"], rows) + note


def _quantize_cpu(layout: Layout) -> str:
    """CPU seconds of the block loop, without start-up and loading."""
    suite = load_suite("smoke", layout)
    rows = []
    for method in suite.methods:
        details = read_record(layout.record("smoke", suite.models[0], method, suite.seed, "quantize")).details
        blocks = [block["cpu_seconds"] for block in details["blocks"]]
        if None in blocks:
            raise DataError(
                f"{method}: some blocks were read back from an interrupted run, so their time is unknown; delete "
                f"results/smoke/{suite.models[0]}/{method} and run the suite again"
            )
        gradients = details["gradient_cpu_seconds"]
        cells = ["–" if gradients is None else f"{gradients:.1f}", f"{sum(blocks):.1f}"]
        rows.append([f"`{method}`", *cells, f"{sum(blocks) + (gradients or 0):.1f}"])
    return markdown_table(["CPU seconds", "loss gradients", "blocks", "sum"], rows)


def _nano(layout: Layout) -> str:
    """How the embedded models were made, a column each."""
    configs = {name: load_model_config(name, layout) for name in config_names("models", layout)}
    names = [name for name, config in configs.items() if config.source == "embedded"]
    columns = [_training(configs[name].repo) for name in names]
    rows = [[quantity, *(column[quantity] for column in columns)] for quantity in columns[0]]
    return markdown_table(["", *names], rows)


def _training(repo: str) -> dict[str, str]:
    """What is told of an embedded model, from the record of its training."""
    figures = json.loads((embedded_model(repo) / "training.json").read_text(encoding="utf-8"))
    recipe = figures["recipe"]
    return {
        "hidden size, layers, heads": f"{recipe['hidden_size']}, {recipe['layers']}, {recipe['heads']}",
        "experts, width, per token": f"{recipe['experts']}, {recipe['intermediate_size']}, {recipe['top_k']}",
        "width of the shared expert": str(recipe.get("shared_intermediate_size") or "none"),
        "vocabulary, context": f"{recipe['vocab_size']}, {recipe['sequence_length']}",
        "training tokens seen (distinct)": f"{figures['train_tokens_seen']:,} ({figures['train_tokens_unique']:,})",
        "training documents dropped for overlap with evaluated items": f"{sum(figures['dropped'].values()):,}",
        "perplexity on held-out text of the same kinds": f"{figures['heldout_perplexity']:.2f}",
        "training hours on a CPU": f"{figures['seconds'] / 3600:.1f}",
    }


def _audit(layout: Layout) -> str:
    """Counts and the inconsistencies of the paper's own entries."""
    from mobie.paper.audit import audit

    report = audit(PACKAGE / "paper")
    counts = [[name, str(count)] for name, count in (*report.counts.items(), *report.verdicts.items())]
    found = [f"- {f.where}: {f.sentence}" for f in report.findings if f.section == "inconsistency"]
    listing = "<details><summary>The inconsistencies, one by one</summary>\n\n" + "\n".join(found) + "\n\n</details>\n"
    return markdown_table(["audit", "count"], counts) + "\n" + listing


def _claims(layout: Layout) -> str:
    """Statements by verdict, and each with both verdicts."""
    from mobie.results import Results
    from mobie.verdicts import judge
    from mobie.verdicts.write import to_json

    verdicts = judge(Results("smoke", layout))
    _checked(layout.table("claims", "json"), to_json(verdicts))
    found = verdicts.as_dict()
    counts = [[f"this suite: {name}", str(n)] for name, n in found["counts"].items()]
    counts += [[f"the paper's own entries: {name}", str(n)] for name, n in found["paper_counts"].items()]
    rows = [[claim["id"], _cell(claim["claim"]), claim["paper"], claim["verdict"]] for claim in found["claims"]]
    listing = markdown_table(["id", "statement", "the paper's own entries", "this suite"], rows)
    folded = f"<details><summary>The {len(rows)} statements</summary>\n\n{listing}\n</details>\n"
    return markdown_table(["verdict", "statements"], counts) + "\n" + folded


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("*", "\\*").replace("<", "&lt;")


def _pareto(layout: Layout) -> str:
    """The figure of accuracy and perplexity against stored bits."""
    return _picture(
        "pareto", "Quality against bits really stored, every method and setting, with the Pareto front", layout
    )


def _picture(name: str, words: str, layout: Layout) -> str:
    """A figure, copied to where it is committed."""
    picture = layout.readme_figure(name, "svg")
    write_bytes(picture, read_svg(layout.figure(name, "svg")))
    return f"![{words}]({picture.relative_to(layout.root).as_posix()})\n"


def _goals(layout: Layout) -> str:
    """What our method was to reach, and whether it does."""
    from mobie.goals import judge_goals
    from mobie.report.goals import counts_table, verdict_table
    from mobie.results import Results

    text = _table("goals", layout, "beyond")
    judged = judge_goals(Results("beyond", layout))
    folded = _folded("Every goal with its numbers", re.sub(r"^#", "####", text, flags=re.MULTILINE))
    return "\n".join([counts_table(judged), verdict_table(judged), folded])


def _dial(layout: Layout) -> str:
    """Excess loss against stored bits, by calibration size, and the numbers behind the first."""
    pictures = [
        _picture("dial", "Excess loss over full precision against stored bits, with 95 % intervals", layout),
        _picture("calibration_size", "Excess loss by the size of the calibration sample", layout),
    ]
    table = re.sub(r"^#", "####", _table("beyond", layout, "beyond"), flags=re.MULTILINE)
    return "\n".join([*pictures, _folded("The numbers", table)])


def _ablation(layout: Layout) -> str:
    """What each part of our method is worth."""
    lines = _table("ablation", layout, "beyond").splitlines()
    return "\n".join(line for line in lines if not line.startswith(("#", "- "))).strip() + "\n"


def _folded(summary: str, text: str) -> str:
    return f"<details><summary>{summary}</summary>\n\n{text}\n</details>\n"


def _sensitivity(layout: Layout) -> str:
    """The readings of the paper by the size of their effect."""
    lines = _table("sensitivity", layout).splitlines()
    return "\n".join(line for line in lines if line.startswith("|")) + "\n"


def _kernels(layout: Layout) -> str:
    """Instructions per weight of the compiled kernels' main loops, from the checked-in budget."""
    with (PACKAGE / "kernels" / "budget.csv").open(newline="", encoding="utf-8") as file:
        found: dict[str, dict[str, dict[str, str]]] = {}
        for row in csv.DictReader(file):
            found.setdefault(row["variant"], {})[row["capability"]] = row
    targets = sorted({target for of_variant in found.values() for target in of_variant})
    rows = []
    for variant, by_target in found.items():
        cells = [f"{float(by_target[target]['per_weight']):.2f}" for target in targets]
        registers = max(int(row["registers"]) for row in by_target.values())
        spills = sum(int(row["spills"]) for row in by_target.values())
        rows.append([f"`{variant}`", *cells, str(registers), str(spills)])
    return markdown_table(["instructions per weight", *(f"sm_{t}" for t in targets), "registers", "spills"], rows)


def _speed(layout: Layout) -> str:
    """The table of timings, under the README's own headings."""
    return _folded("The table", re.sub(r"^#", "####", _table("speed", layout), flags=re.MULTILINE))


PARTS: dict[str, Callable[[Layout], str]] = {
    "ablation": _ablation,
    "audit": _audit,
    "claims": _claims,
    "dial": _dial,
    "goals": _goals,
    "kernels": _kernels,
    "nano": _nano,
    "pareto": _pareto,
    "quantize-cpu": _quantize_cpu,
    "sensitivity": _sensitivity,
    "speed": _speed,
    "streaming-memory": streaming_memory,
    "table2": _table2,
    "times": _times,
    "true-size": true_size,
}


def fill_readme(layout: Layout) -> list[str]:
    """Rewrite the generated parts of README.md from the results at hand; returns the names of the parts.

    Raises:
        DataError: a result that a part needs is missing, or a marker names no part.
    """
    path = layout.root / "README.md"
    text = path.read_text()
    names = [match["name"] for match in PART.finditer(text)]
    unknown = sorted(set(names) - set(PARTS))
    if unknown:
        raise DataError(f"{path}: generated parts {unknown} are unknown; expected {sorted(PARTS)}")

    def fill(match: re.Match[str]) -> str:
        try:
            return f"{match[1]}\n{PARTS[match['name']](layout)}\n{match[3]}"
        except OSError as error:
            raise DataError(
                f"{error.filename}: no such file, needed for the part {match['name']!r} of README.md; "
                "run `snakemake --cores all` first"
            ) from error

    write_text(path, PART.sub(fill, text))
    return names
