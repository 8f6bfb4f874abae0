"""Cutting a text into the token windows that perplexity and routing are measured on, once per tokenizer and protocol.

The windows lie in a file that says what they were cut from; a job that reads them needs neither text nor tokenizer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from mobie.errors import ConfigError, DataError
from mobie.provenance import digest, file_hash
from mobie.scoring.protocol import Dtype, Protocol, require_dtype
from mobie.sealed import load_sealed, save_sealed

if TYPE_CHECKING:
    from torch import Tensor


class WindowProtocol(Protocol):
    """How a text becomes windows.

    text:       name of the text (mobie.data.texts).
    separator:  put between documents before the whole is tokenized once.
    window:     tokens per window; windows follow one another without overlap, an incomplete last one is dropped.
    windows:    at most so many, evenly spaced over the text; None: all.
    bos:        `none`: no token is added. `text`: one beginning-of-sequence token before the whole text. `window`: it
                is the first token of every window, followed by `window - 1` tokens of text.
    batch_size: windows per forward pass.
    dtype:      of the model's weights and activations.
    """

    text: str
    separator: str = "\n\n"
    window: int = Field(256, ge=2)
    windows: int | None = Field(None, ge=1)
    bos: Literal["none", "text", "window"] = "none"
    batch_size: int = Field(8, ge=1)
    dtype: Dtype = "float32"

    def windows_digest(self) -> str:
        """SHA-256 of the fields that decide the tokens: equal for protocols that differ in batch size or dtype only."""
        return digest(self.model_dump(mode="json", include={"text", "separator", "window", "windows", "bos"}))

    @property
    def windows_id(self) -> str:
        """The first 12 digits of `windows_digest`: part of the windows' file name."""
        return self.windows_digest()[:12]


@dataclass(frozen=True)
class WindowsOrigin:
    """What token windows were cut from.

    text:             name of the text.
    text_sha256:      of its documents.
    source:           what the register says of the download that the text was read from.
    tokenizer_sha256: of the tokenizer's files.
    protocol_sha256:  of the fields that decide the tokens.
    """

    text: str
    text_sha256: str
    source: str
    tokenizer_sha256: str
    protocol_sha256: str


def tokenizer_files_digest(folder: Path) -> str:
    """SHA-256 over the tokenizer's files in a model or checkpoint folder. Raises `DataError` where there is none."""
    names = ("added_tokens.json", "merges.txt", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json")
    files = [*(folder / name for name in (*names, "vocab.json", "vocab.txt")), *folder.glob("*.model")]
    found = {file.name: file_hash(file) for file in files if file.is_file()}
    if not found:
        raise DataError(f"{folder}: no tokenizer file, expected tokenizer.json; fetch or quantize the model again")
    return digest(found)


def save_windows(path: Path, windows: Tensor, origin: WindowsOrigin) -> None:
    """Write token windows `(windows, window)`, their origin and the hash of both. Raises `StorageError`."""
    save_sealed(path, {"windows": windows}, asdict(origin))


def load_windows(path: Path, expected: Mapping[str, str]) -> tuple[Tensor, WindowsOrigin]:
    """Read token windows; `expected` holds those fields of the origin that the reader knows.

    Raises:
        DataError: missing, damaged, not token windows, or cut from something else.
    """
    remedy = "delete it and run `python -m mobie windows` or the windows rule again"
    try:
        windows, found = load_sealed(path, "windows")
        origin = WindowsOrigin(**found)
    except FileNotFoundError:
        raise DataError(f"{path}: no such token windows; run `python -m mobie windows`") from None
    except (ValueError, TypeError) as error:
        raise DataError(f"{path}: not readable token windows ({error}); {remedy}") from error
    for field, value in expected.items():
        if getattr(origin, field) != value:
            raise DataError(
                f"{path}: cut from something else: {field} {getattr(origin, field)}, expected {value}; {remedy}"
            )
    return windows, origin


def token_windows(documents: Sequence[str], tokenizer: Any, protocol: WindowProtocol) -> Tensor:
    """Token windows `(windows, window)` of a text under `protocol`.

    Raises:
        ConfigError: a beginning-of-sequence token is asked for and the tokenizer has none.
        DataError: the text is shorter than one window.
    """
    import torch

    ids = tokenizer(protocol.separator.join(documents), add_special_tokens=False, verbose=False)["input_ids"]
    if protocol.bos != "none" and tokenizer.bos_token_id is None:
        raise ConfigError(f"bos is {protocol.bos!r}, but the tokenizer has no such token; expected bos: none")
    if protocol.bos == "text":
        ids = [tokenizer.bos_token_id, *ids]
    length = protocol.window - (protocol.bos == "window")
    count = len(ids) // length
    if count == 0:
        raise DataError(
            f"text {protocol.text!r}: got {len(ids)} tokens, expected at least one window of {length}; "
            "take a longer text or a shorter window"
        )
    rows = torch.tensor(ids[: count * length]).reshape(count, length)
    if protocol.windows is not None and protocol.windows < count:
        rows = rows[torch.arange(protocol.windows) * count // protocol.windows]
    if protocol.bos == "window":
        rows = torch.cat([torch.full((len(rows), 1), tokenizer.bos_token_id), rows], dim=1)
    return rows


def require_fit(model: Any, protocol: WindowProtocol) -> None:
    """Check that a model is what the protocol speaks of.

    Raises:
        ConfigError: its dtype is another one, or its context is shorter than a window.
    """
    require_dtype(model, protocol.dtype)
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and protocol.window > context:
        raise ConfigError(
            f"windows of {protocol.window} tokens exceed the model's context of {context}; use {context} or less"
        )
