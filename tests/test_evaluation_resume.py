"""An evaluation that is cut off goes on where it stopped, with the same result."""

from collections.abc import Sequence
from pathlib import Path

import pytest
from evaluations import (
    content,
    flags_of,
    make_likely_rows,
    make_near_model,
    make_sharp_model,
    run,
    run_evaluation,
    run_or_die,
)
from tiny import Axes

from megatron_tw.evaluation import kept as kept_module

N, ROWS = 64, 5


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    make_sharp_model(folder / "model", num_hidden_layers=2)
    make_near_model(folder / "model", folder / "other")
    make_likely_rows(folder / "model", folder / "rows", rows=ROWS, tokens=N)
    return folder


def options(world: Path, output: Path, *more: str) -> list[str]:
    return [
        "--tasks=loss,longppl", f"--data-path={world / 'rows'}", f"--seq-length={N}", f"--output={output}",
        f"--load-hf={world / 'model'}", "--longppl-context=16", "--longppl-stride=8", "--short-window=16",
        f"--longppl-evaluator={world / 'other'}", *more,
    ]  # fmt: skip


def test_going_on_gives_the_same(world, ranks, tmp_path):
    (whole,) = ranks(1).run(run, options(world, tmp_path / "whole"))
    assert len(whole) == 10  # the evaluator's passes, and those of the loss, which LongPPL uses again
    cut = options(world, tmp_path / "cut")
    parts: list[str] = []
    for stop_after in (3, 4, None):
        (written,) = ranks(1).run(run, cut, stop_after)
        parts += written
        assert (tmp_path / "cut").exists() == (stop_after is None)
        assert (tmp_path / "cut.partial").exists() == (stop_after is not None)
    assert parts == whole, "no pass is made twice"
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_what_was_changed_in_between_is_said(world, ranks, tmp_path):
    first = options(world, tmp_path / "out")
    ranks(1).run(run, first, 2)
    for more, match in (
        ("--short-window=32", "short_window: 16 -> 32"),
        (f"--load-hf={world / 'other'}", "holds the parts of another evaluation that was cut off: model: "),
    ):
        with pytest.raises(ValueError, match=match):
            ranks(1).run(run_evaluation, [*first, more])
    (part, *_) = sorted((tmp_path / "out.partial").glob("*.npz"))
    part.write_bytes(part.read_bytes()[:40])
    with pytest.raises(ValueError, match="truncated or no numpy file"):
        ranks(1).run(run_evaluation, first)
    assert not part.exists()
    (written,) = ranks(1).run(run, first)
    assert part.stem in written


def test_parts_hold_several_passes(world, ranks, tmp_path, monkeypatch):
    (whole,) = ranks(1).run(run, options(world, tmp_path / "whole"))
    (few,) = ranks(1).run(run_in_few_parts, options(world, tmp_path / "few"))
    assert (len(whole), len(few)) == (10, 4)
    assert content(tmp_path / "few") == content(tmp_path / "whole")


def run_in_few_parts(options: Sequence[str]) -> list[str]:
    before, kept_module.MAX_PARTS = kept_module.MAX_PARTS, 2
    try:
        return run(options)
    finally:
        kept_module.MAX_PARTS = before


@pytest.mark.full
@pytest.mark.parametrize("axes", [Axes(pp=2), Axes(dp=2), Axes(tp=2)], ids=lambda axes: axes.name)
def test_going_on_under_layouts(axes, world, ranks, tmp_path):
    ranks(axes.world_size).run(run, options(world, tmp_path / "whole", *flags_of(axes)))
    cut = options(world, tmp_path / "cut", *flags_of(axes))
    with pytest.raises(Exception):  # noqa: B017 - one rank dies, whatever the others then say
        ranks(axes.world_size).run(run_or_die, cut, 2)
    ranks(axes.world_size).run(run, cut)
    assert content(tmp_path / "cut") == content(tmp_path / "whole")
