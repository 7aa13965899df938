# SPDX-License-Identifier: Apache-2.0
"""Generates mutants of a C++ source: one token changed, by rule, in every place there is."""

import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

TOKEN = re.compile(
    r"//[^\n]*|/\*.*?\*/|static_assert\([^;]*;|^[ \t]*#(?:[^\n]*\\\n)*[^\n]*|\"(?:\\.|[^\"\\])*\""
    r"|(?P<number>\d[\w.]*)|(?P<word>[A-Za-z_]\w*(?:\.[xyz]\b)?)"
    r"|(?P<operator>->|::|\+\+|--|&&|\|\||<<|>>|[-+*/%<>=!&|^]=|[^\w\s])",
    re.DOTALL | re.MULTILINE,
)
COMPARISONS = {"<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "=="}
OPERATORS = {"+": "-", "-": "+", "*": "/", "/": "*", "%": "/", "&&": "||", "||": "&&"}
OPERATORS |= {"&": "|", "|": "&", "^": "|", "<<": ">>", ">>": "<<"}
UPDATES = {"+=": "-=", "-=": "+=", "*=": "/=", "/=": "*=", "++": "--", "--": "++"}
UPDATES |= {"&=": "|=", "|=": "&=", "^=": "|="}
CALLS = {"smaller": "larger", "larger": "smaller", "min": "max", "max": "min", "fmaxf": "fminf"}
BARRIERS = ("__syncthreads", "__syncwarp", "commit_copies", "wait_for_copies")
BUILT_IN = re.compile(r"(threadIdx|blockIdx)\.[xyz]")
DECLARATION = re.compile(
    r"\s*(__shared__|static|constexpr|float|double|int|uint32_t|element_t)\s+\w([^=]|= \{\})*$"
)
KINDS = ("barrier", "comparison", "constant", "index", "operator", "call")


class Mutant(NamedTuple):
    """`old` at `start` of a file becomes `new`."""

    path: Path
    start: int
    old: str
    new: str
    kind: str
    line: int
    text: str  # the line, stripped
    ordinal: int  # among the mutants of the file that read the same

    @property
    def change(self) -> str:
        return f"`{self.old}` -> `{self.new}`"

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What a list of mutants knows it by: survives that lines move."""
        return self.path.name, self.text, self.change, self.ordinal

    def source(self) -> str:
        text = self.path.read_text()
        return text[: self.start] + self.new + text[self.start + len(self.old) :]


def mutants_of(path: Path) -> list[Mutant]:
    """Every mutant of a source that is formatted by clang-format."""
    text = path.read_text()
    tokens = list(TOKEN.finditer(text))
    found, seen = [], Counter()
    for position in range(len(tokens)):
        for start, old, new, kind in changes(text, tokens, position):
            line = text.count("\n", 0, start) + 1
            stripped = text.splitlines()[line - 1].strip()
            seen[stripped, old, new] += 1
            ordinal = seen[stripped, old, new]
            found.append(Mutant(path, start, old, new, kind, line, stripped, ordinal))
    return found


def changes(text: str, tokens: list[re.Match], position: int):
    """(start, old, new, kind) of each change at a token."""
    token = tokens[position]
    word, start, end = token[0], token.start(), token.end()
    # the format tells a binary operator from a pointer, a reference, a template or a sign
    binary = text[start - 1] == " " and text[end : end + 1] in (" ", "\n")
    if token["number"]:
        number = re.fullmatch(r"(\d+|0x[\da-fA-F]+)([uUlL]*)|(\d+\.\d*)(f?)", word)
        if number and number[1]:
            more = int(number[1], 0) + 1
            yield start, word, f"{hex(more) if 'x' in word else more}{number[2]}", "constant"
        elif number:
            yield start, word, f"{float(number[3]) + 1}{number[4]}", "constant"
    elif token["word"]:
        after = tokens[position + 1][0] if position + 1 < len(tokens) else ""
        called = after == "("
        if word in BARRIERS and after in ("(", "<"):
            end = text.index(";", start)
            yield start, text[start:end], "", "barrier"
        elif BUILT_IN.fullmatch(word):
            yield start, word, f"({word} + 1)", "index"
        elif word in CALLS and called and is_expression(tokens[position - 1]):
            yield start, word, CALLS[word], "call"
    elif word in COMPARISONS and binary:
        yield start, word, COMPARISONS[word], "comparison"
    elif word in OPERATORS and binary:
        yield start, word, OPERATORS[word], "operator"
    elif word in UPDATES:
        yield start, word, UPDATES[word], "operator"
    elif word in ("-", "!", "~") and text[end : end + 1] not in (" ", "\n"):
        yield start, word, "", "operator"
    elif word == "[" and (text[start - 1].isalnum() or text[start - 1] in "])_"):
        inside = text[end : closing(text, end)]
        if inside and not is_declaration(text, start):
            yield end, inside, f"{inside} + 1", "index"


def is_expression(before: re.Match) -> bool:
    """Whether a call may follow; a type before it makes it a declaration."""
    return before["operator"] is not None or before[0] == "return"


def closing(text: str, start: int) -> int:
    """Where the bracket that was opened before `start` is closed."""
    depth = 1
    for bracket in re.compile(r"[][]").finditer(text, start):
        depth += 1 if bracket[0] == "[" else -1
        if depth == 0:
            return bracket.start()
    raise ValueError("a bracket that is never closed")


def is_declaration(text: str, start: int) -> bool:
    """Whether a bracket holds the size of an array: one element more does no harm."""
    line = text[text.rfind("\n", 0, start) + 1 : start]
    return DECLARATION.match(line) is not None
