"""Run a harness: `python -m tests.reliability NAME [options]`."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TESTS))  # as under pytest: `reliability.faults`, `mini_wheel`, `tiny` are top-level names

from mobie.errors import MobieError, unknown_name  # noqa: E402
from mobie.reliability import HARNESSES  # noqa: E402

USAGE = "usage: python -m tests.reliability NAME [options]\n       python -m tests.reliability NAME --help\n"


def help_text() -> str:
    """What the harnesses ask, and how to run one."""
    names = "\n".join(f"  {name:12} {question}" for name, question in HARNESSES.items())
    return (
        f"{USAGE}\nTry to break the suite in one way and save what came of it in results/reliability/NAME.json.\n"
        "The exit status is 0 when nothing happened that must not, 1 when something did, 2 for a wrong call.\n\n"
        f"names:\n{names}\n\n"
        "examples:\n"
        "  python -m tests.reliability faults --count 200 --seed 0   200 seeded faults, about eight minutes\n"
        "  python -m tests.reliability faults --only 17              one of them again\n"
        "  python -m mobie reliability                               write RELIABILITY.md from all that has run\n"
    )


def main(arguments: list[str]) -> int:
    """Call `main` of the module named first with the other arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    name, *rest = arguments
    if name not in HARNESSES:
        print(f"error: {unknown_name('harness', name, HARNESSES)}", file=sys.stderr)
        return 2
    if importlib.util.find_spec(f"reliability.{name}") is None:
        print(f"error: tests/reliability/{name}.py does not exist in this version; known: {known()}", file=sys.stderr)
        return 2
    try:
        return importlib.import_module(f"reliability.{name}").main(rest)
    except MobieError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def known() -> str:
    """Names of the harnesses that exist."""
    return ", ".join(name for name in HARNESSES if importlib.util.find_spec(f"reliability.{name}") is not None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
