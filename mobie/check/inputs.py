"""Hashes that records name against the files that are there: checkpoints, calibration, windows, mirror, wheels, models.

A file that is gone cannot be compared, which is a warning; one that is there with other bytes is an error.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mobie.check.files import Damaged, Hashes, broken_seal, digest, read_json, read_tensor_file
from mobie.check.findings import Report
from mobie.check.records import Stored
from mobie.config import ProtocolConfig, load_method, load_model_config, load_protocol, load_suite
from mobie.errors import MobieError
from mobie.lock import load_lock
from mobie.paths import PACKAGE, Layout
from mobie.sources import load_sources

REFERENCE = "fp16"
SCORES = frozenset({"perplexity", "tasks", "hard", "routing", "shift", "cka", "generations"})
CALIBRATION = re.compile(r"(?P<text>.+)-n(?P<sequences>\d+)-l(?P<length>\d+)-s(?P<seed>\d+)")
MODEL_FILES = ("config.json", "model.safetensors", "tokenizer.json")
AGAIN = "delete the file and run its job again"
SCORE_AGAIN = "run the job of the record again"


@dataclass
class Inputs:
    """What records read, compared once for each record."""

    folder: Path
    layout: Layout
    hashes: Hashes
    report: Report

    def check(self, record: Stored) -> None:
        """Every input of a record that is ok and of this machine."""
        for name, expected in record.inputs.items():
            try:
                if name in ("checkpoint", "reference"):
                    self._manifest(record, name, expected)
                elif name == "calibration":
                    self._calibration(record, expected)
                elif name.startswith("windows "):
                    self._windows(record, name.removeprefix("windows "), expected)
                elif name == "mirror":
                    self._compare(record, name, self.layout.mirror_stamp, expected)
                elif name == "prompts":
                    self._compare(record, name, PACKAGE / "paper" / "prompts.yaml", expected)
                elif name == "model":
                    self._model(record, expected)
            except Damaged as damage:
                self.report.error(record.path, f"its {name}: {damage}", "a file that can be read", AGAIN)

    def _compare(self, record: Stored, name: str, path: Path, expected: str) -> None:
        if not path.is_file():
            self.report.warning(path, f"no such file; {record.path.name} cannot be compared with it", name)
        elif self.hashes.sha256(path) not in (None, expected):
            self.report.error(
                record.path,
                f"its {name} had sha256 {expected}, {self.report.name(path)} has {self.hashes.sha256(path)}",
                "the file that was read",
                SCORE_AGAIN,
            )

    def _manifest(self, record: Stored, name: str, expected: str) -> None:
        run = record.path.parent
        if name == "reference":
            run = run.parent.parent / REFERENCE / run.name
        if (run / "checkpoint").is_dir():
            self._compare(record, name, run / "checkpoint" / "manifest.json", expected)

    def _calibration(self, record: Stored, expected: str) -> None:
        """The token set with that hash is one of this seed, and of the settings that the record's digest is of."""
        files = sorted(self._model_folder(record).glob("calibration/*.safetensors"))
        matching = [path for path in files if self.hashes.sha256(path) in (None, expected)]
        if not matching:
            level = self.report.error if files else self.report.warning
            level(record.path, f"no calibration set has sha256 {expected}", "the one that was read", SCORE_AGAIN)
        settings = [found.groupdict() for path in matching if (found := CALIBRATION.fullmatch(path.stem))]
        fits = [
            int(s.pop("seed")) == record.raw["seed"]
            and digest({"text": s["text"], "sequences": int(s["sequences"]), "length": int(s["length"])})
            == record.raw["protocol"]
            for s in settings
        ]
        if matching and not any(fits):
            self.report.error(
                record.path,
                f"read {', '.join(path.name for path in matching)}",
                f"a set of seed {record.raw['seed']} under the calibration {record.raw['protocol'][:12]}",
                SCORE_AGAIN,
            )

    def _windows(self, record: Stored, text: str, expected: str) -> None:
        files = sorted(self._model_folder(record).glob(f"windows/{text}-*.safetensors"))
        matching = [path for path in files if self.hashes.sha256(path) in (None, expected)]
        if not matching:
            level = self.report.error if files else self.report.warning
            level(record.path, f"no windows of {text} have sha256 {expected}", "those that were read", SCORE_AGAIN)
        origins = [json.loads(read_tensor_file(path).metadata.get("origin", "{}")) for path in matching]
        wanted = record.inputs.get(f"text {text}")
        if matching and wanted not in [origin.get("text_sha256") for origin in origins]:
            self.report.error(
                record.path, f"text {text} had sha256 {wanted}", "that of the windows it read", SCORE_AGAIN
            )

    def _model_folder(self, record: Stored) -> Path:
        return self.folder / record.raw["suite"] / record.model

    def _model(self, record: Stored, expected: str) -> None:
        try:
            config = load_model_config(record.model, self.layout)
        except MobieError:
            self.report.warning(record.path, f"no configuration of the model {record.model}", "its file in models/")
            return
        if config.source == "hub":
            files = [self.layout.hub_model_stamp(record.model)]
        else:
            own = self.layout.root / "mobie" / "assets" / config.repo
            assets = own if own.is_dir() else PACKAGE / "assets" / config.repo
            files = [assets / name for name in MODEL_FILES]
        if not all(path.is_file() for path in files):
            if config.source == "hub" and record.kind == "speed":
                return  # timed with random weights: nothing was downloaded
            self.report.warning(files[0], "no such file; records cannot be compared with the model", "the model")
            return
        got = [self.hashes.sha256(path) for path in files]
        if None not in got and digest({path.name: sha for path, sha in zip(files, got, strict=True)}) != expected:
            self.report.error(
                record.path,
                f"made from a model with digest {expected}",
                f"that of {self.report.name(files[0])}",
                SCORE_AGAIN,
            )


