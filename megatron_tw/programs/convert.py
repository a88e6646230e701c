"""A run's checkpoint to a Hugging Face folder, and the other way."""

from pathlib import Path

import torch
import torch.distributed as dist

from megatron_tw.config import ComputeConfig
from megatron_tw.config.conversion import ConversionConfig, check_conversion
from megatron_tw.model.build import check_export_target, save_hf
from megatron_tw.runtime.checkpoint import save_checkpoint
from megatron_tw.runtime.checksums import seal
from megatron_tw.runtime.opening import join_world, open_model
from megatron_tw.runtime.outputs import checkpoint_bytes, hold_export, hold_run
from megatron_tw.runtime.run_folder import RunState, check_save_target
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
    source = open_source(
        config.model, load=options.load, seq_length=options.seq_length, verify=options.verify_checkpoint
    )
    architecture = source.architecture
    compute = ComputeConfig(bf16=architecture.dtype == torch.bfloat16)
    own_length = architecture.max_position_embeddings
    length = options.seq_length or own_length
    if options.save_hf is not None and length < own_length:
        raise ValueError(f"--seq-length: expected {own_length} or more, the context of {source.name}, got {length}")
    with (
        hold_run(options.save, checkpoint_bytes(architecture, architecture.dtype)) as lock,
        hold_export(options.save_hf, architecture, architecture.dtype) as export_lock,
    ):
        layout, chunks = open_model(source, config.layout, compute, device)
        if options.save_hf is not None:
            try:
                save_hf(
                    chunks,
                    options.save_hf,
                    architecture,
                    layout,
                    max_position_embeddings=length,
                    tokenizer_dir=source.tokenizer_dir,
                    still_ours=export_lock.check if export_lock is not None else None,
                    seal=seal,
                )
            except OSError as error:
                raise OSError(f"--save-hf {options.save_hf}: could not be written: {error}") from error
            return options.save_hf
        assert options.save is not None
        state = RunState(
            iteration=0,
            consumed_samples=0,
            seq_length=length,
            old_context=own_length,
            loader={},
        )
        return str(save_checkpoint(options.save, chunks, state, layout, lock=lock, tokenizer_dir=source.tokenizer_dir))
