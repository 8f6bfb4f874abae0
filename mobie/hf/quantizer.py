"""The library's way to load a packed checkpoint: `quant_method` "mobie" in config.json finds the classes of this file.

    import mobie
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map="auto")

The library builds the model without memory; its modules are swapped for packed ones; the library then reads each tensor
of the files into the buffer of that name. Before that, the files are compared with the manifest and with the model, so
that nothing is left to random values; afterwards, what was read is compared with what the files say.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from mobie.errors import ConfigError, DataError, UnsupportedError, unknown_name
from mobie.hf.modules import pack_model, packed_modules
from mobie.models.base import Adapter
from mobie.packing.checkpoint import (
    FORMAT_VERSION,
    MANIFEST,
    PackedBlock,
    check_version,
    load_block,
    read_manifest,
    read_tensors,
    weight_files,
)
from mobie.packing.folder import CONFIG, QUANT_METHOD

COMPUTE = ("auto", "unpack", "cached", "kernels")
ACTIVATIONS = ("16bit", "int8")


class MobieConfig(QuantizationConfigMixin):
    """How a packed checkpoint was made (read from its config.json) and how it shall compute (chosen at loading).

    compute:     "kernels": from the packed bits; "cached": unpack a weight at its first use and keep it; "unpack":
                 unpack it for every forward pass, which needs least memory; "auto": kernels on a GPU, else cached.
    activations: of the kernels: "16bit", or "int8" (faster; rounds inputs in groups of 128).
    """

    def __init__(
        self,
        compute: str = "auto",
        activations: str = "16bit",
        format_version: int = FORMAT_VERSION,
        **stored: Any,
    ) -> None:
        """Raises ConfigError for an unknown choice, DataError for a format version that this version does not read."""
        check_version(format_version, f"{CONFIG}, quantization_config")
        for name, value, known in (("compute", compute, COMPUTE), ("activations", activations, ACTIVATIONS)):
            if value not in known:
                raise ConfigError(unknown_name(name, value, known))
        if activations == "int8" and compute in {"unpack", "cached"}:
            raise ConfigError(
                f"activations 'int8' with compute {compute!r}: only kernels round activations; expected compute "
                "'kernels' or 'auto', or activations '16bit'"
            )
        stored.pop("quant_method", None)
        self.quant_method = QUANT_METHOD
        self.format_version = format_version
        self.compute, self.activations = compute, activations
        self.stored = stored

    def get_loading_attributes(self) -> dict[str, str]:
        """What `from_pretrained(quantization_config=MobieConfig(…))` changes about a checkpoint's own configuration."""
        return {"compute": self.compute, "activations": self.activations}

    def to_dict(self) -> dict[str, Any]:
        """The entry of config.json; how to compute is no property of the checkpoint."""
        return {"quant_method": self.quant_method, "format_version": self.format_version, **self.stored}


