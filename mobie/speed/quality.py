"""What int8 activations and an int8 head cost in perplexity: the same windows through the kernels' path, paired."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

#: name → activations, int8 head; the first is what the others are compared with
VARIANTS: dict[str, tuple[Literal["16bit", "int8"], bool]] = {
    "16bit": ("16bit", False),
    "int8-activations": ("int8", False),
    "int8-head": ("16bit", True),
    "int8-activations-and-head": ("int8", True),
}
BATCH = 4


def quality(model: Any, windows: Tensor) -> dict[str, Any]:
    """Perplexity of a packed model on token windows `(windows, length)`, by variant.

    Returns:
        `perplexity` of each variant; `difference` of each but the first, the change of the mean loss in nats with its
        standard error, paired by window; `windows` and `tokens` that were scored, and the `dtype`.
    """
    from mobie.kernels.attach import attach, detach
    from mobie.scoring.perplexity import window_losses

    losses = {}
    for name, (activations, int8_head) in VARIANTS.items():
        attach(model, compute="kernels", activations=activations, int8_head=int8_head)
        losses[name] = window_losses(model, windows, BATCH).tolist()
    detach(model)
    reference, *others = VARIANTS
    return {
        "perplexity": {name: math.exp(sum(values) / len(values)) for name, values in losses.items()},
        "difference": {name: paired(losses[name], losses[reference]) for name in others},
        "windows": len(windows),
        "tokens": windows.numel() - len(windows),
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def paired(values: Sequence[float], others: Sequence[float]) -> dict[str, float]:
    """Mean of `values - others`, and its standard error."""
    differences = [a - b for a, b in zip(values, others, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    variance = math.fsum((d - mean) ** 2 for d in differences) / (n - 1)
    return {"mean": mean, "stderr": math.sqrt(variance / n)}
