"""Pack a suite: its records as they are, its configuration, and every file that is made of them, made anew.

Tables and figures in `results/` may be another suite's or old, so none is taken from there: they are built from the
packed records while packing, and what differs on disk is told.
"""

from __future__ import annotations

import importlib.metadata
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import mobie
from mobie.config import load_suite
from mobie.errors import DataError
from mobie.paths import Layout
from mobie.provenance import file_hash, git_commit, versions
from mobie.publish.archive import write_archive
from mobie.publish.manifest import GUIDE, File, Hole, Manifest, Role
from mobie.publish.targets import build_targets, builders_code
from mobie.records import read_record
from mobie.report.build import report_records
from mobie.report.record_view import log_tail, path_stripper
from mobie.results import KINDS, PUBLISHED
from mobie.storage import write_bytes, write_text

#: libraries that decide the bytes of built files, beside those that every record names
DRAWING = ("matplotlib", "tabulate", "Jinja2", "pydantic")


@dataclass(frozen=True)
class Packed:
    """What was packed.

    differing: files on disk that are not what the suite's records give.
    """

    path: Path
    manifest: Manifest
    differing: tuple[str, ...]


def publish(suite: str, layout: Layout, path: Path, *, partial: bool = False) -> Packed:
    """Write the archive of a suite to `path`.

    Raises:
        ConfigError: no such suite.
        DataError: a record is damaged, or records are missing and `partial` is not set.
        StorageError: the system refused to write.
    """
    asked = report_records(suite, layout)
    missing = _missing(asked, layout)
    if missing and not partial:
        shown = "\n  ".join(f"{hole.path}: {hole.reason}" for hole in missing[:5])
        more = f"\n  and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(
            f"suite {suite!r} is incomplete: {len(missing)} of {len(asked)} records are missing:\n  {shown}{more}\n"
            f"Finish it with `snakemake --cores all --config suite={suite}`, or pack what there is with --partial."
        )
    records = sorted({*(path for path in asked if path.exists()), *_stored_records(suite, layout)})
    with tempfile.TemporaryDirectory(prefix="mobie-publish-") as name:
        stage = Layout(Path(name))
        roles = _stage(suite, layout, stage, records, asked)
        for _, paths in build_targets(suite, stage):
            roles |= dict.fromkeys((_relative(path, stage) for path in paths), "built")
        manifest = _manifest(suite, layout, stage, roles, records, missing)
        write_text(stage.root / GUIDE, _guide(manifest))
        files = manifest.files | {GUIDE: _file(stage.root / GUIDE, "guide")}
        manifest = manifest.model_copy(update={"files": files})
        built = sorted(
            set(manifest.names("built")) - {_relative(stage.report, stage)}
        )  # on disk it has paths shortened
        differing = tuple(name for name in built if _differs(layout.root / name, stage.root / name))
        write_archive(path, stage.root, manifest)
    return Packed(path, manifest, differing)


def _missing(asked: Iterable[Path], layout: Layout) -> list[Hole]:
    """Records that were asked for and are not there, nor a published one in their place."""
    found = []
    for path in asked:
        suite, model, method, seed = path.relative_to(layout.root).parts[-5:-1]
        published = layout.published(suite, model, method, seed.removeprefix("s"), path.stem)
        if path.exists() or (path.stem in PUBLISHED and published.exists()):
            continue
        log = log_tail(layout.log(suite, model, method, seed, path.stem))
        tidy = path_stripper(layout.root.resolve(), Path.home())
        reason = f"its job left no record; its log ends: {tidy(log[-1])}" if log else "its job has not run"
        found.append(Hole(path=_relative(path, layout), status="missing", reason=reason))
    return found


def _stored_records(suite: str, layout: Layout) -> list[Path]:
    """All records of a suite that are on disk: more than its tables ask for, e.g. how the reference was made."""
    kinds = layout.record(suite, "*", "*", "*", "*").relative_to(layout.root).as_posix()
    return [path for path in layout.root.glob(kinds) if path.stem in KINDS]


def _relative(path: Path, layout: Layout) -> str:
    return path.relative_to(layout.root).as_posix()


def _stage(
    suite: str, layout: Layout, stage: Layout, records: Iterable[Path], asked: Iterable[Path]
) -> dict[str, Role]:
    """Copy records, configuration and the ends of logs into the stage; returns the role of each."""
    roles: dict[str, Role] = {}

    def copy(path: Path, role: Role) -> None:
        name = _relative(path, layout)
        target = stage.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        roles[name] = role

    for path in records:
        copy(path, "record")
        if path.stem == "code_samples":
            for programs in sorted((path.parent / "code_samples").glob("*.jsonl")):
                copy(programs, "programs")
    for path in _configuration(suite, layout):
        copy(path, "configuration")
    tidy = path_stripper(layout.root.resolve(), Path.home())
    for path in sorted({*records, *asked}):
        log = layout.log(*path.relative_to(layout.root).parts[-5:-1], path.stem)
        tail = log_tail(log)
        if tail:
            name = _relative(log, layout)
            write_bytes(stage.root / name, "".join(f"{tidy(line)}\n" for line in tail).encode())
            roles[name] = "log"
    return roles


def _configuration(suite: str, layout: Layout) -> list[Path]:
    """The suite, its protocol, and what they can name: models, methods, sources, lm-eval's tasks."""
    config = load_suite(suite, layout)
    chosen = [layout.config_file("suites", suite), layout.config_file("protocols", config.protocol), layout.sources]
    folders = [layout.config / name for name in ("models", "methods", "lm_eval")]
    return [*chosen, *(path for folder in folders for path in sorted(folder.glob("*.yaml")))]


def _manifest(
    suite: str,
    layout: Layout,
    stage: Layout,
    roles: Mapping[str, Role],
    records: Iterable[Path],
    missing: Iterable[Hole],
) -> Manifest:
    read = {_relative(path, layout): read_record(path) for path in records}
    holes = [
        Hole(path=name, status=record.status, reason=record.reason or "")
        for name, record in read.items()
        if not record.ok
    ]
    return Manifest(
        suite=suite,
        mobie=mobie.__version__,
        commit=git_commit(layout.root),
        builders=builders_code(),
        versions=versions() | {library: importlib.metadata.version(library) for library in DRAWING},
        records=dict(Counter(record.status for record in read.values())),
        missing=tuple(missing),
        holes=tuple(holes),
        files={name: _file(stage.root / name, role) for name, role in sorted(roles.items())},
    )


def _file(path: Path, role: Role) -> File:
    return File(sha256=file_hash(path), bytes=path.stat().st_size, role=role)


def _differs(disk: Path, built: Path) -> bool:
    return disk.exists() and disk.read_bytes() != built.read_bytes()


def _guide(manifest: Manifest) -> str:
    """What a person who opens the archive reads first."""
    records = ", ".join(f"{count} {status}" for status, count in manifest.records.items())
    return (
        f"# Results of the suite `{manifest.suite}`\n\n"
        f"Packed by the MoBiE reproducibility suite {manifest.mobie}, commit {manifest.commit or 'unknown'}. "
        f"Records: {records}; {len(manifest.missing)} missing.\n\n"
        "Begin with `results/report.html`. Records lie in `results/`, figures in `paper_figures/`; `logs/` has the "
        "last lines of all logs. `MANIFEST.json` lists every file with its SHA-256, and what is missing and why.\n\n"
        "All tables, figures, verdicts and the report can be made again from the records here, on any machine, without "
        "a model or a GPU, and are compared with those here byte by byte: install that version of the suite, then\n\n"
        "    python -m mobie rebuild ARCHIVE.zip\n"
    )
