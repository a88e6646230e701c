"""The model: Megatron-Core's GPTModel whose last stage returns per-token NLL (or logits), never both and never logits
on the way."""

from collections.abc import Mapping
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.layers import set_tensor_model_parallel_attributes
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_tw.losses import linear_cross_entropy
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.families import Family
from megatron_tw.model.families.layers import norm_of
from megatron_tw.model.rotary import ShardedRotaryEmbedding, rotary_embedding
from megatron_tw.parallel.layout import Layout

_EXTRA_STATE = "_extra_state"


class TokenWeightedGPT(GPTModel):
    """A model of which this rank holds its tensor-parallel shard of one pipeline stage (or model chunk).

    forward(input_ids [B, S], position_ids=None, attention_mask=None, labels=[B, S], packed_seq_params=SequenceShard)
    returns on the last stage the NLL [S, B] fp32 of `labels` (0 where the label is -100), or with labels=None this
    rank's vocabulary shard of the logits [S, B, V / TP]; on other stages the hidden states. With top1=True the last
    stage returns (NLL, whether the label is the first choice of the whole vocabulary [S, B] bool).
    """

    def __init__(
        self,
        architecture: Architecture,
        config: TransformerConfig,
        layer_spec: ModuleSpec | TransformerBlockSubmodules,
        *,
        padded_vocab_size: int,
        layout: Layout,
        max_sequence_length: int,
        pre_process: bool,
        post_process: bool,
        vp_stage: int | None,
        loss_chunk_tokens: int | None,
        loss_keep_logits_bytes: int,
    ) -> None:
        super().__init__(
            config=config,
            transformer_layer_spec=layer_spec,
            vocab_size=padded_vocab_size,
            max_sequence_length=max_sequence_length,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=architecture.tied_embeddings,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        self.architecture = architecture
        self.layout = layout
        self.loss_chunk_tokens = loss_chunk_tokens
        self.loss_keep_logits_bytes = loss_keep_logits_bytes
        self._top1 = False
        self.rotary_pos_emb = ShardedRotaryEmbedding(
            rotary_embedding(architecture).inv_freq, torch.device(torch.cuda.current_device())
        )
        if post_process and architecture.family.has_head_bias:
            bias = torch.empty(
                padded_vocab_size // layout.tp_size, dtype=config.params_dtype, device=torch.cuda.current_device()
            )
            self.output_layer.bias = torch.nn.Parameter(bias)  # GPTModel has no option for it
            set_tensor_model_parallel_attributes(self.output_layer.bias, is_parallel=True, dim=0, stride=1)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron-Core's, of the weights alone. What Transformer Engine's modules keep besides (`_extra_state`: scales
        of FP8, which a run makes again) would tie a checkpoint to them."""
        state = super().sharded_state_dict(*args, **kwargs)
        return {name: entry for name, entry in state.items() if not name.endswith(_EXTRA_STATE)}

    def load_weights(self, state: Mapping[str, Any]) -> None:
        """Take over the loaded entries of `sharded_state_dict`.

        Raises:
            ValueError: weights are missing, or are not the model's.
        """
        missing, unknown = self.load_state_dict(state, strict=False)
        wrong = [name for name in [*missing, *unknown] if not name.endswith(_EXTRA_STATE)]
        if wrong:
            raise ValueError(f"weights that are missing or unknown: {', '.join(wrong)}")

    def head_weight(self) -> Tensor:
        """The output projection [V / TP, hidden] of this rank: the embedding's own weight where they are tied."""
        for hook in self.output_layer._forward_pre_hooks.values():
            hook(self.output_layer, ())  # used without a call of the module: --overlap-param-gather waits here for it
        if self.share_embeddings_and_output_weights:
            return self.shared_embedding_or_output_weight()
        return self.output_layer.weight

    def forward(self, *args: Any, top1: bool = False, **kwargs: Any) -> Tensor | tuple[Tensor, Tensor]:
        self._top1 = top1  # GPTModel.forward hands nothing of its callers' own to _postprocess
        try:
            return super().forward(*args, **kwargs)
        finally:
            self._top1 = False

    def _postprocess(
        self, hidden_states: Tensor, labels: Tensor | None = None, **unused: Any
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not self.post_process:
            return hidden_states
        if labels is None:
            logits, _ = self.output_layer(
                hidden_states, weight=self.head_weight() if self.share_embeddings_and_output_weights else None
            )
            return logits
        labels_SB = labels.transpose(0, 1).contiguous()
        top1_SB = torch.empty_like(labels_SB, dtype=torch.bool) if self._top1 else None
        nll_SB = linear_cross_entropy(
            hidden_states,
            self.head_weight(),
            labels_SB,
            bias=self.output_layer.bias,
            tp_group=self.layout.tp_group if self.layout.tp_size > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
            vocab_size=self.architecture.vocab_size,
            chunk_tokens=self.loss_chunk_tokens,
            keep_logits_bytes=self.loss_keep_logits_bytes,
            top1=top1_SB,
        )
        return nll_SB if top1_SB is None else (nll_SB, top1_SB)


def layer_spec(
    family: Family, config: TransformerConfig, *, transformer_engine: bool, vp_stage: int | None
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, and the norm after the last."""
    spec = family.layer(family, transformer_engine)
    num_layers = get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=[spec] * num_layers, layer_norm=norm_of(family, transformer_engine))


def transformer_engine_available() -> bool:
    """Whether Transformer Engine can be imported here."""
    try:
        import transformer_engine  # noqa: F401
    except ImportError:
        return False
    return True
