"""Per-token NLL from the last hidden states, where a language model of Megatron's would make logits first.

All of its language models (GPTModel, HybridModel, MambaModel) end alike: `self.output_layer(hidden, ...)`, then
`self.compute_language_model_loss(labels, logits)`. For the time of a schedule, the first hands the hidden states
through and the second makes the NLL from them. The module is still called, so that its hooks run (Megatron's overlapped
parameter gather waits in one), and what the model returns keeps its place and shape, [B, S] fp32.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from megatron_tw.losses import linear_cross_entropy


def language_model(chunk: nn.Module) -> Any:
    """The model inside Megatron's wrappers (data parallelism, half precision).

    Raises:
        ValueError: one that does not end as Megatron's language models do.
    """
    inner: Any = chunk
    while hasattr(inner, "module"):
        inner = inner.module
    if not hasattr(inner, "compute_language_model_loss"):
        raise ValueError(
            f"--token-weighting: expected one of Megatron's language models, got {type(inner).__name__}, which has no "
            "compute_language_model_loss"
        )
    return inner


@contextmanager
def loss_from_hidden_states(model: Sequence[nn.Module]) -> Iterator[None]:
    """Have the model chunk that ends the model (if this rank has it) return NLLs without logits, within the block."""
    ends = [end for end in map(language_model, model) if getattr(end, "post_process", False)]
    try:
        for end in ends:
            _bypass_logits(end)
        yield
    finally:
        for end in ends:
            vars(end).pop("compute_language_model_loss", None)
            vars(end.output_layer).pop("forward", None)


def _bypass_logits(end: Any) -> None:
    weights: list[Tensor | None] = []

    def hand_through(input_: Tensor, weight: Tensor | None = None, **unused: Any) -> tuple[Tensor, None]:
        weights[:] = [weight]
        return input_, None

    def nll(labels: Tensor, logits: Tensor) -> Tensor:
        """[B, S] fp32 of labels [B, S] (0 where the label is -100), from what stands in for the logits: the hidden
        states."""
        head = end.output_layer
        (given,) = weights  # the embedding's, where they are tied
        group = end.pg_collection.tp
        nll_SB = linear_cross_entropy(
            logits,
            head.weight if given is None else given,
            labels.transpose(0, 1).contiguous(),
            bias=getattr(head, "bias", None),
            tp_group=group if group.size() > 1 else None,
            sequence_parallel=end.config.sequence_parallel,
        )
        return nll_SB.transpose(0, 1).contiguous()

    end.output_layer.forward = hand_through
    end.compute_language_model_loss = nll
