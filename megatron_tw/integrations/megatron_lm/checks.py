"""What Megatron-LM can do that token weighting cannot go with: refused by name, before anything is allocated."""

from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_tw.integrations.megatron_lm.options import TokenWeightingOptions, renamed


@dataclass(frozen=True)
class Refusal:
    """An option of Megatron-LM. where: whether its value is one that cannot be gone with. why: in the message."""

    flag: str
    name: str
    where: Callable[[Any], bool]
    why: str


def _given(value: Any) -> bool:
    return bool(value)


def _graphs(value: Any) -> bool:
    return value not in (None, "none")


_GRAPH = "a CUDA graph replays one shape, and a step runs short windows too"
_DOCUMENTS = "a short window sees across the documents of its row, and the long pass would not"
_HEAD = "the loss is made from the last hidden states and one output weight"
REFUSED = (
    Refusal("--cuda-graph-impl", "cuda_graph_impl", _graphs, _GRAPH),
    Refusal("--enable-cuda-graph", "enable_cuda_graph", _given, _GRAPH),
    Refusal("--external-cuda-graph", "external_cuda_graph", _given, _GRAPH),
    Refusal(
        "--overlap-moe-expert-parallel-comm",
        "overlap_moe_expert_parallel_comm",
        _given,
        "its schedule plans the loss with the layers",
    ),
    Refusal(
        "--moe-expert-rank-capacity-factor",
        "moe_expert_rank_capacity_factor",
        lambda value: value is not None,
        "it runs a step again that overflowed",
    ),
    Refusal(
        "--hybrid-context-parallel",
        "hybrid_context_parallel",
        _given,
        "a row's weights need the row on the same ranks at every step",
    ),
    Refusal("--mtp-num-layers", "mtp_num_layers", _given, "the losses of further tokens have no weights"),
    Refusal("--use-mup", "use_mup", _given, "its factor on the logits was not tried with this loss"),
    Refusal("--sft", "sft", _given, "packed rows have no fixed length"),
    Refusal("--dataloader-inter-document-masking", "dataloader_inter_document_masking", _given, _DOCUMENTS),
    Refusal("--reset-attention-mask", "reset_attention_mask", _given, _DOCUMENTS),
    Refusal(
        "--reset-position-ids",
        "reset_position_ids",
        _given,
        "positions of a short window count from its own beginning",
    ),
    Refusal("--defer-embedding-wgrad-compute", "defer_embedding_wgrad_compute", _given, _HEAD),
    Refusal("--logits-load-dir", "logits_load_dir", _given, "a loss of its own"),
    Refusal("--logits-save-dir", "logits_save_dir", _given, "the output layer gives no logits that could be saved"),
    Refusal(
        "--tensor-parallel-num-weight-shards",
        "gtp_weight_remat_size",
        lambda value: (value or 1) > 1,
        "the loss needs the whole output weight of a tensor-parallel rank",
    ),
    Refusal("--moe-input-jitter-eps", "moe_input_jitter_eps", _given, "it draws at random in the short windows too"),
    Refusal("--qk-clip", "qk_clip", _given, "it would clip by the attention in short windows as well"),
    Refusal("--fp8-format", "fp8", _given, "its scales would learn from the short windows as well"),
    Refusal("--fp4-format", "fp4", _given, "its scales would learn from the short windows as well"),
    Refusal("--tp-comm-overlap", "tp_comm_overlap", _given, "its buffers have one shape"),
    Refusal("--use-megatron-fsdp", "use_megatron_fsdp", _given, "it was not tried"),
    Refusal("--use-custom-fsdp", "use_custom_fsdp", _given, "it was not tried"),
    Refusal("--use-torch-fsdp2", "use_torch_fsdp2", _given, "it was not tried"),
    Refusal("--perform-rl-step", "perform_rl_step", _given, "a loss of its own"),
    Refusal("--use-legacy-models", "use_legacy_models", _given, _HEAD),
    Refusal("--yaml-cfg", "yaml_cfg", lambda value: value is not None, "it replaces the arguments of the command line"),
)


def check_arguments(args: Namespace, options: TokenWeightingOptions) -> None:
    """That a run with these arguments of Megatron-LM, as it has validated them, can be token-weighted.

    Raises:
        ValueError: names the option, and says why.
    """
    for refusal in REFUSED:
        value = getattr(args, refusal.name, None)
        if refusal.where(value):
            raise ValueError(f"{refusal.flag}: cannot go with --token-weighting, got {value}: {refusal.why}")
    if not args.calculate_per_token_loss:
        raise ValueError(
            "--calculate-per-token-loss: expected with --token-weighting: without it every micro-batch is divided by "
            "a count of its own, and weights would not mean the same everywhere"
        )
    if getattr(args, "decoder_seq_length", None) not in (None, args.seq_length):
        raise ValueError(f"--decoder-seq-length {args.decoder_seq_length}: cannot go with --token-weighting")
    renamed(lambda: options.check(args.seq_length))
