"""What a run says of itself at its start, a line each."""

from pathlib import Path

from megatron_tw.config import RunConfig, differences
from megatron_tw.config.options import flag
from megatron_tw.data.blend import Blend, taken
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.checkpoint import CONFIG_FILE
from megatron_tw.training.inputs import Inputs


def describe_origin(config: RunConfig, inputs: Inputs, layout: Layout, iteration: int) -> list[str]:
    """Where the run comes from: the checkpoint and how its options differ, or the weights."""
    source, lines = inputs.source, []
    if (saved := source.saved) is not None:
        layouts = f"{saved.layout}, now {layout.describe()}"
        lines.append(f"resumed from {saved.directory} ({layouts}) at iteration {iteration}")
        if (saved.directory / CONFIG_FILE).is_file():
            lines += [f"  {line}" for line in differences(saved.directory / CONFIG_FILE, config)]
        if iteration >= config.train.train_iters:
            lines.append(f"--train-iters {config.train.train_iters}: the run is there already, no step is left")
    elif config.checkpoint.load is not None:
        lines.append(f"--load {config.checkpoint.load} holds no checkpoint: starting fresh from {source.name}")
    if (earlier := source.pretrained) is not None:
        state = earlier.state
        lines.append(f"weights of {earlier.directory}: {state.iteration} steps on rows of {state.seq_length} tokens")
    return lines


def describe_run(config: RunConfig, inputs: Inputs, layout: Layout, consumed_samples: int) -> list[str]:
    """Layout, data and weighting of the run, and warnings."""
    settings, rows, train = inputs.settings, len(inputs.rows), config.train
    lines = [
        f"{layout.describe()}, {'bf16' if config.compute.bf16 else 'fp32'}, "
        f"{inputs.source.architecture.rope_in_words}, old context {settings.old_context} tokens",
        f"{rows} rows of {config.data.seq_length} tokens, {train.train_iters} steps of "
        f"{settings.global_batch_size}: {train.train_iters * settings.global_batch_size / rows:.2f} epochs",
    ]
    packings = [part.header.packing for part in inputs.rows.parts if part.header.packing is not None]
    if packings:
        padding = sum(packing.padding_tokens for packing in packings) / (rows * config.data.seq_length)
        documents = sum(packing.documents for packing in packings)
        lines.append(f"  packed: {documents} documents, {padding:.1%} of the tokens are padding")
    lines += _describe_folders(inputs.rows, train.train_iters * settings.global_batch_size, consumed_samples)
    lines += _warn_of_same_rows(inputs)
    schedule = config.weighting.weighting_schedule
    weighting = f"weighting {config.weighting.weighting}" if schedule is None else f"weighting {schedule}"
    if inputs.make_scorer is not None and settings.windows is not None:
        windows = settings.windows
        weighting += f", {config.scorer.scorer} scorer, windows of {windows.tokens} every {windows.stride} tokens"
    lines.append(weighting)
    warmup, steps = config.optimizer.lr_warmup_iters, train.train_iters
    if warmup >= steps:
        highest = config.optimizer.lr * (steps - 1) / warmup
        lines.append(
            f"warning: --lr-warmup-iters {warmup} does not end within --train-iters {steps}: the highest learning "
            f"rate of this run is {highest:.3g}, not --lr {config.optimizer.lr:g}"
        )
    for name in ("min_lr", "lr_decay_iters"):
        if config.optimizer.lr_decay_style == "constant" and getattr(config.optimizer, name):
            lines.append(f"warning: {flag(name)}: nothing decays with --lr-decay-style constant")
    if config.checkpoint.save is None and config.checkpoint.save_hf is None:
        lines.append("warning: neither --save nor --save-hf: nothing of this run is kept")
    return lines


def consumed_by_folder(rows: Blend, consumed_samples: int) -> dict[str, int]:
    """Samples so far of each folder of --data-path."""
    counts = taken(consumed_samples, rows.shares)
    return {str(part.path): count for part, count in zip(rows.parts, counts, strict=True)}


def _describe_folders(rows: Blend, samples: int, consumed_samples: int) -> list[str]:
    """Of several folders each one's share of the run's samples, and how often the run goes through it."""
    if len(rows.parts) == 1:
        return []
    lines, consumed = [], consumed_by_folder(rows, consumed_samples).values()
    for part, share, planned, done in zip(rows.parts, rows.shares, taken(samples, rows.shares), consumed, strict=True):
        so_far = f", {done} so far" if consumed_samples else ""
        lines.append(
            f"  {float(share):.2%} of the samples from {part.path}: {planned}, {planned / len(part):.2f} times its "
            f"{len(part)} rows{so_far}"
        )
    return lines


def _warn_of_same_rows(inputs: Inputs) -> list[str]:
    """What is hardly meant: folders that are copies of each other, and held-out rows that are trained on."""
    valid, first, lines = inputs.valid_rows, dict[str, Path](), []
    for part in inputs.rows.parts:
        earlier = first.setdefault(part.fingerprint, part.path)
        if earlier != part.path:
            lines.append(f"warning: --data-path {part.path}: holds the same rows as {earlier}")
    if valid is not None and valid.fingerprint in first:
        lines.append(
            f"warning: --valid-data-path {valid.path}: is trained on, it holds the rows of --data-path "
            f"{first[valid.fingerprint]}"
        )
    return lines
