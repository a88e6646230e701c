"""Bottom-right causal attention, as our layers use it under context parallelism: which kernel PyTorch takes, its time
and its memory, for the last queries of a longer row.

    tools/benchmarks/bottom_right.py --keys 32768 131072 --output FILE     # Llama-3-8B's heads, bf16: a GPU

A kernel that holds the scores of all pairs (PyTorch's "math") is no use at such lengths, and is reported as a failure.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from process_memory import PeakMemory
from torch.profiler import profile

from megatron_tw.model.attention import bottom_right_causal
from megatron_tw.parallel.devices import prepare_device, synchronize

KERNELS = ("flash", "efficient", "cudnn", "math", "overrideable")


def measure(options: argparse.Namespace, keys: int) -> dict[str, Any]:
    """Kernel, seconds and peak bytes beyond the inputs, forward and backward, of the second call."""
    device = prepare_device()
    queries = max(1, int(keys * options.share))
    dtype = torch.bfloat16 if options.bf16 else torch.float32

    def made(heads: int, tokens: int) -> torch.Tensor:
        tensor = torch.randn(1, heads, tokens, options.head_size, device=device.device, dtype=dtype)
        return tensor.requires_grad_()

    q_BHQD, k_BGKD, v_BGKD = made(options.heads, queries), made(options.groups, keys), made(options.groups, keys)

    def attend() -> None:
        out_BHQD = torch.nn.functional.scaled_dot_product_attention(
            q_BHQD, k_BGKD, v_BGKD, attn_mask=bottom_right_causal(queries, keys), enable_gqa=True
        )
        out_BHQD.sum().backward()

    with profile() as profiler:
        attend()
    called = {event.key for event in profiler.key_averages() if "scaled_dot_product" in event.key}
    kernels = [kernel for kernel in KERNELS if any(f"_{kernel}" in name for name in called)]
    memory = PeakMemory(device)
    with memory.of_block() as block:
        synchronize()
        started = time.perf_counter()
        attend()
        synchronize()
        seconds = time.perf_counter() - started
    pairs = queries * (keys - (queries - 1) / 2)
    flops = 3.5 * 4 * pairs * options.heads * options.head_size  # backward: 2.5 times the forward's two products
    return {
        "queries": queries,
        "keys": keys,
        "kernels": kernels,
        "seconds": seconds,
        "tflops_per_second": flops / seconds / 1e12,
        "extra_bytes": block.peak_bytes,
        "scores_bytes": options.heads * queries * keys * dtype.itemsize,
    }


def as_markdown(figures: Sequence[dict[str, Any]]) -> str:
    lines = [
        "| queries | keys | kernel | forward + backward (s) | TFLOP/s | extra GiB | all scores would take GiB |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in figures:
        lines.append(
            f"| {row['queries']} | {row['keys']} | {', '.join(row['kernels']) or 'unknown'} | {row['seconds']:.4f} | "
            f"{row['tflops_per_second']:.3g} | {row['extra_bytes'] / 2**30:.3f} | {row['scores_bytes'] / 2**30:.3f} |"
        )
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--keys", type=int, nargs="+", default=[32768, 131072])
    parser.add_argument("--share", type=float, default=0.125, help="queries, as a share of the keys: CP 4 has 1/8")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--groups", type=int, default=8)
    parser.add_argument("--head-size", type=int, default=128)
    parser.add_argument("--bf16", action=argparse.BooleanOptionalAction, default=torch.cuda.is_available())
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="for the figures, as JSON")
    return parser


def main(arguments: Sequence[str]) -> None:
    options = build_parser().parse_args(arguments)
    figures = [measure(options, keys) for keys in options.keys]
    options.output.write_text(json.dumps(figures, indent=1))
    print(as_markdown(figures))
    if any("math" in row["kernels"] for row in figures):
        sys.exit("error: PyTorch took its math kernel, which holds the scores of all pairs")


if __name__ == "__main__":
    main(sys.argv[1:])
