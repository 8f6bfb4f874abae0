"""MoBiE and its baselines: quantize, score, load and run mixture-of-experts models with binary experts.

`import mobie` is enough for `AutoModelForCausalLM.from_pretrained(folder)` to load a packed checkpoint. It imports
neither torch nor transformers: the quantizer is registered when the library's own registry is imported, by a finder
that looks at this one module, or at once where it was imported before.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

__version__ = "0.2.0"  # the only place; pyproject.toml takes it from here

_REGISTRY = "transformers.quantizers.auto"


class _ThenRegister(Loader):
    """Executes a module as its own loader does, then registers the quantizer in it."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _register()


class _RegistryFinder(MetaPathFinder):
    """Finds the registry as Python would, and has the quantizer registered after it was executed."""

    _searching = False

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != _REGISTRY or self._searching:
            return None
        self._searching = True  # the search below asks all finders, this one too
        try:
            spec = find_spec(name)
        finally:
            self._searching = False
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader)
        return spec


def _register() -> None:
    """Import the quantizer, which registers itself; nothing to do where it is what imports the registry."""
    import_module("mobie.hf.quantizer")


if _REGISTRY in sys.modules:
    _register()
elif not any(type(finder).__name__ == _RegistryFinder.__name__ for finder in sys.meta_path):
    sys.meta_path.insert(0, _RegistryFinder())
