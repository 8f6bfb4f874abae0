"""Which faults are done, and how many of each kind in two hundred."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from reliability.fault import changes, kinds, network
from reliability.fault.judge import Fault
from reliability.fault.workshop import JOBS, Job, job


@dataclass(frozen=True)
class Entry:
    """A fault: its kind (a row of the table), its own name, what does it, and its share among all faults.

    slow: it takes long, or needs a job that does.
    """

    kind: str
    name: str
    do: Fault
    weight: int = 1
    slow: bool = False


def _of(kind: str, do: Callable[..., Any], thing: Any, weight: int = 1) -> Entry:
    """A fault done to a job or a class of files."""
    name = thing if isinstance(thing, str) else thing.name
    jobs = [thing] if isinstance(thing, Job) else [job(one) for one in kinds.DAMAGED.get(name, ("", "", ()))[2]]
    slow = any(one.slow for one in jobs)
    return Entry(kind, f"{kind}: {name}", lambda workshop, chance: do(workshop, chance, thing), weight, slow)


OFTEN = {"quantize fp16": 3, "quantize rtn-w3": 3, "quantize mobie": 8, "table": 2, "figure": 2}
WEIGHTS = {"checkpoint shard": 6, "mirror": 2, "mirror stamp": 2, "record in a report": 2, "drawing": 2}
COMPUTING = [one for one in JOBS if one.name.startswith(("quantize", "score")) or one.name in ("calibrate", "windows")]

PLAN: tuple[Entry, ...] = (
    *(_of("job killed", kinds.killed, one, 1 if one.slow else 2 * OFTEN.get(one.name, 1)) for one in JOBS),
    *(_of("no space on the disk", kinds.no_space, one, OFTEN.get(one.name, 1)) for one in JOBS),
    *(_of(f"flipped or cut: {what}", kinds.damaged, what, WEIGHTS.get(what, 4)) for what in kinds.DAMAGED),
    *(_of("no memory", kinds.no_memory, one, 2) for one in COMPUTING if not one.slow),
    *(Entry("network lost", how, partial(network.lost, way=how), 2, slow=True) for how in network.WAYS),
    *(
        _of("the same job twice at once", kinds.at_once, job(name), 2)
        for name in ("quantize mobie", "calibrate", "table")
    ),
    *(_of("configuration changed", changes.changed, what, 2) for what in changes.CHANGES),
    *(Entry("two workflows at once", name, do, slow=True) for name, do in changes.WORKFLOWS.items()),
)


def chosen(count: int, seed: int, *, quick: bool = False) -> list[Entry]:
    """`count` faults in an order that the seed decides: one of each kind, then every entry as often as its weight says.

    More than there are by weight: all over again in another order.
    """
    once = [entry for entry in PLAN for _ in range(entry.weight) if not (quick and entry.slow)]
    order = random.Random(f"{seed}/order")
    found: list[Entry] = []
    while len(found) < count:
        order.shuffle(once)
        firsts = list({entry.kind: position for position, entry in reversed(list(enumerate(once)))}.values())
        found += [once[position] for position in sorted(firsts)]
        found += [entry for position, entry in enumerate(once) if position not in firsts]
    return found[:count]
