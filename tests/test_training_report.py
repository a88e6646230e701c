"""What a step reports: means over all targets of all micro-batches, by position too."""

import numpy as np
import pytest
import torch

from megatron_tw.objective.report import StepReport

EDGES = (1, 32, 64, 96, 128, 200)
N = 200


@pytest.fixture
def targets() -> dict[str, torch.Tensor]:
    """Four rows: NLLs, weights of which some are zero, and a mask behind which anything may stand."""
    torch.manual_seed(5)
    valid = torch.rand(4, N - 1) < 0.8
    valid[:, 32:63] = False  # a bucket without targets: positions 33 .. 63, and 32 masked too
    valid[:, 31] = False
    weights = torch.where(torch.rand(4, N - 1) < 0.5, 0.0, torch.rand(4, N - 1)) * valid
    long, short = (torch.where(valid, torch.rand(4, N - 1) * 5, torch.nan) for _ in range(2))
    return {"valid_MT": valid, "long_MT": long, "short_MT": short, "weights_MT": weights}


def sums_of(report: StepReport, targets: dict[str, torch.Tensor]) -> torch.Tensor:
    valid, long, short, weights = targets.values()
    return report.sums(valid, long, short, weights)


def test_metrics_are_means_over_all_targets(targets: dict[str, torch.Tensor]) -> None:
    report = StepReport.of_rows(N, old_context=96)
    assert report.edges == EDGES
    parts = [sums_of(report, {name: x[rows] for name, x in targets.items()}) for rows in (slice(0, 1), slice(1, 4))]
    metrics = report.metrics(torch.stack(parts).sum(0).tolist(), scored=True)

    valid, long, short, weights = (x.double().numpy() for x in targets.values())
    mask = valid.astype(bool)
    count = mask.sum()
    per_row = [weights[row][mask[row]] for row in range(4)]
    shares = [row / row.sum() for row in per_row]
    expected = {
        "weighted_loss": (weights[mask] * long[mask]).sum() / count,
        "lm_loss": long[mask].mean(),
        "short_lm_loss": short[mask].mean(),
        "weight_mean": weights[mask].mean(),
        "weight_std": np.mean([row.std(ddof=1) for row in per_row]),
        "weight_entropy": np.mean([-(p[p > 0] * np.log(p[p > 0])).sum() for p in shares]),
        "effective_sample_size": sum(row.sum() ** 2 / (row**2).sum() for row in per_row) / count,
        "zero_weight_share": (weights[mask] == 0).mean(),
        "weight_share_beyond_context": weights[:, 95:].sum() / weights.sum(),  # position 96 and later
        "rows": 4,
        "nonfinite": 0,
        "loss_rows": (mask & (weights != 0)).sum(),
        "labelled_rows": count,
        "targets": count,
        "attended": 4 * N**2,
    }
    buckets = metrics.pop("by_position")
    assert metrics == pytest.approx(expected, rel=1e-6)

    ends = [(bucket["first"], bucket["last"]) for bucket in buckets]
    assert ends == [(1, 31), (32, 63), (64, 95), (96, 127), (128, 199)]
    empty = dict.fromkeys(("lm_loss", "short_lm_loss", "weight_mean"))
    assert buckets[1] == {"first": 32, "last": 63, "targets": 0, **empty}
    assert sum(bucket["targets"] for bucket in buckets) == count
    for bucket in buckets[:1] + buckets[2:]:
        inside = mask.copy()
        inside[:, : bucket["first"] - 1] = inside[:, bucket["last"] :] = False
        assert bucket["targets"] == inside.sum()
        for name, values in (("lm_loss", long), ("short_lm_loss", short), ("weight_mean", weights)):
            assert bucket[name] == pytest.approx(values[inside].mean(), rel=1e-6), name


def test_without_a_scorer_nothing_is_said_of_short_contexts(targets: dict[str, torch.Tensor]) -> None:
    report = StepReport.of_rows(N, old_context=N)
    sums = report.sums(targets["valid_MT"], targets["long_MT"], None, targets["weights_MT"])
    metrics = report.metrics(sums.tolist(), scored=False)
    assert "short_lm_loss" not in metrics
    assert all("short_lm_loss" not in bucket for bucket in metrics["by_position"])
    assert metrics["weight_share_beyond_context"] == 0.0


@pytest.mark.parametrize("name", ["long_MT", "short_MT"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_counted(targets: dict[str, torch.Tensor], name: str, value: float) -> None:
    report = StepReport.of_rows(N, old_context=96)
    row, column = targets["valid_MT"].nonzero()[7]
    targets[name][row, column] = value
    assert report.metrics(sums_of(report, targets).tolist(), scored=True)["nonfinite"] == 1
