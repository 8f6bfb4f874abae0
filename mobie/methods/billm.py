"""BiLLM (Huang et al. 2024, arXiv 2402.04291): residual binarization of salient columns, two groups of the rest.

    salient columns   mu + alpha1 · B1 + alpha2 · B2     the second order binarizes what the first leaves over
    others            mu_g + alpha_g · B                 g: smaller or larger magnitude, a bit per weight

Where the paper and the authors' implementation differ, the implementation's reading is the default of an option: the
searches measure errors on the saliency matrix (`search_on`), and error feedback divides by the diagonal of the Cholesky
factor (`feedback`). The saliency divides by that diagonal too (`saliency_rule`). Each order has a mean, as released.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from mobie.methods.base import register
from mobie.methods.binary_common import BinaryMethod
from mobie.methods.binary_fit import Fit, fit_means
from mobie.methods.split_search import Split


@register
@dataclass(frozen=True)
class BiLLM(BinaryMethod):
    """BiLLM; the options are those of the shared skeleton."""

    name: ClassVar[str] = "billm"
    seconds_per_weight: ClassVar[float] = 7.8e-7
    stored_bits: ClassVar[float] = 3.0

    def fit_block(self, weights: Tensor, split: Split, gram: Tensor) -> tuple[Fit, Fit]:
        rest = ~split.salient
        plain = fit_means(weights[:, rest], split.second_group[:, rest], order=1)
        return plain, fit_means(weights[:, split.salient], None, order=2)
