"""A user's training script, as Megatron-LM's pretrain_gpt.py is one: model, data and forward step handed to
`pretrain()`. It knows nothing of token weighting. Ready rows from a .npy file; CPU ranks where there is no GPU.

    python tests/megatron_lm_pretrain.py --rows rows.npy --weights tests/reference/tiny_llama ARGUMENTS OF MEGATRON-LM
"""

import inspect
import os
import signal
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron_lm_cpu import megatron_lm_on_cpu
from torch import Tensor

from megatron_tw.model.families.llama import LLAMA
from megatron_tw.model.gpt import layer_spec
from megatron_tw.objective.zigzag import zigzag_shard

models: list[Any] = []
"""The model chunks of the run that this process made last."""


class Rows(torch.utils.data.Dataset):
    """Rows of S tokens; the last target of a row is not in it, and masked."""

    def __init__(self, file: str, num_samples: int) -> None:
        self.rows, self.num_samples = np.load(file), num_samples

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        tokens = torch.from_numpy(self.rows[index % len(self.rows)])
        loss_mask = torch.ones(len(tokens))
        loss_mask[-1] = 0.0
        return {
            "tokens": tokens,
            "labels": torch.cat((tokens[1:], tokens[:1])),
            "loss_mask": loss_mask,
            "position_ids": torch.arange(len(tokens)),
        }


def datasets(num_samples: Any, vp_stage: int | None = None) -> tuple[Rows | None, ...]:
    from megatron.training import get_args

    return tuple(Rows(get_args().rows, int(count)) if count else None for count in num_samples)


def model_provider(pre_process: bool = True, post_process: bool = True, vp_stage: Any = None, **unused: Any) -> Any:
    from megatron.core.transformer.spec_utils import import_module
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    config = core_transformer_config_from_args(args)
    spec: Any = get_gpt_layer_local_spec(normalization=args.normalization)
    if args.spec is not None:
        spec = import_module(args.spec)
    if args.sequence_parallel:  # of Megatron-Core's norms, those without Transformer Engine refuse it
        spec = layer_spec(LLAMA, config, transformer_engine=False, vp_stage=vp_stage)
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
    )
    if args.weights is not None:
        fill(model, args.weights)
    models.append(model)
    return model


def fill(model: Any, folder: str) -> None:
    """The weights of a Hugging Face folder, each rank its shards."""
    from types import SimpleNamespace

    from megatron_tw.model.architecture import read_architecture
    from megatron_tw.model.build import load_hf

    layout: Any = SimpleNamespace(
        tp_rank=mpu.get_tensor_model_parallel_rank(), tp_size=mpu.get_tensor_model_parallel_world_size()
    )
    load_hf([model], folder, read_architecture(folder), layout)


def get_batch(data_iterator: Any, model: Any) -> dict[str, Tensor | None]:
    """Tokens on the first stage, labels and mask on the last; the first tensor-parallel rank reads and tells."""
    from megatron.core.utils import get_attr_wrapped_model
    from megatron.training import get_args

    args = get_args()
    wanted = []
    if get_attr_wrapped_model(model, "pre_process"):
        wanted += ["tokens", "position_ids"]
    if get_attr_wrapped_model(model, "post_process"):
        wanted += ["labels", "loss_mask"]
    batch: dict[str, Tensor | None] = dict.fromkeys(("tokens", "position_ids", "labels", "loss_mask"))
    if not wanted:
        return batch
    source = next(data_iterator) if data_iterator is not None else None
    shape = (args.micro_batch_size, args.seq_length)
    group, first = mpu.get_tensor_model_parallel_group(), mpu.get_tensor_model_parallel_src_rank()
    cp_rank, cp_size = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    for name in wanted:
        dtype = torch.float32 if name == "loss_mask" else torch.int64
        whole = torch.empty(shape, dtype=dtype, device="cuda") if source is None else source[name].cuda()
        dist.broadcast(whole, first, group=group)
        batch[name] = zigzag_shard(whole, 1, rank=cp_rank, size=cp_size).contiguous()
    return batch


def loss_func(loss_mask: Tensor, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    mask = loss_mask.view(-1)
    loss = (losses.view(-1).float() * mask).sum()
    count = mask.sum().detach().to(torch.int)
    return loss, count, {"lm loss": torch.cat((loss.detach().view(1), count.view(1)))}


def forward_step(data_iterator: Any, model: Any) -> tuple[Tensor, Any]:
    from megatron.training import get_args

    if get_args().curr_iteration == get_args().die_at:
        os.kill(os.getpid(), signal.SIGKILL)
    batch = get_batch(data_iterator, model)
    loss_mask: Any = batch.pop("loss_mask")
    output = model(batch["tokens"], batch["position_ids"], None, labels=batch["labels"], loss_mask=loss_mask)
    return output, partial(loss_func, loss_mask)


def add_arguments(parser: Any) -> Any:
    group = parser.add_argument_group("rows")
    group.add_argument("--rows", required=True)
    group.add_argument("--weights", default=None)
    group.add_argument("--die-at", type=int, default=None, help="Step in which the process kills itself.")
    return parser


def main() -> None:
    from megatron.training import arguments, pretrain

    common: dict[str, Any] = {"forward_step_func": forward_step, "model_provider": model_provider}
    if "extra_args_provider" in inspect.signature(pretrain).parameters:  # up to 0.17
        pretrain(datasets, model_type=ModelType.encoder_or_decoder, extra_args_provider=add_arguments, **common)
        return
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    args = arguments.parse_and_validate_args(extra_args_provider=add_arguments)
    pretrain(pretrain_cfg_container_from_args(args), datasets, model_type=ModelType.encoder_or_decoder, **common)


if __name__ == "__main__":
    if not torch.cuda.is_available():
        megatron_lm_on_cpu()
    main()
