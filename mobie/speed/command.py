"""The verb `speed`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import click

from mobie.determinism import make_deterministic
from mobie.options import FILE, checked_keys, keys_options, show_record, verb


@verb(name="speed")
@keys_options(method=True)
@click.option("--batch", type=click.IntRange(min=1), help="Rows.  [default: the protocol's]")
@click.option("--prefill", type=click.IntRange(min=1), help="Tokens of each prompt.  [default: the protocol's]")
@click.option("--decode", type=click.IntRange(min=2), help="New tokens of each row.  [default: the protocol's]")
@click.option("--router", type=click.Choice(["natural", "balanced", "zipf"]), help="This routing only.")
@click.option("--weights", type=click.Choice(["random", "stored"]), help="[default: random for a published shape]")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), help="[default: a GPU where there is one]")
@click.option("--sweep", is_flag=True, help="Every runner with every batch size and routing, not only ours.")
@click.option("--out", type=FILE, help="Write the record here.  [default: only a run without changes is stored]")
def speed_command(
    suite: str,
    model: str | None,
    method: str,
    seed: int | None,
    batch: int | None,
    prefill: int | None,
    decode: int | None,
    router: str | None,
    weights: Literal["random", "stored"] | None,
    device: str | None,
    sweep: bool,
    out: Path | None,
) -> None:
    """Time a model packed by METHOD: tokens per second, time to first token, memory, share of the roofline.

    Beside it, in the same process: the same model in 16 bits with the library's experts implementations and with our
    runner, and other projects' runners where they are installed. Models of published shape get random weights and need
    a GPU. A method whose format no kernel reads is not timed: the record says so, with its bits and bytes. A run with
    other numbers than the protocol's is shown, and stored only where --out says.

    \b
    python -m mobie speed --method mobie
    python -m mobie speed --suite paper --model qwen1.5-moe-a2.7b --method mobie
    python -m mobie speed --suite paper --model olmoe-1b-7b --method mobie --batch 16 --prefill 512 --out b16.json
    """
    from mobie.jobs.speed import Options, change_protocol, speed_job, speed_lines
    from mobie.records import write_record

    keys = checked_keys(suite, model, seed, method)
    make_deterministic(algorithms=False)
    protocol = change_protocol(keys.protocol.speed, batch=batch, prefill=prefill, decode=decode, router=router)
    options = Options(weights, device, sweep)
    record = speed_job(keys, protocol, options, progress=sys.stderr.isatty())
    changed = options != Options() or protocol != keys.protocol.speed
    if out is not None or not changed:
        write_record(out or keys.record("speed"), record)
    show_record(record)
    for line in speed_lines(record):
        click.echo(line)
