"""lm-evaluation-harness on a parallel model answers as its own Hugging Face model does on the export."""

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from evaluations import flags_of
from tiny import BOS, Axes, make_folder
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance

from megatron_tw.config import parse_options
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.evaluation.harness.adapter import parallel_lm
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.tasks import Model
from megatron_tw.parallel.layout import destroy_layout
from megatron_tw.runtime.opening import join_world, open_model
from megatron_tw.runtime.source import open_source

MAX_LENGTH = 40
WORDS = [f"w{number}" for number in range(60)]


def make_word_model(folder: Path, **changes: Any) -> Path:
    """A tiny Llama with a tokenizer of 60 words that begins texts with BOS."""
    make_folder("llama", folder, **{"num_hidden_layers": 2, "vocab_size": 64, **changes})
    vocabulary = {"<pad>": 0, "<s>": BOS, "</s>": 2, "<unk>": 3} | {word: 4 + i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    ).save_pretrained(folder)
    return folder


def text(generator: torch.Generator, words: int) -> str:
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (words,), generator=generator).tolist())


def make_requests(folder: Path) -> dict[str, list[tuple[str, ...]]]:
    """Contexts and continuations of many lengths, some beyond the longest input, some empty; and whole texts. For half
    of them the continuation is what the model says next, so that greedy is true as well."""
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    generator = torch.Generator().manual_seed(5)
    pairs: list[tuple[str, ...]] = [("", text(generator, 3)), ("", "<s> w1 w2"), ("<s> w3 w4", " w5")]
    for context, continuation in ((1, 1), (4, 2), (9, 3), (17, 1), (25, 4), (36, 5), (60, 2), (11, 30)):
        start = text(generator, context)
        pairs.append((start, " " + text(generator, continuation)))
        ids = tokenizer(start, return_tensors="pt").input_ids
        for _ in range(min(continuation, 4)):
            with torch.no_grad():
                best = model(ids[:, -MAX_LENGTH:]).logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, best], dim=1)
        said = " ".join(tokenizer.convert_ids_to_tokens(ids[0, -min(continuation, 4) :].tolist()))
        pairs.append((start, " " + said))
        pairs.append((start + " ", said))
    return {"loglikelihood": pairs, "loglikelihood_rolling": [(text(generator, words),) for words in (2, 39, 95)]}


def ask(lm: Any, requests: dict[str, list[tuple[str, ...]]]) -> dict[str, list[Any]]:
    return {
        kind: getattr(lm, kind)([Instance(kind, {}, one, index) for index, one in enumerate(given)])
        for kind, given in requests.items()
    }


def ask_parallel(options: Sequence[str], folder: Path, output: Path, requests: dict[str, Any]) -> dict[str, list[Any]]:
    """On a rank."""
    config = parse_options(["--tasks=mmlu", f"--output={output}", f"--load-hf={folder}", *options], EvaluationConfig)
    device = join_world(config.parallel)
    source = open_source(config.model, load=None, seq_length=None)
    layout, chunks = open_model(source, config.parallel, config.compute, device)
    try:
        model = Model(config, source, layout, chunks, device, Kept(output, {}))
        return ask(parallel_lm(model, folder, max_length=MAX_LENGTH, name="test"), requests)
    finally:
        destroy_layout()
        gc.collect()


@pytest.fixture(scope="module")
def word_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_word_model(tmp_path_factory.mktemp("harness") / "model")


@pytest.fixture(scope="module")
def expected(word_model: Path) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """The requests, and the answers of lm_eval's own model."""
    from lm_eval.models.huggingface import HFLM

    requests = make_requests(word_model)
    lm = HFLM(pretrained=str(word_model), device="cpu", dtype="float32", batch_size=1, max_length=MAX_LENGTH)
    return requests, ask(lm, requests)


LAYOUTS = [
    (Axes(), 3),
    (Axes(cp=2), 1),
    *(pytest.param(axes, size, marks=pytest.mark.full) for axes, size in (
        (Axes(tp=2), 2), (Axes(pp=2), 1), (Axes(dp=2), 2), (Axes(tp=2, cp=2), 1), (Axes(pp=2, vpp_layers=1), 1),
    )),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "micro_batch_size"), LAYOUTS)
def test_answers_are_those_of_the_harness_own_model(axes, micro_batch_size, ranks, word_model, expected, tmp_path):
    requests, answers = expected
    flags = [*flags_of(axes), f"--micro-batch-size={micro_batch_size}"]
    if axes.vpp_layers:
        flags.append(f"--num-layers-per-virtual-pipeline-stage={axes.vpp_layers}")
    greedy = [flag for _, flag in answers["loglikelihood"]]
    assert 5 < sum(greedy) < len(greedy) - 5
    for found in ranks(axes.world_size).run(ask_parallel, flags, word_model, tmp_path / "out", requests):
        assert [flag for _, flag in found["loglikelihood"]] == greedy
        likelihoods = [value for value, _ in answers["loglikelihood"]]
        assert [value for value, _ in found["loglikelihood"]] == pytest.approx(likelihoods, abs=1e-4)
        assert found["loglikelihood_rolling"] == pytest.approx(answers["loglikelihood_rolling"], abs=1e-4)


def test_what_cannot_be_done_is_said(ranks, word_model, tmp_path):
    for requests, match in (
        ({"generate_until": [("w1", {})]}, "scores and does not generate; export it with tools/convert_checkpoint"),
        ({"loglikelihood": [("w1", " w2" * 50)]}, "--seq-length 40: a continuation of 50 tokens"),
    ):
        with pytest.raises(ValueError, match=match):
            ranks(1).run(ask_parallel, [], word_model, tmp_path / "out", requests)
