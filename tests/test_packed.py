"""A packed row is its documents run one by one, in every layout: NLLs, weights, gradients, training, scores."""

import doctest
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from evaluations import flags_of, run_evaluation
from test_data_prepare import write_jsonl
from test_flops import counted_step
from test_training import (
    CACHED,
    DENSE,
    EMA,
    LIVE,
    LONGCE,
    METRICS,
    SPARSE_UNFROZEN,
    UNFROZEN,
    make_scores,
    metrics_of,
    options,
    run_all,
    run_steps,
    scoring_options,
)
from tiny import (
    BOS,
    SEQ_LENGTH,
    STRIDE,
    TINY_LLAMA,
    VOCAB,
    WINDOW,
    Axes,
    layout_of,
    load_tiny,
    make_folder,
    reference_rows,
    release,
)
from torch import Tensor

from megatron_tw.config import (
    ActivationConfig,
    CheckpointConfig,
    ModelConfig,
    RunConfig,
    ScorerConfig,
    TrainConfig,
    WeightingOptions,
)
from megatron_tw.data.loader import documents_of, read_batch
from megatron_tw.data.prepare import prepare_rows
from megatron_tw.data.rows import TokenRows
from megatron_tw.data.scores import ScoreRows
from megatron_tw.evaluation.result import EvaluationResult
from megatron_tw.model import packed_windows
from megatron_tw.model.architecture import read_architecture
from megatron_tw.model.flops import model_flops
from megatron_tw.model.forward import ShortWindowForward, call_model, long_sequences, row_layout
from megatron_tw.model.packed_windows import PackedWindowForward
from megatron_tw.model.sequence import thd_params
from megatron_tw.objective import packed, weighted_loss
from megatron_tw.objective.packed import PackedSequence
from megatron_tw.objective.zigzag import zigzag_positions
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.description import describe_run
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run
from megatron_tw.weighting import ExactConfig, Scheme, WeightingConfig, documents, token_weights, unfrozen_short_nll

