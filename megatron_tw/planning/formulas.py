"""Memory, FLOPs and traffic of one rank by formula: quick, and near enough to choose which layouts to simulate.

Bytes of activations follow from what autograd keeps of a layer; they were set beside simulated layers (docs/plan.md).

P = weights of a rank, S = tokens of a micro-batch that a rank holds, H = hidden size, F = width of the MLP, Q and K =
widths of all query heads and of all key-value heads, T = TP, C = CP.
"""

from dataclasses import dataclass
from functools import lru_cache
from math import prod

from megatron_tw.config import ActivationConfig, RunConfig
from megatron_tw.model.architecture import Architecture, megatron_vocab_size
from megatron_tw.model.families.table import layer_shapes
from megatron_tw.model.flops import StepWork, Work, scoring_work, step_work
from megatron_tw.model.forward import num_window_groups
from megatron_tw.planning.sizes import Sizes


def work_of(sizes: Sizes) -> StepWork:
    """FLOPs of all ranks."""
    config = sizes.config
    return step_work(
        sizes.architecture,
        seq_length=config.data.seq_length,
        rows=sizes.rows,
        train=config.train,
        parallel=config.parallel,
        compute=config.compute,
        activations=config.activations,
        keep_logits_mib=sizes.keep_logits_mib,
        loss_rows=None if sizes.share == 1.0 else sizes.share * sizes.rows * config.data.seq_length,
        scoring=_scoring_work(sizes),
    )


def _scoring_work(sizes: Sizes) -> Work:
    """Of all ranks if each were as busy as the busiest, for which the others wait."""
    scoring = sizes.scoring
    if scoring is None or not scoring.windows:
        return Work()
    work = scoring_work(
        scoring.architecture,
        scoring.windows,
        rows=sizes.rows,
        copies=sizes.copies,
        parallel=sizes.config.parallel,
        scoring_micro_batch=scoring.micro_batch,
        multiple=1,
    )
    groups = num_window_groups(len(scoring.windows), sizes.config.parallel.context_parallel_size)
    return work * (sizes.windows_of_a_rank * groups / len(scoring.windows))


def flops_of_a_rank(sizes: Sizes) -> dict[str, dict[str, float]]:
    """By phase and kind, of a rank of the last stage, which has the head too."""
    work, stages = work_of(sizes), sizes.config.parallel.pipeline_model_parallel_size
    flops = {}
    for phase, part in (("scoring", work.scoring), ("forward", work.forward), ("backward", work.backward)):
        heads, ranks = _head_share(sizes), sizes.world_size
        if phase == "scoring" and sizes.scoring is not None and not sizes.scoring.pipelined:
            heads, ranks = 0.0, ranks // stages  # of the last stage alone
        flops[phase] = {"gemm": part.gemm / ranks * (1 + heads * (stages - 1)), "attention": part.attention / ranks}
    return flops


def _head_share(sizes: Sizes) -> float:
    """Of the products with weights, that of the head."""
    a = sizes.architecture
    layers = a.num_layers * sum(prod(shape) for shape in layer_shapes(a) if len(shape) == 2)
    head = a.hidden_size * a.vocab_size
    return head / (layers + head)


@dataclass(frozen=True)
class Weights:
    """Numbers of a rank's weights: of all its layers, and of embedding and head."""

    layers: float
    vocabulary: float

    @property
    def total(self) -> float:
        return self.layers + self.vocabulary


def weights_of_a_rank(sizes: Sizes, *, last: bool) -> Weights:
    """Of the first or the last stage."""
    return _weights(sizes.architecture, sizes.config, last)


@lru_cache(maxsize=4096)
def _weights_of(tensor: int, pipeline: int, shapes: tuple[tuple[int, ...], ...], layers: int) -> float:
    matrices = sum(prod(shape) for shape in shapes if len(shape) == 2) / tensor
    return layers / pipeline * (matrices + sum(shape[0] for shape in shapes if len(shape) == 1))


def _weights(architecture: Architecture, config: RunConfig, last: bool) -> Weights:
    parallel = config.parallel
    tensor, pipeline = parallel.tensor_model_parallel_size, parallel.pipeline_model_parallel_size
    layers = _weights_of(tensor, pipeline, tuple(layer_shapes(architecture)), architecture.num_layers)
    entries = megatron_vocab_size(architecture, parallel, config.compute) // tensor
    tables = 2 if pipeline == 1 and not architecture.tied_embeddings else 1
    return Weights(layers, tables * entries * architecture.hidden_size)


@dataclass(frozen=True, kw_only=True)
class LayerBytes:
    """Bytes that one layer leaves for its backward pass, for all tokens of a micro-batch on a rank.

    ours: this project's layers; te: Transformer Engine's, which fuse the rotary embedding and keep no gathered keys
    and values. input: the layer's input alone, which full recomputation keeps. gathered: of ours, the keys and values
    of all context-parallel ranks. local: those of this rank, which stand in for them where they are gathered again.
    mlp: what the MLP keeps besides its input.
    """

    ours: float
    te: float
    input: float
    gathered: float
    local: float
    mlp: float

    def kept(self, options: ActivationConfig) -> float:
        """What ours leave where some of it is made again in backward, but not whole layers."""
        modules = options.modules_run_again
        kept = self.ours
        if self.gathered and ("core_attn" in modules or options.recompute_cp_gather):
            kept += self.local - self.gathered
        if "mlp" in modules:
            kept -= self.mlp
        return kept


