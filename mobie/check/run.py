"""The check of a results folder, from its records outwards."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mobie.check.checkpoints import check_checkpoint
from mobie.check.files import Damaged, Hashes, read_tensor_file, total_size
from mobie.check.findings import Report
from mobie.check.gate import check_gate
from mobie.check.inputs import Inputs, check_configuration, check_downloads, check_samples
from mobie.check.records import Stored, load, record_paths
from mobie.check.tables import LONG, check_protocols, check_rebuilt, check_values, compare_text, table_files
from mobie.errors import DataError, MobieError
from mobie.paths import Layout, find_root
from mobie.results import KINDS, Results


@dataclass(frozen=True)
class Options:
    """suite: only this one. quick: big files are not hashed. progress: show a bar."""

    suite: str | None = None
    quick: bool = False
    progress: bool = False


def check(folder: Path, options: Options) -> Report:
    """Verify a results folder; what is wrong is in the report.

    Raises:
        DataError: the folder is not there or holds no record.
        ConfigError: there is no configuration of suites, beside the folder or around the current folder.
    """
    folder = folder.resolve()
    paths = record_paths(folder, options.suite)
    if not paths:
        asked = f"SUITE={options.suite}" if options.suite else "SUITE"
        raise DataError(
            f"{folder}: no record, expected files {asked}/MODEL/METHOD/sSEED/KIND.json; give the folder `results` of a "
            "run, or make one with `snakemake --cores all`"
        )
    with _repository(folder) as layout:
        return _check(layout, layout.root / "results", options)


@contextmanager
def _repository(folder: Path) -> Iterator[Layout]:
    """Paths of the repository that the folder is part of; a folder from elsewhere is linked into one for the while."""
    parent = folder.parent
    if folder.name == "results" and (parent / "workflow" / "config").is_dir():
        yield Layout(parent)
        return
    root = find_root()
    with tempfile.TemporaryDirectory(prefix="mobie-check-") as name:
        linked = Path(name).resolve()
        (linked / "results").symlink_to(folder)
        (linked / "workflow").symlink_to(root / "workflow")
        for beside in ("paper_figures", "resources"):
            if (parent / beside).is_dir():
                (linked / beside).symlink_to(parent / beside)
        yield Layout(linked)


def _check(layout: Layout, folder: Path, options: Options) -> Report:
    report = Report(layout.root)
    paths = record_paths(folder, options.suite)
    hashes = Hashes(_work(layout, folder, options), quick=options.quick, progress=options.progress)
    try:
        found = [load(path, folder, KINDS, report) for path in paths]
        records = [record for record in found if record is not None]
        report.seen["records"] = len(paths)
        _check_checkpoints(folder, records, hashes, options, report)
        inputs = Inputs(folder, layout, hashes, report)
        for record in records:
            if record.ok and not record.published:
                inputs.check(record)
                check_samples(record, hashes, report)
            if record.ok:
                check_configuration(record, layout, report)
        by_path = {record.path: record for record in records}
        for record in records:
            if record.ok and record.kind == "gate":
                check_gate(record, by_path, report)
        check_downloads(layout, records, hashes, report)
        _check_tables(layout, folder, records, options, report)
        _check_figures(layout, options, report)
        _check_leftovers(folder, report)
    finally:
        hashes.close()
    if hashes.left_out:
        report.note(folder, f"{hashes.left_out} big files were not hashed", "", "leave out --quick to hash them")
    return report


def _work(layout: Layout, folder: Path, options: Options) -> int:
    """About how many bytes will be hashed."""
    suite = options.suite or "*"
    files = [*folder.glob(f"{suite}/*/*/s*/checkpoint/*"), *folder.glob(f"{suite}/*/calibration/*")]
    files += [*layout.resources.glob("*.whl"), *layout.mirror.rglob("*.parquet")]
    return total_size(files)


def _check_checkpoints(folder: Path, records: list[Stored], hashes: Hashes, options: Options, report: Report) -> None:
    """Checkpoints of quantize records, and those that no record speaks of."""
    suite = options.suite or "*"
    there = {path.parent for path in folder.glob(f"{suite}/*/*/s*/checkpoint")}
    gone = []
    for record in records:
        if record.kind != "quantize" or not record.ok or record.published:
            continue
        if record.path.parent in there:
            there.discard(record.path.parent)
            check_checkpoint(record, hashes, report)
        else:
            gone.append(record)
    if gone and not report.seen["checkpoints"]:
        report.note(folder, f"no checkpoint of {len(gone)} records is here: bits are not compared with files")
    else:
        for record in gone:
            report.warning(
                record.path, "its checkpoint is not here", "the folder checkpoint/", "run the quantize job again"
            )
    known = {record.path.parent for record in records}
    for run in sorted(there - known):
        report.warning(run / "checkpoint", "no record speaks of it", "quantize.json beside it", "run its job again")
    for path in [*folder.glob(f"{suite}/*/gradients/*/*.safetensors"), *folder.glob(f"{suite}/*/windows/*")]:
        try:
            read_tensor_file(path)
        except Damaged as damage:
            report.error(path, str(damage), "a safetensors file", "delete it and run its job again")


def _check_tables(layout: Layout, folder: Path, records: list[Stored], options: Options, report: Report) -> None:
    by_name = {record.path.relative_to(layout.root).as_posix(): record for record in records}
    by_path = {record.path: record for record in records}
    for path, lines in table_files(folder, options.suite).items():
        name = path.name.removesuffix(LONG)
        again = f"build the table again: `python -m mobie table {name}`"
        if isinstance(lines, str) or not lines:
            report.error(path, f"not a table ({lines or 'no line'})", "one line per value", again)
            continue
        report.seen["tables"] += 1
        check_values(path, lines, by_name, report)
        try:
            asked = check_rebuilt(name, lines[0].get("suite", ""), layout, report)
        except (MobieError, ImportError) as error:
            report.warning(path, f"cannot be built to compare ({error})", "a table and a suite of this version")
            asked = [layout.root / line["record"] for line in lines if line.get("record")]
        check_protocols(path, [by_path[record] for record in asked if record in by_path], report)
        absent = sum(not record.is_file() for record in asked)
        if absent:
            report.note(path, f"{absent} of the {len(asked)} records that it reads are not there", "", "holes")


def _check_figures(layout: Layout, options: Options, report: Report) -> None:
    """Drawn values against what the records give now."""
    from mobie.figures import ALL_FIGURES, collect_figure
    from mobie.figures.figure import to_csv

    for name in ALL_FIGURES:
        path = layout.figure(name, "csv")
        if not path.is_file():
            continue
        got = path.read_bytes().decode(errors="replace")
        suite = next(iter(got.splitlines()[1:]), "").partition(",")[0]
        if not suite or options.suite not in (None, suite):
            continue
        report.seen["figures"] += 1
        try:
            expected = to_csv(collect_figure(name, Results(suite, layout)))
        except MobieError as error:
            report.warning(path, f"cannot be collected to compare ({error})", "records that can be read")
            continue
        compare_text(path, got, expected, f"draw it again: `python -m mobie figure {name}`", report)


def _check_leftovers(folder: Path, report: Report) -> None:
    """Temporary files of killed jobs."""
    found = sorted(folder.rglob(".*.tmp"))
    if found:
        report.note(found[0], f"{len(found)} temporary files of killed jobs", "", "delete them when nothing runs")
