"""Tokens and passwords: out of the environment of all verbs but `fetch` and `lock`, never in a message or a record."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence

#: names of environment variables that hold a secret: HF_TOKEN, HUGGING_FACE_HUB_TOKEN, AWS_SECRET_ACCESS_KEY, …
SECRET_NAME = re.compile(r"(^|_)(TOKEN|KEY|APIKEY|SECRET|PASSWORD|PASSWD|CREDENTIALS?)($|_(?!PATH$|FILE$))")
SHORTEST = 8  # characters of a secret that is looked for by its value
HIDDEN = "[hidden]"
PATTERNS: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"\b(hf|api_org|ghp|gho|ghs|glpat|pypi|sk|xox[abp])([_-])[A-Za-z0-9_-]{16,}"), HIDDEN),
    (re.compile(r"\bgithub_pat_\w{16,}|\bAKIA[0-9A-Z]{16}\b"), HIDDEN),
    (
        re.compile(r"(?i)\b(authorization\s*[:=]\s*['\"]?(?:bearer|basic|token)|bearer)\s+[\w.~+/=-]{8,}"),
        rf"\1 {HIDDEN}",
    ),
    (re.compile(r"(\b[a-zA-Z][\w+.-]*://)[^\s/@'\"<>]+@"), rf"\1{HIDDEN}@"),  # user and password of an address
    (re.compile(r"(\bhttps?://[^\s?#'\"<>]+)\?[^\s'\"<>]*"), rf"\1?{HIDDEN}"),  # signatures of an address
    (re.compile(r"(?i)(--?[\w-]*(?:token|password|secret|api-?key)=)\S+"), rf"\1{HIDDEN}"),
)
SECRET_OPTION = re.compile(r"(?i)--?[\w-]*(token|password|secret|api-?key)")


def secrets(environment: Mapping[str, str]) -> list[str]:
    """Names of the variables that hold a secret."""
    return sorted(name for name in environment if SECRET_NAME.search(name.upper()))


def drop_secrets() -> None:
    """Take secrets out of this process's environment, and so out of every program that it starts.

    The hub's client is told not to look for a stored token either.
    """
    for name in secrets(os.environ):
        del os.environ[name]
    os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"


def redact(text: str) -> str:
    """A text without secrets: values of the environment's, known forms of tokens, logins and queries of addresses."""
    for name in secrets(os.environ):
        if len(os.environ[name]) >= SHORTEST:
            text = text.replace(os.environ[name], HIDDEN)
    for pattern, shown in PATTERNS:
        text = pattern.sub(shown, text)
    return text


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without secrets; the word after an option such as `--token` is one."""
    before = ["", *arguments[:-1]]
    return [
        HIDDEN if SECRET_OPTION.fullmatch(option) else redact(word)
        for option, word in zip(before, arguments, strict=True)
    ]
