"""Base of the protocols: frozen objects that hold all that decides a score; their digests go into records."""

from __future__ import annotations

import importlib.metadata
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from mobie.errors import ConfigError
from mobie.provenance import digest

Dtype = Literal["float32", "bfloat16", "float16"]


class Protocol(BaseModel):
    """Immutable and strict: an unknown field is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def digest(self) -> str:
        """SHA-256 of all fields."""
        return digest({"protocol": type(self).__name__, **self.model_dump(mode="json")})


def require_version(library: str, version: str) -> None:
    """Raise ConfigError where another version of a library is installed than the protocol's."""
    try:
        installed = importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        installed = "no version"
    if installed != version:
        raise ConfigError(
            f"{installed} of {library} is installed, the protocol says {version}; install {library}=={version}"
        )


def require_dtype(model: Any, expected: Dtype) -> None:
    """Raise ConfigError for a model in another dtype than its protocol's."""
    dtype = str(model.dtype).removeprefix("torch.")
    if dtype != expected:
        raise ConfigError(f"the model is in {dtype}, the protocol says {expected}; load the model in that dtype")