def layer_bytes(sizes: Sizes, tokens: int, sequence: int) -> LayerBytes:
    """tokens: S. sequence: of all tokens whose keys and values a rank gathers, S without context parallelism."""
    a, parallel, b = sizes.architecture, sizes.config.parallel, sizes.bytes_of_a_number
    tensor = parallel.tensor_model_parallel_size
    hidden = a.hidden_size / (tensor if parallel.uses_sequence_parallel else 1)
    queries, keys = (heads * a.head_dim / tensor for heads in (a.num_attention_heads, a.num_query_groups))
    keys = max(keys, a.head_dim)
    ffn = a.ffn_hidden_size / tensor
    gated = bool(a.family.megatron.get("gated_linear_unit"))
    up = 2 if gated else 1  # products before the activation
    norms = 2 if any("mlp" in p.names[0] and "norm" in p.names[0] for p in a.family.tensors) else 1
    mlp = (up + 1) * ffn if a.family.fused_activation else (up + 2) * ffn
    # Inputs and outputs of the norms, queries, keys and values, attention's output, both sides of the activation.
    fused = 2 * norms * hidden + 2 * queries + 2 * keys + mlp
    gathered = 2 * keys * sequence if sequence > tokens else 0.0
    # Attention's output is made in two parts, which are kept besides; keys and values of this rank are not.
    parts, local = (queries, 2 * keys) if gathered else (0.0, 0.0)
    return LayerBytes(
        ours=b * (tokens * (fused + parts - local) + gathered),
        te=b * tokens * fused,
        input=b * tokens * hidden,
        gathered=b * gathered,
        local=b * tokens * local,
        mlp=b * tokens * mlp,
    )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes of the rank that needs most."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        return self.parameters + self.gradients + self.optimizer + self.activations


def memory_of(sizes: Sizes) -> Memory:
    """Of the rank and the moment that need most; the first stage holds most activations, the last has the head."""
    config, parallel = sizes.config, sizes.config.parallel
    b, stages = sizes.bytes_of_a_number, parallel.pipeline_model_parallel_size
    weights = weights_of_a_rank(sizes, last=False).total
    sharded = sizes.copies * parallel.context_parallel_size
    ema = 4 * weights if config.scorer.scorer == "ema" else 0.0
    return Memory(
        parameters=b * weights + (_live_scorer_bytes(sizes) if stages == 1 else 0.0),
        gradients=4 * weights,
        optimizer=(12 if config.compute.bf16 else 8) * weights / sharded + ema,
        activations=max(training_bytes(sizes), scoring_bytes(sizes)),
    )


def _live_scorer_bytes(sizes: Sizes) -> float:
    if sizes.config.scorer.scorer_hf is None or sizes.scoring is None:
        return 0.0
    return sizes.bytes_of_a_number * _weights(sizes.scoring.architecture, sizes.config, True).total


def in_flight(sizes: Sizes) -> float:
    """Micro-batches whose activations the first stage holds, counted in its whole share of the layers."""
    stages = sizes.config.parallel.pipeline_model_parallel_size
    if stages == 1:
        return 1.0
    if sizes.chunks == 1:
        return min(stages, sizes.microbatches)
    return min(float(sizes.microbatches), stages + (stages - 1) / sizes.chunks)


def training_bytes(sizes: Sizes) -> float:
    """Activations of the first stage, and what a layer or the loss works with."""
    config, tokens = sizes.config, sizes.local_tokens
    parallel, options = config.parallel, config.activations
    sequence = config.data.seq_length * config.train.micro_batch_size
    layer = layer_bytes(sizes, tokens, sequence)
    kept = layer.kept(options)
    layers = sizes.architecture.num_layers / parallel.pipeline_model_parallel_size
    again = 0.0  # of these layers, that are run again
    if options.recompute_granularity == "full":
        assert options.recompute_num_layers is not None
        again = layers
        if options.recompute_method == "block":
            again = min(layers, options.recompute_num_layers * sizes.chunks)
    stored = again * layer.input + (layers - again) * kept
    if options.recompute_granularity == "full" and options.recompute_method == "uniform":
        assert options.recompute_num_layers is not None
        stored = again * layer.input / options.recompute_num_layers + (options.recompute_num_layers - 1) * kept
    working = layer.ours * (1.3 if again else 1.0)  # one layer, run again, and gradients within it
    working += 4 * layer.gathered  # gathered keys and values once more, their gradients, and these in fp32
    head = sizes.architecture.hidden_size * sizes.bytes_of_a_number
    loss = min(float(sizes.keep_logits_mib << 20), tokens * 2.0 * sizes.architecture.vocab_size)
    loss += 4096 * head * 4 + 60e6
    rows = 40.0 * sequence + 8.0 * config.data.seq_length * sizes.rows / sizes.copies
    return stored * in_flight(sizes) + max(working, loss - 0.5 * kept, 0.3 * loss) + 3 * layer.input + rows


def scoring_bytes(sizes: Sizes) -> float:
    """A layer's forward pass over all windows that run at once; nothing is kept."""
    scoring = sizes.scoring
    if scoring is None:
        return 0.0
    at_once = scoring.micro_batch or sizes.windows_of_a_rank
    tokens = at_once * scoring.windows[0].length
    return 0.8 * layer_bytes(sizes.of_scorer, tokens, tokens).ours
