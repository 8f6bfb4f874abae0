"""Full-precision models from local folders; what cannot be used is refused before anything is computed."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from mobie.errors import DataError
from mobie.models import OWN_FILES
from mobie.models.base import require_finite
from mobie.parsing import parse_json


def load_full_precision(folder: Path) -> nn.Module:
    """The library's model from a local folder, in float32 for computing.

    Its experts run one after the other (`eager`), in the order of sums of the observed experts function: a block read
    back after a kill must pass on the same hidden states, bit for bit, as the block that was observed.

    Raises:
        DataError: unreadable files, parameters missing, unexpected or of another shape, values that are not finite.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=torch.float32,
            experts_implementation="eager",
            ignore_mismatched_sizes=True,  # they are refused below, with a message of our own
            use_safetensors=True,  # other weight files are pickles
            output_loading_info=True,
            **OWN_FILES,
        )
    except (SafetensorError, OSError, ValueError) as error:
        raise DataError(
            f"{folder}: the model's weights cannot be read ({error}); expected complete safetensors files and "
            "config.json; delete the folder and fetch the model again"
        ) from error
    wrong = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
    }
    if wrong:
        raise DataError(f"{folder}: {wrong}; expected exactly the model's own parameters; fetch the model again")
    for name, parameter in model.named_parameters():
        require_finite(name, parameter)
    return model.eval()


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
