"""A prompt and its gold answers as token ids, and which of the tokens are an answer's."""

from dataclasses import dataclass

from megatron_tw.evaluation.ruler.prompt import Prompt
from megatron_tw.evaluation.ruler.tasks import Encoder


@dataclass(frozen=True, kw_only=True)
class Row:
    """ids: of the prompt, then of its completion. prompt_tokens: how many of them are the prompt's. spans: of each
    answer, the place in `ids` of its first token and the one after its last."""

    ids: tuple[int, ...]
    prompt_tokens: int
    spans: tuple[tuple[int, int], ...]


def tokenize(prompt: Prompt, encoder: Encoder, first_ids: tuple[int, ...] = ()) -> Row:
    """The row of a prompt. first_ids: stand before it (BOS).

    The ids of the prompt are those that it has without the completion, as when a model generates. The completion's are
    those that follow in both texts together; where the tokenizer merges across the border, those of the completion
    alone. A space before an answer is its own only where it shares a token with it.
    """
    prompt_ids = encoder.encode(prompt.text)
    start = prompt.text.rfind("\n") + 1  # the last line is enough to see how the completion goes on
    line = prompt.text[start:]
    line_ids = encoder.encode(line)
    if encoder.encode(line + prompt.completion)[: len(line_ids)] != line_ids:
        line, line_ids = "", []
    whole = encoder.encode(line + prompt.completion)
    offset = len(first_ids) + len(prompt_ids) - len(line_ids)
    spans = []
    for first, last in prompt.spans:
        before = encoder.encode(line + prompt.completion[:first])
        until = encoder.encode(line + prompt.completion[:last])
        begin, end = _shared(before, whole), _shared(until, whole)
        end += end < len(until)  # the answer's last letters share a token with what follows
        spans.append((offset + max(begin, len(line_ids)), offset + end))
    return Row(
        ids=(*first_ids, *prompt_ids, *whole[len(line_ids) :]),
        prompt_tokens=len(first_ids) + len(prompt_ids),
        spans=tuple(spans),
    )


def _shared(first: list[int], second: list[int]) -> int:
    """How many ids both begin with."""
    count = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        count += 1
    return count
