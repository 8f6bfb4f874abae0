"""The protocol gate of a model: its scores in full precision, under a grid of protocols, beside the paper's own.

It blocks nothing: a model that does not reproduce the paper's full-precision row is quantized and scored all the same,
because differences between methods on one model are worth having; its numbers are only marked as not comparable with
the printed ones. The workflow runs the gate, and what it reads, before the other jobs of a model.

Texts are cut into windows here rather than by the rule `windows`: a grid has a dozen sets of them, which nothing else
reads, and one of a tokenizer that has no beginning-of-sequence token has to be a hole of the grid, not a failed job.
"""

from __future__ import annotations

from dataclasses import asdict, replace

from mobie.data.texts import TEXTS, read_text, text_digest
from mobie.errors import ConfigError, unknown_name
from mobie.jobs.keys import Keys, checked_source
from mobie.jobs.score import REFERENCE, Job, Scores, checkpoint_of, load, record_scores
from mobie.jobs.stale import gate_code
from mobie.paper.baseline import PERPLEXITY, Printed, printed_baseline
from mobie.provenance import digest
from mobie.records import Record, read_record
from mobie.scoring.gate import measure_grid, point_label
from mobie.scoring.perplexity import PerplexityProtocol
from mobie.scoring.reproduce import METRICS, Candidate, accuracy_candidates, compare, conclude, told

KIND = "gate"
PAPER_TEXT = "wikitext2"  # another text's perplexity is not the printed column's


def gate_keys(keys: Keys) -> Keys:
    """The keys of a model's gate: one for a suite and a model, beside the scores of the method `fp16`."""
    return replace(keys, method=REFERENCE, seed=keys.suite_config.seed)


def gate_state(keys: Keys) -> str:
    """Digest of what decides a gate's record beside its inputs: code, protocol, printed entries."""
    return digest([gate_code(), keys.protocol.gate_digest(), [asdict(entry) for entry in _printed(keys)]])


def gate_job(keys: Keys) -> Record:
    """Write `gate.json` beside the scores of the method `fp16`, whose checkpoint and zero-shot record must be there.

    Raises:
        ConfigError, DataError, StorageError: wrong input, or a disk that cannot be written.
    """
    keys = gate_keys(keys)
    return record_scores(keys, KIND, _gate, keys.protocol.gate_digest(), gate_code())


def _printed(keys: Keys) -> tuple[Printed, ...]:
    """The printed entries that the suite can be held against: a perplexity on a stand-in is not WikiText-2's."""
    text = keys.protocol.gate.text
    return tuple(e for e in printed_baseline(keys.model_config.label) if e.column != PERPLEXITY or text == PAPER_TEXT)


def _points(keys: Keys) -> tuple[PerplexityProtocol, ...]:
    """The grid; the suite's own point alone for a model of the paper's whose perplexity it does not print."""
    points = keys.protocol.gate.points(keys.protocol.gate_own)
    has_entry = any(entry.column == PERPLEXITY for entry in _printed(keys))
    return points if has_entry or keys.model_config.label is None else points[:1]


def _gate(keys: Keys) -> Job:
    folder, manifest = checkpoint_of(keys, REFERENCE)
    gate, own = keys.protocol.gate, keys.protocol.gate_own
    if gate.text not in TEXTS:
        raise ConfigError(unknown_name("text", gate.text, TEXTS))
    documents = read_text(gate.text, checked_source(TEXTS[gate.text].source, keys.layout))
    tasks = read_record(keys.record("tasks"))
    accuracies = [m for m in tasks.measurements if m.name.rpartition(".")[2] in METRICS]
    inputs = {
        "checkpoint": manifest,
        f"text {gate.text}": text_digest(documents),
        "accuracies": digest([asdict(m) for m in accuracies]),
    }

    def measure() -> Scores:
        grid = measure_grid(*load(folder, gate.dtype), documents, _points(keys))
        candidates = [
            *(
                Candidate(PERPLEXITY, point_label(point), point == gate.own_point(own), found, gate.windows is not None)
                for point, found in grid.found
            ),
            *accuracy_candidates(accuracies),
        ]
        printed = _printed(keys)
        comparisons = compare(candidates, printed, gate)
        details = {
            "window_nll": grid.window_nll,
            "window_tokens": grid.window_tokens,
            "holes": grid.holes if tasks.ok else {**grid.holes, "tasks": f"{tasks.status}: {tasks.reason}"},
            **told(candidates, comparisons, conclude(comparisons, printed)),
        }
        return Scores([candidate.measurement for candidate in candidates], details)

    return Job(KIND, keys.protocol.gate_digest(), inputs, measure)
