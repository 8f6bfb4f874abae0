"""`python -m mobie chat`: the same tokens as `generate`, as they come, and a clear message for everything else."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tiny import make_model, random_tokens, save_model

from mobie.chat import Chat, Options, Timing, load, talk
from mobie.cli import main
from mobie.config import load_method
from mobie.errors import DataError
from mobie.packing.checkpoint import MANIFEST, load_model
from mobie.pipeline import quantize

CONTEXT = 128  # of the tiny models
TEMPLATE = "{% for m in messages %}{{ 'w9 ' if m.role == 'user' else 'w8 ' }}{{ m.content }} {% endfor %}w7"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("chat")
    source = save_model(make_model("olmoe"), root / "source")
    quantize(source, load_method("rtn-w4").build(), random_tokens(1, 8), root / "out", fingerprint="job")
    return root / "out"


@pytest.fixture(scope="module")
def loaded(folder: Path) -> tuple[Any, Any]:
    return load(folder)


class Recorder(io.StringIO):
    """A terminal that remembers what came at once."""

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []

    def write(self, text: str) -> int:
        if text:
            self.pieces.append(text)
        return super().write(text)


def chat(loaded: tuple[Any, Any], template: str | None = None, **options: Any) -> tuple[Chat, Recorder]:
    model, tokenizer = loaded
    tokenizer.chat_template = template
    out = Recorder()
    return Chat(model, tokenizer, Options(**({"temperature": 0.0, "max_new_tokens": 6} | options)), out), out


def expected(folder: Path, tokens: list[int], new: int) -> str:
    """Greedy continuation by the dequantized model, step by step, without cache or `generate`."""
    model, tokenizer = load_model(folder)
    for _ in range(new):
        with torch.no_grad():
            tokens = [*tokens, int(model(torch.tensor([tokens])).logits[0, -1].argmax())]
        if tokens[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(tokens[-new:], skip_special_tokens=True)


def invoke(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["chat", *map(str, arguments)])


def test_one_prompt_is_continued_as_the_dequantized_model_would(folder: Path) -> None:
    result = invoke(folder, "--prompt", "w5 w27", "--max-new-tokens", 6, "--temperature", 0)
    assert result.exit_code == 0, result.output
    assert result.stdout.split() == expected(folder, [5, 27], 6).split()
    assert re.search(r"\[6 tokens, the first after \d+\.\d\d s, then \d+\.\d tok/s\]", result.stderr)


def test_text_comes_while_tokens_come(loaded: tuple[Any, Any]) -> None:
    conversation, out = chat(loaded)
    conversation.answer("w5 w27")
    assert len(out.pieces) >= 5  # one piece per token, but for the last ones


def test_sampling_is_decided_by_its_seed(loaded: tuple[Any, Any]) -> None:
    def said(seed: int, temperature: float) -> str:
        conversation, out = chat(loaded, seed=seed, temperature=temperature, max_new_tokens=12)
        conversation.answer("w5 w27")
        return out.getvalue()

    assert said(3, 2.0) == said(3, 2.0)
    assert len({said(seed, 2.0) for seed in range(4)}) > 1
    assert said(1, 0.0) == said(2, 0.0)


def test_without_a_template_each_text_stands_alone(loaded: tuple[Any, Any]) -> None:
    conversation, out = chat(loaded)
    assert not conversation.has_template
    conversation.answer("w5 w27")
    alone = out.getvalue()
    conversation.answer("w30")
    conversation.answer("w5 w27")
    assert out.getvalue().endswith(alone)


def test_with_a_template_a_conversation_is_remembered(folder: Path, loaded: tuple[Any, Any]) -> None:
    conversation, out = chat(loaded, TEMPLATE, max_new_tokens=3)
    assert conversation.has_template
    conversation.answer("w5")
    first = out.getvalue().split()
    assert first == expected(folder, [9, 5, 7], 3).split()
    conversation.answer("w6")
    history = [9, 5, 8, *(int(word[1:]) for word in first), 9, 6, 7]
    assert out.getvalue().split()[len(first) :] == expected(folder, history, 3).split()


def test_oldest_turns_go_when_the_context_is_full(loaded: tuple[Any, Any]) -> None:
    conversation, _ = chat(loaded, TEMPLATE, max_new_tokens=1)
    for _ in range(4):
        assert conversation.answer(" ".join(["w5"] * 50)).tokens == 1
    assert len(conversation._turns) < 8


def test_answer_ends_where_the_context_does(loaded: tuple[Any, Any]) -> None:
    conversation, _ = chat(loaded, max_new_tokens=50)
    assert conversation.answer(" ".join(["w5"] * (CONTEXT - 2))).tokens <= 2


@pytest.mark.parametrize(("text", "message"), [("w5 " * CONTEXT, "128 tokens; expected fewer than 128"), ("", "token")])
def test_text_that_cannot_be_read_is_refused(text: str, message: str, loaded: tuple[Any, Any]) -> None:
    conversation, _ = chat(loaded)
    with pytest.raises(DataError, match=message):
        conversation.answer(text)


def test_talk_goes_on_after_an_error_and_ends_at_exit(loaded: tuple[Any, Any]) -> None:
    conversation, out = chat(loaded)
    notes = io.StringIO()
    talk(conversation, ["w5 " * 200, "  ", "w5", "/exit", "w6"], out, notes)
    lines = notes.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("error: the text has 200 tokens") and lines[1].startswith("[")


def test_terminal_input_is_answered_line_by_line(folder: Path) -> None:
    arguments = ["chat", str(folder), "--max-new-tokens", "2", "--temperature", "0"]
    result = CliRunner().invoke(main, arguments, input="w5\nw6\n")
    assert result.exit_code == 0, result.output
    assert result.stderr.count("tokens") == 2 and "no chat template" in result.stderr


def test_timing_says_what_it_knows() -> None:
    assert str(Timing(5, 0.5, 2.0)) == "5 tokens, the first after 0.50 s, then 2.0 tok/s"
    assert str(Timing(1, 0.5, 0.0)) == "1 tokens, the first after 0.50 s"


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "not a folder; expected a checkpoint"),
        (lambda path: (path / MANIFEST).unlink(), "has no manifest.json; expected a finished checkpoint"),
        (lambda path: (path / "kept.safetensors").unlink(), "kept.safetensors: sha256 no file"),
        (lambda path: (path / "block-000.safetensors").write_bytes(b"half"), "block-000.safetensors: sha256"),
        (
            lambda path: (path / MANIFEST).write_text('{"format_version": 1, "files": {}}'),
            "format version 1, which this version no longer reads (expected 2); quantize again",
        ),
        (lambda path: (path / "config.json").write_text("{"), "config.json"),
    ],
)
def test_what_is_no_checkpoint_is_one_message(spoil: Any, message: str, folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    spoil(copy)
    result = invoke(copy, "--prompt", "w5")
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ") and message in result.stderr
    assert "Traceback" not in result.output
