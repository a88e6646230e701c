"""Draws the figures of docs/method.md with the library itself: the windows of a row, and what weight a score gives.

python tools/draw_method.py docs
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

from megatron_tw.weighting import WeightingConfig, plan_windows, token_weights

SEQ_LENGTH, WINDOW, STRIDE = 32768, 8192, 6144
SCHEMES: dict[str, tuple[str, dict[str, float]]] = {
    "dense": ("#D55E00", {}),
    "sparse": ("#009E73", {}),
    "longce": ("#CC79A7", {}),
    "uniform": ("#000000", {}),
}


def draw_windows(file: Path) -> None:
    """Each window over its place in the row: what it sees, and the targets that it scores."""
    figure = Figure(figsize=(9, 3), layout="constrained", facecolor="white")
    axes = figure.subplots()
    windows = plan_windows(SEQ_LENGTH, WINDOW, STRIDE, include_first=True)
    axes.barh(0, SEQ_LENGTH, color="#DDDDDD", height=0.6)
    labels = [f"row, {SEQ_LENGTH:,} tokens"]
    for index, window in enumerate(windows):
        axes.barh(index + 1, window.length, left=window.start, color="#BBD6EE", height=0.6)
        scored = window.last_target - window.first_target + 1
        axes.barh(index + 1, scored, left=window.first_target, color="#0072B2", height=0.6)
        labels.append(f"window {index}")
    axes.set(yticks=range(len(labels)), yticklabels=labels, xlabel="token of the row", xlim=(0, SEQ_LENGTH))
    axes.set_xticks([window.start for window in windows] + [SEQ_LENGTH])
    axes.invert_yaxis()
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.set_title(
        f"Windows of {WINDOW:,} tokens, {STRIDE:,} apart: dark, the targets that each one scores", fontsize=10
    )
    figure.savefig(file, dpi=120)


def draw_weights(file: Path) -> None:
    """A row of made scores, most of them near 0, and the weight that each scheme gives them."""
    torch.manual_seed(0)
    exponential = torch.distributions.Exponential
    gain_T = torch.where(torch.rand(2000) < 0.15, exponential(0.8).sample((2000,)), 0.0)
    loss_T = torch.where(torch.rand(2000) < 0.05, exponential(2.0).sample((2000,)), 0.0)
    long_RT = torch.full((1, 2000), 3.0)
    short_RT = (long_RT + gain_T - loss_T + 0.1 * torch.randn(2000)).clamp(0.5, 7.0)
    score_T = (long_RT - short_RT)[0]
    order = score_T.argsort()
    figure = Figure(figsize=(9, 3.4), layout="constrained", facecolor="white")
    axes = figure.subplots()
    for name, (colour, parameters) in SCHEMES.items():
        weights_T = token_weights(long_RT, short_RT, WeightingConfig.preset(name, **parameters))[0]
        axes.plot(score_T[order], weights_T[order], color=colour, label=name, linewidth=2)
    axes.set(xlabel="score = long NLL - short NLL (nats)", ylabel="weight", ylim=(0, None))
    axes.set_title("← the long context helps", loc="left", fontsize=10)
    axes.set_title("it hurts →", loc="right", fontsize=10)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(0.02, 0.45))
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


def main(arguments: Sequence[str]) -> None:
    folder = Path(*arguments)
    draw_windows(folder / "method_windows.png")
    draw_weights(folder / "method_weights.png")


if __name__ == "__main__":
    main(sys.argv[1:])
