"""Figure 11: GLAS and NGES plugged into ARB-LLM; drawn as Figure 10."""

from __future__ import annotations

from mobie.figures.fig10 import collect_plug_ins, draw
from mobie.figures.figure import FigureData
from mobie.results import Results

__all__ = ["collect", "draw"]


def collect(results: Results) -> FigureData:
    """Perplexities with ARB-LLM as the backbone."""
    return collect_plug_ins(results, "fig11", "arb-llm")
