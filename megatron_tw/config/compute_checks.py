"""Checks of what is computed how: layers, recomputation, FP8 and the kernels of attention.

Each raises ValueError with the option, what was expected and what was given.
"""

from megatron_tw.config.options import flag
from megatron_tw.config.ranges import at_least, at_most, require
from megatron_tw.config.schema import ActivationConfig, ComputeConfig, KernelConfig, ParallelConfig

LARGEST_VOCABULARY_MULTIPLE = 2**16
RECOMPUTE_MODULES = ("core_attn", "mlp")
"""Of Megatron-Core's, those that a dense layer has. Not layernorm: Megatron-Core recomputes it with Transformer Engine
alone, whose layers have none by itself."""
FP8_MULTIPLE, MXFP8_MULTIPLE = 16, 32
"""What Transformer Engine wants the dimensions of a matrix product in FP8 to be a multiple of; mxfp8 scales blocks."""
LONGEST_MATERIALIZED = 8192
"""Tokens of a row for which all scores of a head may exist at once."""


def check_compute(compute: ComputeConfig, parallel: ParallelConfig) -> None:
    """Ranges of the computation's options, and whose layers know what --cp-comm-type asks for."""
    at_least(1, make_vocab_size_divisible_by=compute.make_vocab_size_divisible_by)
    at_most(LARGEST_VOCABULARY_MULTIPLE, make_vocab_size_divisible_by=compute.make_vocab_size_divisible_by)
    at_least(1, loss_chunk_tokens=compute.loss_chunk_tokens)
    require(
        compute.transformer_impl != "local" or parallel.cp_comm_type == "p2p",
        f"--cp-comm-type: {parallel.cp_comm_type} is Transformer Engine's; --transformer-impl local always gathers",
    )


def check_activations(activations: ActivationConfig, parallel: ParallelConfig) -> None:
    """The combinations of recompute options that Megatron-Core knows, and the range of what the loss keeps."""
    modules = activations.recompute_modules
    require(
        modules is None or activations.recompute_granularity == "selective",
        f"--recompute-modules: expected --recompute-granularity selective with it, got "
        f"{activations.recompute_granularity}",
    )
    require(
        modules is None or (len(modules) > 0 and set(modules) <= set(RECOMPUTE_MODULES)),
        f"--recompute-modules: expected some of {', '.join(RECOMPUTE_MODULES)}, got "
        f"{', '.join(modules or ()) or 'none'}",
    )
    require(
        not activations.recompute_cp_gather or parallel.context_parallel_size > 1,
        "--recompute-cp-gather: expected a --context-parallel-size above 1 with it, got 1",
    )
    at_least(0, loss_keep_logits_mib=activations.loss_keep_logits_mib)
    at_least(1, recompute_num_layers=activations.recompute_num_layers)
    for name in ("recompute_method", "recompute_num_layers"):
        given = getattr(activations, name) is not None
        wanted = activations.recompute_granularity == "full"
        require(not wanted or given, f"{flag(name)}: --recompute-granularity full needs it, got none")
        require(
            not given or wanted,
            f"{flag(name)}: expected --recompute-granularity full, got {activations.recompute_granularity}",
        )


def check_kernels(kernels: KernelConfig, parallel: ParallelConfig, compute: ComputeConfig) -> None:
    """What FP8 and user buffers need of other options, and what deterministic mode excludes."""
    at_least(0, fp8_margin=kernels.fp8_margin)
    at_least(1, fp8_amax_history_len=kernels.fp8_amax_history_len)
    for name in ("fp8_recipe", "fp8_margin", "fp8_amax_history_len", "fp8_amax_compute_algo"):
        value, default = getattr(kernels, name), getattr(KernelConfig, name)
        require(value == default or kernels.fp8_format is not None, f"{flag(name)}: expected --fp8-format with it")
        require(
            value == default or name == "fp8_recipe" or kernels.fp8_recipe == "delayed",
            f"{flag(name)}: expected --fp8-recipe delayed, got {kernels.fp8_recipe}",
        )
    for name, given in (
        ("fp8_format", kernels.fp8_format is not None),
        ("tp_comm_overlap", kernels.tp_comm_overlap),
    ):
        require(
            not given or (compute.bf16 and compute.transformer_impl != "local"),
            f"{flag(name)}: expected --bf16 and Transformer Engine's layers, got "
            f"{'--transformer-impl local' if compute.bf16 else 'fp32'}",
        )
    require(
        not kernels.tp_comm_overlap or parallel.uses_sequence_parallel,
        "--tp-comm-overlap: expected --tensor-model-parallel-size above 1 with sequence parallelism, got "
        f"{parallel.tensor_model_parallel_size}",
    )
    require(
        kernels.tp_comm_bootstrap_backend == KernelConfig.tp_comm_bootstrap_backend or kernels.tp_comm_overlap,
        "--tp-comm-bootstrap-backend: expected --tp-comm-overlap with it",
    )
    require(
        not (kernels.deterministic_mode and kernels.tp_comm_overlap),
        "--deterministic-mode: expected --no-tp-comm-overlap with it",
    )


def check_fp8_tokens(kernels: KernelConfig, parallel: ParallelConfig, seq_length: int, micro_batch_size: int) -> None:
    """That the tokens which a rank multiplies are as many as FP8 kernels take."""
    ranks = parallel.context_parallel_size
    if parallel.uses_sequence_parallel:
        ranks *= parallel.tensor_model_parallel_size
    tokens = seq_length * micro_batch_size // ranks
    mxfp8 = kernels.fp8_recipe == "mxfp8"
    option, multiple = ("--fp8-recipe mxfp8", MXFP8_MULTIPLE) if mxfp8 else ("--fp8-format", FP8_MULTIPLE)
    require(
        tokens % multiple == 0,
        f"{option}: expected a multiple of {multiple} tokens on a rank, got --seq-length {seq_length} x "
        f"--micro-batch-size {micro_batch_size} over {ranks} ranks = {tokens}",
    )


def check_fp32_attention(
    option: str, *, on_gpu: bool, bf16: bool, num_attention_heads: int, num_query_groups: int, seq_length: int
) -> None:
    """Refuse what would end in memory: on a GPU, PyTorch has no kernel for fp32 with fewer key-value heads than query
    heads. It then makes a mask and all scores, tokens x tokens."""
    require(
        not on_gpu or bf16 or num_attention_heads == num_query_groups or seq_length <= LONGEST_MATERIALIZED,
        f"{option}: expected at most {LONGEST_MATERIALIZED} in fp32 on a GPU, where the attention of "
        f"{num_attention_heads} heads with {num_query_groups} key-value heads holds tokens x tokens scores, got "
        f"{seq_length}; --bf16 holds none",
    )
