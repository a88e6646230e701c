"""Options of tools/convert_checkpoint.py."""

from dataclasses import dataclass, field

from megatron_tw.config.schema import ModelConfig, ParallelConfig


@dataclass(frozen=True, kw_only=True)
class ConversionOptions:
    """Conversion: from a run's newest checkpoint (--load) to a Hugging Face folder (--save-hf), or from --load-hf to
    --save."""

    load: str | None = None
    """Folder of a run, whose newest checkpoint is exported."""
    verify_checkpoint: bool = True
    """Compare the files of a checkpoint with their checksums before it is read."""
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
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
