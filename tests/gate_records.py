"""What a record of the protocol gate holds, for tests of what reads it."""

from __future__ import annotations

from typing import Any

from mobie.records import Measurement

OWN, OTHER = "w4096-blank_line-none", "w2048-blank_line-none"
MEASUREMENTS = (
    Measurement(f"{OWN}.perplexity", 7.5, 0.1, 4000),
    Measurement(f"{OTHER}.perplexity", 6.66, 0.1, 2000),
    Measurement("piqa.acc", 0.79, 0.01, 1838, 0.5),
)


def details(comparable: str = "yes", why: str = "all as printed") -> dict[str, Any]:
    """Details beside `MEASUREMENTS`: the other window reproduces the printed perplexity, the suite's own does not."""
    printed = {"column": "wikitext2_ppl", "printed": "6.65", "tables": "table2", "tolerance": 0.03325}
    return {
        "comparable": comparable,
        "why": why,
        "holes": {"w2048-blank_line-text": "the tokenizer has no beginning-of-sequence token"},
        "protocols": [
            {"name": f"{OWN}.perplexity", "column": "wikitext2_ppl", "label": "window 4096", "own": True},
            {"name": f"{OTHER}.perplexity", "column": "wikitext2_ppl", "label": "window 2048", "own": False},
            {"name": "piqa.acc", "column": "piqa", "label": "piqa acc", "own": True},
        ],
        "comparisons": [
            {**printed, "name": f"{OWN}.perplexity", "distance": 0.85, "reproduces": False},
            {**printed, "name": f"{OTHER}.perplexity", "distance": 0.01, "reproduces": True},
        ],
    }
