"""Megatron-Core's versions: which are taken, and that a fault of theirs is mended where it is, and once."""

import inspect
import warnings

import pytest
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from megatron_tw.parallel.devices import BROKEN_MEGATRON_CORE, check_megatron_version
from megatron_tw.parallel.mends import mend_bucket_padding, saves_padded_buckets_shifted

METHOD = "sharded_param_state_fully_reshardable"


@pytest.mark.parametrize("version", ["0.16.1", "0.17.1", "0.18.2", "0.19.2", "0.19.2+d98e8a6", None])
def test_a_known_version_is_taken_silently(version: str | None) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_megatron_version(version)


@pytest.mark.parametrize("version", ["0.20.0rc0+d98e8a6", "0.20.0", "1.0"])
def test_a_newer_version_is_warned_of_by_one_rank(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    with pytest.warns(UserWarning, match=r"megatron-core .* is newer than 0\.19\.2"):
        check_megatron_version(version)
    monkeypatch.setenv("RANK", "1")
    test_a_known_version_is_taken_silently(version)


@pytest.mark.parametrize("version", ["0.15.3", "0.16.0", "0.16.1rc0", "0.18.0+d98e8a6"])
def test_an_old_or_broken_version_is_refused(version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BROKEN_MEGATRON_CORE, "0.18.0", "it loses a step")
    why = r" \(it loses a step\)" if "0.18" in version else ""
    with pytest.raises(
        RuntimeError, match=rf"expected version 0\.16\.1 to 0\.19\.2, found {version[:6]}.*{why}\. Inst"
    ):
        check_megatron_version(version)


def test_shifted_parameters_are_found_and_mended_once(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = inspect.unwrap(getattr(DistributedOptimizer, METHOD))
    monkeypatch.setattr(DistributedOptimizer, METHOD, installed)
    faulty = saves_padded_buckets_shifted(DistributedOptimizer)
    mend_bucket_padding()
    mended = getattr(DistributedOptimizer, METHOD)
    assert (mended is not installed) == faulty
    assert not saves_padded_buckets_shifted(DistributedOptimizer)
    mend_bucket_padding()
    assert getattr(DistributedOptimizer, METHOD) is mended


def test_an_optimizer_that_saves_otherwise_is_refused() -> None:
    class Other:
        def sharded_param_state_fully_reshardable(self, *args, **kwargs):  # type: ignore[no-untyped-def]
            state = inspect.unwrap(getattr(DistributedOptimizer, METHOD))(self, *args, **kwargs)
            state[0]["param"].data = state[0]["param"].data - 3
            return state

    with pytest.raises(RuntimeError, match=r"saves elements \[\d\.0, \d\.0\] of a buffer"):
        saves_padded_buckets_shifted(Other)
