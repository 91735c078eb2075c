"""Texts that somebody else wrote, made fit for terminals, logs and the UI."""

from __future__ import annotations

import re
import unicodedata

#: The longest name of a worker, host or queue that is shown, in characters.
MAX_NAME_CHARACTERS = 255

#: The same for a sentence, such as the reason of a death.
MAX_REASON_CHARACTERS = 20_000

#: The same for what stands in one line of a listing.
MAX_SENTENCE_CHARACTERS = 500

#: Control characters and escapes, marks that reorder text, line separators, surrogates.
_HIDDEN = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})


def plain_name(text: str) -> str:
    """A name in one line without control characters, shortened where it is too long."""
    return _shortened(_without_controls(text[: 2 * MAX_NAME_CHARACTERS]), MAX_NAME_CHARACTERS)


def plain_reason(text: str) -> str:
    """Sentences without control characters but for line breaks and tabs."""
    lines = text[: 2 * MAX_REASON_CHARACTERS].split("\n")
    plain = "\n".join(
        "\t".join(_without_controls(part) for part in line.split("\t")) for line in lines
    )
    return _shortened(plain, MAX_REASON_CHARACTERS)


def plain_sentence(text: str) -> str:
    """A sentence or two in one line without control characters, shortened where it is too long."""
    # white space may be most of it, such as the indentation of a stack
    line = " ".join(text[: 4 * MAX_SENTENCE_CHARACTERS].split())
    return _shortened(_without_controls(line), MAX_SENTENCE_CHARACTERS)


def _without_controls(text: str) -> str:
    if text.isprintable():  # as nearly all are, and a list of workers has thousands
        return text
    return "".join("\N{REPLACEMENT CHARACTER}" if _is_hidden(it) else it for it in text)


def _is_hidden(character: str) -> bool:
    return not character.isprintable() and unicodedata.category(character) in _HIDDEN


def _shortened(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 1] + "\N{HORIZONTAL ELLIPSIS}"


def yaml_problem(error: Exception) -> str:
    """What is wrong with a YAML text, and where, without a word of the text: it may be secret."""
    problem = str(getattr(error, "problem", None) or "it cannot be decoded")
    mark = getattr(error, "problem_mark", None)
    place = f", in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
    return re.sub(r"'.*'|\".*\"", "...", problem, flags=re.DOTALL) + place
