"""Published shapes of the paper's models: one file each, read without torch."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from mobie.errors import ConfigError, unknown_name
from mobie.parsing import parse_yaml

FOLDER = Path(__file__).parent
#: models whose speed is measured with random weights, in the order of tables; names as in workflow/config/models
NAMES = ("olmoe-1b-7b", "qwen1.5-moe-a2.7b", "deepseek-v2-lite", "qwen3-30b-a3b")


@dataclass(frozen=True)
class Shape:
    """A published architecture.

    label:      the model's name for people.
    source:     where the values come from.
    parameters: number of weights, to check the values with.
    config:     `model_type` and the arguments of the library's configuration class.
    """

    name: str
    label: str
    source: str
    parameters: int
    config: dict[str, Any]

    def build(self, **changes: Any) -> Any:
        """The library's configuration object; `changes` overrule values (fewer layers, say)."""
        from transformers import AutoConfig

        values = self.config | changes
        return AutoConfig.for_model(values.pop("model_type"), **values)


@cache
def load_shape(name: str) -> Shape:
    """An architecture by its name. Raises `ConfigError` for an unknown one."""
    known = sorted(path.stem for path in FOLDER.glob("*.yaml"))
    if name not in known:
        raise ConfigError(unknown_name("architecture", name, known))
    values = parse_yaml((FOLDER / f"{name}.yaml").read_text(encoding="utf-8"))
    return Shape(name, **values)
