"""Damaged outside data is refused with an error for its user, or is as good as valid data; nothing else happens.

A few seeded inputs per parser; `python -m tests.reliability fuzz` tries thousands.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from fuzz_cases import Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st
from reliability.fuzz import Tally, try_inputs

from mobie.check.files import Damaged, read_tensor_file
from mobie.parsing import parse_json, parse_yaml

INPUTS = 60  # per parser


@pytest.fixture(scope="module")
def all_cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Case]:
    return {case.name: case for case in cases(tmp_path_factory.mktemp("fuzz") / "repository")}


def test_valid_inputs_are_read(all_cases: dict[str, Case]) -> None:
    """A case whose seeds are refused would show nothing."""
    for case in all_cases.values():
        for seed in case.seeds:
            case.parse(seed)


def test_damaged_inputs_raise_nothing_but_errors_with_a_remedy(all_cases: dict[str, Case]) -> None:
    tallies = [try_inputs(case, INPUTS, seed=0) for case in all_cases.values()]
    wrong = [line for tally in tallies for line in tally.defects]
    assert wrong == [], "\n".join(wrong)
    assert all(tally.accepted + tally.refused == INPUTS for tally in tallies)
    assert all(tally.refused for tally in tallies)


def test_a_defect_is_seen() -> None:
    def fails(data: bytes) -> None:
        raise IndexError("no such thing")

    def hangs(data: bytes) -> None:
        signal.pause()

    assert try_inputs(Case("x", "bytes", (b"abc",), fails), 3, seed=0).defects
    assert "no answer" in try_inputs(Case("x", "bytes", (b"abc",), hangs), 1, seed=0, seconds=0.2).defects[0]
    assert try_inputs(Case("x", "bytes", (b"abc",), len), 3, seed=0) == Tally("x", 3, 0, [])


def test_the_same_seed_gives_the_same_inputs() -> None:
    seen: list[list[bytes]] = [[], []]
    for run in seen:
        try_inputs(Case("x", "json", (b'{"a": [1, 2]}',), run.append), 50, seed=7)
    assert seen[0] == seen[1] and len(set(seen[0])) > 30


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.text(alphabet=st.sampled_from("{}[]:,&*!|>-?\"'#%@`ab01 \n\t.<~\x00é"), max_size=80))
def test_any_text_is_yaml_or_refused(text: str) -> None:
    try:
        parse_yaml(text)
    except ValueError as error:
        assert str(error)


@settings(derandomize=True, max_examples=300, deadline=None)
@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4)
        ),
        max_leaves=12,
    )
)
def test_json_comes_back_as_it_was(value: object) -> None:
    import json

    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


@settings(derandomize=True, max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_any_bytes_are_json_or_refused(data: bytes) -> None:
    try:
        parse_json(data)
    except ValueError as error:
        assert str(error)


@settings(derandomize=True, max_examples=200, deadline=None)
@given(header=st.binary(max_size=80), rest=st.binary(max_size=40), length=st.none() | st.integers(0, 2**64 - 1))
def test_any_bytes_are_a_tensor_file_or_refused(
    header: bytes, rest: bytes, length: int | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = Path(tmp_path_factory.getbasetemp()) / "any.safetensors"
    path.write_bytes((len(header) if length is None else length).to_bytes(8, "little") + header + rest)
    try:
        read_tensor_file(path)
    except Damaged as damage:
        assert str(damage)
