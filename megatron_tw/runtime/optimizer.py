"""The model made ready to train: precision and data-parallel wrappers, the distributed AdamW, the learning-rate
schedule."""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.distrib_optimizer import USING_TE_OPTIMIZER
from megatron.core.optimizer.optimizer import ChainedOptimizer, param_group_identifier_keys
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import Float16Module

from megatron_tw.config import OptimizationConfig, RunConfig
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.parallel.devices import prepare_device

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp8": torch.uint8}
"""uint8 is how Transformer Engine's AdamW is told FP8."""


def wrap_for_training(chunks: Sequence[TokenWeightedGPT], config: RunConfig) -> list[DistributedDataParallel]:
    """Model chunks with bf16 casting and Megatron's data parallelism around them; gradients are summed in fp32
    unless --main-grads-dtype says otherwise.

    The parameters move into contiguous buffers, so call it after their values are in place and before the optimizer
    exists. config: with its overlaps decided.
    """
    options = config.data_parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=config.optimizer.main_grads_dtype == "fp32",
        overlap_grad_reduce=bool(options.overlap_grad_reduce),
        overlap_param_gather=bool(options.overlap_param_gather),
        bucket_size=options.ddp_bucket_size,
        use_distributed_optimizer=True,
    )
    model = []
    for index, chunk in enumerate(chunks):
        inner: torch.nn.Module = Float16Module(chunk.config, chunk) if config.compute.bf16 else chunk
        model.append(DistributedDataParallel(chunk.config, ddp_config, inner, disable_bucketing=index > 0))
    megatron_config = chunks[0].config
    megatron_config.finalize_model_grads_func = finalize_model_grads
    if options.overlap_grad_reduce:
        no_sync = [chunk.no_sync for chunk in model]
        megatron_config.no_sync_func = no_sync if len(no_sync) > 1 else no_sync[0]
    return model


def make_optimizer(model: Sequence[DistributedDataParallel], config: RunConfig) -> MegatronOptimizer:
    """AdamW sharded over data- and context-parallel ranks, fp32 main weights under bf16, no weight decay on norms.

    Its gradient norm and clipping are global over all axes. Where that norm is NaN or infinite it makes no update.
    """
    optimizer = get_megatron_optimizer(
        OptimizerConfig(**optimizer_fields(config)),
        list(model),
        use_gloo_process_groups=dist.get_backend() == "nccl",
    )
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        part.data_parallel_group_gloo = part.data_parallel_group_gloo or part.data_parallel_group
    model[0].config.grad_scale_func = optimizer.scale_loss
    _update_by_finite_gradients(optimizer)
    return optimizer


def _update_by_finite_gradients(optimizer: MegatronOptimizer) -> None:
    """Megatron-Core's step measures the gradients' norm, clips, and updates whatever that norm is, but under fp16. In
    the way of its last part stands what the first has found."""
    assert isinstance(optimizer, ChainedOptimizer), "the parts of its step are called by name"
    measure, update, norm = optimizer.get_grad_norm, optimizer.step_with_ready_grads, math.nan

    def get_grad_norm() -> float:
        nonlocal norm
        norm = measure()
        return norm

    optimizer.get_grad_norm = get_grad_norm
    optimizer.step_with_ready_grads = lambda: math.isfinite(norm) and update()


_GROUP_KEYS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
"""What tells parameter groups apart."""


