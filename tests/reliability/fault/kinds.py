"""Faults inside one process: killed jobs, a disk without space, damaged files, no memory, two jobs at once."""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from reliability.fault.children import Child, Ended, kill_self, refuse, run
from reliability.fault.judge import (
    LOST,
    REFUSED,
    SAME,
    UNNAMED,
    USED,
    Bad,
    Outcome,
    require_equal,
    require_named_refusal,
    require_recovery,
    require_rest_untouched,
)
from reliability.fault.repository import MODEL, SUITE
from reliability.fault.workshop import JOBS, Job, Snapshot, Workshop, job

from mobie.paths import PACKAGE


def killed(workshop: Workshop, chance: random.Random, one: Job) -> Outcome:
    """SIGKILL of a job, once or twice, at a file event or at any moment; over finished results or without them."""
    fresh, times = chance.random() < 0.7, chance.choice((1, 1, 2))
    root = workshop.copy(without=[one] if fresh else [])
    before = Snapshot.of(root)
    undisturbed, where = workshop.ended[one.name], []
    for _ in range(times):
        if chance.random() < 0.7:
            at = chance.randint(1, max(1, undisturbed.events))
            where.append(f"file event {at} of {undisturbed.events}")
            run(Child(root, one.arguments, at=at, strike=kill_self))
        else:
            share = chance.random()
            where.append(f"{share:.0%} of its time")
            run(Child(root, one.arguments, kill_after=share * undisturbed.seconds))
        require_rest_untouched(workshop, root, before, one)
    require_recovery(workshop, root, one)
    return Outcome(f"{one.name} killed at {' and '.join(where)}{'' if fresh else ', over finished results'}", SAME)


def no_space(workshop: Workshop, chance: random.Random, one: Job) -> Outcome:
    """A disk that is full at some file event, a limit on file sizes, or a real file system without room."""
    root = workshop.copy(without=[one])
    before = Snapshot.of(root)
    way = chance.choice(("event", "size", "tmpfs" if can_mount() else "event"))
    if way == "event":
        at = chance.randint(1, max(1, workshop.ended[one.name].events))
        what = f"{one.name}: no space at file event {at}"
        ended = run(Child(root, one.arguments, at=at, strike=refuse))
    elif way == "size":
        size = chance.choice((2000, 5000, 20_000, 200_000))  # what the child prints goes to a file too
        what = f"{one.name}: files of at most {size} bytes"
        ended = run(Child(root, one.arguments, prepare=lambda: limit_file_size(size)))
    else:
        room = chance.choice((0, 4, 16, 64, 256)) << 10
        what = f"{one.name}: {room >> 10} KiB left on a real file system"
        with small_disk(root, room):
            ended = run(Child(root, one.arguments))
            return _judge_full(workshop, root, before, one, ended, what, lambda: resize(root, 1 << 30))
    return _judge_full(workshop, root, before, one, ended, what, lambda: None)


def _judge_full(
    workshop: Workshop,
    root: Path,
    before: Snapshot,
    one: Job,
    ended: Ended,
    what: str,
    give_space: Callable[[], None],
) -> Outcome:
    """A job that found no space says so and harms nothing; with space it ends well."""
    give_space()
    if ended.status == 0:
        require_equal(workshop, root, one)
        return Outcome(what + " (enough)", SAME)
    require_named_refusal(ended)
    require_rest_untouched(workshop, root, before, one)
    require_recovery(workshop, root, one)
    return Outcome(what, REFUSED, ended.message)


def can_mount() -> bool:
    """Whether a file system can be mounted here."""
    return os.geteuid() == 0


@contextlib.contextmanager
def small_disk(root: Path, room: int) -> Iterator[None]:
    """Move a folder onto a file system of its own with so many bytes left; gone afterwards."""
    aside = root.with_name("aside")
    os.rename(root, aside)
    root.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1G,mode=755", "tmpfs", root], check=True)
    try:
        subprocess.run(["cp", "-a", f"{aside}/.", root], check=True)
        subprocess.run(["rm", "-rf", aside], check=True)
        state = os.statvfs(root)
        resize(root, (state.f_blocks - state.f_bfree) * state.f_frsize + room)
        yield
    finally:
        subprocess.run(["umount", root], check=True)


def resize(root: Path, size: int) -> None:
    """Give the file system at `root` another size."""
    subprocess.run(["mount", "-o", f"remount,size={size}", root], check=True)


