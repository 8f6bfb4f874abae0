"""JSON and YAML from outside: data only, every key once, bounded depth and size; whatever is wrong is a `ValueError`.

The libraries' own parsers keep the last of two equal keys, take NaN for a number, and end in errors of many kinds for
input that is nested too deeply or refers to itself.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yaml import Node

MOST_DEPTH = 100  # of YAML; nothing of ours is deeper than 12
MOST_NODES = 1_000_000  # of YAML with its aliases written out
MERGE = "tag:yaml.org,2002:merge"
EXPONENT = re.compile(r"[eE]\+?\d{3}")  # of a number that a float may not hold
LONG, STRIDE = re.compile(r"\d{14}"), 20  # in every 20th character: a number of 300 digits
SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class Unreadable(ValueError):
    """Text that is not of the form it should be; says where."""


def parse_json(text: str | bytes) -> Any:
    """A JSON value: keys stand once, numbers are finite, strings can be written as UTF-8. Raises `Unreadable`."""
    try:
        decoded = text.decode("utf-8") if isinstance(text, bytes) else text
        huge = EXPONENT.search(decoded) or LONG.search(decoded[::STRIDE])
        floats = _finite if huge else None  # a function called for every number takes its time
        value = json.loads(decoded, object_pairs_hook=_once, parse_constant=_no_number, parse_float=floats)
        if SURROGATE.search(decoded):  # half a character, which no file can hold
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except RecursionError as error:
        raise Unreadable("nested too deeply") from error
    except ValueError as error:
        raise Unreadable(str(error)) from error
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise Unreadable(f"the key {next(name for name in names if names.count(name) > 1)!r} stands twice")
    return found


def _no_number(name: str) -> None:
    raise Unreadable(f"{name} is no finite number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise Unreadable(f"{text} is no finite number")
    return value


def parse_yaml(text: str) -> Any:
    """A YAML document of plain data (no tags that make objects). Raises `Unreadable`."""
    import yaml

    loader = _safe_loader()(text)
    try:
        _check_depth(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _check_node(node, {}, set())
        return loader.construct_document(node)
    except (yaml.YAMLError, ValueError, OverflowError, AttributeError, TypeError, RecursionError) as error:
        raise Unreadable(" ".join(str(error).split()) or type(error).__name__) from error
    finally:
        loader.dispose()


@cache
def _safe_loader() -> Any:
    """libyaml's safe loader, ten times as fast as the other and not in every build."""
    import yaml

    return getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _check_depth(text: str) -> None:
    """Refuse deep nesting before anything recursive sees it."""
    import yaml

    depth = 0
    for event in yaml.parse(text, Loader=_safe_loader()):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MOST_DEPTH:
            line = event.start_mark.line + 1 if event.start_mark else "?"
            raise Unreadable(f"nested more than {MOST_DEPTH} deep in line {line}")


def _check_node(node: Node, sizes: dict[int, int], above: set[int]) -> int:
    """Nodes below a node with aliases written out; refuses keys that stand twice and nodes that hold themselves."""
    import yaml

    if id(node) in above:
        raise Unreadable(f"an alias of what it stands in, in line {node.start_mark.line + 1}")
    if id(node) in sizes:
        return sizes[id(node)]
    size = 1
    if isinstance(node, yaml.CollectionNode):
        above.add(id(node))
        pairs = isinstance(node, yaml.MappingNode)
        if pairs:
            _check_keys(node)
        for child in node.value:
            size += sum(_check_node(part, sizes, above) for part in (child if pairs else (child,)))
        above.remove(id(node))
    if size > MOST_NODES:
        raise Unreadable(f"more than {MOST_NODES} values when its aliases are written out")
    sizes[id(node)] = size
    return size


def _check_keys(node: Any) -> None:
    seen = set()
    for key, _ in node.value:
        if not isinstance(key.value, str) or key.tag == MERGE:
            continue
        if (key.tag, key.value) in seen:
            raise Unreadable(f"the key {key.value!r} stands twice, again in line {key.start_mark.line + 1}")
        seen.add((key.tag, key.value))
