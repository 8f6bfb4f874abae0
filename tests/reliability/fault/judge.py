"""What came of a fault, and the rules by which that is decided."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from reliability.fault.children import Child, Ended, run
from reliability.fault.workshop import Job, Snapshot, Workshop, leftovers, outputs

SAME, REFUSED, LOST, USED, UNNAMED = "same bytes", "refused", "lost", "damaged used", "cause not named"
VERDICTS = (SAME, REFUSED, LOST, USED, UNNAMED)
#: every refusal tells the user what to do
REMEDY = re.compile(
    r"\b(run|delete|restore|fetch|free|raise|remount|give|check|take|make|use|install|move|close|wait|correct|draw)\b",
    re.I,
)


@dataclass(frozen=True)
class Outcome:
    """A fault in words, and what came of it; `detail` says more where it is not well."""

    what: str
    verdict: str
    detail: str = ""

    @property
    def bad(self) -> bool:
        return self.verdict not in (SAME, REFUSED)


class Bad(Exception):
    """Something happened that must not."""

    def __init__(self, verdict: str, detail: str) -> None:
        super().__init__(detail)
        self.verdict = verdict


#: does one fault in a workshop; the generator decides all that is left to chance
Fault = Callable[[Workshop, random.Random], Outcome]


def require_named_refusal(ended: Ended, *names: str) -> None:
    """A failure is one message, without a traceback, that names each of `names` and says what to do."""
    if ended.status != 2 or ended.has_traceback or not ended.message:
        raise Bad(UNNAMED, f"status {ended.status}, signal {ended.signal}: {ended.output[-1500:]}")
    for name in names:
        if name not in ended.message:
            raise Bad(UNNAMED, f"{name} is not in: {ended.message}")
    if not REMEDY.search(ended.message):
        raise Bad(UNNAMED, f"no remedy in: {ended.message}")


def require_rest_untouched(workshop: Workshop, root: Path, before: Snapshot, one: Job) -> None:
    """Files of other jobs are as they were, to the time of their last change; those of this job whole or not there."""
    own = {path.relative_to(root).as_posix() for path in outputs(root, one)}
    own |= {path.relative_to(workshop.base).as_posix() for path in outputs(workshop.base, one)}
    after = Snapshot.of(root)
    for name, state in before.files.items():
        if name not in after.files:
            raise Bad(LOST, f"{name} is gone")
        if name not in own and after.files[name] != state and not _is_card(name):
            raise Bad(LOST, f"{name} of another job was changed")
    written = [name for name in sorted(own & after.files.keys()) if name in workshop.contents]
    differences = [] if one.timed else workshop.differences(root, written)
    if differences:
        raise Bad(USED, f"half-written under its name: {differences}")


def _is_card(name: str) -> bool:
    """Model cards are renewed after every score."""
    return name.endswith("checkpoint/README.md")


def require_recovery(workshop: Workshop, root: Path, one: Job) -> None:
    """The next run of a job ends well, with the bytes of the undisturbed run, and leaves nothing temporary."""
    ended = run(Child(root, one.arguments))
    if ended.status != 0:
        raise Bad(LOST, f"{one.name} does not end well afterwards: {ended.output[-1500:]}")
    require_equal(workshop, root, one)
    left = leftovers(root)
    if left:
        raise Bad(LOST, f"left behind: {left}")


def require_equal(workshop: Workshop, root: Path, one: Job, verdict: str = LOST) -> None:
    """What the undisturbed run made is there, with the same content."""
    own = [path.relative_to(workshop.base).as_posix() for path in outputs(workshop.base, one)]
    names = [name for name in workshop.contents if not (one.timed and name in own)]
    differences = workshop.differences(root, names)
    if differences:
        raise Bad(verdict, f"after {one.name}: {differences}")
