"""What one rank moves in a step, by formula: through its memory and to other ranks."""

from megatron_tw.model.forward import num_window_groups
from megatron_tw.planning.formulas import layer_bytes, weights_of_a_rank
from megatron_tw.planning.record import Collective
from megatron_tw.planning.sizes import Sizes


def elementwise_bytes(sizes: Sizes, *, transformer_engine: bool) -> dict[str, float]:
    """Bytes that a rank's work beside the products reads and writes in a step, by phase.

    Forward, each layer writes what it keeps and reads it again, and its norms and residuals pass over the hidden
    states once more; backward twice that. The optimizer reads and writes three fp32 numbers of a weight, reads its
    gradient (once more for the norm) and writes its copy in low precision; gradients are set to zero before.
    """
    config, parallel = sizes.config, sizes.config.parallel
    layers = sizes.architecture.num_layers / parallel.pipeline_model_parallel_size
    sequence = config.data.seq_length * config.train.micro_batch_size
    layer = layer_bytes(sizes, sizes.local_tokens, sequence)
    kept = layer.te if transformer_engine else layer.ours
    forward = layers * (2 * kept + 4 * layer.input) * sizes.microbatches
    again = {"full": 1.0}.get(str(config.activations.recompute_granularity), 0.0)
    scoring = 0.0
    if sizes.scoring is not None:
        tokens = sizes.scoring_microbatches and sizes.windows_of_a_rank * sizes.scoring.windows[0].length
        window = layer_bytes(sizes.of_scorer, tokens, tokens)
        passes = sizes.scoring_layers * sizes.rows / sizes.copies
        scoring = passes * 2 * (window.te if transformer_engine else window.ours)
    weights = weights_of_a_rank(sizes, last=True).total
    owned = weights / (sizes.copies * parallel.context_parallel_size)
    return {
        "scoring": scoring,
        "forward": forward,
        "backward": (2 + again) * forward + 4 * weights,
        "optimizer": owned * (24 + 8 + 2) + 4 * weights / 8,
    }


def collectives_of(sizes: Sizes) -> list[Collective]:
    """What a rank sends in a step, as the simulation would list it."""
    found: list[Collective] = []
    config, parallel, a = sizes.config, sizes.config.parallel, sizes.architecture
    tensor, context, b = parallel.tensor_model_parallel_size, parallel.context_parallel_size, sizes.bytes_of_a_number
    stages, count = parallel.pipeline_model_parallel_size, sizes.microbatches
    layers = a.num_layers // stages
    hidden = sizes.local_tokens * a.hidden_size * b
    activations = config.activations
    again = layers if activations.recompute_granularity == "full" else 0
    gathers = activations.recompute_cp_gather or "core_attn" in activations.modules_run_again
    gathers_again = layers if gathers else again

    def add(phase: str, group: str, operation: str, size: int, calls: float, payload: float, hid: bool = False) -> None:
        if size > 1 and calls:
            found.append(
                Collective(
                    phase=phase, group=group, operation=operation, group_size=size, count=round(calls),
                    payload_bytes=round(calls * payload), overlapped=hid,
                )
            )  # fmt: skip

    def layer_forward(phase: str, calls: float, payload: float) -> None:
        if parallel.uses_sequence_parallel:
            add(phase, "TP", "all_gather", tensor, 2 * calls, payload)
            add(phase, "TP", "reduce_scatter", tensor, 2 * calls, payload)
        else:
            add(phase, "TP", "all_reduce", tensor, 2 * calls, payload)

    layer_forward("forward", layers * count, hidden)
    mlp_again = layers / 2 if "mlp" in activations.modules_run_again else 0
    layer_forward("backward", (again + mlp_again) * count, hidden)
    if parallel.uses_sequence_parallel:
        add("backward", "TP", "all_gather", tensor, 2 * layers * count, hidden)
        add("backward", "TP", "all_gather", tensor, 2 * layers * count, hidden, True)
        add("backward", "TP", "reduce_scatter", tensor, 2 * layers * count, hidden, True)
        add("forward", "TP", "all_gather", tensor, count, hidden, True)
        add("backward", "TP", "all_gather", tensor, count, hidden, True)
        add("backward", "TP", "reduce_scatter", tensor, count, hidden, True)
    else:
        add("backward", "TP", "all_reduce", tensor, 2 * layers * count, hidden, True)
    keys = max(a.num_query_groups // tensor, 1) * a.head_dim
    gathered = 2 * config.train.micro_batch_size * config.data.seq_length * keys
    add("forward", "CP", "all_gather", context, layers * count, gathered * b)
    add("backward", "CP", "all_gather", context, gathers_again * count, gathered * b)
    add("backward", "CP", "reduce_scatter", context, layers * count, gathered * 4)
    if stages > 1:
        message = hidden / (tensor if parallel.uses_sequence_parallel else 1)
        for phase in ("forward", "backward"):
            add(phase, "PP", "send", stages, count * sizes.chunks, message, sizes.chunks > 1)
    weights, sharded = weights_of_a_rank(sizes, last=True).total, sizes.copies * context
    options = config.data_parallel
    add("backward", "DP x CP", "reduce_scatter", sharded, 1, 4 * weights, bool(options.overlap_grad_reduce))
    gather = "forward" if options.overlap_param_gather else "optimizer"
    add(gather, "DP x CP", "all_gather", sharded, 1, b * weights, bool(options.overlap_param_gather))
    if sizes.scoring is not None:
        tokens = sizes.windows_of_a_rank * sizes.scoring.windows[0].length
        scorer, scored = sizes.scoring.architecture, sizes.rows / sizes.copies
        groups = num_window_groups(len(sizes.scoring.windows), context)
        share = context // groups
        passes, keys = sizes.scoring_layers * scored, max(scorer.num_query_groups // tensor, 1) * scorer.head_dim
        layer_forward("scoring", passes, tokens / share * scorer.hidden_size * b)
        add("scoring", "window", "all_gather", share, passes, 2 * tokens * keys * b)
        add("scoring", "CP", "all_reduce", context, scored, 4 * config.data.seq_length)
    return found