def optimizer_fields(config: RunConfig) -> dict[str, Any]:
    """The fields of Megatron-Core's OptimizerConfig.

    Raises:
        ValueError: --use-precision-aware-optimizer without Transformer Engine (with --optimizer-cpu-offload too, where
        Megatron-Core asks for its version), or --optimizer-cpu-offload without a GPU.
    """
    options = config.optimizer
    if options.use_precision_aware_optimizer and not USING_TE_OPTIMIZER:
        raise ValueError("--use-precision-aware-optimizer: expected Transformer Engine with its AdamW, found none")
    if options.optimizer_cpu_offload and prepare_device().type != "cuda":
        raise ValueError("--optimizer-cpu-offload: expected a GPU to take the optimizer's state from, found none")
    return {
        "optimizer": "adam",
        "lr": options.lr,
        "min_lr": options.min_lr,
        "weight_decay": options.weight_decay,
        "adam_beta1": options.adam_beta1,
        "adam_beta2": options.adam_beta2,
        "adam_eps": options.adam_eps,
        "clip_grad": options.clip_grad or math.inf,  # 0 would leave the norm out of the metrics too
        "bf16": config.compute.bf16,
        "params_dtype": torch.bfloat16 if config.compute.bf16 else torch.float32,
        "fp8_recipe": config.kernels.fp8_recipe if config.kernels.fp8_format is not None else None,
        "use_distributed_optimizer": True,
        "overlap_param_gather": bool(config.data_parallel.overlap_param_gather),
        "use_precision_aware_optimizer": options.use_precision_aware_optimizer,
        "main_grads_dtype": _DTYPES[options.main_grads_dtype],
        "main_params_dtype": _DTYPES[options.main_params_dtype],
        "exp_avg_dtype": _DTYPES[options.exp_avg_dtype],
        "exp_avg_sq_dtype": _DTYPES[options.exp_avg_sq_dtype],
        "optimizer_cpu_offload": options.optimizer_cpu_offload,
        "optimizer_offload_fraction": options.optimizer_offload_fraction if options.optimizer_cpu_offload else 0.0,
    }


def load_optimizer(optimizer: MegatronOptimizer, state: dict[str, Any]) -> None:
    """Take over a checkpoint's optimizer state. Numbers of the parameter groups that it does not have stay as this
    optimizer was made with them: torch's AdamW saves no `bias_correction`, which Transformer Engine's reads."""
    made = [dict(group) for group in optimizer.param_groups]
    _find_groups_again(made, [state] if "optimizer" in state else list(state.values()))
    with torch.no_grad():  # its fp32 main weights are the trained weights themselves
        optimizer.load_state_dict(state)
    for group, before in zip(optimizer.param_groups, made, strict=True):
        for name in before.keys() - group.keys():
            group[name] = before[name]


def _find_groups_again(made: Sequence[dict[str, Any]], states: Sequence[dict[str, Any]]) -> None:
    """Give saved groups this run's options, where Megatron-Core (from 0.19) tells groups apart by options too: it would
    not find those of a run with another learning rate, or those that an earlier version saved.
    """
    options = [key for key in param_group_identifier_keys if key not in _GROUP_KEYS]
    own = {tuple(group.get(key) for key in _GROUP_KEYS): group for group in made}
    for state in states:
        for saved in state["optimizer"]["param_groups"]:
            group = own.get(tuple(saved.get(key) for key in _GROUP_KEYS))
            if group is not None:
                for key in options:
                    saved.pop(key, None)
                saved.update({key: group[key] for key in options if key in group})


def use_options(optimizer: MegatronOptimizer, options: OptimizationConfig) -> None:
    """Give the parameter groups this run's numbers: a checkpoint's came with its optimizer state."""
    for group in optimizer.param_groups:
        group.update(
            max_lr=options.lr,
            min_lr=options.min_lr,
            betas=(options.adam_beta1, options.adam_beta2),
            eps=options.adam_eps,
        )


def gather_weights(model: Sequence[DistributedDataParallel]) -> None:
    """Make the weights of all ranks whole: --overlap-param-gather leaves that to the next forward pass. Collective
    over data- and context-parallel ranks."""
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.disable_forward_pre_hook(param_sync=True)
            chunk.enable_forward_pre_hook()


def make_scheduler(optimizer: MegatronOptimizer, config: RunConfig) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then constant, linear or cosine; counted in optimizer steps. Weight decay stays
    constant."""
    options = config.optimizer
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=options.lr,
        min_lr=options.min_lr,
        lr_warmup_steps=options.lr_warmup_iters,
        lr_decay_steps=options.decay_iters(config.train.train_iters),
        lr_decay_style=options.lr_decay_style,
        start_wd=options.weight_decay,
        end_wd=options.weight_decay,
        wd_incr_steps=config.train.train_iters,
        wd_incr_style="constant",
        # The flags of this run win over those of the run that it resumes; the number of steps taken is restored.
        override_opt_param_scheduler=True,
        use_checkpoint_opt_param_scheduler=False,
    )
