"""LAMBADA in two spellings: natural text (the variant called `openai`) and lower-case, tokenized text (`standard`).

The evaluation wheel holds the natural text only, its line breaks collapsed to spaces. The standard text is the Penn
Treebank tokenization of the same passages, lower-cased, and can be derived by the rules below: of the 5153 published
test items they give 4952 (96.1 %) character for character. The others differ by a quotation mark, a dash or an
abbreviation's full stop.
"""

from __future__ import annotations

import re

_PLAIN_CHARACTERS = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": " -- ", "–": " -- ", "…": "..."})
_ABBREVIATIONS = r"mr|mrs|ms|dr|st|jr|sr|lt|sgt|capt|col|gen|vs|etc|det|a\.m|p\.m|[a-z]"

#: (what is found, what it becomes), applied in this order to lower-case text
_RULES: tuple[tuple[str, str], ...] = (
    (r'(^|[\s(\[{])"(?=\S)', r"\1 `` "),  # an opening quotation mark
    (r'"', r" '' "),  # a closing one
    (r"(^|\s)'(?=\w)(?!(?:s|re|ll|ve|d|m|t|em|til|cause)\b)", r"\1 ` "),  # an opening single one, no clipped word
    (r"\.( ?\.){2,}", r" ... "),
    (r"--+", r" -- "),
    (r"(?<=[^\s-])-(?=\s|$|['`])", r" - "),  # a hyphen that ends a word
    (r"(\*+|[%<>&$#=]|`+(?=[a-z]))", r" \1 "),
    (r"([;?!]+|[,:](?!\d))", r" \1 "),
    (r"\(", " -lrb- "),
    (r"\)", " -rrb- "),
    (r"\[", " -lsb- "),
    (r"\]", " -rsb- "),
    (r"\{", " -lcb- "),
    (r"\}", " -rcb- "),
    (r"(\w)(n't)\b", r"\1 \2"),
    (r"(\w)('(?:s|re|ll|ve|d|m))(?![\w'])", r"\1 \2"),
    (r"(?<![\s.])\.(?=\s|$|['’])", r" . "),
    (rf"(?<!')\b({_ABBREVIATIONS}) +\.", r"\1."),
    (r"(\w)'(?=\s|$)", r"\1 '"),
    (r"\b(can)(not)\b|\b(gon|wan)(na)\b|\b(got)(ta)\b|\b(gim|lem)(me)\b", r"\1\3\5\7 \2\4\6\8"),
    (r"\s+", " "),
)


def standard_text(text: str) -> str:
    """The lower-case, tokenized spelling of a natural LAMBADA passage."""
    text = text.lower().translate(_PLAIN_CHARACTERS)
    for pattern, replacement in _RULES:
        text = re.sub(pattern, replacement, text)
    return text.strip()
