"""A run's checkpoint to a Hugging Face folder, and the other way."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tw.config import ComputeConfig
from megatron_tw.config.conversion import ConversionConfig, check_conversion
from megatron_tw.model.build import check_export_target, save_hf
from megatron_tw.runtime.checkpoint import RunState, check_save_target, save_checkpoint
from megatron_tw.runtime.opening import join_world, open_model
from megatron_tw.runtime.source import open_source


def convert(config: ConversionConfig) -> str:
    """Convert as the options say, in the source's own dtype (fp32 and bf16), and return the folder written.

    Called on every rank of the launcher's world.

    Raises:
        ValueError: the options do not name one source and one target, or they do not fit.
    """
    device = join_world(config.parallel)
    check_conversion(config, dist.get_world_size())
    options = config.conversion
    if options.save_hf is not None:
        check_export_target(Path(options.save_hf))
    check_save_target(options.save, None)
    source = open_source(config.model, load=options.load)
    architecture = source.architecture
    compute = ComputeConfig(bf16=architecture.dtype == torch.bfloat16)
    layout, chunks = open_model(source, config.layout, compute, device)
    length = options.seq_length or architecture.max_position_embeddings
    if options.save_hf is not None:
        save_hf(
            chunks,
            options.save_hf,
            architecture,
            layout,
            max_position_embeddings=length,
            tokenizer_dir=source.tokenizer_dir,
        )
        return options.save_hf
    assert options.save is not None
    state = RunState(
        iteration=0,
        consumed_samples=0,
        seq_length=length,
        old_context=architecture.max_position_embeddings,
        loader={},
    )
    return str(save_checkpoint(options.save, chunks, state, layout, tokenizer_dir=source.tokenizer_dir))
