"""Several folders of rows as one dataset: shares, epochs, row numbers, resumption; trained as one folder would be."""

import doctest
import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_scores import config as scoring_options
from test_scores import score
from test_training import DENSE, metrics_of, options, run_all
from test_training_options import printed_by
from tiny import Axes, prepare_ready_rows, reference_rows

from megatron_tw.config import CheckpointConfig, DataConfig, RunConfig, ScorerConfig, TrainConfig
from megatron_tw.config import blend as options_module
from megatron_tw.data import blend as blend_module
from megatron_tw.data.blend import Blend, BlendOrder, place, taken
from megatron_tw.data.loader import Loader
from megatron_tw.data.order import RowOrder
from megatron_tw.data.rows import TokenRows

SIZES = (5, 3, 9)
SHARES = (Fraction(1, 2), Fraction(1, 6), Fraction(1, 3))
WEIGHTS = [
    [Fraction(7, 10), Fraction(3, 10)],
    [Fraction(1, 10**6), Fraction(10**6 - 1, 10**6)],
    [Fraction(n, 55) for n in range(1, 11)],
    [Fraction(1, 7)] * 7,
    [Fraction(1)],
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[TokenRows]:
    """Row i of folder f is BOS and seven times 10 * f + i."""
    folder = tmp_path_factory.mktemp("folders")
    made = [np.array([[1] + [10 * f + i] * 7 for i in range(size)]) for f, size in enumerate(SIZES)]
    return [TokenRows(prepare_ready_rows(rows, folder / f"rows_{f}")) for f, rows in enumerate(made)]


def make_loader(
    blend: Blend, *, seed: int = 3, shuffle: bool = True, gbs: int = 8, mbs: int = 1, **rank: Any
) -> Loader:
    order = blend.order(seed=seed, shuffle=shuffle)
    rank = {"dp_rank": 0, "dp_size": 1, **rank}
    return Loader(blend, order, global_batch_size=gbs, micro_batch_size=mbs, **rank)


def samples_of(loaders: list[Loader], steps: int) -> list[int]:
    """The rows of all ranks in the order of the samples."""
    rows: list[int] = []
    for _ in range(steps):
        for batches in zip(*(next(loader) for loader in loaders), strict=True):
            rows += [row for batch in batches for row in batch.row_index.tolist()]
    return rows


def test_docstring_examples() -> None:
    assert doctest.testmod(blend_module).failed == doctest.testmod(options_module).failed == 0


@pytest.mark.parametrize("shares", WEIGHTS)
def test_every_sample_has_its_folder_and_every_folder_its_share(shares: list[Fraction]) -> None:
    counts = [0] * len(shares)
    halvings = (len(shares) - 1).bit_length()
    for sample in range(3000):
        assert taken(sample, shares) == counts
        assert place(sample, shares)[1] == counts[place(sample, shares)[0]]  # without what came before
        for count, share in zip(counts, shares, strict=True):
            assert abs(count - sample * share) <= Fraction(halvings, 2)
        counts[place(sample, shares)[0]] += 1
    far = 10**15 + 12345  # no table to get there, and no rounding
    assert sum(taken(far, shares)) == far
    assert taken(far + 1, shares)[place(far, shares)[0]] == taken(far, shares)[place(far, shares)[0]] + 1


def test_without_weights_all_folders_end_their_epochs_together(folders: list[TokenRows]) -> None:
    blend = Blend(folders)
    assert blend.shares == tuple(Fraction(size, sum(SIZES)) for size in SIZES)
    order = blend.order(seed=3, shuffle=True)
    for epoch in range(3):
        assert sorted(order[epoch * 17 + i] for i in range(17)) == list(range(17))


def test_each_folder_has_epochs_of_its_own(folders: list[TokenRows]) -> None:
    blend = Blend(folders, SHARES)
    order = blend.order(seed=3, shuffle=True)
    rows: list[list[int]] = [[], [], []]
    for sample in range(180):
        rows[blend.folder_of(order[sample])].append(order[sample])
    assert [len(of_folder) for of_folder in rows] == [90, 30, 60] == taken(180, SHARES)
    for of_folder, size, start in zip(rows, SIZES, blend.starts, strict=False):
        epochs = [of_folder[first : first + size] for first in range(0, len(of_folder), size)]
        assert all(sorted(epoch) == list(range(start, start + len(epoch))) for epoch in epochs if len(epoch) == size)
        assert len({tuple(epoch) for epoch in epochs}) > 1  # shuffled anew
    alike = BlendOrder([50, 50], [Fraction(1, 2)] * 2, seed=3, shuffle=True)
    first, second = ([alike[sample] % 50 for sample in range(parity, 100, 2)] for parity in (0, 1))
    assert first != second
    assert sorted(first) == sorted(second) == list(range(50))
    assert [blend.order(seed=4, shuffle=True)[sample] for sample in range(180)] != [order[s] for s in range(180)]
    in_order = blend.order(seed=3, shuffle=False)
    of_first = [row for row in map(in_order.__getitem__, range(30)) if blend.folder_of(row) == 0]
    assert of_first == 3 * [0, 1, 2, 3, 4]


def test_a_single_folder_is_as_it_was(folders: list[TokenRows]) -> None:
    rows = folders[2]
    blend, alone = Blend([rows], [Fraction(7)]), RowOrder(9, seed=3, shuffle=True)
    order = blend.order(seed=3, shuffle=True)
    assert [order[sample] for sample in range(40)] == [alone[sample] for sample in range(40)]
    state = make_loader(blend).state_dict()
    begun = {"consumed_samples": 0, "seed": 3, "shuffle": True, "num_rows": 9}  # as of runs before there were blends
    assert state == begun | {"data_fingerprint": rows.header.fingerprint}


def test_numbers_of_rows_are_theirs_alone(folders: list[TokenRows]) -> None:
    blend = Blend(folders)
    assert len(blend) == 17
    expected = [10 * f + i for f, size in enumerate(SIZES) for i in range(size)]
    assert [int(blend[row][1]) for row in range(17)] == expected
    assert [blend.at(row)[1] for row in (0, 4, 5, 7, 8, 16)] == [0, 4, 0, 2, 0, 8]
    for row in (-1, 17):
        with pytest.raises(IndexError, match=f"row {row} of 17 rows"):
            blend[row]


def test_layouts_and_resumption_change_nothing(folders: list[TokenRows]) -> None:
    blend = Blend(folders, SHARES)
    expected = samples_of([make_loader(blend, gbs=12)], 8)
    assert len(Counter(expected)) == 17
    for dp_size, mbs in ((2, 1), (2, 3), (4, 1), (3, 2)):
        loaders = [make_loader(blend, gbs=12, mbs=mbs, dp_rank=rank, dp_size=dp_size) for rank in range(dp_size)]
        assert samples_of(loaders, 8) == expected

    loader = make_loader(blend, gbs=12)
    samples_of([loader], 3)
    state = json.loads(json.dumps(loader.state_dict()))
    resumed = [make_loader(blend, gbs=4, mbs=2, dp_rank=rank, dp_size=2) for rank in range(2)]
    for rank in resumed:
        rank.load_state_dict(state)
    assert samples_of(resumed, 15) == expected[36:]  # another global batch size, another layout

    batch = next(make_loader(blend, gbs=2, mbs=2))[0]
    assert batch.tokens.tolist() == [blend[row].tolist() for row in batch.row_index.tolist()]


def test_resumption_on_another_blend_is_refused(folders: list[TokenRows]) -> None:
    state = make_loader(Blend(folders, SHARES)).state_dict()
    with pytest.raises(ValueError, match=r"shares was \['1/2', '1/6', '1/3'\] and is now \['5/17'.*\(--data-path\)$"):
        make_loader(Blend(folders)).load_state_dict(state)
    make_loader(Blend(folders, [3 * share for share in SHARES])).load_state_dict(state)  # the same in other words
    other_order = Blend([folders[0], folders[2], folders[1]], [SHARES[0], SHARES[2], SHARES[1]])
    with pytest.raises(ValueError, match="data_fingerprint was"):
        make_loader(other_order).load_state_dict(state)
    with pytest.raises(ValueError, match="num_rows was 17 and is now 5"):
        make_loader(Blend(folders[:1])).load_state_dict(state)


def test_folders_that_do_not_go_together(folders: list[TokenRows], tmp_path: Path) -> None:
    rows = np.array([[1, *range(6)]])
    other = TokenRows(prepare_ready_rows(rows, tmp_path / "other", vocab_size=300))
    with pytest.raises(ValueError, match=r"other and .*rows_0 with tokens of a row 7 and 8, vocabulary 300 and 320$"):
        Blend([folders[0], other])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The four reference rows in two folders, and in the order of the samples of 0.75 `three` 0.25 `one` (`merged`)."""
    folder = tmp_path_factory.mktemp("blend")
    rows = reference_rows()
    order = [[0, 1, 2][own % 3] if number == 0 else 3 for number, own in (place(s, SHARES_OF_TWO) for s in range(12))]
    for name, of_folder in {"three": rows[:3], "one": rows[3:], "merged": rows[order]}.items():
        prepare_ready_rows(of_folder, folder / name)
    return folder


SHARES_OF_TWO = (Fraction(3, 4), Fraction(1, 4))


def run_of(axes: Axes, world: Path, save: Path, data: tuple[str, ...], **changes: Any) -> RunConfig:
    made = options(axes, world / "three", weighting=DENSE, **changes)
    data_path = tuple(value if value[0].isdigit() else str(world / value) for value in data)
    return replace(
        made,
        data=replace(made.data, data_path=data_path),
        train=replace(made.train, train_iters=6, global_batch_size=2),
        checkpoint=CheckpointConfig(save=str(save), load=str(save)),
    )


def test_a_blend_trains_as_one_folder_of_its_samples(ranks, world: Path, tmp_path: Path) -> None:
    """With cached scores of each folder, stopped and resumed under another layout and batch size, too."""
    parts = ("three", "one", "merged")
    ranks(1).run(score, [scoring_options(Axes(), world / name, tmp_path / f"scores_{name}") for name in parts])
    scores = {name: str(tmp_path / f"scores_{name}") for name in parts}

    def cached(*names: str) -> ScorerConfig:
        return ScorerConfig(scorer="frozen", scores=tuple(scores[name] for name in names))

    blend = ("0.75", "three", "0.25", "one")
    merged = run_of(Axes(), world, tmp_path / "merged", ("merged",), scorer=cached("merged"))
    blended = run_of(Axes(), world, tmp_path / "blended", blend, scorer=cached("three", "one"))
    stopped = run_of(Axes(), world, tmp_path / "stopped", blend, scorer=cached("three", "one"))
    stop = replace(stopped, train=replace(stopped.train, exit_interval=3))
    ranks(1).run(run_all, [merged, blended, stop])
    expected, found = metrics_of(tmp_path / "merged"), metrics_of(tmp_path / "blended")
    assert found["weighted_loss"].tolist() == expected["weighted_loss"].tolist()
    counts = [list(by_folder.values()) for by_folder in found["consumed_samples_by_folder"]]
    assert counts == [taken(samples, SHARES_OF_TWO) for samples in range(2, 13, 2)]

    resumed = run_of(Axes(dp=2), world, tmp_path / "stopped", blend, scorer=cached("three", "one"))
    told, _ = ranks(2).run(printed_by, resumed)
    again = metrics_of(tmp_path / "stopped")
    np.testing.assert_allclose(again["weighted_loss"], expected["weighted_loss"], rtol=1e-5)
    assert again["weighted_loss"][:3].tolist() == expected["weighted_loss"][:3].tolist()
    assert f"75.00% of the samples from {world / 'three'}: 9, 3.00 times its 3 rows" in told
    assert f"25.00% of the samples from {world / 'one'}: 3, 3.00 times its 1 rows, 1 so far" in told

    swapped = run_of(Axes(), world, tmp_path / "new", blend, scorer=cached("one", "three"))
    with pytest.raises(Exception, match=r"made from another dataset than .*three"):
        ranks(1).run(run_all, [swapped])


def test_copies_and_held_out_rows_that_are_trained_on_are_told(ranks, world: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(world / "one", tmp_path / "copy")
    config = run_of(Axes(), world, tmp_path / "run", ("three", "one", str(copy)))
    data = replace(config.data, valid_data_path=str(world / "three"))
    train = replace(config.train, train_iters=1, eval_interval=1)
    (told,) = ranks(1).run(printed_by, replace(config, data=data, train=train))
    three = world / "three"
    assert [line for line in told.splitlines() if line.startswith("warning: --")] == [
        f"warning: --data-path {copy}: holds the same rows as {world / 'one'}",
        f"warning: --valid-data-path {three}: is trained on, it holds the rows of --data-path {three}",
    ]


def test_plans_take_blends(tmp_path: Path) -> None:
    from megatron_tw.config import parse_options
    from megatron_tw.config.plan import PlanConfig, check_plan

    argv = ["--world-size", "1", "--model", "llama3-8b", "--seq-length", "4096", "--data-path", "1", "a", "2", "b"]
    config = parse_options(argv, PlanConfig)
    check_plan(config)
    assert config.run_config().data == DataConfig(data_path=("1", "a", "2", "b"), seq_length=4096)
    assert isinstance(config.run_config().train, TrainConfig)
