"""RULER's 13 tasks (arXiv 2404.06654; scripts/synthetic.yaml of NVIDIA/RULER), and their examples.

An example follows from the seed, its task, its index, the length and the tokenizer alone: not from the examples before
it, the machine, or versions of Python and libraries. Its needles do not follow from the length, so that lengths are
compared on the same questions.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal, Protocol

from megatron_tw.evaluation.ruler.draw import Draw
from megatron_tw.evaluation.ruler.fitting import Fit, fit
from megatron_tw.evaluation.ruler.metric import string_match_all, string_match_part
from megatron_tw.evaluation.ruler.niah import Needles, niah
from megatron_tw.evaluation.ruler.prompt import Build, Material, Prompt, Questions
from megatron_tw.evaluation.ruler.qa import question_answering
from megatron_tw.evaluation.ruler.variable_tracking import LEAST_UNITS, variable_tracking
from megatron_tw.evaluation.ruler.word_lists import (
    FWE_GENERATED,
    LEAST_CODED,
    LEAST_WORDS,
    common_words,
    frequent_words,
)

Text = Literal["essay", "squad", "hotpotqa"]


class Encoder(Protocol):
    """What the prompts need of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of the text; no special tokens are added."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """generate: makes prompts. tokens_to_generate: left free behind the prompt. least_units: fewest units of text.
    text: what the user must bring. any_answer: the answers are wordings of one, any of which counts."""

    generate: Callable[[Material], Build]
    tokens_to_generate: int
    least_units: int
    text: Text | None = None
    any_answer: bool = False

    def string_match(self, prediction: str, answers: tuple[str, ...]) -> float:
        """RULER's score of a generated text, 0 to 1."""
        return (string_match_part if self.any_answer else string_match_all)(prediction, answers)


def _niah(needles: Needles) -> Task:
    return Task(
        generate=partial(niah, needles),
        tokens_to_generate=128,
        least_units=needles.least_units,
        text="essay" if needles.haystack == "essay" else None,
    )


TASKS: dict[str, Task] = {
    "niah_single_1": _niah(Needles(haystack="noise")),
    "niah_single_2": _niah(Needles(haystack="essay")),
    "niah_single_3": _niah(Needles(haystack="essay", value="uuids")),
    "niah_multikey_1": _niah(Needles(haystack="essay", keys=4)),
    "niah_multikey_2": _niah(Needles(haystack="needle")),
    "niah_multikey_3": _niah(Needles(haystack="needle", key="uuids", value="uuids")),
    "niah_multivalue": _niah(Needles(haystack="essay", values=4)),
    "niah_multiquery": _niah(Needles(haystack="essay", keys=4, queries=4)),
    "vt": Task(generate=variable_tracking, tokens_to_generate=30, least_units=LEAST_UNITS),
    "cwe": Task(generate=common_words, tokens_to_generate=120, least_units=LEAST_WORDS),
    "fwe": Task(generate=frequent_words, tokens_to_generate=FWE_GENERATED, least_units=LEAST_CODED),
    "qa_1": Task(generate=question_answering, tokens_to_generate=32, least_units=0, text="squad", any_answer=True),
    "qa_2": Task(generate=question_answering, tokens_to_generate=32, least_units=0, text="hotpotqa", any_answer=True),
}


@dataclass(frozen=True, kw_only=True)
class Texts:
    """What the user brought: words of essays, and questions; None: not."""

    essay: tuple[str, ...] | None = None
    squad: Questions | None = None
    hotpotqa: Questions | None = None

    def digests(self) -> dict[str, str]:
        """Of the content of those that are there, by name."""
        there = {name: text for name in ("essay", "squad", "hotpotqa") if (text := getattr(self, name)) is not None}
        return {name: hashlib.sha256(repr(text).encode()).hexdigest()[:16] for name, text in there.items()}


class Examples:
    """The examples of one task at one length."""

    def __init__(
        self, name: str, length: int, encoder: Encoder, texts: Texts, *, seed: int = 42, first_tokens: int = 0
    ) -> None:
        """first_tokens: that stand before every prompt (BOS), and count as part of it.

        Raises:
            ValueError: the task's text is missing, or no prompt of the task is as short as `length`; the message
                names both.
        """
        self.name, self.length, self.task = name, length, TASKS[name]
        self._encoder, self._seed, self._first_tokens = encoder, seed, first_tokens
        if self.task.text is not None and getattr(texts, self.task.text) is None:
            raise ValueError(f"{name}: needs --ruler-{self.task.text}")
        self._material = Material(
            length=length,
            count=lambda text: len(encoder.encode(text)),
            seed=seed,
            essay=texts.essay or (),
            questions=getattr(texts, self.task.text) if self.task.any_answer and self.task.text else None,
        )
        self._start: Fit | None = None
        try:
            self._build = self.task.generate(self._material)
            self._fewest = self._made(0, self.task.least_units)[1]
            if self._fewest > length:
                raise ValueError(f"expected at least {self._fewest:,} tokens, got {length:,}")
        except ValueError as error:
            raise ValueError(f"{name} in {length:,} tokens: no prompt is that short: {error}") from error

    @property
    def available(self) -> int | None:
        """How many there are; None: as many as one likes."""
        return None if self._material.questions is None else len(self._material.questions.questions)

    def check(self, count: int) -> None:
        """That the first `count` examples fit. They differ in what must stand in them: by a few tokens, those of a
        question by its documents.

        Raises:
            ValueError: one needs more; the message names task, length and example.
        """
        if self._material.questions is None and 2 * self._fewest <= self.length:
            return
        for index in range(count):
            fewest = self._made(index, self.task.least_units)[1]
            if fewest > self.length:
                raise ValueError(
                    f"{self.name} in {self.length:,} tokens: example {index}: expected at least {fewest:,} tokens, got "
                    f"{self.length:,}"
                )

    def example(self, index: int) -> Prompt:
        """The prompt: with what is generated after it at most `length` tokens.

        Raises:
            ValueError: this one needs more; the message names task and length.
        """
        try:
            if self._start is None:
                self._start = self._fit(0)[1]
            return self._fit(index)[0]
        except ValueError as error:
            raise ValueError(f"{self.name} in {self.length:,} tokens: example {index}: {error}") from error

    def _fit(self, index: int) -> tuple[Prompt, Fit]:
        prompts: dict[int, Prompt] = {}

        def tokens_of(units: int) -> int:
            prompts[units], tokens = self._made(index, units)
            return tokens

        found = fit(tokens_of, self.length, least=self.task.least_units, start=self._start, slack=self.length // 100)
        return prompts[found.units], found

    def _made(self, index: int, units: int) -> tuple[Prompt, int]:
        """A prompt, and its tokens with those left for the answer."""
        prompt = self._build(Draw(self._seed, self.name, index), index, units)
        # An answer that a tokenizer makes longer than what is generated must fit, too: it is scored as a whole.
        answer = max(self.task.tokens_to_generate, self._material.count(prompt.completion))
        return prompt, self._first_tokens + self._material.count(prompt.text) + answer
