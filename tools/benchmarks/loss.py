"""The loss against others, in one run: time, memory and share of the FLOP floor for a share kappa of weighted tokens.

    python tools/benchmarks/loss.py --output DIR          # 2 CPU cores, fp32: the shape of docs/loss.md
    python tools/benchmarks/loss.py --llama3-8b --output DIR          # bf16, against its bounds: a GPU with 80 GB
    python tools/benchmarks/loss.py --llama3-8b --tokens 8192 --sweep --output DIR    # over chunk and tile sizes

Ranks are started by the script itself. Every candidate computes the weighted sum of per-token NLLs and its gradients.
Times are medians of interleaved repetitions after a warm-up, of the slowest rank. Memory is the peak beyond inputs and
gradients: of the process on a CPU (Linux), of the allocator on a GPU. The floor is the FLOPs that the weights ask for,
2 * tokens * hidden * vocab / tp * (1 + 2 * kappa) (each kept logit made once), at the GEMM rate measured meanwhile.
Ratios to Megatron-Core are also given from the lowest to the highest repetition.
"""

import argparse
import ctypes
import importlib
import importlib.util
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from process_memory import status_bytes
from torch import Tensor
from tqdm import tqdm

from megatron_tw.config.quiet import quiet_libraries
from megatron_tw.losses import linear_cross_entropy
from megatron_tw.parallel.devices import Device, prepare_device, synchronize

