"""Windows laid out as a batch: what a model says of them stands in the rows where the targets do."""

import pytest
import torch

from megatron_tw.objective import lay_out_windows
from megatron_tw.weighting import plan_windows

N, WINDOW, STRIDE, BOS = 21, 8, 5, 1


def nll_of(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Of a causal "model": a number that depends on the target and on everything before it in the sequence."""
    places = torch.arange(1, ids.shape[1] + 1)
    return ((ids * places).cumsum(1) + 1000 * labels).double() / 7


@pytest.fixture
def rows() -> torch.Tensor:
    rows = torch.randint(2, 50, (3, N), generator=torch.Generator().manual_seed(0))
    rows[:2, 0] = BOS
    return rows


@pytest.mark.parametrize("include_first", [True, False])
@pytest.mark.parametrize("bos_id", [BOS, None])
def test_every_target_sees_its_window_and_no_more(rows, include_first, bos_id):
    windows = plan_windows(N, WINDOW, STRIDE, include_first=include_first)
    expected = torch.zeros(3, N - 1, dtype=torch.float64)
    for row, tokens in enumerate(rows):
        for window in windows:
            seen = tokens[window.start : window.start + window.length].clone()
            if bos_id is not None and tokens[0] == bos_id:
                seen[0] = bos_id
            for target in range(window.first_target, window.last_target + 1):
                context = seen[: target - window.start]
                expected[row, target - 1] = nll_of(context[None], tokens[target])[0, -1]
    batch = lay_out_windows(rows, windows, bos_id=bos_id)
    assert torch.equal(batch.put_back(nll_of(batch.ids, batch.labels)), expected)

    padded = lay_out_windows(rows, windows, bos_id=bos_id, length=WINDOW + 3, multiple=8)
    assert len(padded.ids) % 8 == 0
    assert padded.ids.shape[1] == WINDOW + 3
    nll = nll_of(padded.ids, padded.labels)
    assert torch.equal(padded.put_back(nll), expected)
    halves = torch.arange(WINDOW + 3).split(6)  # as two ranks hold them
    assert torch.equal(torch.stack([padded.put_back(nll[:, half], half) for half in halves]).sum(0), expected)
    dealt = [lay_out_windows(rows, windows[part::2], bos_id=bos_id) for part in range(2)]
    assert torch.equal(torch.stack([part.put_back(nll_of(part.ids, part.labels)) for part in dealt]).sum(0), expected)


def test_labels_that_are_shifted_already(rows):
    """S tokens and their S labels are a row of S + 1 tokens; masked labels are not scored."""
    windows = plan_windows(N, WINDOW, STRIDE, include_first=True)
    whole = lay_out_windows(rows, windows, bos_id=BOS)
    expected = whole.put_back(nll_of(whole.ids, whole.labels))
    labels = rows[:, 1:].clone()
    labels[:, 11] = -100
    expected[:, 11] = 0
    batch = lay_out_windows(rows[:, :-1], windows, labels=labels, bos_id=BOS)
    assert torch.equal(batch.put_back(nll_of(batch.ids, batch.labels)), expected)


def test_without_windows_nothing_is_scored(rows):
    batch = lay_out_windows(rows, (), length=4, multiple=2)
    assert batch.ids.shape == (2, 4)
    assert not batch.put_back(torch.ones(2, 4)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(3, N - 1)}, r"`labels`: expected the shape of `rows` \[3, 21\], got \[3, 20\]"),
        ({"rows": torch.ones(N)}, r"`rows`: expected \[rows, positions\], got shape \[21\]"),
        ({"rows": torch.ones(3, N - 1)}, "`windows`: expected those of rows of 19 targets, got .* target 20"),
        ({"length": 7}, "`length`: expected at least 8, .* got 7"),
    ],
)
def test_wrong_arguments_are_named(rows, change, message):
    windows = plan_windows(N, WINDOW, STRIDE, include_first=True)
    with pytest.raises(ValueError, match=message):
        lay_out_windows(**{"rows": rows, "windows": windows, **change})


def test_nlls_of_another_shape_are_refused(rows):
    batch = lay_out_windows(rows, plan_windows(N, WINDOW, STRIDE, include_first=True))
    with pytest.raises(ValueError, match=r"`nll`: expected \[12, 8\], as the labels, got \[12, 7\]"):
        batch.put_back(torch.ones(12, 7))
