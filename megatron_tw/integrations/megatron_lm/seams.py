"""What the plug-in holds on to in Megatron-Core and Megatron-LM, by the names of the parameters in every version that
was tried. Another signature is refused by name: better at the start than with a wrong loss.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Seam:
    """A function or method, and the signatures it may have: parameters in their order."""

    module: str
    name: str
    known: tuple[tuple[str, ...], ...]
    optional: bool = False

    @property
    def target(self) -> str:
        return f"{self.module}.{self.name}"

    def found(self) -> Callable[..., Any] | None:
        """What stands there, None where nothing does."""
        try:
            target: Any = import_module(self.module)
        except ImportError:
            return None
        for part in self.name.split("."):
            target = getattr(target, part, None)
        return target if callable(target) else None


def seam(module: str, name: str, *signatures: str, optional: bool = False) -> Seam:
    """A row of the tables below, its signatures as words."""
    known = tuple(tuple(signature.split()) for signature in signatures)
    return Seam(module=module, name=name, known=known, optional=optional)


_CORE, _TRAINING = "megatron.core", "megatron.training"
_SCHEDULES, _ROTARY = f"{_CORE}.pipeline_parallel.schedules", f"{_CORE}.models.common.embeddings.rotary_pos_embedding"
_SCHEDULE = (
    "forward_step_func data_iterator model num_microbatches seq_length micro_batch_size decoder_seq_length "
    "forward_only collect_non_loss_data first_val_step adjust_tensor_shapes_fn p2p_communicator pg_collection "
    "force_all_reduce"
)
_GPT = (
    "self input_ids position_ids attention_mask decoder_input labels inference_context packed_seq_params "
    "extra_block_kwargs runtime_gather_output inference_params loss_mask padding_mask"
)
_STEP = "forward_step_func data_iterator model optimizer opt_param_scheduler config forward_backward_func iteration"
_GET_SCHEDULE = ("pp_size vp_size", "pp_size vp_size schedule_pg_collection")

CORE_SEAMS = (
    seam(_SCHEDULES, "get_forward_backward_func", *_GET_SCHEDULE),
    seam(_SCHEDULES, "forward_backward_no_pipelining", _SCHEDULE),
    seam(_SCHEDULES, "forward_backward_pipelining_without_interleaving", _SCHEDULE),
    seam(_SCHEDULES, "forward_backward_pipelining_with_interleaving", _SCHEDULE),
    seam(
        _SCHEDULES,
        "forward_step_calc_loss",
        "model output_tensor loss_func config vp_stage collect_non_loss_data num_microbatches forward_data_store "
        "cp_group_size is_last_stage",
    ),
    seam(
        f"{_CORE}.models.gpt.gpt_model",
        "GPTModel.forward",
        _GPT,
        f"{_GPT} is_spec_decode",
        f"{_GPT} output_processor output_processor_context",
    ),
    seam(
        f"{_CORE}.models.common.language_module.language_module",
        "LanguageModule.compute_language_model_loss",
        "self labels logits",
    ),
    seam(f"{_CORE}.tensor_parallel.layers", "ColumnParallelLinear.forward", "self input_ weight runtime_gather_output"),
    seam(f"{_CORE}.utils", "get_model_config", "model"),
    seam(_ROTARY, "RotaryEmbedding.forward", "self max_seq_len offset packed_seq cp_group"),
    seam(
        _ROTARY,
        "RotaryEmbedding.get_rotary_seq_len",
        "self inference_context transformer transformer_input transformer_config packed_seq_params inference_params",
    ),
)
TRAINING_SEAMS = (
    seam(f"{_TRAINING}.arguments", "parse_args", "extra_args_provider ignore_unknown_args"),
    seam(f"{_TRAINING}.arguments", "validate_args", "args defaults"),
    seam(f"{_TRAINING}.initialize", "parse_args", "extra_args_provider ignore_unknown_args", optional=True),
    seam(f"{_TRAINING}.initialize", "validate_args", "args defaults", optional=True),
    seam(f"{_TRAINING}.training", "get_forward_backward_func", *_GET_SCHEDULE),
    seam(f"{_TRAINING}.training", "train_step", _STEP, f"{_STEP} pg_collection p2p_communicator"),
)


def check_seams(seams: Sequence[Seam] = CORE_SEAMS + TRAINING_SEAMS) -> None:
    """That what stands at these seams is what the plug-in was tried with.

    Raises:
        RuntimeError: names what is missing, or has another signature.
    """
    for seam in seams:
        target = seam.found()
        if target is None:
            if seam.optional:
                continue
            raise RuntimeError(f"{seam.target}: not in this version of Megatron, which token weighting cannot go with")
        parameters = tuple(inspect.signature(target).parameters)
        if parameters not in seam.known:
            raise RuntimeError(
                f"{seam.target}: expected the parameters ({', '.join(seam.known[-1])}), got ({', '.join(parameters)}): "
                "this version of Megatron was not tried with token weighting"
            )