quiet_libraries()  # in the processes of ranks, too, which import this
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
OURS, KEEPING, MEGATRON = "ours", "ours, logits kept", "Megatron-Core"
LLAMA3_8B = {"tokens": 32768, "hidden": 4096, "vocab": 128256, "dtype": "bf16", "tp": [1]}
SWEEP_CHUNKS, SWEEP_TILES_MIB = (2048, 4096, 8192), (8, 32, 128)
BOUNDS = "extra memory at most 1/20 and kappa 0.2 at most 0.6 x of Megatron-Core; dense at 85% of the GEMM rate or more"
BOUNDS_TP = "1"
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden [S, 1, H], weight [V / tp, H], labels [S, 1] -> NLL [S, 1]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=32768)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--tp", type=int, nargs="+", default=[1, 2], help="tensor-parallel sizes")
    parser.add_argument(
        "--kappa", type=float, nargs="+", default=[1.0, 0.5, 0.2, 0.1], help="shares of weighted tokens"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--threads", type=int, help="of a rank on a CPU (default: cores / tp)")
    parser.add_argument(
        "--clock",
        choices=("wall", "cpu"),
        default="wall",
        help="cpu: processor time, for a machine that others use too",
    )
    parser.add_argument("--llama3-8b", action="store_true", help=f"its shape in bf16 at TP 1, against bounds: {BOUNDS}")
    parser.add_argument("--sweep", action="store_true", help="ours over chunk and tile sizes instead")
    parser.add_argument("--output", type=Path, required=True, help="folder for loss_benchmark.json and .png")
    return parser


def main(arguments: Sequence[str]) -> None:
    parser = build_parser()
    if "--llama3-8b" in arguments:
        parser.set_defaults(**LLAMA3_8B)
    options = parser.parse_args(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    results: dict[str, list[dict[str, Any]]] = {}
    for tp_size in options.tp:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(measure_rank, args=(tp_size, options, folder), nprocs=tp_size)
            results[str(tp_size)] = json.loads(Path(folder, "rows.json").read_text())
        print_table(tp_size, results[str(tp_size)])
    settings = {name: str(value) for name, value in vars(options).items() if name != "output"}
    settings["processor"] = processor()
    print(f"\n{settings['processor']}, torch {torch.__version__}")
    text = json.dumps({"settings": settings, "torch": torch.__version__, "results": results}, indent=1)
    (options.output / "loss_benchmark.json").write_text(text)
    plot(results, options)
    print(f"wrote loss_benchmark.json and .png to {options.output}")
    if options.llama3_8b and not options.sweep:
        if BOUNDS_TP not in results:
            print(f"bounds: of TP {BOUNDS_TP}, which was not measured")
            return
        broken = broken_bounds(results[BOUNDS_TP])
        print(f"bounds: {BOUNDS}: {'held' if not broken else 'NOT HELD'}")
        if broken:
            sys.exit("error: " + "; ".join(broken))


def processor() -> str:
    """What the times are of."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(models)} cores of {models[0]}" if models else "unknown processor"


def broken_bounds(rows: list[dict[str, Any]]) -> list[str]:
    """Which bounds of BOUNDS do not hold, in words."""
    by_case = {(row["candidate"], row["kappa"]): row for row in rows}
    base, broken = by_case[MEGATRON, 1.0], []
    for (name, kappa), row in by_case.items():
        memory, time_ratio = (row[key] / base[key] for key in ("extra_bytes", "seconds"))
        if name == OURS and memory > 1 / 20:
            broken.append(f"{name} at kappa {kappa:g} takes {memory:.3f} of the memory")
        if name == OURS and kappa <= 0.2 and time_ratio > 0.6:
            broken.append(f"{name} at kappa {kappa:g} takes {time_ratio:.2f} x the time")
        # Ours makes the logits twice: 4 GEMMs where the floor counts 3.
        rate = row["share_of_floor"] * (4 / 3 if name == OURS else 1)
        if name in (OURS, KEEPING) and kappa == 1 and rate < 0.85:
            broken.append(f"{name} runs at {rate:.0%} of the GEMM rate")
    return broken


# ---- candidates ----


def make_candidates(
    device: Device, tp_size: int, hidden: Tensor, vocab: int, *, sweep: bool
) -> dict[str, tuple[bool, Loss]]:
    """Name to (whether it is meant for weights that are often zero, loss); `vocab` entries on this rank."""
    group = dist.group.WORLD if tp_size > 1 else None
    if sweep:
        sized = {OURS: (True, partial(linear_cross_entropy, tp_group=group))}
        for chunk in SWEEP_CHUNKS:
            for mib in SWEEP_TILES_MIB:
                entries = max(1, (mib << 20) // (chunk * hidden.element_size()))
                loss = partial(linear_cross_entropy, tp_group=group, chunk_tokens=chunk, tile_entries=entries)
                sized[f"{chunk} tokens, {mib} MiB"] = (True, loss)
        return sized | {MEGATRON: (False, megatron_loss(hidden, vocab * tp_size))}
    keep_all = len(hidden) * vocab * hidden.element_size()
    ours = partial(linear_cross_entropy, tp_group=group)
    candidates: dict[str, tuple[bool, Loss]] = {
        OURS: (True, ours),
        KEEPING: (False, partial(ours, keep_logits_bytes=keep_all)),
        MEGATRON: (False, megatron_loss(hidden, vocab * tp_size)),
    }
    if tp_size == 1:
        candidates["PyTorch"] = (False, pytorch_loss)
    if device.type == "cuda":
        if importlib.util.find_spec("transformer_engine"):
            candidates["Transformer Engine"] = (False, transformer_engine_loss(group))
        if importlib.util.find_spec("cut_cross_entropy") and tp_size == 1:
            candidates["cut-cross-entropy"] = (False, cut_cross_entropy_loss)
        if importlib.util.find_spec("liger_kernel") and tp_size == 1:
            candidates["Liger-Kernel"] = (False, liger_loss)
    return candidates


def megatron_loss(hidden: Tensor, vocab: int) -> Loss:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=1,
        hidden_size=hidden.shape[-1],
        num_attention_heads=dist.get_world_size(),
        tensor_model_parallel_size=dist.get_world_size(),
        params_dtype=hidden.dtype,
        use_cpu_initialization=True,
        perform_initialization=False,
    )
    layer = tensor_parallel.ColumnParallelLinear(
        hidden.shape[-1],
        vocab,
        config=config,
        init_method=torch.nn.init.zeros_,
        bias=False,
        skip_weight_param_allocation=True,
    )

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logits, _ = layer(hidden, weight=weight)
        return tensor_parallel.vocab_parallel_cross_entropy(logits, labels)

    return loss


def pytorch_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden, weight).float().flatten(0, 1)
    return torch.nn.functional.cross_entropy(logits, labels.flatten(), reduction="none").view_as(labels)


def transformer_engine_loss(group: dist.ProcessGroup | None) -> Loss:
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        return parallel_cross_entropy(torch.nn.functional.linear(hidden, weight), labels, 0.0, False, group)

    return loss


def cut_cross_entropy_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    cut = importlib.import_module("cut_cross_entropy")
    return cut.linear_cross_entropy(hidden, weight, labels, reduction="none")


def liger_loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    liger = importlib.import_module("liger_kernel.transformers")
    loss = liger.LigerFusedLinearCrossEntropyLoss(reduction="none")
    return loss(weight, hidden.flatten(0, 1), labels.flatten()).view_as(labels)


# ---- measuring, on each rank ----


def measure_rank(rank: int, tp_size: int, options: argparse.Namespace, folder: str) -> None:
    os.environ.update(LOCAL_RANK=str(rank))
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.set_num_threads(options.threads or max(1, (os.cpu_count() or 1) // tp_size))
    device = prepare_device()
    store = dist.FileStore(f"{folder}/store", tp_size)
    dist.init_process_group(device.backend, store=store, rank=rank, world_size=tp_size)
    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
    generator = torch.Generator().manual_seed(0)  # the same hidden states and labels on all ranks
    shape = (options.tokens, 1, options.hidden)
    hidden = torch.randn(shape, generator=generator).to(device.device, DTYPES[options.dtype]).requires_grad_()
    labels = torch.randint(options.vocab, shape[:2], generator=generator).to(device.device)
    order = torch.rand(options.tokens, 1, generator=generator).to(device.device)
    weight = 0.02 * torch.randn(options.vocab // tp_size, options.hidden, generator=generator.manual_seed(rank))
    weight = weight.to(device.device, hidden.dtype).requires_grad_()
    candidates = make_candidates(device, tp_size, hidden, options.vocab // tp_size, sweep=options.sweep)
    inputs = hidden, weight, labels
    if hidden.dtype != torch.float32:  # as Megatron's DistributedDataParallel has it
        weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)  # type: ignore[attr-defined]
        weight.grad_added_to_main_grad = False  # type: ignore[attr-defined]
    cases = [
        (name, kappa, loss, (order < kappa).float())
        for name, (sparse, loss) in candidates.items()
        for kappa in (options.kappa if sparse else [1.0])  # the others do the same work whatever the weights
    ]
    times: dict[tuple[str, float], list[tuple[float, float]]] = {case[:2]: [] for case in cases}
    memory, gemm_seconds = {}, []
    progress = tqdm(total=(1 + options.repetitions) * len(cases), desc=f"TP {tp_size}", disable=rank > 0)
    list(train(candidates[OURS][1], inputs, (order < 0.1).float()))  # libraries allocate their workspaces
    for name, kappa, loss, token_weights in cases:  # also the warm-up
        memory[name, kappa] = extra_bytes(partial(train, loss, inputs, token_weights), device, (hidden, weight))
        progress.update()
    for _ in range(options.repetitions):
        gemm_seconds.append(slowest(partial(gemm, hidden, weight), options.clock, device)[-1])
        for name, kappa, loss, token_weights in cases:
            seconds = slowest(partial(train, loss, inputs, token_weights), options.clock, device)
            times[name, kappa].append((seconds[0], seconds[-1]))
            progress.update()
    progress.close()
    rows = []
    base = [both for _, both in times[MEGATRON, 1.0]]
    for name, kappa, *_ in cases:
        forward, both = (statistics.median(column) for column in zip(*times[name, kappa], strict=True))
        floor = statistics.median(gemm_seconds) * (1 + 2 * kappa)
        row = {"candidate": name, "kappa": kappa, "forward_seconds": forward, "seconds": both}
        row["ratios"] = [own / other for (_, own), other in zip(times[name, kappa], base, strict=True)]
        rows.append(row | {"share_of_floor": floor / both, "extra_bytes": memory[name, kappa]})
    if rank == 0:
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


def train(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor], token_weights: Tensor) -> Iterator[None]:
    """Forward, a pause to read the clock, backward."""
    hidden, weight, _ = inputs
    hidden.grad = weight.grad = None
    total = (loss(*inputs) * token_weights).sum()
    yield
    total.backward()


def gemm(hidden: Tensor, weight: Tensor, rows: int = 1024, columns: int = 1024) -> Iterator[None]:
    """As many FLOPs as all logits need, in GEMMs of a size that runs well."""
    left, blocks = hidden.detach()[:, 0].split(rows), weight.detach().split(columns)
    out = hidden.new_empty(len(left[0]), len(blocks[0]))
    for left_MH in left:
        for block_VH in blocks:
            torch.mm(left_MH, block_VH.T, out=out[: len(left_MH), : len(block_VH)])
    yield


def slowest(work: Callable[[], Iterator[None]], clock: str, device: Device) -> list[float]:
    """Seconds to each pause of the work and to its end, of the rank that takes longest."""
    now = time.perf_counter if clock == "wall" else time.process_time
    dist.barrier()
    synchronize()
    start = now()
    laps = []
    for _ in work():
        synchronize()
        laps.append(now() - start)
    synchronize()
    seconds = torch.tensor([*laps, now() - start], device=device.device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX)
    return seconds.tolist()


def extra_bytes(work: Callable[[], Iterator[None]], device: Device, leaves: tuple[Tensor, ...]) -> int:
    """Peak memory of this rank beyond what there is before, without the gradients of the leaves."""
    for leaf in leaves:
        leaf.grad = None
    gradient_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        list(work())
        return torch.cuda.max_memory_allocated() - before - gradient_bytes
    ctypes.CDLL(None).malloc_trim(0)  # so that memory freed earlier is not used again unseen
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from now on
    before = status_bytes("VmRSS")
    list(work())
    return status_bytes("VmHWM") - before - gradient_bytes


# ---- what comes out ----


def print_table(tp_size: int, rows: list[dict[str, Any]]) -> None:
    base = next(row for row in rows if row["candidate"] == MEGATRON)
    print(f"\nTP {tp_size}; x: times {MEGATRON}")
    print(f"{'candidate':20} kappa  forward s  fwd+bwd s      x  lowest-highest  of floor  extra MiB       x")
    for row in rows:
        print(
            f"{row['candidate']:20} {row['kappa']:5g} {row['forward_seconds']:10.3f} {row['seconds']:10.3f} "
            f"{row['seconds'] / base['seconds']:6.2f}     {min(row['ratios']):.2f} - {max(row['ratios']):.2f} "
            f"{row['share_of_floor']:9.0%} {row['extra_bytes'] / 2**20:10.1f} "
            f"{row['extra_bytes'] / base['extra_bytes']:7.3f}"
        )


def plot(results: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(results), 4), layout="constrained")
    for axes, (tp_size, rows) in zip(figure.subplots(1, len(results), squeeze=False)[0], results.items(), strict=True):
        base = next(row["seconds"] for row in rows if row["candidate"] == MEGATRON)
        for name in dict.fromkeys(row["candidate"] for row in rows):
            own = [row for row in rows if row["candidate"] == name]
            axes.plot([row["kappa"] for row in own], [row["seconds"] / base for row in own], marker="o", label=name)
        kappas = sorted(options.kappa)
        axes.plot(kappas, [(1 + 3 * kappa) / 3 for kappa in kappas], "k:", label="(1 + 3 kappa) / 3")
        axes.set(title=f"TP {tp_size}", xlabel="kappa: share of tokens with a weight", ylabel=f"time / {MEGATRON}")
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
        axes.grid(alpha=0.3)
    figure.savefig(options.output / "loss_benchmark.png", dpi=120)


if __name__ == "__main__":
    main(sys.argv[1:])
