"""A plan for people: tables of plain text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from mobie.plan.budget import Budget, Sum
from mobie.plan.machine import Machine
from mobie.plan.nearest import Offer

COLUMNS = ("", "jobs", "done", "GPU hours", "CPU hours", "GPU GiB", "RAM GiB")
DISK_COLUMNS = ("disk, GiB", "download", "checkpoints", "gradients", "at work")
BASIS = (
    "Hours on a processor are of one core, calibrated by benchmarks/records/true_size.json. Those on a GPU come from\n"
    "its maker's figures (A100) with a stated efficiency and were not measured. Memory and hours: mobie/jobs/cost.py."
)


def shown(suite: str, targets: Sequence[str], found: Budget, machine: Machine) -> str:
    """What a target needs."""
    parts = [f"{' '.join(targets)}, suite {suite}: {found.total.jobs} jobs, {found.total.done} of them done"]
    if found.total.done < found.total.jobs:
        parts.append(_table(COLUMNS, [*_rows(found.rules.items()), _row("in all", found.total)]))
        if found.models:
            parts.append(_table(("by model", *COLUMNS[1:]), _rows(found.models.items())))
        parts.append(_table(DISK_COLUMNS, _disk_rows(found)))
        parts.append(_downloads(found))
        if found.cores:
            parts.append(_core_table(found))
        parts.append(BASIS)
    parts.append(_larger_models(found, machine))
    parts.append(f"{'Machine as described' if machine.described else 'This machine'}: {machine.line()}.")
    return "\n\n".join(part for part in parts if part)


def refusal(machine: Machine, reasons: Sequence[str], offers: Sequence[Offer]) -> str:
    """Why the machine cannot run it, and what it can."""
    lines = [
        f"{'The machine described' if machine.described else 'This machine'} cannot run it:",
        *(f"  {reason}" for reason in reasons),
    ]
    if not offers:
        return "\n".join([*lines, "Nothing smaller fits either; use another machine, or plan for one with --machine."])
    lines.append("It can run:")
    for offer in offers:
        lines += [f"  {offer.command}", f"    ({offer.leaves_out})"]
    return "\n".join(lines)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    from tabulate import tabulate

    align = ["left", *["right"] * (len(header) - 1)]
    return tabulate(rows, header, tablefmt="simple", colalign=align, disable_numparse=True)


def _rows(sums: Iterable[tuple[str, Sum]]) -> list[list[str]]:
    return [_row(name, total) for name, total in sums]


def _row(name: str, total: Sum) -> list[str]:
    memory = [f"{mb / 1024:.1f}" if mb else "" for mb in (total.gpu_mb, total.host_mb)]
    return [name, str(total.jobs), str(total.done or ""), hours(total.gpu_hours), hours(total.cpu_hours), *memory]


def hours(value: float) -> str:
    """`0.02`, `3.1`, `120`; nothing for nothing."""
    if value == 0:
        return ""
    return f"{value:.2f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:,.0f}"


def _disk_rows(found: Budget) -> list[list[str]]:
    rows = [*found.disk.items(), ("in all", found.all_disk)]
    return [
        [name, *(f"{value / 1024:.1f}" for value in (d.downloads, d.checkpoints, d.gradients, d.work))]
        for name, d in rows
    ]


def _downloads(found: Budget) -> str:
    if not found.downloads:
        return "Nothing to download."
    named = [
        download.name if download.bytes is None else f"{download.name} ({download.bytes / 1e9:.2f} GB)"
        for download in found.downloads
    ]
    lines = [f"Downloads: {', '.join(named)}."]
    if found.unknown_sizes:
        lines.append(f"Sizes not known before they are fetched: {len(found.unknown_sizes)}.")
    if found.unpinned:
        lines.append(f"Not pinned: {len(found.unpinned)} of {len(found.downloads)}; `python -m mobie lock` pins them.")
    if found.gated:
        lines.append(
            f"Gated on the hub: {', '.join(found.gated)}: accept the terms there and log in with `hf auth login`."
        )
    return "\n".join(lines)


def _larger_models(found: Budget, machine: Machine) -> str:
    """Models that a card cannot hold whole."""
    if not machine.gpus:
        return ""
    larger = [f"{n} ({s.whole_mb / 1024:.0f} GiB)" for n, s in found.models.items() if s.whole_mb > machine.gpu_mb]
    if not larger:
        return ""
    return f"Larger than the card: {', '.join(larger)}. Their layers go to and fro: scores take longer than said."


def _core_table(found: Budget) -> str:
    models = list(found.cores)
    methods = list(dict.fromkeys(method for by_method in found.cores.values() for method in by_method))
    rows = [[m, *(hours(found.cores[model].get(m, 0.0)) for model in models)] for m in methods]
    return _table(("quantizing on one core, h", *models), rows)
