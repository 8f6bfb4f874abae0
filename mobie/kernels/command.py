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
@click.option(
    "--kernel", "kernels", multiple=True, help="Only this kernel; may be given several times.  [default: all]"
)
@click.option("--folder", type=click.Path(path_type=Path, file_okay=False), help="[default: mobie/kernels/tuning]")
def tune_command(kernels: tuple[str, ...], folder: Path | None) -> None:
    """Time the tile sizes of the Triton kernels at the shapes of the four models and write the GPU's file.

    Needs an NVIDIA GPU with 16 GB and nothing else on it; most of the time goes into compiling. The weights are random
    bits, no model is downloaded. All kernels are searched in the same way, the binary ones and the 16-bit experts that
    they are compared with. The sizes are used from then on, on every GPU of that name; a GPU without a file uses
    default.yaml. Sizes change the speed and the order of sums, so check the kernels afterwards with the second command.

    \b
    python -m mobie tune
    python -m pytest -m gpu tests
    python -m mobie tune --kernel binary_grouped --kernel dense_grouped

    Kernels: binary_grouped, dense_grouped, panel, binary_linear, route. With --kernel the file keeps what it has of the
    others.
    """
    from mobie.kernels import tuning
    from mobie.kernels.tune import tune

    click.echo(tune(folder or tuning.FOLDER, kernels, say=click.echo))
