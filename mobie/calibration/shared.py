"""Loss gradients of a model on disk, so that jobs which need the same ones compute them once.

What one backward pass gives (token weights), and the guided Hessians that follow from it, depend on the model, the
calibration tokens, the channel groups and the bases that the gradients are read through; sixty method configs may share
them. They lie in a folder that is named by a digest of all that:

    000.safetensors …         token weights of each block
    guided-000.safetensors …  guided Hessians of each block, unless they are too large to keep
    cost.json                 CPU seconds of the pass so far, and whether it is finished

Every file is written whole or not at all, names what it belongs to, and carries a hash of its content: what is absent,
damaged or another's is computed again, and two jobs at once write the same tensors.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from mobie.calibration.gradients import (
    load_checked,
    load_token_weights,
    save_checked,
    save_token_weights,
)
from mobie.calibration.guided import Guided, TokenWeights
from mobie.errors import DataError
from mobie.methods.base import ExpertBank, Method
from mobie.sealed import content_digest
from mobie.storage import remove_abandoned, write_json

COST = "cost.json"
LARGEST_GUIDED = 1 << 28  # bytes over all blocks; guided Hessians grow with the square of the width


@dataclass(frozen=True)
class GradientCache:
    """Where jobs share loss gradients.

    folder: holds one folder for each set of them.
    source: digest of the model, the calibration tokens and the code.
    """

    folder: Path
    source: str

    def key(self, method: Method, batch_sequences: int, bases: Sequence[Mapping[str, str]]) -> str:
        """SHA-256 of all that decides the gradients: source, channel groups, bases, sequences per batch.

        Whether the router is quantized counts as well: the full-precision stream runs with the router as it is kept.

        bases: of every block, as `basis_digests` gives them.
        """
        parts = [self.source, method.gradient_groups, method.quantizes_router, batch_sequences]
        hashed = hashlib.sha256(json.dumps(parts).encode())
        for index, digests in enumerate(bases):
            for name, what in sorted(digests.items()):
                hashed.update(f"/{index}/{name}/{what}".encode())
        return hashed.hexdigest()


def basis_digests(bank: ExpertBank | None, method: Method) -> dict[str, str]:
    """What tells apart the matrices that the gradients of a block's experts are read through, by projection."""
    bases = {} if bank is None else method.gradient_bases(bank)
    return {n: "identity" if basis is None else content_digest({"basis": basis}) for n, basis in bases.items()}


class GradientFolder:
    """Loss gradients of all blocks of a model in one folder; `fingerprint` stands for all that decides them."""

    def __init__(self, folder: Path, fingerprint: str, blocks: int) -> None:
        self._folder, self._fingerprint, self._blocks = folder, fingerprint, blocks
        if folder.is_dir():
            remove_abandoned(folder)

    def _weights_path(self, index: int) -> Path:
        return self._folder / f"{index:03d}.safetensors"

    def _guided_path(self, index: int) -> Path:
        return self._folder / f"guided-{index:03d}.safetensors"

    def cost(self) -> float | None:
        """CPU seconds of the backward pass, or None where it is not finished."""
        spent, finished = self._account()
        return spent if finished else None

    def has_weights(self) -> bool:
        """Whether the token weights of every block are there and whole."""
        return all(self.is_finished(index) for index in range(self._blocks))

    def weights(self, index: int) -> TokenWeights | None:
        """Token weights of a block, or None where there are none. Raises `DataError` for a damaged file."""
        return load_token_weights(self._weights_path(index), self._fingerprint)

    def is_finished(self, index: int) -> bool:
        """Whether the token weights of a block are there and whole."""
        try:
            return self.weights(index) is not None
        except DataError:
            return False

    def begin(self) -> None:
        """Start the account of what the token weights cost. Raises `StorageError`."""
        write_json(self._folder / COST, {"cpu_seconds": 0.0, "finished": False})

    def save_block(self, index: int, weights: TokenWeights, cpu_seconds: float) -> None:
        """Write the token weights of a block, and add what they cost to the account. Raises `StorageError`."""
        save_token_weights(self._weights_path(index), weights, self._fingerprint)
        spent, _ = self._account()
        write_json(self._folder / COST, {"cpu_seconds": spent + cpu_seconds, "finished": False})

    def finish(self) -> float:
        """Close the account, the last thing to be written; returns the CPU seconds. Raises `StorageError`."""
        spent, _ = self._account()
        write_json(self._folder / COST, {"cpu_seconds": spent, "finished": True})
        return spent

    def _account(self) -> tuple[float, bool]:
        """CPU seconds so far and whether all is finished; nothing where no readable account is."""
        try:
            account = json.loads((self._folder / COST).read_text(encoding="utf-8"))
            return float(account["cpu_seconds"]), bool(account["finished"])
        except (OSError, ValueError, KeyError, TypeError):
            return 0.0, False

    def guided(self) -> list[Guided] | None:
        """Guided Hessians of all blocks; None unless every block's are there and whole."""
        found = []
        for index in range(self._blocks):
            try:
                loaded = load_checked(self._guided_path(index), self._fingerprint)
            except DataError:
                return None
            if loaded is None:
                return None
            tensors, notes = loaded
            by_part: dict[str, dict[str, Tensor]] = {"linears": {}, "experts": {}, "pooled": {}}
            for name, tensor in tensors.items():
                part, _, rest = name.partition(".")
                by_part[part][rest] = tensor
            found.append(Guided(**by_part, unmatched=notes["unmatched"], cpu_seconds=notes["cpu_seconds"]))
        return found

    def keeps_guided(self, size: int) -> bool:
        """Whether guided Hessians of `size` bytes a block are small enough to keep those of all blocks."""
        return self._blocks * size <= LARGEST_GUIDED

    def save_guided(self, index: int, guided: Guided) -> None:
        """Write a block's guided Hessians, all of them computed. Raises `StorageError`."""
        tensors = {
            f"{part}.{name}": tensor
            for part in ("linears", "experts", "pooled")
            for name, tensor in getattr(guided, part).items()
        }
        notes = {"unmatched": guided.unmatched, "cpu_seconds": guided.cpu_seconds}
        save_checked(self._guided_path(index), tensors, self._fingerprint, notes)
