"""What decides how programs are generated and judged."""

from __future__ import annotations

from typing import Any

from pydantic import Field, model_validator

from mobie.data.problems import DATASETS, DatasetName
from mobie.provenance import digest
from mobie.scoring.protocol import Dtype, Protocol

#: fields that decide the verdicts on programs but not the programs
JUDGING = ("k", "limits")


class CodeDataset(Protocol):
    """A set of problems.

    source: row of `workflow/config/sources.csv`: evalplus's release file, or the evaluation wheel.
    limit:  at most so many problems; None: all.
    """

    name: DatasetName
    source: str
    limit: int | None = Field(None, ge=1)


class CodeLimits(Protocol):
    """What one program may use; see `mobie.sandbox.Limits`."""

    seconds: float = Field(150.0, gt=0)
    memory_mb: int = Field(4096, ge=64)
    processes: int = Field(16, ge=1)
    output_bytes: int = Field(1 << 20, ge=1024)
    file_mb: int = Field(64, ge=1)


class CodeProtocol(Protocol):
    """Everything that decides the scores beside the model and the problems.

    evalplus:       version of evalplus, whose stop texts, sanitizer and checks are used.
    sample_seed:    of the problems drawn where a set has more than its `limit`, and of sampled programs.
    samples:        programs of each problem drawn at `temperature` and `top_p`, beside the greedy one; 0: none.
    k:              pass@k of the drawn programs.
    max_new_tokens: of one program.
    max_length:     context in tokens; a longer prompt is cut on its left. The model's own limit holds where it is less.
    limits:         of one program's run.
    dtype:          of the model's weights and activations.
    """

    evalplus: str
    datasets: tuple[CodeDataset, ...] = Field(min_length=1)
    sample_seed: int = Field(0, ge=0)
    samples: int = Field(0, ge=0)
    temperature: float = Field(0.8, gt=0)
    top_p: float = Field(0.95, gt=0, le=1)
    k: tuple[int, ...] = ()
    max_new_tokens: int = Field(768, ge=1)
    max_length: int = Field(2048, ge=2)
    limits: CodeLimits = CodeLimits()
    dtype: Dtype = "float32"

    @model_validator(mode="after")
    def _consistent(self) -> CodeProtocol:
        names = [part.name for part in self.datasets]
        if len(set(names)) != len(names):
            raise ValueError(f"datasets {', '.join(names)}: expected each of {', '.join(DATASETS)} at most once")
        wrong = [k for k in self.k if not 1 <= k <= self.samples]
        if wrong or (self.samples > 0) != bool(self.k):
            raise ValueError(
                f"k {list(self.k)} with {self.samples} samples; expected numbers from 1 to {self.samples}"
                if self.samples
                else f"k {list(self.k)} without samples; give `samples` or leave `k` out"
            )
        if self.max_new_tokens >= self.max_length:
            raise ValueError(
                f"{self.max_new_tokens} new tokens leave no room for a prompt in max_length {self.max_length}"
            )
        return self

    @property
    def modes(self) -> dict[str, int]:
        """How programs are made → how many of each problem."""
        return {"greedy": 1, **({"sampled": self.samples} if self.samples else {})}

    def generation(self) -> dict[str, Any]:
        """The fields that decide the programs, as JSON values."""
        return self.model_dump(mode="json", exclude=set(JUDGING))

    def generation_digest(self) -> str:
        """SHA-256 of `generation`: other verdicts on the same programs need no new programs."""
        return digest({"protocol": "CodeSamples", **self.generation()})
