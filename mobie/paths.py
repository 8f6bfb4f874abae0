"""Where every file of the suite lies. Nothing else in the project builds a path to a generated file.

- `resources/`: downloads, hash-checked
- `resources/lm_eval_mirror/`: benchmark data in the shape lm-eval reads
- `resources/hub/OWNER/NAME/`: data sets from the hub
- `resources/github/OWNER/NAME/FILE`: files of GitHub repositories
- `resources/models/MODEL/`: hub models
- `results/SUITE/MODEL/calibration/`: token sequences
- `results/SUITE/MODEL/unfinished/`: batches of sequences that a model is writing; gone when they are whole
- `results/SUITE/MODEL/windows/`: token windows of the texts that are scored
- `results/SUITE/MODEL/gradients/`: loss gradients, shared by the methods that need the same
- `results/SUITE/MODEL/METHOD/sSEED/`: checkpoint/ and one record per job;
  code_samples/ holds the programs that a model wrote
- `results/reliability/`: what the harnesses of tests/reliability found; `RELIABILITY.md` is made of it
- `benchmarks/records/`: committed records of the benchmarks
- `results/published/SUITE/MODEL/METHOD/sSEED/`: committed records of a machine with a GPU
- `results/table2.{csv,md,tex,long.csv}`: tables; `results/claims.{csv,md,json}`, `results/report.html`
- `results/mobie-SUITE-VERSION.zip`: a published suite
- `paper_figures/fig6.{svg,pdf,png,csv}`: figures, with the values drawn
- `logs/`: log (.log) and measured time and memory (.tsv) of a job, by the same keys
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mobie.errors import ConfigError

if TYPE_CHECKING:
    from mobie.sources import Source

PACKAGE = Path(__file__).resolve().parent
MARKER = "Snakefile"


def find_root(start: Path | None = None) -> Path:
    """The repository: the nearest folder with a `Snakefile` from `start` upwards, else the package's parent.

    `start` is the current folder unless given.

    Raises:
        ConfigError: there is none.
    """
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents, PACKAGE.parent):
        if (folder / MARKER).is_file() and (folder / "workflow" / "config").is_dir():
            return folder
    raise ConfigError(
        f"no {MARKER} with a workflow/config folder in {start}, above it, or beside the package ({PACKAGE.parent}); "
        "change into a clone of the repository, or install it from one with `pip install -e .`"
    )


@dataclass(frozen=True)
class Layout:
    """Paths under `root`. With `root = Path()` they are relative, as Snakemake wants them.

    Any key may be a wildcard such as `{model}`.
    """

    root: Path

    @property
    def config(self) -> Path:
        return self.root / "workflow" / "config"

    @property
    def schemas(self) -> Path:
        return self.root / "workflow" / "schemas"

    @property
    def resources(self) -> Path:
        return self.root / "resources"

    @property
    def mirror(self) -> Path:
        return self.resources / "lm_eval_mirror"

    @property
    def mirror_stamp(self) -> Path:
        """Written last; lists the hashes of the mirror's files."""
        return self.resources / "lm_eval_mirror.json"

    def nano_work(self, name: str) -> Path:
        """Where `train-nano` keeps the checkpoint, log and finished model of an embedded model."""
        return self.resources / name

    def nano_record(self, name: str) -> Path:
        """How an embedded model was made; written last."""
        return self.nano_work(name) / "training.json"

    @property
    def hub_data(self) -> Path:
        """Data sets from the hub, each under its repository's name."""
        return self.resources / "hub"

    def source(self, source: Source) -> Path:
        """Where a row of `sources.csv` lands: a wheel under its own name, a repository as a folder."""
        if source.kind == "pypi-wheel":
            return self.resources / source.files[0]
        if source.kind == "github":
            return self.resources / "github" / source.reference / source.files[0]
        return self.hub_data / (source.reference if source.kind == "hub" else source.name)

    @property
    def sources(self) -> Path:
        return self.config / "sources.csv"

    @property
    def lock(self) -> Path:
        """Revisions and hashes of the hub's repositories; not there where nothing is locked."""
        return self.config / "lock.json"

    def config_file(self, folder: str, name: str) -> Path:
        return self.config / folder / f"{name}.yaml"

    def hub_model(self, model: str) -> Path:
        return self.resources / "models" / model

    def hub_model_stamp(self, model: str) -> Path:
        """Written last; lists the revision and the hashes of a downloaded model's files."""
        return self.resources / "models" / f"{model}.json"

    def calibration(self, suite: str, model: str, text: str, sequences: int, length: int, seed: int | str) -> Path:
        folder = self.root / "results" / suite / model / "calibration"
        return folder / f"{text}-n{sequences}-l{length}-s{seed}.safetensors"

    def calibration_parts(self, suite: str, model: str, text: str, sequences: int, length: int, seed: int) -> Path:
        """Finished batches of a calibration set that a model is still writing; gone when it is whole."""
        name = self.calibration(suite, model, text, sequences, length, seed).stem
        return self.root / "results" / suite / model / "unfinished" / name

    def windows(self, suite: str, model: str, text: str, protocol: str) -> Path:
        """Token windows of a text; `protocol` is the `windows_id` of a window protocol."""
        return self.root / "results" / suite / model / "windows" / f"{text}-{protocol}.safetensors"

    def gradients(self, suite: str, model: str) -> Path:
        """One folder for each set of loss gradients, named by what decides them."""
        return self.root / "results" / suite / model / "gradients"

    def run(self, suite: str, model: str, method: str, seed: int | str) -> Path:
        return self.root / "results" / suite / model / method / f"s{seed}"

    def checkpoint(self, suite: str, model: str, method: str, seed: int | str) -> Path:
        return self.run(suite, model, method, seed) / "checkpoint"

    def code_samples(self, suite: str, model: str, method: str, seed: int | str) -> Path:
        """Programs that a model wrote, one file for each set of problems and way of generating."""
        return self.run(suite, model, method, seed) / "code_samples"

    def record(self, suite: str, model: str, method: str, seed: int | str, kind: str) -> Path:
        return self.run(suite, model, method, seed) / f"{kind}.json"

    def published(self, suite: str, model: str, method: str, seed: int | str, kind: str) -> Path:
        """A committed record of another machine: read where this one cannot make its own (speed on a GPU)."""
        return self.root / "results" / "published" / suite / model / method / f"s{seed}" / f"{kind}.json"

    def table(self, name: str, suffix: str) -> Path:
        return self.root / "results" / f"{name}.{suffix}"

    def figure(self, name: str, suffix: str) -> Path:
        return self.root / "paper_figures" / f"{name}.{suffix}"

    def readme_figure(self, name: str, suffix: str) -> Path:
        """Copy of a figure that README.md shows; the only committed one."""
        return self.root / "paper_figures" / "readme" / f"{name}.{suffix}"

    @property
    def report(self) -> Path:
        return self.root / "results" / "report.html"

    def finding(self, name: str) -> Path:
        """What a harness of tests/reliability found."""
        return self.root / "results" / "reliability" / f"{name}.json"

    def measured(self, name: str) -> Path:
        """Committed record of a benchmark."""
        return self.root / "benchmarks" / "records" / f"{name}.json"

    @property
    def reliability(self) -> Path:
        return self.root / "RELIABILITY.md"

    def archive(self, suite: str, version: str) -> Path:
        """What `publish` packs a suite into."""
        return self.root / "results" / f"mobie-{suite}-{version}.zip"

    def log(self, *keys: str) -> Path:
        return (self.root / "logs").joinpath(*keys[:-1], f"{keys[-1]}.log")

    def benchmark(self, *keys: str) -> Path:
        return (self.root / "logs").joinpath(*keys[:-1], f"{keys[-1]}.tsv")

    def benchmarks(self, suite: str) -> list[Path]:
        """Measured time and memory of all jobs of a suite."""
        return sorted((self.root / "logs" / suite).rglob("*.tsv"))


def embedded_model(name: str) -> Path:
    """Folder of a model that ships in the package."""
    return PACKAGE / "assets" / name


def paper_table(name: str) -> Path:
    """A table of the paper as CSV."""
    return PACKAGE / "paper" / "tables" / f"{name}.csv"
