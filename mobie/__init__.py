"""MoBiE and its baselines: quantize, score, load and run mixture-of-experts models with binary experts.

`import mobie` is enough for `AutoModelForCausalLM.from_pretrained(folder)` to load a packed checkpoint, and a model of
the type `deepseek`, which the library does not have. It imports neither torch nor transformers: what is ours is
registered when the library's own registries are imported, by a finder that looks at these modules only, or at once
where they were imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.5.0"  # the only place; pyproject.toml takes it from here

#: module of the library that holds a registry → the module of ours that registers itself in it
_REGISTRARS = {
    "transformers.quantizers.auto": "mobie.hf.quantizer",
    "transformers.models.auto.configuration_auto": "mobie.hf.deepseek_config",
}


class _ThenRegister(Loader):
    """Executes a module as its own loader does, then registers in it what is ours."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        import_module(_REGISTRARS[module.__name__])  # nothing to do where that is what imports the registry


class _RegistryFinder(MetaPathFinder):
    """Finds the registries as Python would, and has ours registered after they were executed."""

    _searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in _REGISTRARS or self._searching:
            return None
        self._searching = True  # the search below asks all finders, this one too
        try:
            spec = find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


if not any(type(finder).__name__ == _RegistryFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegistryFinder())
for _registry, _ours in _REGISTRARS.items():
    if _registry in sys.modules:
        import_module(_ours)
