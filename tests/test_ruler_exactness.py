"""Exactness on the parallel model: what greedy decoding by transformers says, the same under every layout; and the
suite `ruler` from the command line, in both ways of scoring."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from evaluations import content, flags_of, parts_there, run, run_or_die
from programs import Programs
from ruler_smollm2 import begins_with_gold
from tiny import BOS, TINY_LLAMA, Axes, layout_of, load_tiny, make_folder

from megatron_tw.config import RunConfig, parse_options
from megatron_tw.data.tokenizer import load_tokenizer
from megatron_tw.evaluation.results import Results
from megatron_tw.evaluation.ruler.exactness import Forward
from megatron_tw.evaluation.ruler.generation import generate
from megatron_tw.evaluation.ruler.prompt import Prompt
from megatron_tw.evaluation.ruler.rows import Row
from megatron_tw.evaluation.ruler.scoring import Work, first_tokens, ruler_exactness
from megatron_tw.evaluation.ruler.tasks import Examples, Texts
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.ruler import ruler_metrics

LAYOUTS = (Axes(), Axes(tp=2), Axes(cp=2), Axes(pp=2), Axes(dp=2), Axes(tp=2, cp=2))


def greedy_rows() -> tuple[list[Row], list[tuple[bool, bool, bool]]]:
    """Rows of different lengths with two answers each, and what transformers' argmax says of them: of the first, the
    second, and the whole completion."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    generator = torch.Generator().manual_seed(5)
    rows, expected = [], []
    for length, wrong in ((31, ()), (40, (0,)), (53, (3,)), (64, (5,)), (77, (1, 6))):
        ids = [BOS, *torch.randint(3, 320, (length,), generator=generator).tolist()]
        start, right = len(ids), []
        for place in range(7):  # three tokens, one between, three tokens
            with torch.no_grad():
                best = model(torch.tensor([ids])).logits[0, -1].topk(2)
            assert best.values[0] - best.values[1] > 1e-4
            right.append(place not in wrong)
            ids.append(int(best.indices[0] if right[-1] else best.indices[1]))
        rows.append(Row(ids=tuple(ids), prompt_tokens=start, spans=((start, start + 3), (start + 4, start + 7))))
        expected.append((all(right[:3]), all(right[4:]), all(right)))
    return rows, expected


def exactness_of(axes: Axes, rows: list[Row], micro_batch_size: int):
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout)
        forward = Forward(
            chunks=chunks,
            layout=layout,
            device=prepare_device(),
            sequence_parallel=axes.tp > 1,
            micro_batch_size=micro_batch_size,
        )
        found = []
        for first in range(0, len(rows), forward.examples_per_pass):
            here = rows[first : first + forward.examples_per_pass]
            flags = forward.exactness(here[layout.dp_rank :: layout.dp_size] or rows[-1:], len(here))
            if flags is not None:
                found += [(*answers, whole) for answers, whole in zip(flags["answers"], flags["exact"], strict=True)]
    return found


def test_every_layout_says_what_transformers_argmax_says(ranks):
    rows, expected = greedy_rows()
    assert {True, False} == {x[0] for x in expected} == {x[1] for x in expected} == {x[2] for x in expected}
    assert (True, True, False) in expected, "a wrong token between two answers counts in neither"
    for axes in LAYOUTS:
        for micro_batch_size in (1, 2) if axes.world_size == 1 else (1,):
            answers = [
                found for found in ranks(axes.world_size).run(exactness_of, axes, rows, micro_batch_size) if found
            ]
            assert len(answers) == axes.world_size // axes.pp
            assert all(found == expected for found in answers), axes.name


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random tiny model whose tokenizer has a token for each byte and each common word of a prompt."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("ruler")
    make_folder("llama", folder / "model", max_position_embeddings=1024)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), special_tokens=["<s>", "</s>"]
    )
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. special magic"
    tokenizer.train_from_iterator([text] * 20, trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>").save_pretrained(
        folder / "model"
    )
    return folder


def samples_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "ruler_samples.jsonl").read_text().splitlines()]