class MobieQuantizer(HfQuantizer):
    """Swaps the modules of a model for packed ones and sees to it that they hold what the files say."""

    requires_calibration = True

    def __init__(self, quantization_config: MobieConfig, **kwargs: Any) -> None:
        if not kwargs.get("pre_quantized", True):
            raise UnsupportedError(
                "a MobieConfig for a model that is not quantized: packed checkpoints are written by "
                "`python -m mobie quantize --method METHOD`, and loaded without a configuration of your own"
            )
        super().__init__(quantization_config, **kwargs)
        self._checked: Path | None = None
        self._sources: dict[str, Path] = {}
        self._stored: dict[str, Tensor] = {}  # every tensor of the files, on `meta`

    # ---- before the library looks at the files: `config` knows the folder --------------------------------------------

    def update_attn_implementation(self, config: Any) -> Any:
        self._check_local_folder(config)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Older versions of the library call this one with the configuration."""
        self._check_local_folder(config)
        return config

    def _check_local_folder(self, config: Any) -> None:
        folder = Path(getattr(config, "name_or_path", None) or "")
        if (folder / CONFIG).is_file():
            self._check(folder)

    def _check(self, folder: Path) -> dict[str, Any]:
        """Compare every file with the manifest, once. Raises DataError."""
        if self._checked != folder:
            self._manifest = read_manifest(folder)
            self._checked = folder
        return self._manifest

    # ---- before loading ----------------------------------------------------------------------------------------------

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Swap modules, and refuse files that do not hold exactly what the swapped model needs."""
        if not checkpoint_files:
            raise UnsupportedError(
                "a packed checkpoint with a state dict or from a distributed checkpoint; expected its folder: "
                "AutoModelForCausalLM.from_pretrained(folder)"
            )
        folder = Path(checkpoint_files[0]).parent
        if not (folder / MANIFEST).exists():
            raise DataError(
                f"{folder / MANIFEST}: no such file; expected a finished checkpoint; run the quantize rule again, or, "
                "if it comes from a hub, fetch the whole folder first (`hf download NAME --local-dir FOLDER`)"
            )
        manifest = self._check(folder)
        adapter = Adapter(manifest["model_type"])
        if not model.can_generate():
            raise UnsupportedError(
                f"{folder}: a packed checkpoint as {type(model).__name__}; expected AutoModelForCausalLM"
            )
        files = weight_files(folder, manifest["blocks"])
        blocks, replaced = self._read_headers(files)
        pack_model(model, adapter, blocks)
        self._compare(model, folder, replaced)
        self._names = [name for name in self._stored if name not in replaced]
        known = set(model._keys_to_ignore_on_load_unexpected or ())
        model._keys_to_ignore_on_load_unexpected = known | {f"^{re.escape(name)}$" for name in replaced}
        self._packed = {
            f"{name}.{buffer}" for name, module in packed_modules(model).items() for buffer in module.stored_names()
        }

    def _read_headers(self, files: list[Path]) -> tuple[list[PackedBlock], set[str]]:
        """The blocks without values, and the parameters that are stored by name only."""
        blocks: list[PackedBlock] = []
        replaced: set[str] = set()
        for file in files:
            tensors, _ = read_tensors(file, values=False)
            self._stored |= tensors
            self._sources |= dict.fromkeys(tensors, file)
        for file in files[:-1]:
            shard = load_block(file, values=False)
            blocks.append(shard.block)
            replaced |= shard.replaced
        return blocks, replaced

    def _compare(self, model: nn.Module, folder: Path, replaced: set[str]) -> None:
        """Refuse files with tensors that are missing, unexpected or of another shape than the model's."""
        expected = model.state_dict()
        tied = set(model.all_tied_weights_keys)
        stored = {name: tensor for name, tensor in self._stored.items() if name not in replaced}
        wrong = {
            "missing": sorted(set(expected) - set(stored) - tied),
            "unexpected": sorted(set(stored) - set(expected)),
            "of another shape": sorted(
                f"{name} {tuple(tensor.shape)}, expected {tuple(expected[name].shape)}"
                for name, tensor in stored.items()
                if name in expected and tensor.shape != expected[name].shape
            ),
        }
        found = "; ".join(f"{what}: {', '.join(names[:8])}" for what, names in wrong.items() if names)
        if found:
            raise DataError(
                f"{folder}: tensors {found}; expected exactly the model's own; delete the folder and run the quantize "
                "rule again, or fetch it again"
            )

    # ---- while loading -----------------------------------------------------------------------------------------------

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """None, which is "as stored", for packed tensors: a scale that is cast is another weight."""
        names = getattr(converter, "target_patterns", None) or [""]
        return None if names[0] in self._packed else super().get_new_dtype(converter, param, dtype)

    # ---- after loading -----------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        """Check what was read, and choose how to compute."""
        for name in self._names:
            module, tensor = _owner(model, name)
            if not (tensor.is_meta and hasattr(module, "_hf_hook")):  # else it is read from the disk when it is needed
                self._verify(module, tensor, name)
        self._stored.clear()
        from mobie.kernels.attach import attach

        attach(model, compute=self.quantization_config.compute, activations=self.quantization_config.activations)
        return model

    def _verify(self, module: nn.Module, tensor: Tensor, name: str) -> None:
        """Refuse a tensor that was not read; read a packed one again that was cast on the way.

        The library marks what it took from a file; without the mark, values decide.
        """
        stored = self._stored[name]
        cast = name in self._packed and tensor.dtype != stored.dtype
        if not cast and not tensor.is_meta and getattr(tensor, "_is_hf_initialized", False):
            return
        values = read_tensors(self._sources[name])[0][name]
        if cast:
            module._buffers[name.rpartition(".")[2]] = values.to(tensor.device)
        elif tensor.is_meta or not torch.equal(values.to(tensor.device, tensor.dtype), tensor):
            raise DataError(
                f"{self._sources[name]}: {name} was not read into the model; load the folder again without "
                "`key_mapping` or other changes of names"
            )

    # ---- what the library asks ---------------------------------------------------------------------------------------

    def is_serializable(self, **kwargs: Any) -> bool:
        """Raises UnsupportedError: a packed folder is copied, not written again."""
        raise UnsupportedError(
            f"save_pretrained of a packed model: its folder {self._checked} is already what would be written; copy "
            "that folder (`cp -r`), README.md and manifest.json included"
        )

    @property
    def is_trainable(self) -> bool:
        return False


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, Tensor]:
    """The module that a tensor of the state dict belongs to, and the tensor."""
    path, _, last = name.rpartition(".")
    module = model.get_submodule(path)
    return module, module._parameters[last] if last in module._parameters else module._buffers[last]


def register() -> None:
    """Make the library know `quant_method` "mobie"; again is no harm."""
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING[QUANT_METHOD] = MobieConfig
    auto.AUTO_QUANTIZER_MAPPING[QUANT_METHOD] = MobieQuantizer
    # lets `quantization_config=MobieConfig(compute=…)` choose how a checkpoint computes
    known = auto.LOADING_ATTRIBUTES_CONFIG_TYPES
    if MobieConfig not in known:
        auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*known, MobieConfig)


register()
