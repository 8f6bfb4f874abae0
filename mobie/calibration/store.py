"""Where activations of the calibration text lie: in memory while a budget lasts, then in files.

A file is written whole or not at all and names the job that it belongs to, so that a job that was killed can go on from
what it finds; a store that is asked to `keep` writes every tensor to a file for that reason.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from mobie.errors import DataError
from mobie.packing.checkpoint import read_tensors, save_tensors

CPU = torch.device("cpu")


class Memory:
    """Bytes that may still be taken for activations and statistics."""

    def __init__(self, budget: int) -> None:
        self.left = budget

    def reserve(self, size: int) -> bool:
        """Take `size` bytes, or none where so many are not left."""
        if size > self.left:
            return False
        self.left -= size
        return True

    def release(self, size: int) -> None:
        """Give back what `reserve` took."""
        self.left += size


class ActivationStore:
    """Named tensors of one stage of a job."""

    def __init__(self, folder: Path, fingerprint: str, memory: Memory, *, keep: bool = False) -> None:
        """Args:
        folder: of the files.
        fingerprint: of the job; a file with another is as good as none.
        memory: what tensors may take; those beyond go to files.
        keep: write all to files, for a later run of the same job.
        """
        self._folder, self._fingerprint, self._memory, self._keep = folder, fingerprint, memory, keep
        self._held: dict[str, Tensor] = {}
        self._written: set[str] = set()

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.safetensors"

    def put(self, name: str, tensor: Tensor) -> None:
        """Keep a tensor in place of the one of this name. Raises `StorageError`."""
        self.drop(name)
        tensor = tensor.detach().to(CPU)
        if not self._keep and self._memory.reserve(tensor.nbytes):
            self._held[name] = tensor
        else:
            save_tensors(self._path(name), {"rows": tensor}, {"fingerprint": self._fingerprint})
            self._written.add(name)

    def get(self, name: str, device: torch.device = CPU) -> Tensor:
        """The tensor of a name. Raises `DataError` where its file is gone or damaged."""
        if name in self._held:
            return self._held[name].to(device)
        tensors, _ = read_tensors(self._path(name))
        return tensors["rows"].to(device)

    def has(self, name: str) -> bool:
        """Whether a tensor is there, whole: in memory, of this run, or in a file that an earlier run left."""
        if name in self._held or name in self._written:
            return True
        try:
            _, metadata = read_tensors(self._path(name), verify=True)
        except DataError:
            return False
        if metadata.get("fingerprint") != self._fingerprint:
            return False
        self._written.add(name)
        return True

    def drop(self, name: str) -> None:
        """Forget a tensor and remove its file."""
        held = self._held.pop(name, None)
        if held is not None:
            self._memory.release(held.nbytes)
        if name in self._written:
            self._path(name).unlink(missing_ok=True)
            self._written.discard(name)

    def clear(self) -> None:
        """Forget everything."""
        for name in [*self._held, *self._written]:
            self.drop(name)
