"""The tiny suite on the host and inside the image, and the image built a second time: the same bytes?

Both runs have a copy of the repository of their own; nothing in the one that this file lies in is touched but the
finding. Building takes many minutes and is done when asked for.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mobie.containers.apptainer import apptainer_environment, find_apptainer
from mobie.containers.build import Options, build_tree
from mobie.containers.images import IDENTITY, IMAGES, read_digests
from mobie.errors import DataError
from mobie.hf.card import CARD
from mobie.paths import PACKAGE, Layout
from mobie.provenance import file_hash
from mobie.records import stable
from mobie.reliability import Finding, Value, save_finding
from tests.working_copy import snakemake, working_copy

ROOT = PACKAGE.parent
TARGET = "results/table2.csv"
COLUMNS = ("what", "compared", "equal", "different")
#: what is compared byte by byte, as patterns below results/
FILES = {
    "tables (CSV, Markdown, LaTeX, one row per value)": "table2.*",
    "calibration sets and token windows": "tiny/*/[cw]*/*.safetensors",
    "files of quantized checkpoints, without model cards": "tiny/*/*/s0/checkpoint/**/*",
}


def run_suite(folder: Path, *arguments: str) -> float:
    """Run the tiny suite's table in a copy of the repository and return its seconds. Raises `DataError`."""
    began = time.monotonic()
    done = snakemake(folder, "--cores", "2", *arguments, "--config", "suite=tiny", "--", TARGET)
    if done.returncode:
        raise DataError(f"{folder}: {TARGET} was not made:\n{(done.stdout + done.stderr)[-4000:]}")
    return time.monotonic() - began


def compared_files(host: Path, inside: Path, pattern: str) -> Iterator[tuple[str, bool]]:
    """Files of either run that a pattern names, and whether their bytes are equal."""
    roots = (host / "results", inside / "results")
    found = {path.relative_to(root) for root in roots for path in root.glob(pattern) if path.is_file()}
    names = sorted(path for path in found if path.name != CARD)  # it tells when and by what it was made
    for name in names:
        first, second = (root / name for root in roots)
        yield str(name), first.is_file() and second.is_file() and file_hash(first) == file_hash(second)


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """All records of a run by their path below results/."""
    root = folder / "results"
    return {
        str(path.relative_to(root)): json.loads(path.read_text()) for path in sorted(root.glob("tiny/*/*/s0/*.json"))
    }


def content(record: dict[str, Any]) -> dict[str, Any]:
    """What has to be equal in a record: all but times, machine, command, image, and the patch level of Python."""
    kept = stable(record)
    kept["provenance"]["versions"].pop("python")
    return kept


def compared_records(host: Path, inside: Path) -> Iterator[tuple[str, bool]]:
    first, second = records(host), records(inside)
    for name in sorted(first.keys() | second.keys()):
        yield name, name in first and name in second and content(first[name]) == content(second[name])


def named_images(inside: Path, identity: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Records made inside, and whether each names the image."""
    for name, record in records(inside).items():
        yield name, record["provenance"]["image"] == identity


def read_identity(image: Path) -> dict[str, Any]:
    """What an image says it is. Raises `DataError` when it says nothing."""
    command = [find_apptainer(), "exec", str(image), "cat", f"/{IDENTITY}"]
    done = subprocess.run(command, env=apptainer_environment(), capture_output=True, text=True)
    if done.returncode:
        raise DataError(f"{image}: has no /{IDENTITY}; build it with `containers/build`\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def row(what: str, pairs: list[tuple[str, bool]]) -> tuple[Value, ...]:
    """One line of the finding; names the first that differ."""
    different = [name for name, equal in pairs if not equal]
    shown = ", ".join(different[:3]) + (" …" if len(different) > 3 else "")
    return (what, len(pairs), len(pairs) - len(different), shown or "none")


def build_again(name: str, work: Path) -> list[tuple[Value, ...]]:
    """Build the tree of an image once more, from nothing, and compare it with what containers/digests.json says."""
    before = read_digests(ROOT).get(name)
    if before is None:
        raise DataError(f"{name} was not built before; run `containers/build` first, then this")
    options = Options((), None, work, False)
    built = build_tree(IMAGES[name], ROOT, options, lambda text: print(f"  {text}", flush=True))[1]
    parts = {"Debian root file system": "rootfs_sha256", "tree": "tree_sha256"}
    return [
        row(f"{what} of {name}, built a second time", [(f"{before[part]}, {new}", before[part] == new)])
        for what, part in parts.items()
        for new in [getattr(built, part)]
    ]


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tests.reliability container",
        description=__doc__,
        epilog="example: python -m tests.reliability container --again mobie-cpu --again code",
    )
    parser.add_argument("--image", type=Path, default=ROOT / "containers" / "mobie.sif", help="built image")
    parser.add_argument("--again", action="append", choices=IMAGES, default=[], help="also build this image once more")
    parser.add_argument("--keep", type=Path, help="folder, new or empty, for the two copies; they stay there")
    return parser.parse_args(arguments)


def compare(image: Path, folder: Path) -> tuple[list[tuple[Value, ...]], list[str]]:
    """Run both and compare. Returns rows and notes of the finding. Raises `DataError` when a run fails."""
    if not image.is_file():
        raise DataError(f"{image}: no such image; build it with `containers/build`")
    identity = read_identity(image)
    host, inside = working_copy(folder / "host"), working_copy(folder / "inside")
    (inside / "containers" / "mobie.sif").symlink_to(image.resolve())
    print("1 of 2: the tiny suite on the host", flush=True)
    seconds = [run_suite(host)]
    print(f"  {seconds[0]:.0f} s\n2 of 2: the tiny suite inside {image.name}", flush=True)
    seconds.append(run_suite(inside, "--sdm", "apptainer"))
    print(f"  {seconds[1]:.0f} s", flush=True)
    rows = [row(what, list(compared_files(host, inside, pattern))) for what, pattern in FILES.items()]
    rows.append(row("records, without times, machine and image", list(compared_records(host, inside))))
    rows.append(row("records made inside that name the image", list(named_images(inside, identity))))
    versions = [next(iter(records(copy).values()))["provenance"]["versions"]["python"] for copy in (host, inside)]
    return rows, [
        f"The image is {identity['name']} with tree {identity['tree_sha256']}.",
        f"Python is {versions[0]} on the host and {versions[1]} in the image; this one entry is not compared.",
        f"The run took {seconds[0]:.0f} s on the host and {seconds[1]:.0f} s in the image.",
        "The CUDA image was not run.",
    ]


def passed(rows: list[tuple[Value, ...]]) -> bool:
    """Whether something was compared in every row, and all of it is equal."""
    return all(row[1] and row[1] == row[2] for row in rows)


def main(arguments: list[str]) -> int:
    """Run the comparison, save the finding, and return 0 when all is equal, else 1."""
    options = parse(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    with tempfile.TemporaryDirectory() as temporary:
        rows, notes = compare(options.image, options.keep or Path(temporary))
        for name in options.again:
            rows += build_again(name, Path(temporary) / "build")
    if not options.again:
        notes.append("Whether two builds give the same tree was not tried in this run; `--again mobie-cpu` does.")
    command = " ".join(["python -m tests.reliability container", *(f"--again {name}" for name in options.again)])
    title = "the tiny suite outside and inside the image"
    finding = Finding("container", title, command, COLUMNS, tuple(rows), passed(rows), tuple(notes))
    print(save_finding(finding, Layout(ROOT)))
    for line in rows:
        print(*line, sep=" | ")
    return 0 if finding.passed else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
