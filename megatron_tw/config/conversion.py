"""Options of tools/convert_checkpoint.py."""

from dataclasses import dataclass, field
from pathlib import Path

from megatron_tw.config.checks import check_model
from megatron_tw.config.layout_checks import check_parallel
from megatron_tw.config.options import flag
from megatron_tw.config.schema import ModelConfig, ParallelConfig, ShardingConfig


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Conversion: from a run's newest checkpoint (--load) to a Hugging Face folder (--save-hf), or from --load-hf to
    --save."""

    load: str | None = None
    """Folder of a run, whose newest checkpoint is exported."""
    verify_checkpoint: bool = True
    """Compare the files of a checkpoint or an export with their checksums before it is read."""
    save_hf: str | None = None
    """New folder in Hugging Face format."""
    save: str | None = None
    """New folder for a checkpoint of the weights alone, which --load starts from."""
    seq_length: int | None = None
    """Context length that the result names, in tokens (null: the source's)."""


@dataclass(frozen=True, kw_only=True)
class ConversionConfig:
    """All options of a conversion, which runs alone or, for models too large for one rank, under torchrun."""

    conversion: ConversionOptions = field(default_factory=ConversionOptions)
    parallel: ShardingConfig = field(default_factory=ShardingConfig)
    model: ModelConfig = field(default_factory=ModelConfig)

    @property
    def layout(self) -> ParallelConfig:
        """`parallel`, with the axes that a conversion has no use for left at 1."""
        return ParallelConfig(**vars(self.parallel))


def check_conversion(config: ConversionConfig, world_size: int) -> None:
    """Check that the options name one source and one target, and fit the number of ranks.

    Raises:
        ValueError: names the options.
    """
    options = config.conversion
    directions = (options.load, options.save_hf), (config.model.load_hf, options.save)
    given = [pair for pair in directions if all(pair)]
    if len(given) != 1 or sum(value is not None for pair in directions for value in pair) != 2:
        raise ValueError("expected --load with --save-hf, or --load-hf with --save, and nothing of the other pair")
    if options.seq_length is not None and options.seq_length < 2:
        raise ValueError(f"--seq-length: expected 2 or more, got {options.seq_length}")
    (source, target), (source_name, target_name) = (
        given[0],
        ("load", "save_hf") if options.load else ("load_hf", "save"),
    )
    if Path(str(source)).resolve() == Path(str(target)).resolve():
        raise ValueError(
            f"{flag(target_name)}: expected another folder than {flag(source_name)}, got {target} for both"
        )
    check_parallel(config.layout, world_size)
    check_model(config.model)