def limit_file_size(size: int) -> None:
    """Let no file of this process grow beyond `size` bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # the write fails instead of the process
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def _checkpoint(method: str, pattern: str) -> str:
    return f"results/{SUITE}/{MODEL}/{method}/s0/checkpoint/{pattern}"


#: what is damaged → files, the job that makes them again, the jobs that read them. `*` is the job that made the file;
#: `=` puts the file back (the report shows when a record was made)
DAMAGED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "download (wheel)": ("resources/*.whl", "=", ("calibrate", "windows", "mirror")),
    "mirror": ("resources/lm_eval_mirror/*/*/*/*.parquet", "mirror", ("score-tasks",)),
    "mirror stamp": ("resources/lm_eval_mirror.json", "mirror", ("score-tasks", "score-hard")),
    "calibration tokens": (
        f"results/{SUITE}/{MODEL}/calibration/*",
        "calibrate",
        ("quantize mobie", "quantize rtn-w3"),
    ),
    "token windows": (f"results/{SUITE}/{MODEL}/windows/*", "windows", ("score-perplexity", "score-shift")),
    "checkpoint shard": (
        _checkpoint("mobie", "*.safetensors"),
        "quantize mobie",
        ("score-perplexity", "score-routing", "score-cka", "score-generations", "speed"),
    ),
    "checkpoint manifest": (_checkpoint("mobie", "manifest.json"), "quantize mobie", ("score-perplexity", "score-cka")),
    "checkpoint config.json": (_checkpoint("mobie", "config.json"), "quantize mobie", ("score-perplexity", "speed")),
    "checkpoint tokenizer.json": (
        _checkpoint("mobie", "tokenizer*.json"),
        "quantize mobie",
        ("score-tasks", "score-generations", "score-perplexity"),
    ),
    "finished block": (_checkpoint("mobie", "block-*.safetensors"), "", ("quantize mobie",)),
    "gradient cache": (f"results/{SUITE}/{MODEL}/gradients/*/*", "", ("quantize mobie",)),
    "record of a quantization": (
        f"results/{SUITE}/{MODEL}/mobie/s0/quantize.json",
        "quantize mobie",
        ("table", "score-perplexity", "score-cka", "score-routing"),
    ),
    "record of a score": (f"results/{SUITE}/{MODEL}/mobie/s0/[pr]*.json", "*", ("table",)),
    "record in a report": (f"results/{SUITE}/{MODEL}/mobie/s0/*.json", "=", ("claims", "report")),
    "model of the package": (str(PACKAGE / "assets" / MODEL / "*"), "", ("calibrate", "windows", "quantize fp16")),
    "drawing": ("paper_figures/fig6.svg", "figure", ("report",)),
}


def damaged(workshop: Workshop, chance: random.Random, kind: str) -> Outcome:
    """A byte flipped or the end cut off in something that a job reads."""
    pattern, maker, readers = DAMAGED[kind]
    reader = job(chance.choice(readers))
    root = workshop.copy(without=[reader] if kind not in ("finished block", "gradient cache") else [])
    files = [p for p in sorted(Path("/").glob(pattern[1:]) if pattern[0] == "/" else root.glob(pattern)) if p.is_file()]
    if kind == "gradient cache":  # read only where the checkpoint is not there
        for path in (root / _checkpoint("mobie", "")).iterdir():
            path.unlink()
    path = chance.choice(files)
    whole = path.read_bytes()
    hurt, how = hurt_bytes(whole, chance)
    path.write_bytes(hurt)
    what = f"{path.name} ({kind}) {how}, read by {reader.name}"
    try:
        ended = run(Child(root, reader.arguments))
        if ended.status == 0:
            if kind not in ("finished block", "gradient cache"):
                path.write_bytes(whole)
            require_equal(workshop, root, reader, USED)
            return Outcome(what, SAME, ended.output[-300:])
        require_named_refusal(ended, path.name)
    finally:
        if path.is_relative_to(PACKAGE):
            path.write_bytes(whole)
    follow_remedy(root, path, whole, maker)
    require_recovery(workshop, root, reader)
    return Outcome(what, REFUSED, ended.message)


def hurt_bytes(whole: bytes, chance: random.Random) -> tuple[bytes, str]:
    """A byte changed, or the end missing; and in words."""
    if chance.random() < 0.4:
        length = chance.choice((0, chance.randrange(len(whole)), len(whole) - 1))
        return whole[:length], f"cut to {length} of {len(whole)} bytes"
    position, flip = chance.randrange(len(whole)), chance.randint(1, 255)
    return whole[:position] + bytes([whole[position] ^ flip]) + whole[position + 1 :], f"flipped at {position}"


def follow_remedy(root: Path, path: Path, whole: bytes, maker: str) -> None:
    """What the messages say: delete the file and run its job again; a download is put back."""
    if path.is_relative_to(PACKAGE):
        return
    path.unlink(missing_ok=True)
    if maker == "=":
        path.write_bytes(whole)
        return
    if maker == "*":
        maker = next(one.name for one in JOBS if path in {root / p for p in _patterns(root.parent / "base", one, root)})
    if maker:
        ended = run(Child(root, job(maker).arguments))
        if ended.status != 0:
            raise Bad(LOST, f"{maker} does not make {path.name} again: {ended.output[-1500:]}")


def _patterns(base: Path, one: Job, root: Path) -> list[Path]:
    return [root / p.relative_to(base) for pattern in one.outputs for p in base.glob(pattern)]


def no_memory(workshop: Workshop, chance: random.Random, one: Job) -> Outcome:
    """The N-th large operation finds no memory: as on a GPU, as Python says it, or for real under a limit."""
    root = workshop.copy(without=[one])
    before = Snapshot.of(root)
    way = chance.choice(("gpu", "python", "limit"))
    at = chance.randint(1, 40)
    prepare: Callable[[], None] = {
        "gpu": lambda: starve(at, gpu=True),
        "python": lambda: starve(at, gpu=False),
        "limit": lambda: limit_memory(chance.choice((0, 1, 4, 16)) << 20),
    }[way]
    what = f"{one.name}: out of memory ({way})"
    ended = run(Child(root, one.arguments, prepare=prepare))
    require_rest_untouched_but_record(workshop, root, before, one)
    verdict, detail = SAME, ""
    if ended.signal is not None:
        detail = f"signal {ended.signal}"  # a library gave up: Snakemake sees a job that died
    elif ended.status == 0:
        status, reason = status_of(root, one)
        if status == "oom":
            verdict, detail = REFUSED, reason
            if not reason:
                raise Bad(UNNAMED, "status oom without a reason")
        elif status != "ok":
            raise Bad(UNNAMED, f"status {status}: {reason}, expected oom")
    else:
        require_named_refusal(ended, "memory")
        verdict, detail = REFUSED, ended.message
    require_recovery(workshop, root, one)
    return Outcome(what, verdict, detail)


def require_rest_untouched_but_record(workshop: Workshop, root: Path, before: Snapshot, one: Job) -> None:
    """As `require_rest_untouched`; the job's own record and the cards that show it may say that it failed."""
    after = Snapshot.of(root)
    record = one.outputs[0]
    for name, state in before.files.items():
        if name not in after.files:
            raise Bad(LOST, f"{name} is gone")
        if name != record and not name.endswith("checkpoint/README.md") and after.files[name] != state:
            raise Bad(LOST, f"{name} of another job was changed")


