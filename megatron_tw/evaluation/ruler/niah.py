"""Needles in a haystack: RULER's eight niah tasks (definition: NVIDIA/RULER, scripts/data/synthetic/niah.py)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.prompt import Build, Material, Prompt, complete
from megatron_tw.evaluation.ruler.words import ADJECTIVES, NOUNS

Haystack = Literal["noise", "essay", "needle"]
Kind = Literal["words", "numbers", "uuids"]

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
DEPTHS = tuple(round(100 * step / 39) for step in range(40))
"""Percent of the sentences: numpy.linspace(0, 100, 40), rounded."""
ABBREVIATIONS = frozenset(
    ["mr.", "mrs.", "ms.", "dr.", "st.", "jr.", "sr.", "vs.", "e.g.", "i.e.", "cf.", "fig.", "p."]
)


@dataclass(frozen=True, kw_only=True)
class Needles:
    """What one of the tasks hides, and where: `keys` needles of `values` each, of which `queries` keys are asked for.
    A unit of a haystack is a line of noise or of other needles, or a word of the essays."""

    haystack: Haystack
    key: Kind = "words"
    value: Kind = "numbers"
    keys: int = 1
    values: int = 1
    queries: int = 1

    @property
    def least_units(self) -> int:
        return self.keys * self.values


def niah(needles: Needles, material: Material) -> Build:
    """The generator of one task."""

    def build(draw: Draw, index: int, units: int) -> Prompt:
        keys: list[str] = []
        while len(keys) < needles.keys:
            key = _drawn(draw, needles.key)
            keys += [] if key in keys else [key]
        values = [[_drawn(draw, needles.value) for _ in range(needles.values)] for _ in keys]
        asked = draw.sample(range(needles.keys), needles.queries)
        hidden = draw.shuffled([(key, value) for key, own in zip(keys, values, strict=True) for value in own])
        lines = [_needle(needles.value, key, value) for key, value in hidden]
        if needles.haystack == "essay":
            context = _in_essay(draw, lines, material.essay, units)
        else:
            context = _among_lines(draw, lines, _haystack_lines(draw, needles, keys, units))
        text = _template(needles, context, [keys[i] for i in asked])
        # Several keys are answered in the order of the question, several values of a key in that of the text.
        gold = [pair for i in asked for pair in hidden if pair[0] == keys[i]]
        places = [text.index(_needle(needles.value, *pair)) for pair in gold]
        return complete(text, [value for _, value in gold], places=places)

    return build


def _drawn(draw: Draw, kind: Kind) -> str:
    makers: dict[Kind, Callable[[], str]] = {
        "words": lambda: f"{draw.choice(ADJECTIVES)}-{draw.choice(NOUNS)}",
        "numbers": lambda: draw.digits(7),
        "uuids": draw.uuid,
    }
    return makers[kind]()


def _needle(kind: Kind, key: str, value: str) -> str:
    return f"One of the special magic {kind} for {key} is: {value}."


def _haystack_lines(draw: Draw, needles: Needles, keys: Sequence[str], units: int) -> list[str]:
    if needles.haystack == "noise":
        return [NOISE] * units
    lines: list[str] = []
    while len(lines) < units:
        key, value = _drawn(draw, needles.key), _drawn(draw, needles.value)
        if key not in keys:  # a second value of the key that is asked for would be right, too
            lines.append(_needle(needles.value, key, value))
    return lines


def _among_lines(draw: Draw, needles: Sequence[str], lines: Sequence[str]) -> str:
    """The needles before lines of the haystack that are drawn, never two before the same one."""
    at = sorted(draw.sample(range(len(lines)), len(needles)))
    mixed: list[str] = []
    last = 0
    for place, needle in zip(at, needles, strict=True):
        mixed += [*lines[last:place], needle]
        last = place
    return "\n".join([*mixed, *lines[last:]])


def _in_essay(draw: Draw, needles: Sequence[str], essay: Sequence[str], units: int) -> str:
    """The first `units` words of the essays, which begin again at their end, and needles between their sentences."""
    words = [*essay] * (units // len(essay)) + [*essay[: units % len(essay)]]
    ends = sentence_ends(words)
    depths = sorted(draw.sample(DEPTHS, len(needles)))
    parts, last = [], 0
    for depth, needle in zip(depths, needles, strict=True):
        sentences = len(ends) * depth // 100
        place = ends[sentences - 1] if sentences else 0
        parts += [*words[last:place], needle]
        last = place
    return " ".join([*parts, *words[last:]])


def sentence_ends(words: Sequence[str]) -> list[int]:
    """Numbers of words after which a sentence ends: after . ! or ?, with what closes behind it, before a word that is
    not in lower case. The last is all words.

    >>> sentence_ends("So it goes. He said (at 3 p. m. or so) no! And Mr. Fox".split())
    [3, 12, 15]
    """
    ends = []
    for place in range(1, len(words)):
        word = words[place - 1].rstrip("\"')]}”’")
        if word and word[-1] in ".!?" and not words[place][0].islower() and word.lower() not in ABBREVIATIONS:
            ends.append(place)
    return [*ends, len(words)]


def _template(needles: Needles, context: str, keys: Sequence[str]) -> str:
    query = keys[0] if len(keys) == 1 else ", ".join(keys[:-1]) + ", and " + keys[-1]
    if needles.queries * needles.values == 1:
        kind, some, are, all_ = needles.value[:-1], "A", "is", "is"
    else:
        kind, some, are, all_ = needles.value, "Some", "are", "are all"
    return (
        f"{some} special magic {kind} {are} hidden within the following text. Make sure to memorize it. I will quiz "
        f"you about the {kind} afterwards.\n{context}\nWhat {all_} the special magic {kind} for {query} mentioned in "
        f"the provided text? The special magic {kind} for {query} mentioned in the provided text {are}"
    )
