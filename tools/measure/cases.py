"""What a step is asked to do, as text: 'mix=2048,16*1@4096' is one prompt of 2048 beside 16 decodes at context 4096."""

import re
from dataclasses import dataclass
from itertools import product

from measure.report import BenchError

GRAMMAR = "LABEL=[N*]QUERY[@CONTEXT],..."
MOST_CASES = 1000
_RANGE = re.compile(r"(\d+)-(\d+)(?:([+*])(\d+))?")
_PART = re.compile(r"(?:(\d+)\*)?(\d+)(?:@(\d+))?")
_LABEL = re.compile(r"[\w.+-]+")
_BRACES = re.compile(r"\{([^{}]*)\}")


def int_list(text):
    """'1,8,64', '1-4' (step 1), '1-9+2' (step 2), '1-64*4' (factor 4), or a mix; each at least 1."""
    found = [value for item in text.split(",") for value in _range(item, text)]
    if min(found) < 1:
        raise BenchError(f"numbers {text!r}: expected each to be at least 1")
    return found


def _range(item, text):
    item = item.strip()
    if re.fullmatch(r"\d+", item):
        return [int(item)]
    match = _RANGE.fullmatch(item)
    if match is None:
        raise BenchError(f"numbers {text!r}: {item!r} is none, expected such as 8, 1-4, 1-9+2 or 1-64*2")
    first, last, sign, by = int(match[1]), int(match[2]), match[3] or "+", int(match[4] or 1)
    if first > last:
        raise BenchError(f"numbers {text!r}: {item!r} falls, expected it to rise from the first to the last")
    if by < (2 if sign == "*" else 1) or (sign == "*" and first < 1):
        raise BenchError(f"numbers {text!r}: {item!r} never ends, expected it to rise with each step")
    values = []
    while first <= last:
        values.append(first)
        first = first * by if sign == "*" else first + by
        if len(values) > MOST_CASES:
            raise BenchError(f"numbers {text!r}: {item!r} has more than {MOST_CASES} values")
    return values


@dataclass(frozen=True)
class Part:
    """n_seqs sequences that bring n_query tokens each and then stand at `context` positions, theirs included."""

    n_seqs: int
    n_query: int
    context: int

    def __str__(self):
        many = f"{self.n_seqs}*" if self.n_seqs != 1 else ""
        return f"{many}{self.n_query}" + (f"@{self.context}" if self.context != self.n_query else "")


@dataclass(frozen=True)
class Case:
    """One step's batch. str(case) is the text that parse_case reads."""

    label: str
    parts: tuple

    def __str__(self):
        return f"{self.label}={','.join(map(str, self.parts))}"

    @property
    def rows(self):
        """[(n_seqs, n_query, context)], as engine.cost.floor takes them."""
        return [(part.n_seqs, part.n_query, part.context) for part in self.parts]

    @property
    def n_seqs(self):
        return sum(part.n_seqs for part in self.parts)

    @property
    def n_tokens(self):
        """New tokens of the step, all sequences together."""
        return sum(part.n_seqs * part.n_query for part in self.parts)

    @property
    def max_context(self):
        return max(part.context for part in self.parts)

    @property
    def is_decode(self):
        """One new token a sequence, each with a context behind it."""
        return all(part.n_query == 1 < part.context for part in self.parts)

    @property
    def is_prompt(self):
        """Whole prompts: nothing is cached before the step."""
        return all(part.n_query == part.context for part in self.parts)


def parse_case(text):
    """'decode=32*1@8192' -> Case('decode', (Part(32, 1, 8192),)). No N* is one sequence, no @ a whole prompt."""
    if "{" in text or "}" in text:
        raise BenchError(f"case {text!r}: braces make several cases, expected one")
    label, equals, rest = text.partition("=")
    if not equals or not _LABEL.fullmatch(label):
        raise BenchError(f"case {text!r}: expected {GRAMMAR}")
    return Case(label, tuple(_part(part, text) for part in rest.split(",")))


def _part(part, text):
    match = _PART.fullmatch(part)
    if match is None:
        raise BenchError(f"case {text!r}: {part!r} is no part of a case, expected {GRAMMAR}; what makes several cases "
                         "stands in braces: decode={1,8-64*2}*1@512")
    n_seqs, n_query = int(match[1] or 1), int(match[2])
    context = int(match[3]) if match[3] else n_query
    if n_seqs < 1 or n_query < 1:
        raise BenchError(f"case {text!r}: {part!r} is empty, expected at least one sequence and one token")
    if context < n_query:
        raise BenchError(f"case {text!r}: context {context} is less than the query, {n_query}; it counts the "
                         "positions once the step is done")
    return Part(n_seqs, n_query, context)


def parse_cases(text):
    """Every case of a text with braces: 'decode={1-64*4}*1@{1024,32768}' is 8. An argparse type: action="extend"."""
    pieces = _BRACES.split(text)                        # text, inside, text, inside, ..., text
    choices = [_alternatives(inside, text) for inside in pieces[1::2]]
    n_cases = 1
    for choice in choices:
        n_cases *= len(choice)
    if n_cases > MOST_CASES:
        raise BenchError(f"case {text!r}: {n_cases} cases, expected at most {MOST_CASES}")
    cases = []
    for chosen in product(*choices):
        filled = [*chosen, ""]
        cases.append(parse_case("".join(a + b for a, b in zip(pieces[::2], filled, strict=True))))
    return cases


def _alternatives(inside, text):
    """What stands for a brace: each item, and each number of an item that is a range."""
    items = []
    for item in inside.split(","):
        if not item:
            raise BenchError(f"case {text!r}: an empty choice in {{{inside}}}")
        items += map(str, _range(item, item)) if _RANGE.fullmatch(item) else [item]
    return items


def one_of(*known):
    """An argparse type: a comma list of some of `known`."""
    def parse(text):
        names = text.split(",")
        for name in names:
            if name not in known:
                raise BenchError(f"{name!r} is none of {','.join(known)}")
        return names
    return parse


def positive(text):
    """An argparse type: a number above zero."""
    try:
        value = float(text)
    except ValueError:
        value = 0
    if not 0 < value < float("inf"):
        raise BenchError(f"{text!r} is not a number above 0")
    return value


def whole(least):
    """An argparse type: an int that is at least so much."""
    def parse(text):
        if not text.isdecimal() or int(text) < least:
            raise BenchError(f"{text!r} is not a whole number >= {least}")
        return int(text)
    return parse
