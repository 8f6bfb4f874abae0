"""The verbs `kernels` (what kernels cost, without a GPU) and `tune` (their tile sizes, on a GPU)."""

from __future__ import annotations

from pathlib import Path

import click

from mobie.errors import MeasurementError


@click.command(name="kernels", short_help="Count instructions per weight, registers and spills of compiled kernels.")
@click.option("--target", "targets", multiple=True, type=int, help="Compute capability.  [default: 80, 89 and 90]")
@click.option("--only", default="", help="Regular expression that a variant's name must match.")
@click.option("--check", is_flag=True, help="Fail where a figure is above mobie/kernels/budget.csv.")
@click.option("--write", is_flag=True, help="Write mobie/kernels/budget.csv: all variants, all targets.")
def kernels_command(targets: tuple[int, ...], only: str, check: bool, write: bool) -> None:
    """Compile the Triton kernels for NVIDIA GPUs, on any Linux machine, and count what a GPU has to issue.

    The columns: compute capability, instructions per weight of the main loop and of the loop over salient columns,
    instructions of the main loop and of the kernel, registers per thread, instructions that spill registers.

    \b
    python -m mobie kernels --target 90 --only int8
    python -m mobie kernels --write
    """
    import re

    from mobie.kernels import budget

    if write and (targets or only):
        raise click.UsageError("--write takes all variants and targets; leave out --target and --only.")
    expected = budget.read_budget() if check else {}
    variants = [v for v in budget.registered() if re.search(only, v.name)]
    if not variants:
        raise click.UsageError(f"--only {only!r} matches no variant.")
    rows, dearer = [], []
    click.echo(budget.HEADER)
    for variant in variants:
        for target in targets or budget.CAPABILITIES:
            row = budget.measure(variant, target)
            rows.append(row)
            click.echo(budget.as_line(row))
            if check:
                dearer += budget.compare(row, expected)
    if write:
        budget.write_budget(rows)
    if dearer:
        raise MeasurementError(
            "kernels are dearer than their budget:\n  "
            + "\n  ".join(dearer)
            + "\nIf the change is worth it, write the new figures with `python -m mobie kernels --write`."
        )


@click.command(name="tune", short_help="Measure the kernels' tile sizes on this machine's GPU and keep the best.")
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="[default: mobie/kernels/tuning]")
def tune_command(folder: Path | None) -> None:
    """Time all tile sizes of the grouped binary kernel and write the GPU's file; a few minutes, most of it compiling.

    \b
    python -m mobie tune
    """
    from mobie.kernels import tuning
    from mobie.kernels.tune import tune

    click.echo(tune(folder or tuning.FOLDER, say=click.echo))
