import doctest

import pytest

from megatron_tw.weighting import plan_windows, windows


def test_docstring_examples():
    failed, tried = doctest.testmod(windows)
    assert failed == 0
    assert tried == 2


@pytest.mark.parametrize(
    ("seq_length", "window", "stride"), [(256, 64, 48), (256, 64, 63), (97, 16, 1), (20, 20, 3), (21, 20, 19)]
)
@pytest.mark.parametrize("include_first", [True, False])
def test_every_target_is_scored_once_with_enough_context(seq_length, window, stride, include_first):
    plan = plan_windows(seq_length, window, stride, include_first=include_first)
    scored = [target for span in plan for target in range(span.first_target, span.last_target + 1)]
    assert scored == list(range(1 if include_first else window, seq_length))
    for span in plan:
        assert span.length == window
        assert span.start >= 0
        assert span.start + window <= seq_length
        if span.start > 0:
            assert window - stride <= span.first_target - span.start <= span.last_target - span.start <= window - 1
            assert span.last_target == span.start + window - 1


def test_even_windows_start_at_multiples_of_the_stride():
    assert [span.start for span in plan_windows(256, 64, 48, include_first=True)] == [0, 48, 96, 144, 192]


def test_published_plans():
    plan = plan_windows(32768, 8192, 6144, include_first=False)
    assert len(plan) == 4
    assert sum(span.length for span in plan) == 32768
    long_plan = plan_windows(131072, 8192, 6144, include_first=False)
    assert len(long_plan) == 20
    assert sum(span.length for span in long_plan) == 131072 * 5 // 4
    assert len(plan_windows(1 << 20, 8192, 6144, include_first=True)) == 1 + -(-(2**20 - 8192) // 6144)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plan_windows(64, 65, 8, include_first=True), "`window`: expected 2 to 64, .*got 65"),
        (lambda: plan_windows(64, 1, 1, include_first=True), "`window`: .*got 1"),
        (lambda: plan_windows(64, 16, 16, include_first=True), "`stride`: expected 1 to 15 .*got 16"),
        (lambda: plan_windows(64, 16, 0, include_first=True), "`stride`: .*got 0"),
    ],
)
def test_bad_plans_name_the_argument(call, message):
    with pytest.raises(ValueError, match=message):
        call()
