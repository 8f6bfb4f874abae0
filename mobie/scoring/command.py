"""The verbs `score-KIND`: each scores one stored checkpoint and writes a record; they differ in their help alone."""

from __future__ import annotations

import click

from mobie.determinism import make_deterministic
from mobie.options import checked_keys, keys_options, show_record, verb

COMPARED = "Needs the checkpoint of the method `fp16` beside that of METHOD."
#: kind of score → what it measures, what it needs; a method to show
SCORES = {
    "perplexity": ("Perplexity of a stored checkpoint on the texts of the suite's protocol.", "", "gptq-w3"),
    "tasks": ("Zero-shot accuracy of a stored checkpoint on lm-eval's tasks.", "", "gptq-w3"),
    "hard": (
        "Accuracy of a stored checkpoint on the harder tasks: MMLU, GSM8K, MathQA (Tables 8 and 9).",
        "",
        "gptq-w3",
    ),
    "routing": (
        "How far the routers of a stored checkpoint decide as in full precision, layer by layer.",
        COMPARED,
        "mobie",
    ),
    "shift": (
        "Perplexity by weights and by routing: full precision or quantized, routing kept or shifted (Table 1).",
        COMPARED,
        "arb-llm",
    ),
    "cka": (
        "How alike a layer's experts are before and after the joint decomposition (Figure 2).",
        f"{COMPARED[:-1]}, which must have a shared basis.",
        "mobie",
    ),
    "generations": ("Let a stored checkpoint continue the prompts of Table 11, greedily.", "", "mobie"),
}


def score_command(kind: str) -> click.Command:
    """The verb of one kind."""
    does, needs, example = SCORES[kind]
    shown = f"\b\npython -m mobie score-{kind} --model nano-olmoe --method {example}"

    @verb(name=f"score-{kind}", help="\n\n".join(filter(None, [does, needs, shown])))
    @keys_options(method=True)
    def command(suite: str, model: str | None, method: str, seed: int | None) -> None:
        keys = checked_keys(suite, model, seed, method)
        make_deterministic()
        from mobie.jobs.score import score_job

        show_record(score_job(keys, kind))

    return command


score_commands = [score_command(kind) for kind in SCORES]
