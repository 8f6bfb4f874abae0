"""Calibration texts that the model under test writes itself: MoEQuant's expert-balanced self-sampling (EBSS).

Hu et al., arXiv 2505.03804, section 4.2. What the paper says: score (eq. 13), beams (eq. 14), imbalance (eqs. 3 and 4),
`tau` = 1.2 and 4 beams (section 5.2). What it leaves open is a field here, and a name in `SELF_SAMPLED` where another
reading is worth comparing; such a name stands where the name of a text does: `gptq-w2+calibration.text=ebss-set`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mobie.errors import ConfigError

Frequency = Literal["per_token", "share"]
Scope = Literal["sequence", "set"]
Ends = Literal["kept", "banned"]


@dataclass(frozen=True)
class SelfSampling:
    """How a model writes its own calibration text.

    tau:       divides the imbalance in the score (eq. 13); None: likelihood alone, an ordinary beam search.
    beams:     sequences kept at each step, w in eq. 14.
    frequency: of an expert's use, u in eq. 4. `per_token`: share of the tokens that use it; a layer's frequencies sum
               to k. `share`: of all uses; they sum to 1. The deviations that the authors print (0.0928 for GSM8K on a
               model whose tokens use 6 of 64 experts) exceed what `share` can reach, 0.05.
    scope:     whose imbalance is meant. `sequence`: that of the sequence being written, as eq. 13 prints it. `set`:
               with the finished batches of the set, as the goal in eq. 9.
    prefix:    a sequence starts with a random token of the vocabulary, another for each, and goes on with the likeliest
               one up to a length between these two, drawn for each sequence; then the search begins. The paper does not
               say how a sequence starts; (3, 6) is what its released script does. (1, 1): no such beginning.
    ends:      of a text. `kept`: the model writes its end-of-text token where it likes and a new text behind it, so
               that every sequence has its full length; the released script ends the sequence there. `banned`: it never
               does. Other special tokens (padding, marks of a chat) are never written.
    cached:    tokens, of all beams, whose keys and values are held at once: it decides how many sequences are written
               together, which is part of the result, as sums in batches of another size differ in last digits. 32768 of
               OLMoE take 4 GiB.

    Raises:
        ConfigError: a value that makes no sense.
    """

    tau: float | None = 1.2
    beams: int = 4
    frequency: Frequency = "per_token"
    scope: Scope = "sequence"
    prefix: tuple[int, int] = (3, 6)
    ends: Ends = "kept"
    cached: int = 32768

    def __post_init__(self) -> None:
        if self.tau is not None and not 0 < self.tau < float("inf"):
            raise ConfigError(f"tau: got {self.tau}, expected a positive number, or null for likelihood alone")
        for name in ("beams", "cached"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}: got {getattr(self, name)}, expected 1 or more")
        shortest, longest = self.prefix
        if not 1 <= shortest <= longest:
            raise ConfigError(f"prefix: got {list(self.prefix)}, expected two lengths in order, 1 or more")
        for name, kinds in (("frequency", Frequency), ("scope", Scope), ("ends", Ends)):
            if getattr(self, name) not in get_args(kinds):
                raise ConfigError(f"{name}: got {getattr(self, name)!r}, expected one of {', '.join(get_args(kinds))}")

    def batch(self, length: int) -> int:
        """Sequences of `length` tokens that are written together."""
        return max(1, self.cached // (self.beams * length))


EBSS = "ebss"
#: name of a calibration text that the model writes → how
SELF_SAMPLED: dict[str, SelfSampling] = {
    EBSS: SelfSampling(),
    "ebss-set": SelfSampling(scope="set"),
    "ebss-share": SelfSampling(frequency="share"),
    "ebss-no-prefix": SelfSampling(prefix=(1, 1)),
    "ebss-endless": SelfSampling(ends="banned"),
    "ebss-likelihood": SelfSampling(tau=None),
}
