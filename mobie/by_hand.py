"""The verbs for work by hand: try a method on one matrix, talk to a checkpoint, list the methods, write the schemas."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mobie.determinism import make_deterministic
from mobie.options import FILE, verb

if TYPE_CHECKING:
    from mobie.try_method import Trial


@verb(name="try")
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
    make_deterministic()
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


@verb(name="chat")
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


@verb(name="methods")
def methods_command() -> None:
    """List the methods: the names that --method and `try` take.

    \b
    python -m mobie methods
    """
    from mobie.config import config_names, default_layout, load_method

    layout = default_layout()
    for name in config_names("methods", layout):
        click.echo(f"{name:24} {load_method(name, layout).description}")


@verb(name="schema")
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