def check_configuration(record: Stored, layout: Layout, report: Report) -> None:
    """Whether the suite's configuration still says what a record was made with; where not, its job is to run again."""
    again = "run the table's target with snakemake, which makes stale records anew"
    try:
        if record.kind == "quantize":
            options = load_method(record.raw["method"], layout).options
            if record.details.get("options") != options:
                what = f"made with the options {record.details.get('options')}"
                report.warning(record.path, what, f"{options} as configured now", again)
            return
        protocol = load_protocol(load_suite(record.raw["suite"], layout).protocol, layout)
    except MobieError as error:
        report.note(record.path, f"its configuration cannot be read: {str(error).splitlines()[0]}")
        return
    now = _protocol_digest(protocol, record.kind)
    if now not in (None, record.raw["protocol"]):
        what = f"measured under the protocol {record.raw['protocol'][:12]}"
        report.warning(record.path, what, f"{now[:12]} as configured now", again)


def _protocol_digest(protocol: ProtocolConfig, kind: str) -> str | None:
    """Digest that records of a kind made now would hold; None for a kind whose digest hangs on more."""
    if kind in SCORES:
        parts = getattr(protocol, kind)
        return digest([part.digest() for part in (parts if isinstance(parts, tuple) else (parts,))])
    own = {"code": protocol.code.digest, "code_samples": protocol.code.generation_digest, "gate": protocol.gate_digest}
    return own[kind]() if kind in own else None


def check_samples(record: Stored, hashes: Hashes, report: Report) -> None:
    """Files of programs that a model wrote, beside the record that lists them; and how programs were run."""
    if record.details.get("unsandboxed"):
        report.note(record.path, "programs ran without a sandbox", "one", "score them again with Apptainer")
    files = record.details.get("files", {}) if record.kind == "code_samples" else {}
    for entry in files.values():
        name, expected = (entry.get("file"), entry.get("sha256")) if isinstance(entry, dict) else (None, None)
        path = record.path.parent / record.kind / str(name)
        if Path(str(name)).name != name or not path.is_file():
            report.error(record.path, f"lists {name!r}, which is not there", "a file beside the record", SCORE_AGAIN)
        elif hashes.sha256(path) not in (None, expected):
            report.error(path, f"sha256 {hashes.sha256(path)}", f"{expected} as in {record.path.name}", SCORE_AGAIN)


def check_downloads(layout: Layout, records: Sequence[Stored], hashes: Hashes, report: Report) -> None:
    """Wheels against the register, the mirror and hub models against their stamps."""
    again = "delete it and run the fetch rule again"
    sources = load_sources(layout.sources) if layout.sources.is_file() else {}
    for source in sources.values():
        path = layout.source(source)
        if source.kind == "pypi-wheel" and path.is_file() and hashes.sha256(path) not in (None, source.sha256):
            report.error(path, f"sha256 {hashes.sha256(path)}", f"{source.sha256} as in sources.csv", again)
    stamps = {layout.mirror_stamp: layout.mirror}
    stamps |= {layout.hub_model_stamp(r.model): layout.hub_model(r.model) for r in records}
    locked = {layout.hub_model_stamp(name): entry.hashes for name, entry in load_lock(layout).models.items()}
    for stamp, folder in stamps.items():
        if not stamp.is_file():
            continue
        try:
            _check_stamp(stamp, folder, hashes, report, again)
            if stamp in locked and read_json(stamp)["files"] != locked[stamp]:
                report.error(stamp, "lists other files than the lock", "those of lock.json", "run the fetch rule again")
        except (Damaged, KeyError, TypeError, AttributeError, ValueError, OSError) as error:
            report.error(stamp, f"not a stamp ({error})", "the files of a download with their hashes", again)


def _check_stamp(stamp: Path, folder: Path, hashes: Hashes, report: Report, again: str) -> None:
    told = read_json(stamp)
    problem = broken_seal(told)
    if problem is not None:
        report.error(stamp, problem, "a stamp as it was written", again)
    for name, entry in told["files"].items():
        path, expected = folder / name, entry["sha256"] if isinstance(entry, dict) else entry
        if not path.resolve().is_relative_to(folder.resolve()):
            report.error(stamp, f"lists {name!r}", "files below its folder", again)
        elif not path.is_file():
            report.error(path, "no such file", f"as in {stamp.name}", again)
        elif hashes.sha256(path) not in (None, expected):
            report.error(path, f"sha256 {hashes.sha256(path)}", f"{expected} as in {stamp.name}", again)
