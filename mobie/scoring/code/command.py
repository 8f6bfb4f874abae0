"""The verbs `generate-code` and `score-code`: programs that a model writes, and what becomes of them."""

from __future__ import annotations

import click

from mobie.determinism import make_deterministic
from mobie.options import checked_keys, keys_options, show_record, verb


@verb(name="generate-code")
@keys_options(method=True)
def generate_code_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Let a stored checkpoint write programs for HumanEval and MBPP.

    One program for each problem with the likeliest tokens, and as many drawn ones as the suite's protocol says. Nothing
    is executed. The programs go into code_samples/ beside the record, as JSON lines that evalplus reads too.

    \b
    python -m mobie generate-code --model nano-olmoe --method mobie
    """
    keys = checked_keys(suite, model, seed, method)
    make_deterministic()
    from mobie.jobs.code import generate_job

    show_record(generate_job(keys))


@verb(name="score-code")
@keys_options(method=True)
@click.option("--unsandboxed", is_flag=True, help="Run them on this machine, as you, with nothing around them.")
def score_code_command(suite: str, model: str | None, method: str, seed: int | None, unsandboxed: bool) -> None:
    """Run the programs that a checkpoint wrote, against evalplus's tests, and compute pass@k.

    Programs that a model wrote can do anything that you can do. They run in a container without network, home and
    writable root, under limits; it needs Apptainer and containers/code.sif (`containers/build code`). Without these the
    record is `skipped`. With --unsandboxed they run as any program of yours, and the record says so: only on a machine
    that holds nothing of value.

    \b
    python -m mobie score-code --model nano-olmoe --method mobie
    """
    from mobie.jobs.code import score_job

    show_record(score_job(checked_keys(suite, model, seed, method), unsandboxed))