def status_of(root: Path, one: Job) -> tuple[str, str | None]:
    """Status and reason in a job's record; `ok` for a job without one."""
    path = root / one.outputs[0]
    if not path.name.endswith(".json"):
        return "ok", None
    record = json.loads(path.read_text())
    return record["status"], record["reason"]


def starve(at: int, *, gpu: bool) -> None:
    """Let the `at`-th product of matrices raise what torch raises on a GPU without memory, or Python's own error."""
    import torch

    count = 0
    linear, matmul = torch.nn.functional.linear, torch.Tensor.__matmul__

    def starved(function: Callable) -> Callable:
        def call(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count == at:
                if gpu:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
                raise MemoryError("no memory left")
            return function(*arguments, **options)

        return call

    torch.nn.functional.linear = starved(linear)
    torch.Tensor.__matmul__ = starved(matmul)


def limit_memory(more: int) -> None:
    """Let the process grow by `more` bytes at most."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    size = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (size, size))


def at_once(workshop: Workshop, chance: random.Random, one: Job) -> Outcome:
    """The same job twice at the same time; sometimes one of the two is killed."""
    root = workshop.copy(without=[one])
    second_killed = chance.random() < 0.4
    delay = chance.random() * 0.5 * workshop.ended[one.name].seconds
    process = os.fork()
    if process == 0:
        time.sleep(delay)
        twin = root.with_name("twin")
        kill = dict(at=chance.randint(1, max(1, workshop.ended[one.name].events)), strike=kill_self)
        ended = run(Child(root, one.arguments, **(kill if second_killed else {}), name=twin.name))
        os._exit(0 if ended.status == 0 or (second_killed and ended.killed) else _say(ended))
    first = run(Child(root, one.arguments))
    status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    what = f"{one.name} twice at once, {delay:.1f} s apart{', one of them killed' if second_killed else ''}"
    verdict = SAME
    if first.status != 0:
        require_named_refusal(first)
        verdict = REFUSED
    if status not in (0, 2):
        raise Bad(UNNAMED, f"{what}: the second ended with {status}")
    require_recovery(workshop, root, one)
    return Outcome(what, REFUSED if status == 2 else verdict)


def _say(ended: Ended) -> int:
    """Exit status of the second of two jobs: 2 for a clear refusal, 3 for anything worse."""
    try:
        require_named_refusal(ended)
    except Bad as bad:
        print(bad, flush=True)
        return 3
    return 2