MULTIPLE = 16
LENGTHS = (190, 40, 100, 64, 90, 65, 17, 2, 120, 33, 17, 150, 256)
"""Of documents: on both sides of a window of 64 tokens, and some alike."""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Packed rows of documents that begin with BOS, of which some targets are masked."""
    folder, ids = tmp_path_factory.mktemp("packed"), reference_rows().flatten()
    generator, records = np.random.default_rng(3), []
    for number, length in enumerate(LENGTHS):
        mask = (generator.random(length) < 0.8).astype(int)
        mask[1] = 1
        first = 7 + 61 * number
        records.append({"input_ids": [BOS, *ids[first : first + length - 1].tolist()], "loss_mask": mask.tolist()})
    source = write_jsonl(folder / "in.jsonl", records)
    prepare_rows([source], folder / "rows", seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=VOCAB, bos_id=BOS,
                 pack_multiple=MULTIPLE)  # fmt: skip
    return folder / "rows"


def test_docstring_examples() -> None:
    assert doctest.testmod(packed) == (0, 3)
    assert doctest.testmod(packed_windows) == (0, 2)
    assert doctest.testmod(documents) == (0, 1)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_orders_of_the_tokens(size: int) -> None:
    """Ranks' parts are Transformer Engine's, and attention gets whole documents, those of a length side by side."""
    lengths = [24, 8, 16, 8, 32, 24]
    ranks = [PackedSequence(lengths, rank=rank, size=size) for rank in range(size)]
    starts = [0, *np.cumsum(lengths).tolist()]
    whole = torch.arange(sum(lengths))
    for rank, one in enumerate(ranks):
        positions = one.positions().tolist()
        if size > 1:
            # transformer_engine's thd_partition_src_index, of cu_seqlens over all ranks
            expected = []
            for start, length in zip(starts, lengths, strict=False):
                own = length // size
                for index in range(own):
                    offset = rank if index < own // 2 else 2 * (size - 1) - rank
                    expected.append(start + index + own // 2 * offset)
            assert positions == expected
        each = [start + zigzag_positions(length, rank=rank, size=size)
                for start, length in zip(starts, lengths, strict=False)]  # fmt: skip
        assert positions == torch.cat(each).tolist()
        document = np.searchsorted(starts, positions, side="right") - 1
        assert one.within.tolist() == [place - starts[d] for place, d in zip(positions, document, strict=True)]
        by_length = one.shard(whole, 0).index_select(0, one.local_by_length)
        assert [lengths[np.searchsorted(starts, place, side="right") - 1] // 8 for place in by_length.tolist()] == [
            length // 8 for count, length in one.by_length for _ in range(count * length // size)
        ]
        assert by_length.index_select(0, one.local_in_order).tolist() == positions
        gathered = torch.cat([other.positions() for other in ranks])[one.gathered_by_length]
        order = sorted(range(len(lengths)), key=lambda d: lengths[d])
        assert gathered.tolist() == [place for d in order for place in range(starts[d], starts[d + 1])]
        assert gathered[one.own_by_length[rank]].tolist() == positions
    params = thd_params(ranks[0])
    assert params.cu_seqlens_q.tolist() == starts
    assert params.cu_seqlens_q.dtype == torch.int32
    assert params.cu_seqlens_q_padded is params.cu_seqlens_q  # no gaps: flash attention stays possible
    assert (params.max_seqlen_q, params.max_seqlen_kv, params.qkv_format) == (32, 32, "thd")


SCHEMES: dict[str, Scheme] = {
    "dense": WeightingConfig.preset("dense", interpolation=0.75),
    "sparse": WeightingConfig.preset("sparse", sparsification=0.3),
    "longce": WeightingConfig.preset("longce", truncation=5.0),
    "softmax": WeightingConfig(normalization="softmax"),
    "uniform": WeightingConfig.preset("uniform"),
}


@pytest.mark.parametrize("name", SCHEMES)
def test_weights_are_those_of_the_documents(name: str) -> None:
    generator = torch.Generator().manual_seed(1)
    long, short = (torch.rand(2, 99, generator=generator) for _ in range(2))
    long[0, 12:40], short[0, 12:40] = 1.0, 2.0  # ties
    valid = torch.rand(2, 99, generator=generator) < 0.8
    valid[:, [0, 1]] = True
    long[~valid] = torch.nan
    some = torch.tensor([[0, 0, 10], [0, 12, 30], [0, 44, 56], [1, 0, 2], [1, 4, 0], [1, 8, 92]])
    inside = torch.zeros_like(valid)
    for row, start, tokens in some.tolist():
        inside[row, start : start + max(0, tokens - 1)] = True
    valid &= inside
    ids = torch.tensor([5, 9])
    weights = token_weights(long, short, SCHEMES[name], valid=valid, row_ids=ids, seed=3, documents=some)
    assert (weights[~valid] == 0).all()
    for row, start, tokens in some.tolist():
        own = slice(start, start + max(0, tokens - 1))
        alone = token_weights(long[None, row, own], short[None, row, own], SCHEMES[name], valid=valid[None, row, own],
                              row_ids=ids[row : row + 1] * 100 + start, seed=3)  # fmt: skip
        torch.testing.assert_close(weights[row, own], alone[0], rtol=1e-6, atol=1e-7)


def test_exact_knows_the_documents() -> None:
    some = torch.tensor([[0, 0, 40], [0, 40, 60]])
    starts = documents.document_starts(some, (1, 99))
    long, scheme = torch.rand(1, 99), ExactConfig(alpha=0.5, tau=8)
    weights = token_weights(long, None, scheme, documents=some)
    assert torch.equal(weights, token_weights(long, None, scheme, document_starts=starts))
    assert not torch.equal(weights, token_weights(long, None, scheme))


def one_by_one(folder: Path, include_first: bool) -> list[tuple[str, Tensor, Tensor, list[float]]]:
    """On a rank: of each scheme the weights of packed rows and of their documents, each run alone as an ordinary row,
    and largest differences of NLLs, loss and gradients, as a share of the largest."""
    results = []
    with layout_of(Axes()) as layout:
        _, chunks = load_tiny(Axes(), layout)
        rows = TokenRows(folder)
        batches = [read_batch(rows, [row]) for row in range(len(rows))]
        how: dict[str, Any] = {"bos_id": BOS, "layout": layout, "sequence_parallel": False}
        forward = PackedWindowForward.create(SEQ_LENGTH, WINDOW, STRIDE, include_first=include_first, **how)
        tokens_RN = torch.cat([batch.tokens for batch in batches])
        short_RT = forward.short_nll(chunks, tokens_RN, documents_of(batches))
        assert short_RT is not None
        parameters = list(chunks[0].parameters())
        for name, scheme in SCHEMES.items():
            whole, alone, weights, weights_alone, far = [], [], [], [], []
            for row, batch in enumerate(batches):
                assert batch.documents is not None
                assert batch.valid is not None
                sequences = long_sequences(batch.tokens, layout, valid_RT=batch.valid, documents_D3=batch.documents)
                starts = documents.document_starts(batch.documents, (1, SEQ_LENGTH - 1))
                complete = partial(unfrozen_short_nll, short_nll=short_RT[row : row + 1], window=WINDOW,
                                   document_starts=starts)  # fmt: skip
                loss = weighted_loss(
                    call_model(chunks[0], sequences), short_RT[row : row + 1] if include_first else complete, scheme,
                    valid=batch.valid, layout=row_layout(layout, sequences.shard.packed),
                    row_ids=batch.row_index, documents=batch.documents,
                )  # fmt: skip
                whole.append(loss.sum)
                for _, start, tokens in batch.documents.tolist():
                    if tokens < 2:
                        assert not batch.valid[:, start : start + MULTIPLE - 1].any()
                        continue
                    own = slice(start, start + tokens - 1)
                    ids_1N = batch.tokens[:, start : start + tokens]
                    nll = call_model(chunks[0], long_sequences(ids_1N, layout))[:-1].T
                    short = alone_in_windows(ids_1N, nll.detach(), chunks, include_first, how)
                    one = weighted_loss(nll, short, scheme, valid=batch.valid[:, own],
                                        row_ids=batch.row_index * SEQ_LENGTH + start)  # fmt: skip
                    valid = one.valid
                    alone.append(one.sum)
                    weights.append(loss.weights[:, own])
                    weights_alone.append(one.weights)
                    assert loss.short_nll is not None
                    far.append(float((loss.long_nll[:, own] - nll)[valid].abs().max()))
                    far.append(float((loss.short_nll[:, own] - short)[valid].abs().max()))
            assert len(weights) == len(LENGTHS)
            total, expected = torch.stack(whole).sum(), torch.stack(alone).sum()
            grads, alone_grads = (torch.autograd.grad(x, parameters) for x in (total, expected))
            far.append(abs(float(total / expected) - 1))
            far += [float((g - a).abs().max() / a.abs().max()) for g, a in zip(grads, alone_grads, strict=True)]
            results.append((name, torch.cat(weights, 1), torch.cat(weights_alone, 1), far))
    return results


def alone_in_windows(ids_1N: Tensor, long: Tensor, chunks: Any, include_first: bool, how: dict[str, Any]) -> Tensor:
    """Short NLL of an ordinary row."""
    tokens = ids_1N.shape[1]
    if tokens <= WINDOW:
        return long
    forward = ShortWindowForward.create(tokens, WINDOW, STRIDE, include_first=include_first, **how)
    short = forward.short_nll(chunks, ids_1N)
    assert short is not None
    return short if include_first else unfrozen_short_nll(long, short, WINDOW)


@pytest.mark.parametrize("include_first", [False, True], ids=["unfrozen", "frozen"])
def test_a_packed_row_is_its_documents(include_first: bool, ranks, data: Path) -> None:
    (results,) = ranks(1).run(one_by_one, data, include_first)
    for name, weights, alone, far in results:
        torch.testing.assert_close(weights, alone, rtol=1e-5, atol=1e-5, msg=name)
        assert max(far) < 1e-5, name


LAYOUTS = [Axes(pp=2, vpp_layers=1), Axes(tp=2, cp=2)]
FULL = [Axes(cp=2, dp=2), Axes(tp=2), Axes(cp=2), Axes(pp=2), Axes(dp=2), Axes(cp=4), Axes(tp=2, pp=2, cp=2),
        Axes(pp=2, cp=2), Axes(tp=4), Axes(tp=4, cp=2)]  # fmt: skip
RELATIVE = 2e-4
EXACT = WeightingOptions(weighting="exact", tau=16)
# Where scorer and model are one, a document no longer than a window has scores that are rounding errors, which DENSE
# would blow up to a mean of 1: LONGCE leaves them small.
RUNS = [(SPARSE_UNFROZEN, UNFROZEN), (DENSE, LIVE), (DENSE, CACHED), (LONGCE, EMA), (EXACT, UNFROZEN)]


def with_folder(scorer: ScorerConfig, scores: Path) -> ScorerConfig:
    folders: dict[ScorerConfig, dict[str, Any]] = {
        LIVE: {"scorer_hf": str(scores.with_name("scorer"))},
        CACHED: {"scores": (str(scores),)},
    }
    return replace(scorer, **folders.get(scorer, {}))


def configs(axes: Axes, data: Path, scores: Path) -> list:
    return [
        options(axes, data, weighting=weighting, train=TrainConfig(train_iters=2, global_batch_size=2),
                scorer=with_folder(scorer, scores))
        for weighting, scorer in RUNS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scores(data: Path, ranks) -> Path:
    """Of all rows by another model, on two context-parallel ranks."""
    output, scorer = data.parent / "scores", make_folder("llama", data.parent / "scorer")
    how = scoring_options(data, output)
    how = replace(how, parallel=Axes(cp=2).parallel(), model=ModelConfig(load_hf=str(scorer)))
    ranks(2).run(make_scores, how)
    return output


@pytest.fixture(scope="module")
def alone(data: Path, scores: Path, ranks) -> list[dict[str, list[float]]]:
    """The metrics of all runs on one rank."""
    (found,) = ranks(1).run(run_steps, Axes(), configs(Axes(), data, scores))
    for key in METRICS:
        np.testing.assert_allclose(found[2][key], found[1][key], rtol=RELATIVE, atol=1e-6, err_msg=f"cached {key}")
    assert found[0]["weighted_loss"] != found[4]["weighted_loss"]
    return found


@pytest.mark.parametrize(
    "axes",
    [pytest.param(axes, id=axes.name) for axes in LAYOUTS]
    + [pytest.param(axes, id=axes.name, marks=pytest.mark.full) for axes in FULL],
)
def test_every_layout_is_one_rank(axes: Axes, ranks, data: Path, scores: Path, alone: list) -> None:
    by_rank = ranks(axes.world_size).run(run_steps, axes, configs(axes, data, scores))
    assert all(found == by_rank[0] for found in by_rank), "every rank must report the same numbers"
    for (weighting, scorer), expected, found in zip(RUNS, alone, by_rank[0], strict=True):
        for key in METRICS:
            np.testing.assert_allclose(found[key], expected[key], rtol=RELATIVE, atol=1e-6,
                                       err_msg=f"{weighting.weighting} {scorer.scorer} {key}")  # fmt: skip


SCHEDULE = WeightingOptions(weighting_schedule="0: dense; 2 linear: dense interpolation=0.25; 3: sparse")


@pytest.mark.parametrize("scorer", [CACHED, pytest.param(LIVE, marks=pytest.mark.full)], ids=["cached", "live"])
@pytest.mark.parametrize(
    "after",
    [Axes(cp=2), *(pytest.param(axes, marks=pytest.mark.full) for axes in (Axes(tp=2), Axes(pp=2), Axes(dp=2)))],
    ids=lambda value: value.name,
)
def test_stop_and_resume(scorer, after: Axes, ranks, data: Path, scores: Path, tmp_path: Path) -> None:
    """With a frozen scorer and a schedule: bitwise under the same layout, to rounding under another."""

    def config(axes: Axes, save: str, exit_interval: int | None = None) -> Any:
        return options(
            axes, data, weighting=SCHEDULE, scorer=with_folder(scorer, scores),
            train=TrainConfig(train_iters=4, global_batch_size=2, exit_interval=exit_interval),
            checkpoint=CheckpointConfig(save=str(tmp_path / save), load=str(tmp_path / save), save_interval=2),
        )  # fmt: skip

    before = Axes(cp=2)
    ranks(2).run(run_all, [config(before, "straight"), config(before, "resumed", 2), config(after, "resumed")])
    expected, metrics = metrics_of(tmp_path / "straight"), metrics_of(tmp_path / "resumed")
    assert metrics["iteration"].tolist() == [1, 2, 3, 4]
    assert (metrics["masked_targets"] > 0).all()
    for key in METRICS:
        if after == before:
            assert metrics[key].tolist() == expected[key].tolist(), key
        else:
            np.testing.assert_allclose(metrics[key], expected[key], rtol=RELATIVE, atol=1e-6, err_msg=key)


def nll_by_transformers(ids: list[int]) -> np.ndarray:
    import transformers

    model: Any = transformers.AutoModelForCausalLM.from_pretrained(TINY_LLAMA, dtype=torch.float32)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none").numpy()


def evaluation_flags(axes: Axes, data: Path, output: Path) -> list[str]:
    return [f"--load-hf={TINY_LLAMA}", f"--data-path={data}", f"--seq-length={SEQ_LENGTH}", f"--bos-id={BOS}",
            f"--short-window={WINDOW}", f"--short-stride={STRIDE}", f"--output={output}", *flags_of(axes)]  # fmt: skip


def held_out(axes: Axes, data: Path) -> RunConfig:
    """A run whose held-out rows are the packed ones."""
    config = options(axes, data, train=TrainConfig(train_iters=2, global_batch_size=2, eval_interval=1))
    return replace(config, data=replace(config.data, valid_data_path=str(data)))


def written(axes: Axes, data: Path, folder: Path) -> dict[str, Any]:
    """On a rank: the metrics of held-out rows; an evaluation and scores are written."""
    metrics, _ = found_on_rank(axes, held_out(axes, data), evaluation_flags(axes, data, folder / "evaluation"), [])
    make_scores(replace(scoring_options(data, folder / "scores"), parallel=axes.parallel()))
    return metrics


Written = tuple[dict[str, Any], EvaluationResult, np.ndarray]


def read_written(metrics: dict[str, Any], data: Path, folder: Path) -> Written:
    scores = ScoreRows(folder / "scores").nll(TokenRows(data).documents_R2)
    return metrics, EvaluationResult.load(folder / "evaluation"), scores.numpy()


@pytest.fixture(scope="module")
def written_alone(data: Path, ranks, tmp_path_factory: pytest.TempPathFactory) -> Written:
    """By one rank."""
    folder = tmp_path_factory.mktemp("written_alone")
    (metrics,) = ranks(1).run(written, Axes(), data, folder)
    return read_written(metrics, data, folder)


@pytest.mark.parametrize(
    "axes",
    [Axes(pp=2, vpp_layers=1)]
    + [pytest.param(axes, marks=pytest.mark.full)
       for axes in (Axes(tp=2), Axes(pp=2), Axes(dp=2), Axes(cp=2), Axes(tp=2, cp=2), Axes(pp=2, cp=2))],
    ids=lambda axes: axes.name,
)  # fmt: skip
def test_what_every_layout_writes_is_what_one_rank_writes(
    axes: Axes, ranks, data: Path, written_alone: Written, tmp_path: Path
) -> None:
    """Evaluation, held-out rows and scores, to 1e-5."""
    by_rank = ranks(axes.world_size).run(written, axes, data, tmp_path)
    assert all(found == by_rank[0] for found in by_rank)
    metrics, result, scores = read_written(by_rank[0], data, tmp_path)
    expected_metrics, expected, expected_scores = written_alone
    assert metrics["valid_lm_loss"] == pytest.approx(expected_metrics["valid_lm_loss"], rel=1e-5)
    for bucket, one in zip(metrics["valid_by_position"], expected_metrics["valid_by_position"], strict=True):
        assert bucket == {**one, "lm_loss": pytest.approx(one["lm_loss"], rel=1e-5)}
    assert (result.row_index == expected.row_index).all()
    assert (result.valid == expected.valid).all()
    assert result.valid.sum() > 500
    for name in ("long_nll", "short_nll"):
        ours, theirs = getattr(result, name)[result.valid], getattr(expected, name)[result.valid]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5, err_msg=name)
    valid_RT = np.stack([row.valid for row in map(TokenRows(data).read, range(len(scores))) if row.valid is not None])
    np.testing.assert_allclose(scores[valid_RT], expected_scores[valid_RT], rtol=1e-5, atol=1e-5)


def found_on_rank(axes: Axes, config: Any, evaluation: list[str], again: list) -> tuple[dict[str, Any], list]:
    """On a rank: an evaluation is written; the metrics of a run's held-out rows before its first step, and of the steps
    of others."""
    run_evaluation(evaluation)
    inputs = open_inputs(config)
    with layout_of(axes) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        assert run.validation is not None
        validated = run.validation.metrics(run.step.model)
        release(run.step.model)
        del run
    return validated, run_steps(axes, again)


def test_evaluation_and_held_out_rows_are_the_documents(ranks, data: Path, scores: Path, tmp_path: Path) -> None:
    """Against transformers, document by document; and rows that are masked, not packed; and gathering twice."""
    axes, rows = Axes(cp=2), TokenRows(data)
    masked_ids, mask = reference_rows()[:2], np.random.default_rng(1).random((2, SEQ_LENGTH)) < 0.5
    write_jsonl(tmp_path / "masked.jsonl", [{"input_ids": ids.tolist(), "loss_mask": one.astype(int).tolist()}
                                            for ids, one in zip(masked_ids, mask, strict=True)])  # fmt: skip
    masked = tmp_path / "masked"
    prepare_rows([masked.with_suffix(".jsonl")], masked, seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=VOCAB)
    plain = options(axes, data, weighting=DENSE, scorer=replace(CACHED, scores=(str(scores),)),
                    train=TrainConfig(train_iters=2, global_batch_size=1, eval_interval=1))  # fmt: skip
    plain = replace(plain, data=replace(plain.data, valid_data_path=str(data)))
    again = [plain, replace(plain, activations=ActivationConfig(recompute_cp_gather=True)),
             options(axes, masked, train=TrainConfig(train_iters=1, global_batch_size=2))]  # fmt: skip
    output = tmp_path / "evaluated"
    by_rank = ranks(2).run(found_on_rank, axes, plain, evaluation_flags(axes, data, output), again)
    assert by_rank[0] == by_rank[1]
    validated, (gathered, gathered_again, of_masked) = by_rank[0]
    assert gathered == gathered_again

    result, nlls, positions, place = EvaluationResult.load(output), [], [], 0
    assert result.short_nll is not None
    for index in range(len(rows)):
        row = rows.read(index)
        assert row.documents is not None
        assert row.valid is not None
        for start, tokens in row.documents.tolist():
            if tokens < 2:
                continue
            valid_T = row.valid[start : start + tokens - 1]
            nll_T = nll_by_transformers(row.tokens[start : start + tokens].tolist())
            assert result.row_index[place] == index * SEQ_LENGTH + start
            assert (np.flatnonzero(result.valid[place]) == np.flatnonzero(valid_T)).all()
            np.testing.assert_allclose(result.long_nll[place, : tokens - 1][valid_T], nll_T[valid_T], atol=1e-5, rtol=0)
            same = result.short_nll[place] == result.long_nll[place]
            assert same[: min(WINDOW, tokens - 1)].all()
            assert not same[WINDOW : tokens - 1].any() or tokens <= WINDOW + 1
            nlls.append(nll_T[valid_T])
            positions.append(np.flatnonzero(valid_T) + 1)
            place += 1
    assert place == len(result.row_index) == len(LENGTHS)
    nll, position = np.concatenate(nlls), np.concatenate(positions)
    assert validated["valid_lm_loss"] == pytest.approx(nll.mean(), rel=1e-5)
    for bucket in validated["valid_by_position"]:
        inside = (position >= bucket["first"]) & (position <= bucket["last"])
        assert bucket["targets"] == inside.sum() > 0
        assert bucket["lm_loss"] == pytest.approx(nll[inside].mean(), rel=1e-5)
    summed = sum(nll_by_transformers(ids.tolist())[one[1:]].sum() for ids, one in zip(masked_ids, mask, strict=True))
    assert of_masked["lm_loss"] == [pytest.approx(summed / mask[:, 1:].sum(), rel=1e-5)]


def masked_step(config: Any, mask_RN: np.ndarray) -> tuple[dict[str, Any], dict[str, float]]:
    """On a rank: the metrics of a first step, and what they should be, with the masked targets left out by hand."""
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        batches = next(run.loader)
        metrics = run.step(batches, 0)
        release(run.step.model)
        del run
    scheme: Scheme = WeightingConfig.preset("dense", interpolation=0.75)
    weighted = unweighted = 0.0
    with layout_of(Axes()) as layout, torch.no_grad():
        _, chunks = load_tiny(Axes(), layout)
        how: dict[str, Any] = {"bos_id": BOS, "layout": layout, "sequence_parallel": False}
        for batch in batches:
            for ids_N, row in zip(batch.tokens, batch.row_index.tolist(), strict=True):
                long = call_model(chunks[0], long_sequences(ids_N[None], layout))[:-1].T
                short = alone_in_windows(ids_N[None], long, chunks, False, how)
                own = torch.from_numpy(mask_RN[row, 1:])
                weights = token_weights(long[:, own], short[:, own], scheme)
                weighted += float((weights * long[:, own]).sum())
                unweighted += float(long[:, own].sum())
    targets = int(mask_RN[:, 1:].sum())
    expected = {"weighted_loss": weighted / targets, "lm_loss": unweighted / targets}
    return metrics, {**expected, "masked_targets": mask_RN[:, 1:].size - targets}


def test_masks_reach_weights_losses_and_counts(ranks, tmp_path: Path) -> None:
    """Rows that are not packed, with dense weights by the model's own short NLL."""
    ids, mask = reference_rows()[:2], np.random.default_rng(2).random((2, SEQ_LENGTH)) < 0.4
    source = write_jsonl(tmp_path / "in.jsonl", [{"input_ids": one.tolist(), "loss_mask": bits.astype(int).tolist()}
                                                 for one, bits in zip(ids, mask, strict=True)])  # fmt: skip
    prepare_rows([source], tmp_path / "rows", seq_length=SEQ_LENGTH, tokenizer=None, vocab_size=VOCAB, bos_id=BOS)
    config = options(Axes(), tmp_path / "rows", weighting=DENSE, train=TrainConfig(train_iters=1, global_batch_size=2))
    ((metrics, expected),) = ranks(1).run(masked_step, config, mask)
    assert metrics["masked_targets"] == expected["masked_targets"] == 2 * (SEQ_LENGTH - 1) - mask[:, 1:].sum()
    assert metrics["weighted_loss"] == pytest.approx(expected["weighted_loss"], rel=1e-5)
    assert metrics["lm_loss"] == pytest.approx(expected["lm_loss"], rel=1e-5)
    assert expected["weighted_loss"] != pytest.approx(expected["lm_loss"], rel=1e-3)


