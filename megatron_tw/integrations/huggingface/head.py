"""A causal language model that answers with the NLL of its labels in place of logits.

The model's own forward runs, without labels; its output projection, which is called last, is told the labels and gives
NLLs [batch, seq, 1] (`linear_cross_entropy`: the logits of all tokens never exist). Nothing of the model is copied, so
this holds for every family whose logits are the projection's output; and what shards parameters (FSDP) has gathered the
projection's weight at that moment, and at the same moment of the backward pass, because its own hooks run.
Outside of `answers_with_nll` the model is as it was: generation and evaluation with logits go on.

Shape suffixes: R rows, S positions, H hidden size.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from megatron_tw.losses import linear_cross_entropy

_AFTER_THE_HEAD = (
    "final_logit_softcapping",
    "output_logit_soft_cap",
    "logits_soft_cap",
    "logit_scale",
    "logits_scaling",
    "logits_scale",
    "lm_head_multiplier",
    "unpadded_vocab_size",
)
"""Fields of a config that change logits after the projection (Gemma 2, Cohere, Granite, ...)."""


def output_head(model: nn.Module, argument: str = "model") -> nn.Linear:
    """The output projection of a causal language model, inside of PEFT's wrapper where there is one.

    argument: what errors call it.

    Raises:
        ValueError: a model without one, with one that is no plain linear layer, or whose logits are not its output.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):  # PEFT
        base = base.get_base_model()
    name = type(base).__name__
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ValueError(f"{argument}: expected a causal language model with an output projection, got {name}")
    config: Any = getattr(base, "config", None)
    if getattr(config, "is_encoder_decoder", False) or getattr(base, "loss_type", None) == "ForMaskedLM":
        raise ValueError(f"{argument}: expected a causal language model, whose labels are the next tokens, got {name}")
    if hasattr(head, "modules_to_save") and hasattr(head, "active_adapters"):  # PEFT: trained as a whole
        head = head.modules_to_save[head.active_adapters[0]]
    # fully_shard turns the class of what it shards into a subclass FSDP<class>.
    if type(head) is not nn.Linear and type(head).__name__ != "FSDPLinear":
        raise ValueError(
            f"{argument}: expected a torch.nn.Linear as output projection of {name}, got {type(head).__name__}; leave "
            "it out of LoRA (target_modules) and of quantization"
        )
    if "forward" in vars(head):
        raise ValueError(
            f"{argument}: the output projection of {name} has a forward of its own already (offloading, or another "
            "loss)"
        )
    _check_config(config, name, argument)
    return head


def _check_config(config: Any, name: str, argument: str) -> None:
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    for field in _AFTER_THE_HEAD:
        value = getattr(config, field, None)
        if value is not None and value != 1.0:
            raise ValueError(
                f"{argument}: {name} changes its logits after the output projection ({field}={value}), which a loss "
                "without logits cannot follow"
            )
    if getattr(config, "output_router_logits", False):
        raise ValueError(
            f"{argument}: {name} adds a loss of its router (output_router_logits=True), which would be left out; set "
            "it to False in the config"
        )


def token_nll(
    model: nn.Module, head: nn.Linear, labels_RS: Tensor, inputs: Mapping[str, Any], *, check_output: bool = False
) -> Tensor:
    """NLL [R, S] fp32 of each position's label, 0 where it is -100, on the graph of `model(**inputs)`.

    Args:
        model: as it is called in training, wrapped in whatever it is wrapped in; `head` is somewhere inside.
        labels_RS: int64, the target of each position (shifted already).
        inputs: what the model is called with, without labels.
        check_output: compare what the head gave with what came out (waits for the device): a scale or a cap in between
            would be lost.

    Raises:
        ValueError: the head was not called just once, or something else than its output came out.
    """
    with _answers_with_nll(head, labels_RS) as answers:
        outputs = model(**inputs)
    returned = outputs["logits"] if isinstance(outputs, Mapping) else outputs[0]
    if len(answers) != 1 or not isinstance(returned, Tensor) or returned.shape != (*labels_RS.shape, 1):
        raise ValueError(
            "model: expected its forward to call the output projection once, for all tokens, and to return its output; "
            f"{type(model).__name__} called it {len(answers)} times (another fused loss beside this one?)"
        )
    nll_RS, returned_RS = answers[0], returned[..., 0]
    if check_output and not torch.allclose(returned_RS, nll_RS.to(returned_RS.dtype), rtol=0, atol=0, equal_nan=True):
        raise ValueError(
            f"model: {type(model).__name__} changes its logits after the output projection, which a loss without "
            "logits cannot follow"
        )
    if returned_RS.dtype == nll_RS.dtype:
        return returned_RS
    # A wrapper has rounded it (mixed precision of FSDP). Its tensor stays on the graph, with a gradient of 0, because
    # the wrapper's backward hooks hang on it.
    return nll_RS + 0.0 * returned_RS


@contextmanager
def _answers_with_nll(head: nn.Linear, labels_RS: Tensor) -> Iterator[list[Tensor]]:
    """Inside, `head` answers hidden states [R, S, H] with [R, S, 1], and adds each [R, S] to what is yielded."""
    answers: list[Tensor] = []

    def forward(hidden_RSH: Tensor) -> Tensor:
        if hidden_RSH.shape[:-1] != labels_RS.shape:
            raise ValueError(
                f"model: expected hidden states of all {list(labels_RS.shape)} tokens at the output projection, got "
                f"{list(hidden_RSH.shape[:-1])} (virtual tokens of prompt tuning, or logits_to_keep?)"
            )
        if type(head.weight.data) is not Tensor:
            raise ValueError(
                f"model: expected the whole weight of the output projection in its forward, got a "
                f"{type(head.weight.data).__name__}; tensor parallelism is not supported here"
            )
        answers.append(linear_cross_entropy(hidden_RSH, head.weight, labels_RS, bias=head.bias))
        return answers[-1][..., None].clone()  # no view: FSDP2 warns of those, which an in-place change would break

    head.forward = forward  # type: ignore[method-assign, assignment]
    try:
        yield answers
    finally:
        del head.forward
