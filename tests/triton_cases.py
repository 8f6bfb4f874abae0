"""What the tests of Triton kernels share: where they run, poisoned memory, and how near is near."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # in the interpreter
DTYPES = (torch.float16, torch.bfloat16)
#: share of a value that rounding to a dtype may cost; Triton's interpreter cuts bfloat16 off instead of rounding it
SHARE = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def assert_near(actual: Tensor, expected: Tensor, share: float | None = None) -> None:
    """Every element within `share` of its own size plus the typical size; shape and, for 16 bits, dtype checked too.

    share: by default what the rounding of `actual`'s dtype allows.
    """
    assert actual.shape == expected.shape
    share = SHARE.get(actual.dtype, 2.0**-18) if share is None else share
    actual, expected = actual.double(), expected.double()
    allowed = share * (expected.abs() + expected.square().mean().sqrt())
    wrong = ~((actual - expected).abs() <= allowed)  # NaN is wrong
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} differ, at most by {(actual - expected).abs().max()}"
    )


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """New memory is NaN (or the largest integer), so that a place that a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # a verb that another test called may have unset it
    try:
        assert torch.empty(2).isnan().all()
        yield
    finally:
        torch.use_deterministic_algorithms(False)
