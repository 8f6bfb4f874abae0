"""GPTQ (Frantar et al. 2023): round column by column, each rounding error made up for by the columns not yet rounded.

W: weights (..., out, in)   H: Hessian (..., in, in)   U: upper Cholesky factor of H⁻¹
q_j: column j rounded       e_j = (w_j - q_j) / U_jj    then w_k -= e_j · U_jk for every k > j

No reordering of columns. Leading dimensions are a batch: all experts of a projection go through one loop over columns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from mobie.errors import ConfigError
from mobie.methods.base import TokenWeighting, register
from mobie.methods.factored import FactoredMethod
from mobie.packing.grid import Grid, check_grid_options, fit_grid, nearest_code, nominal_bits, pack_bank

#: scale and zero point `(..., out, 1)` of each row of weights `(..., out, columns)`, for a number of bits
GridFit = Callable[[Tensor, int], tuple[Tensor, Tensor]]


def fit_rows(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The asymmetric grid of each row `(..., out, columns)`, from its least and greatest weight."""
    return fit_grid(weight, bits, None)


def column_spans(columns: int, block_size: int, group_size: int | None) -> Iterator[tuple[int, int]]:
    """Cut the columns wherever a block or a group starts, so that a group starts with all earlier errors fed to it."""
    starts = {*range(0, columns, block_size), *range(0, columns, group_size or columns)}
    return pairwise([*sorted(starts), columns])


#: rounds a column `(..., 1, out)`, the j-th of its span: what is stored of it, and the values that this stands for
RoundColumn = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def round_columns(span: Tensor, factor: Tensor, round_column: RoundColumn) -> tuple[Tensor, Tensor]:
    """Round the columns of one span in turn, each after taking up the errors of the columns before it in the span.

    Works on the transpose, where a column of W is contiguous.

    Args:
        span: `(..., out, width)`.
        factor: the square of U that belongs to these columns, `(..., width, width)`.

    Returns:
        Codes `(..., out, width)` uint8, and the errors e_j `(..., out, width)` that later spans have to take up.
    """
    columns, lower = (t.mT.contiguous() for t in (span, factor))
    codes = torch.empty_like(columns)
    errors = torch.empty_like(columns)
    for j in range(columns.shape[-2]):
        here = slice(j, j + 1)
        column = columns[..., here, :] - lower[..., here, :j] @ errors[..., :j, :]  # (..., 1, out)
        code, value = round_column(j, column)
        codes[..., here, :] = code
        errors[..., here, :] = (column - value) / lower[..., here, here]
    return codes.mT.to(torch.uint8), errors.mT


def quantize_span(span: Tensor, factor: Tensor, scale: Tensor, zero: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """`round_columns` to the nearest points of one grid per row for the whole span: scale and zero `(..., out, 1)`."""
    scale, zero = (t.mT.contiguous() for t in (scale, zero))

    def nearest(_: int, column: Tensor) -> tuple[Tensor, Tensor]:
        code = nearest_code(column, scale, zero, bits)
        return code, (code - zero) * scale

    return round_columns(span, factor, nearest)


def gptq(
    weight: Tensor,
    factor: Tensor,
    dead: Tensor,
    bits: int,
    group_size: int | None = None,
    block_size: int = 128,
    fit: GridFit = fit_rows,
) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize weights `(..., out, in)` (Algorithm 1 of the paper).

    The grid of a whole row comes from the weights as given (dead columns at zero), that of a group from the weights as
    they stand, errors fed in, when the group starts. `block_size` columns are finished before the columns behind them
    are updated in one product: it changes the speed and the rounding of sums, nothing else.

    Args:
        factor: U of the damped Hessians, `(..., in, in)`.
        dead: columns that no input reaches, `(..., in)` bool.
        fit: gives the grids.

    Returns:
        Codes `(..., out, in)` uint8, scale and zero `(..., out, groups)` as `fit` gives them.
    """
    remaining = weight.masked_fill(dead.unsqueeze(-2), 0)
    grids = [] if group_size else [fit(remaining, bits)]
    codes = []
    for start, stop in column_spans(weight.shape[-1], block_size, group_size):
        if group_size and start % group_size == 0:
            grids.append(fit(remaining[..., start : start + group_size], bits))
        square = factor[..., start:stop, start:stop]
        span_codes, errors = quantize_span(remaining[..., start:stop], square, *grids[-1], bits)
        codes.append(span_codes)
        remaining[..., stop:] -= errors @ factor[..., start:stop, stop:]
    scale, zero = (torch.cat(parts, dim=-1) for parts in zip(*grids, strict=True))
    return torch.cat(codes, dim=-1), scale, zero


@register
@dataclass(frozen=True)
class GPTQ(FactoredMethod):
    """GPTQ on an asymmetric grid; `group_size` None is one grid per output row.

    token_weighting: "gate" for affinity-guided Hessians (MoEQuant, section 4.2): a token counts by its router score.
    """

    name: ClassVar[str] = "gptq"
    seconds_per_weight: ClassVar[float] = 1.2e-7
    #: whether the grid has no zero points, so that none is stored
    symmetric: ClassVar[bool] = False

    bits: int
    group_size: int | None = None
    block_size: int = 128
    percdamp: float = 0.01
    token_weighting: TokenWeighting = "none"

    def __post_init__(self) -> None:
        check_grid_options(self.name, self.bits, self.group_size)
        if type(self.block_size) is not int or self.block_size < 1:
            raise ConfigError(
                f"{self.name}: block_size is {self.block_size!r}; expected a positive number of columns (128)"
            )
        if type(self.percdamp) not in (int, float) or not 0 <= self.percdamp < float("inf"):
            raise ConfigError(f"{self.name}: percdamp is {self.percdamp!r}; expected a number of at least 0 (0.01)")

    def fit(self, weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
        """The grids that the weights are rounded to, a `GridFit`."""
        return fit_rows(weight, bits)

    def quantize_batch(self, weight: Tensor, factor: Tensor, dead: Tensor) -> list[Grid]:
        codes, scale, zero = gptq(weight, factor, dead, self.bits, self.group_size, self.block_size, self.fit)
        return pack_bank(codes, scale, None if self.symmetric else zero, **self._layout)

    @property
    def _layout(self) -> dict[str, Any]:
        return {
            "bits": self.bits,
            "group_size": self.group_size,
            "paper": nominal_bits(self.bits, self.group_size, symmetric=self.symmetric),
        }
