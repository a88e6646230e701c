"""LongPPL against its definition, computed with transformers; the evaluator's cache; under layouts."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from evaluations import flags_of, make_likely_rows, make_near_model, make_sharp_model, run_evaluation, values
from tiny import Axes

from megatron_tw.data.rows import TokenRows
from megatron_tw.evaluation.long_ppl import truncated_contexts

N, K, STRIDE = 128, 40, 24  # 88 targets after the first context: the last stride is ragged


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("longppl")
    make_sharp_model(folder / "model")
    make_near_model(folder / "model", folder / "other")
    make_likely_rows(folder / "model", folder / "rows", rows=3, tokens=N)
    return folder


def nlls(folder: Path, rows_RN: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Long NLL [R, T], and in truncated contexts where they are shorter, by the words of the definition."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def nll(ids: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            logits = model(ids).logits[:, :-1]
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")

    long = nll(rows_RN)
    short = long.clone()
    for target in range(K, N):
        begin = (target - K) // STRIDE * STRIDE
        short[:, target - 1] = nll(rows_RN[:, begin : target + 1])[:, -1]
    return long.double().numpy(), short.double().numpy()


def expected(world: Path, model: str, evaluator: str) -> tuple[float, np.ndarray]:
    rows = TokenRows(world / "rows")
    rows_RN = torch.from_numpy(np.stack([rows[row] for row in range(len(rows))]))
    long, short = nlls(world / evaluator, rows_RN)
    key = (short - long > 2) & (long < 2)
    of_model = long if model == evaluator else nlls(world / model, rows_RN)[0]
    return math.exp(of_model[key].mean()), key


def options(world: Path, output: Path, *more: str) -> list[str]:
    return [
        "--tasks=longppl", f"--data-path={world / 'rows'}", f"--seq-length={N}", f"--output={output}",
        f"--load-hf={world / 'model'}", f"--longppl-context={K}", f"--longppl-stride={STRIDE}", *more,
    ]  # fmt: skip


def check(output: Path, value: float, key: np.ndarray) -> None:
    found = values(output)
    assert found["all", "longppl"] == pytest.approx(value, rel=1e-4)
    np.testing.assert_array_equal(np.load(output / "longppl_key_tokens.npz")["key"], key)


def test_contexts_are_the_published_ones() -> None:
    """Each target from K on once, in a context that begins at a multiple of the stride and has K to K + s - 1 tokens;
    as the longppl package does it (range(0, N - K, s)), but for the first, which is the whole."""
    for seq_length, context, stride in ((128, 40, 24), (128, 40, 22), (32768, 4096, 1024), (100, 64, 35)):
        seen: list[int] = []
        for window in truncated_contexts(seq_length, context, stride):
            assert window.start % stride == 0
            assert window.first_target - window.start == context
            assert window.length == window.last_target + 1 - window.start <= context + stride
            seen += range(window.first_target, window.last_target + 1)
        assert seen == list(range(context + stride, seq_length))


def test_the_model_as_its_own_evaluator(world, ranks, tmp_path):
    value, key = expected(world, "model", "model")
    assert 10 < key.sum() < key.size / 2
    assert not key[:, : K + STRIDE - 1].any()
    ranks(1).run(run_evaluation, options(world, tmp_path / "alone"))
    check(tmp_path / "alone", value, key)
    two = Axes(cp=2)
    ranks(2).run(run_evaluation, options(world, tmp_path / "cp", *flags_of(two), "--tasks=loss,longppl"))
    check(tmp_path / "cp", value, key)
    assert (tmp_path / "cp" / "nll.npz").is_file()


def test_another_evaluator_and_its_cache(world, ranks, tmp_path):
    value, key = expected(world, "model", "other")
    assert key.any()
    assert (key != expected(world, "model", "model")[1]).any()
    more = [f"--longppl-evaluator={world / 'other'}", f"--longppl-cache={tmp_path / 'cache'}"]
    ranks(1).run(run_evaluation, options(world, tmp_path / "first", *more))
    check(tmp_path / "first", value, key)
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat().st_mtime_ns
    ranks(1).run(run_evaluation, options(world, tmp_path / "second", *more))
    check(tmp_path / "second", value, key)
    assert file.stat().st_mtime_ns == before
    assert len(list((tmp_path / "cache").iterdir())) == 1
    ranks(1).run(run_evaluation, options(world, tmp_path / "third", *more, "--longppl-stride=20"))
    assert len(list((tmp_path / "cache").iterdir())) == 2, "another definition has key tokens of its own"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(ValueError, match="truncated or no numpy file"):
        ranks(1).run(run_evaluation, options(world, tmp_path / "fourth", *more))


def test_the_published_package_says_the_same(world, ranks, tmp_path):
    """Of the ids of a row: they are given to it as a text whose characters are the tokens."""
    from longppl.longppl import compute_longppl

    rows = TokenRows(world / "rows")
    model, other = (
        transformers.AutoModelForCausalLM.from_pretrained(world / name, dtype=torch.float32)
        for name in ("model", "other")
    )

    def tokenizer(row: int, **_: object) -> dict[str, torch.Tensor]:
        places = torch.arange(N)
        return {
            "input_ids": torch.from_numpy(rows[row])[None],
            "offset_mapping": torch.stack((places, places + 1), dim=1)[None],
        }

    nll, tokens = 0.0, 0
    for row in range(len(rows)):
        found = compute_longppl(row, model, other, tokenizer, tokenizer, trunc_len=K, sliding_window=STRIDE)
        nll += found["n_key_token"] * math.log(found["longppl"])
        tokens += found["n_key_token"]
    ranks(1).run(run_evaluation, options(world, tmp_path / "out", f"--longppl-evaluator={world / 'other'}"))
    assert values(tmp_path / "out")["all", "longppl"] == pytest.approx(math.exp(nll / tokens), rel=1e-4)
    assert np.load(tmp_path / "out" / "longppl_key_tokens.npz")["key"].sum() == tokens


@pytest.mark.full
@pytest.mark.parametrize("axes", [Axes(tp=2), Axes(pp=2), Axes(dp=2), Axes(tp=2, cp=2)], ids=lambda axes: axes.name)
def test_layouts_agree(axes, world, ranks, tmp_path):
    more = [f"--longppl-evaluator={world / 'other'}", *flags_of(axes)]
    ranks(axes.world_size).run(run_evaluation, options(world, tmp_path / "out", *more))
    check(tmp_path / "out", *expected(world, "model", "other"))