def told_of_rows(config: Any) -> list[str]:
    """On a rank: what a run says of itself at its start."""
    inputs = open_inputs(config)
    with layout_of(Axes()) as layout:
        return describe_run(config, inputs, layout, consumed_samples=0)


def test_the_padding_is_told(ranks, data: Path) -> None:
    config = options(Axes(), data, train=TrainConfig(train_iters=1, global_batch_size=1))
    (lines,) = ranks(1).run(told_of_rows, config)
    rows = TokenRows(data)
    share = 1 - sum(LENGTHS) / (len(rows) * SEQ_LENGTH)
    assert f"  packed: {len(LENGTHS)} documents, {share:.1%} of the tokens are padding" in lines


def test_flops_are_those_of_a_step(ranks, data: Path) -> None:
    axes = Axes(cp=2)
    config = options(axes, data, weighting=SPARSE_UNFROZEN, train=TrainConfig(train_iters=1, global_batch_size=4))
    lengths = [
        int(length) for index in range(4)
        for length in np.diff([*TokenRows(data).read(index).documents[:, 0], SEQ_LENGTH])  # type: ignore[index]
    ]  # fmt: skip
    for counted, hardware, model in ranks(2).run(counted_step, config, axes):
        assert hardware == pytest.approx(counted, rel=0.01)
        architecture, attended = read_architecture(TINY_LLAMA), sum(length**2 for length in lengths)
        assert model == model_flops(architecture, 4, SEQ_LENGTH, attended) < model_flops(architecture, 4, SEQ_LENGTH)


def test_a_layout_that_packed_rows_do_not_admit_is_named(ranks, data: Path) -> None:
    config = options(Axes(), data, train=TrainConfig(train_iters=1, global_batch_size=2, micro_batch_size=2))
    with pytest.raises(ValueError, match=r"--micro-batch-size: expected 1 with packed rows \(--data-path\)"):
        ranks(1).run(run_steps, Axes(), [config])