def test_the_suite_writes_records_and_samples(world: Path, programs: Programs) -> None:
    options = (
        "--load-hf model --tasks niah_single_1 niah_single_2 fwe --ruler-lengths 896 1024 --ruler-samples 3 "
        "--micro-batch-size 2 --output exact"
    )
    answer = programs.run("evaluate", options.split(), world)
    assert answer.status == 0, answer.stderr
    results = Results.load(world / "exact")
    found = {(record.task, record.length): record for record in results.records}
    assert len(found) == 8
    for length in (896, 1024):
        for task in ("niah_single_1", "fwe"):
            record = found[task, length]
            assert record.metric == "exactness"
            assert record.samples == 3
            assert record.value is not None
        assert "needs --ruler-essay" in str(found["niah_single_2", length].not_run)
        assert found["average of 2 tasks", length].samples == 6
    lines = samples_of(world / "exact")
    assert [(line["task"], line["length"], line["index"]) for line in lines] == [
        (task, length, index) for length in (896, 1024) for task in ("niah_single_1", "fwe") for index in range(3)
    ]
    assert all(0 < line["depths"][0] < 1 for line in lines if line["task"] == "niah_single_1")
    assert all(set(line["scores"]) <= {0.0, 1.0} for line in lines)


def test_generation_by_lm_evaluation_harness(world: Path, programs: Programs) -> None:
    pytest.importorskip("lm_eval")
    options = (
        "--load-hf model --tasks niah_single_1 --ruler-lengths 640 --ruler-samples 2 --ruler-scoring generation "
        "--output generated"
    )
    answer = programs.run("evaluate", options.split(), world)
    assert answer.status == 0, answer.stderr
    record = Results.load(world / "generated").records[0]
    assert (record.task, record.metric, record.samples) == ("niah_single_1", "string_match", 2)
    assert [line["metric"] for line in samples_of(world / "generated")] == ["string_match"] * 2


@pytest.mark.parametrize(
    ("scoring", "axes", "parts"),
    [
        ("exactness", Axes(), 6),
        pytest.param("exactness", Axes(dp=2), 4, marks=pytest.mark.full),
        pytest.param("exactness", Axes(pp=2), 4, marks=pytest.mark.full),
        pytest.param("exactness", Axes(tp=2, cp=2), 6, marks=pytest.mark.full),
        ("generation", Axes(), 2),
    ],
    ids=lambda value: value.name if isinstance(value, Axes) else str(value),
)
def test_what_is_cut_off_goes_on(scoring: str, axes: Axes, parts: int, world: Path, ranks, tmp_path: Path) -> None:
    if scoring == "generation":
        pytest.importorskip("lm_eval")
    essay = tmp_path / "essay.txt"
    essay.write_text("It was not so. " * 400)

    def options(output: str, axes: Axes = axes) -> list[str]:
        return [
            f"--load-hf={world / 'model'}", "--tasks=niah_single_1,niah_single_2", "--ruler-lengths=640",
            f"--ruler-samples={1 if scoring == 'generation' else 3}", f"--ruler-scoring={scoring}",
            f"--ruler-essay={essay}", f"--output={tmp_path / output}", *flags_of(axes),
        ]  # fmt: skip

    whole = [part for written in ranks(axes.world_size).run(run, options("whole")) for part in written]
    assert len(whole) == parts
    with pytest.raises(RuntimeError):
        ranks(axes.world_size).run(run_or_die, options("cut"), 1)
    made = parts_there(tmp_path / "cut")
    assert len(made) == 1
    assert not (tmp_path / "cut").exists()
    text = essay.read_text()
    essay.write_text(text + "But why?")
    with pytest.raises(ValueError, match=r"another evaluation that was cut off: ruler_essay: [0-9a-f]{16} -> [0-9a-f]"):
        ranks(axes.world_size).run(run, options("cut"))
    essay.write_text(text)
    rest = [part for written in ranks(axes.world_size).run(run, options("cut")) for part in written]
    assert sorted([*made, *rest]) == sorted(whole), "no part is made twice"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
    if axes.world_size > 1:
        ranks(1).run(run, options("one", Axes()))
        assert samples_of(tmp_path / "one") == samples_of(tmp_path / "whole"), "as on one rank"


class WithGold(Examples):
    """Examples whose gold completions are given."""

    golds: list[str]

    def example(self, index: int) -> Prompt:
        gold = self.golds[index]
        return replace(super().example(index), completion=f" {gold}", spans=((1, len(gold) + 1),), answers=(gold,))


