"""What is known of a GPU and its links: one small table, from which plans take their rates and a run's metrics their
peak. FLOP/s and bytes/s, of one GPU; links in one direction.

Peaks are NVIDIA's data sheets' (bf16 without sparsity; SXM boards in nodes of 8). What of a peak a kernel reaches is
not theirs: attention from the measurements of arXiv 2307.08691 (FlashAttention-2: A100, H100) and 2407.08608
(FlashAttention-3, and cuDNN beside it: H100), causal, head size 128, long sequences, forward and backward together;
GEMMs, memory and links as large kernels of this kind are known to reach, and B200's attention, are our assumptions. A
measured run corrects them (tools/plan.py --calibrate).
"""

import re
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """One kind of GPU.

    device_names: a regular expression of what torch.cuda.get_device_name says. memory_bytes: all that CUDA reports,
    before its context. peak_flops: of bf16 tensor cores. gemm_flops, attention_flops, te_attention_flops: what large
    GEMMs, PyTorch's flash attention and Transformer Engine's reach. memory_bytes_per_s, nvlink_bytes_per_s (to the
    other GPUs of the node), network_bytes_per_s (one network card a GPU): what streams and large messages reach.
    """

    kind: str
    device_names: str
    memory_bytes: float
    peak_flops: float
    gemm_flops: float
    attention_flops: float
    te_attention_flops: float
    memory_bytes_per_s: float
    nvlink_bytes_per_s: float
    network_bytes_per_s: float


_GIB = 2**30
GPUS = {
    gpu.kind: gpu
    for gpu in (
        # A100 80 GB SXM: 2.04 TB/s, NVLink 300 GB/s, InfiniBand HDR 25 GB/s.
        Gpu(
            kind="a100", device_names=r"A100.*80GB", memory_bytes=79.1 * _GIB, peak_flops=312e12,
            gemm_flops=0.80 * 312e12, attention_flops=190e12, te_attention_flops=200e12,
            memory_bytes_per_s=0.85 * 2.04e12, nvlink_bytes_per_s=0.75 * 300e9, network_bytes_per_s=0.85 * 25e9,
        ),
        # H100 SXM: 3.35 TB/s, NVLink 450 GB/s, InfiniBand NDR 50 GB/s.
        Gpu(
            kind="h100", device_names=r"H100.*HBM3", memory_bytes=79.1 * _GIB, peak_flops=989e12,
            gemm_flops=0.70 * 989e12, attention_flops=330e12, te_attention_flops=550e12,
            memory_bytes_per_s=0.85 * 3.35e12, nvlink_bytes_per_s=0.75 * 450e9, network_bytes_per_s=0.85 * 50e9,
        ),
        # H200: an H100 with 141 GB of memory at 4.8 TB/s.
        Gpu(
            kind="h200", device_names=r"H200(?! NVL)", memory_bytes=139.8 * _GIB, peak_flops=989e12,
            gemm_flops=0.70 * 989e12, attention_flops=330e12, te_attention_flops=550e12,
            memory_bytes_per_s=0.85 * 4.8e12, nvlink_bytes_per_s=0.75 * 450e9, network_bytes_per_s=0.85 * 50e9,
        ),
        # B200 (HGX, 1000 W): 180 GB at 8 TB/s, NVLink 900 GB/s, InfiniBand NDR 50 GB/s.
        Gpu(
            kind="b200", device_names=r"\bB200", memory_bytes=178.3 * _GIB, peak_flops=2250e12,
            gemm_flops=0.70 * 2250e12, attention_flops=400e12, te_attention_flops=1100e12,
            memory_bytes_per_s=0.85 * 8.0e12, nvlink_bytes_per_s=0.75 * 900e9, network_bytes_per_s=0.85 * 50e9,
        ),
    )
}  # fmt: skip


def gpu_of(device_name: str | None) -> Gpu | None:
    """The GPU of which torch.cuda.get_device_name says this; None for one that is not in the table, or none.

    >>> gpu_of("NVIDIA H100 80GB HBM3").kind, gpu_of("NVIDIA H100 PCIe"), gpu_of(None)
    ('h100', None, None)
    """
    if device_name is None:
        return None
    return next((gpu for gpu in GPUS.values() if re.search(gpu.device_names, device_name)), None)
