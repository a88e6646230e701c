"""One prompt of a RULER task, and what its generators are given and give."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from megatron_tw.evaluation.ruler.draw import Draw


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """A prompt with its gold answers."""

    text: str
    """The whole prompt, with the prefix of the answer."""
    answers: tuple[str, ...]
    """In the order in which the prompt asks for them, or else tells them. Of qa_1: all that count as right."""
    completion: str
    """The text with the gold answers that stands behind the prompt: joined by ", ", or as the prompt's own example
    shows them (vt, cwe)."""
    spans: tuple[tuple[int, int], ...]
    """Of each answer in `completion`: its first character and the one after its last."""
    places: tuple[int, ...] = ()
    """Of each answer, the character of `text` where it is told; empty where it is told all over the text."""

    @property
    def depths(self) -> list[float]:
        """Of each answer, the share of the prompt that stands before it is told."""
        return [round(place / len(self.text), 4) for place in self.places]


def complete(
    text: str,
    answers: Sequence[str],
    *,
    before: str = " ",
    between: str = ", ",
    numbered: bool = False,
    places: Sequence[int] = (),
    references: Sequence[str] | None = None,
) -> Prompt:
    """A prompt whose completion is `answers`, one behind the other. references: what counts as right, where that is
    more than these answers."""
    completion, spans = before, []
    for number, answer in enumerate(answers):
        completion += between if number else ""
        completion += f"{number + 1}. " if numbered else ""
        spans.append((len(completion), len(completion) + len(answer)))
        completion += answer
    return Prompt(
        text=text,
        answers=tuple(references or answers),
        completion=completion,
        spans=tuple(spans),
        places=tuple(places),
    )


Build = Callable[[Draw, int, int], Prompt]
"""(random choices, index of the example, units of text) -> prompt."""


@dataclass(frozen=True, kw_only=True)
class Material:
    """What a generator may use."""

    length: int
    """Tokens of the prompt and what is generated, together."""
    count: Callable[[str], int]
    """Tokens of a text."""
    seed: int
    essay: Sequence[str] = field(default=())
    """Words of the essays."""
    questions: "Questions | None" = None


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question over documents: which of them tell the answer, and which belong to the same article."""

    query: str
    answers: tuple[str, ...]
    gold: tuple[int, ...]
    related: tuple[int, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Questions:
    """A set of questions, and all their documents, sorted."""

    documents: tuple[str, ...]
    questions: tuple[Question, ...]