def work_with(golds: list[str], model: Path) -> Work:
    tokenizer = load_tokenizer(model)
    begin = first_tokens(None, tokenizer)
    examples = WithGold("niah_single_1", 640, tokenizer, Texts(), first_tokens=len(begin))
    examples.golds = golds
    return Work(
        examples=(examples,), not_run={}, lengths=(640,), samples=len(golds), tokenizer=tokenizer, first_ids=begin
    )


def said_by(model: Path) -> list[str]:
    """On a rank: what transformers generates."""
    from lm_eval.api.registry import get_model

    lm = get_model("hf")(pretrained=str(model), dtype="float32", device="cpu", batch_size=1)
    (examples,) = work_with([""] * 4, model).examples
    return generate(lm, examples, 4)


def exact_of(axes: Axes, golds: list[str], model: Path) -> tuple[dict[str, float], list[bool] | None]:
    """On a rank: what training tells, and of each example whether it is exact."""
    options = "--seq-length=640 --data-path=x --train-iters=1 --lr=1 --global-batch-size=2"
    config = parse_options([*options.split(), f"--load-hf={model}", *flags_of(axes)], RunConfig)
    work = work_with(golds, model)
    with layout_of(axes) as layout:
        _, chunks = load_tiny(axes, layout, model)
        told = ruler_metrics(work, chunks, config, layout, prepare_device())
        forward = Forward(
            chunks=chunks,
            layout=layout,
            device=prepare_device(),
            sequence_parallel=axes.tp > 1,
            micro_batch_size=1,
        )
        flags = ruler_exactness(forward, work.examples[0], work)
    return told, None if flags is None else [bool(exact) for exact in flags["exact"]]


@pytest.mark.parametrize(
    "layouts",
    [(Axes(), Axes(pp=2)), pytest.param((Axes(tp=2), Axes(dp=2), Axes(tp=2, cp=2)), marks=pytest.mark.full)],
    ids=["PP2", "others"],
)
def test_both_ways_agree(layouts: tuple[Axes, ...], ranks, tmp_path: Path) -> None:
    """A completion is exact if and only if greedy generation begins with its tokens. The gold answers are what the
    model says, every other one with another third word."""
    pytest.importorskip("lm_eval")
    from test_harness import make_word_model

    model = make_word_model(tmp_path / "model", max_position_embeddings=1024)
    (said,) = ranks(1).run(said_by, model)
    first = [text.split()[:3] for text in said]
    for words in first[1::2]:
        words[2] = "w1" if words[2] == "w2" else "w2"
    golds = [" ".join(words) for words in first]
    work = work_with(golds, model)
    begins = [begins_with_gold(work.examples[0].example(place), f" {text}", work) for place, text in enumerate(said)]
    assert begins == [True, False, True, False]
    for axes in layouts:
        for told, exact in ranks(axes.world_size).run(exact_of, axes, golds, model):
            assert exact in (begins, None)
            assert (exact is None) <= (axes.pp > 1)
            assert told == {"ruler_niah_single_1": 0.5}


def test_training_reports_exactness(world: Path, programs: Programs) -> None:
    text = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. " * 40
    (world / "docs.jsonl").write_text((json.dumps({"text": text}) + "\n") * 3)
    for options in (
        "preprocess --input docs.jsonl --tokenizer model --seq-length 640 --output rows",
        "train --load-hf model --data-path rows --valid-data-path rows --seq-length 640 --train-iters 2 --lr 1e-3 "
        "--global-batch-size 1 --save run --eval-interval 1 --eval-iters 1 --eval-ruler niah_single_1 "
        "--eval-ruler-samples 3",
        "evaluate --load run --tasks niah_single_1 --ruler-lengths 640 --ruler-samples 3 --output trained",
    ):
        program, *arguments = options.split()
        answer = programs.run(program, arguments, world)
        assert answer.status == 0, answer.stderr
    steps = [json.loads(line) for line in (world / "run" / "metrics.jsonl").read_text().splitlines()]
    (record,) = Results.load(world / "trained").records
    assert [0 <= step["ruler_niah_single_1"] <= 1 for step in steps] == [True, True]
    assert steps[-1]["ruler_niah_single_1"] == record.value
