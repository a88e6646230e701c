"""A training step as Megatron-Core alone makes it: its GPTModel, its layers, its cross-entropy, its optimizer. Nothing
of this project is in its way but the choice of the device.

R = rows, N = tokens of a row.
"""

import importlib.util
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

ENGINES_LAYERS, OWN_LAYERS = "layers of Transformer Engine", "its local layers"


def takes_engine(*, bf16: bool) -> bool:
    """Whether its layers are Transformer Engine's here."""
    return bf16 and torch.cuda.is_available() and importlib.util.find_spec("transformer_engine") is not None


def least_bytes(
    architecture: Any, *, tokens: int, bf16: bool, tp_size: int, recompute: bool, engine: bool
) -> dict[str, int]:
    """What a step of `PlainMegatron` with rows of so many tokens holds at once on a rank, at the least, by what it is.

    Weights, gradients and optimizer: 2 + 4 + 12 bytes of a weight in bf16, 4 + 4 + 8 in fp32. Logits: of a whole row,
    and in bf16 their fp32 copy, which the cross-entropy makes. Scores, without Transformer Engine: heads x tokens x
    tokens, the softmax in fp32, and in bf16 its copy; of all layers, of one under recomputation. All else is left out.
    """
    from megatron_tw.model.families.table import layer_shapes

    a = architecture
    weights = a.num_layers * sum(prod(shape) for shape in layer_shapes(a)) + 2 * a.vocab_size * a.hidden_size
    number = 4 + 2 if bf16 else 4
    logits = tokens * a.vocab_size * number // tp_size
    scores = 0 if engine else (1 if recompute else a.num_layers) * a.num_attention_heads * tokens**2 * number // tp_size
    least = {"weights, gradients and optimizer": weights * (18 if bf16 else 16) // tp_size, "logits": logits}
    if not recompute:
        return least | {"scores": scores}
    # A layer is run again when the logits are gone.
    return least if logits >= scores else {**least, "logits": 0, "scores": scores}


class PlainMegatron:
    """A Llama of an architecture's shape under TP alone (with sequence parallelism where Transformer Engine's layers
    are there), for rows whose every target counts."""

    def __init__(self, architecture: Any, *, bf16: bool, tp_size: int, recompute: bool) -> None:
        from megatron.core import parallel_state
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.models.gpt import GPTModel
        from megatron.core.models.gpt.gpt_layer_specs import (
            get_gpt_layer_local_spec,
            get_gpt_layer_with_transformer_engine_spec,
        )
        from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
        from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
        from megatron.core.transformer.transformer_config import TransformerConfig

        if not parallel_state.model_parallel_is_initialized():
            parallel_state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
        model_parallel_cuda_manual_seed(1)
        engine = takes_engine(bf16=bf16)
        self.layers_of = ENGINES_LAYERS if engine else OWN_LAYERS
        gpu = torch.cuda.is_available()
        dtype = torch.bfloat16 if bf16 else torch.float32
        recomputing = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
        config = TransformerConfig(
            num_layers=architecture.num_layers,
            hidden_size=architecture.hidden_size,
            ffn_hidden_size=architecture.ffn_hidden_size,
            num_attention_heads=architecture.num_attention_heads,
            num_query_groups=architecture.num_query_groups,
            normalization="RMSNorm",
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            hidden_dropout=0.0,
            attention_dropout=0.0,
            bf16=bf16,
            params_dtype=dtype,
            pipeline_dtype=dtype,
            tensor_model_parallel_size=tp_size,
            sequence_parallel=engine and tp_size > 1,
            gradient_accumulation_fusion=engine
            and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None,
            bias_dropout_fusion=gpu,
            bias_activation_fusion=gpu,
            apply_rope_fusion=engine,
            masked_softmax_fusion=False,
            persist_layer_norm=False,
            attention_softmax_in_fp32=True,
            calculate_per_token_loss=True,
            **(recomputing if recompute else {}),
        )
        spec = (
            get_gpt_layer_with_transformer_engine_spec()
            if engine
            else get_gpt_layer_local_spec(normalization="RMSNorm")
        )
        # Without Transformer Engine its attention wants the mask that a causal one is.
        self.needs_mask = not engine
        multiple = 128 * tp_size
        model = GPTModel(
            config,
            spec,
            vocab_size=-(-architecture.vocab_size // multiple) * multiple,
            max_sequence_length=architecture.max_position_embeddings,
            position_embedding_type="rope",
            rotary_base=int(architecture.rotary_base),
            share_embeddings_and_output_weights=False,
        )
        model = model.bfloat16() if bf16 else model
        if gpu:
            model.cuda()
        ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
        self.model = DistributedDataParallel(config, ddp, model)
        self.optimizer = get_megatron_optimizer(
            OptimizerConfig(
                optimizer="adam", lr=1e-5, bf16=bf16, params_dtype=dtype, use_distributed_optimizer=True, clip_grad=1.0
            ),
            [self.model],
        )

    def parameters(self) -> Iterator[torch.nn.Parameter]:
        return self.model.parameters()

    def step(self, rows_RN: Tensor) -> None:
        """One update from micro-batches of one row each."""
        from megatron.core.pipeline_parallel.schedules import get_forward_backward_func

        self.model.zero_grad_buffer()
        self.optimizer.zero_grad()
        get_forward_backward_func()(
            forward_step_func=self._forward,
            data_iterator=iter(rows_RN.split(1)),
            model=[self.model],
            num_microbatches=len(rows_RN),
            seq_length=rows_RN.shape[1],
            micro_batch_size=1,
            forward_only=False,
        )
        updated, _, _ = self.optimizer.step()
        assert updated

    def _forward(self, iterator: Iterator[Tensor], model: torch.nn.Module) -> tuple[Tensor, Any]:
        row_1N = next(iterator).to(torch.cuda.current_device())
        length = row_1N.shape[1]
        positions = torch.arange(length, device=row_1N.device)[None]
        mask = None
        if self.needs_mask:
            mask = torch.ones(1, 1, length, length, dtype=torch.bool, device=row_1N.device).triu(1)
        labels_1N = row_1N.roll(-1, dims=1)
        nll_1N = model(row_1N, positions, mask, labels=labels_1N)
        return nll_1N, self._loss

    def _loss(self, nll_1N: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        total = nll_1N[:, :-1].sum()  # the last position has no target
        count = torch.tensor(nll_1N.shape[1] - 1, dtype=torch.int, device=nll_1N.device)
        return total, count, {"lm loss": total.detach()}
