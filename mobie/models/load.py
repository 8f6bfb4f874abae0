"""What the configuration of a model in a local folder says."""

from __future__ import annotations

from pathlib import Path

import torch

from mobie.errors import DataError
from mobie.models import OWN_FILES
from mobie.parsing import parse_json


def model_type(folder: Path) -> str:
    """What `config.json` calls the architecture. Raises `DataError` where there is no such file or entry."""
    path = folder / "config.json"
    try:
        return str(parse_json(path.read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path}: no readable model configuration ({error}); expected a JSON object with `model_type`; delete the "
            "folder and fetch the model again"
        ) from error


def kept_dtype(model_folder: Path) -> torch.dtype:
    """The 16-bit type of the model's files; bfloat16 for a model published in 32 bits. Raises `DataError`."""
    from transformers import AutoConfig

    try:
        dtype = AutoConfig.from_pretrained(model_folder, **OWN_FILES).dtype
    except Exception as error:  # the library's checks of a configuration raise errors of many kinds
        raise DataError(
            f"{model_folder / 'config.json'}: the library cannot read it ({' '.join(str(error).split())[:300]}); "
            "expected the model's own; delete the folder and fetch the model again"
        ) from error
    return dtype if dtype in (torch.float16, torch.bfloat16) else torch.bfloat16
