"""What a simulation does not know, and what to set aside for it."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Allowance:
    """bytes: to add to a rank's peak (`share` of it besides), 0 where nothing is known. why: what it is, and where the
    number comes from."""

    name: str
    bytes: int
    share: float = 0.0
    why: str


NOT_SIMULATED = (
    Allowance(
        name="CUDA context and kernels",
        bytes=1 << 30,
        why="the driver's context, loaded kernels and cuBLAS workspaces; not measured here",
    ),
    Allowance(
        name="NCCL buffers",
        bytes=2 << 30,
        why="channels and buffers of each communicator (TP, CP, DP, PP); not measured here",
    ),
    Allowance(
        name="fragmentation",
        bytes=0,
        share=0.05,
        why="free blocks of the allocator that are of another size; not measured here",
    ),
    Allowance(
        name="Transformer Engine",
        bytes=0,
        why="where its layers run: workspaces and buffers of its own; unknown, so nothing is set aside",
    ),
)
