"""The verbs `score-KIND`, which score one stored checkpoint each and differ in their help alone, and `gate`."""

from __future__ import annotations

import click

from mobie.determinism import make_deterministic
from mobie.options import MODEL, SUITE, checked_keys, keys_options, show_record, verb

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


@verb(name="gate")
@MODEL
@SUITE
def gate_command(suite: str, model: str | None) -> None:
    """Find the protocol under which a model in full precision reproduces the paper's row of it.

    Scores perplexity under a grid of windows, separators and BOS policies, takes `acc` and `acc_norm` from the
    zero-shot record, and holds each against the printed entry. The model's results are marked as comparable with the
    paper's or not, in tables, verdicts, report and model cards; no job waits for the answer. Needs the checkpoint and
    the zero-shot record of the method `fp16`.

    \b
    python -m mobie gate --model nano-olmoe
    python -m mobie gate --suite paper --model olmoe-1b-7b
    """
    keys = checked_keys(suite, model, None)
    make_deterministic()
    from mobie.jobs.gate import gate_job

    record = gate_job(keys)
    show_record(record)
    if record.ok:
        for entry in record.details["comparisons"]:
            mark = "reproduces" if entry["reproduces"] else "is off"
            click.echo(
                f"  {entry['name']:32} {mark} {entry['column']} {entry['printed']} by {entry['distance']:+.2f}"
                f" (allowed {entry['tolerance']:.2f}; {entry['tables']})"
            )
        click.echo(f"comparable: {record.details['comparable']}: {record.details['why']}")
