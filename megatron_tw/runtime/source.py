"""Where a model comes from: a run's newest checkpoint (--load), the weights of an earlier run's
(--pretrained-checkpoint), or a Hugging Face folder (--load-hf)."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_tw.config import ModelConfig
from megatron_tw.data.rows import TokenRows
from megatron_tw.model.architecture import Architecture, read_architecture
from megatron_tw.model.build import check_finite, load_hf
from megatron_tw.model.gpt import TokenWeightedGPT
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.parallel.layout import Layout
from megatron_tw.runtime.checkpoint import HasState, load_checkpoint
from megatron_tw.runtime.intact import check_export, open_checkpoint
from megatron_tw.runtime.run_folder import SavedCheckpoint, check_same_model


@dataclass(frozen=True)
class ModelSource:
    """A model that can be loaded: its architecture, and where its weights are.

    saved: the checkpoint that a run goes on from. pretrained: an earlier run's, of which the weights alone are taken;
    None beside `saved`. load_hf: the folder with the weights where both are None.
    """

    architecture: Architecture
    saved: SavedCheckpoint | None
    load_hf: str | None
    pretrained: SavedCheckpoint | None = None
    start_context: int | None = None
    """Tokens of the context that --load-hf names, None without it."""

    @property
    def checkpoint(self) -> SavedCheckpoint | None:
        """The checkpoint that holds the weights."""
        return self.saved or self.pretrained

    @property
    def name(self) -> str:
        """The folder the weights come from."""
        return str(self.checkpoint.directory) if self.checkpoint is not None else str(self.load_hf)

    @property
    def old_context(self) -> int:
        """Tokens of the context that the model had before the run that extends it."""
        if self.pretrained is not None:
            return self.pretrained.state.seq_length
        saved = self.saved.state.old_context if self.saved is not None else None
        return saved or self.start_context or self.architecture.max_position_embeddings

    @property
    def tokenizer_dir(self) -> Path | None:
        """Folder with the model's tokenizer files, None when nobody kept them. May hold other files too (a Hugging
        Face folder)."""
        if self.checkpoint is not None:
            return self.checkpoint.tokenizer_dir if self.checkpoint.tokenizer_dir.is_dir() else None
        return Path(self.load_hf) if self.load_hf is not None else None

    def fill(
        self,
        chunks: Sequence[TokenWeightedGPT],
        layout: Layout,
        optimizer: MegatronOptimizer | None = None,
        scheduler: OptimizerParamScheduler | None = None,
        scorer: HasState | None = None,
        *,
        parallel_load: bool = False,
    ) -> None:
        """Load the weights into `chunks`; from the checkpoint of --load also the states of optimizer, scheduler and
        scorer. Collective over the world.

        parallel_load: data- and context-parallel ranks share the reading of a checkpoint."""
        share_among = layout.dp_cp_group if parallel_load else None
        if self.saved is not None:
            load_checkpoint(self.saved, chunks, optimizer, scheduler, scorer, share_among=share_among)
            check_finite(chunks, self.saved.directory)
        elif self.pretrained is not None:
            load_checkpoint(self.pretrained, chunks, share_among=share_among)
            check_finite(chunks, self.pretrained.directory)
        else:
            assert self.load_hf is not None
            load_hf(chunks, self.load_hf, self.architecture, layout)


def open_source(
    model: ModelConfig,
    *,
    load: str | None,
    seq_length: int | None,
    pretrained: str | None = None,
    verify: bool = True,
) -> ModelSource:
    """Find the model and read its architecture, changed as `model` asks; of the weights the headers alone. Collective
    over the world.

    load: folder of a run, or one checkpoint; what it holds wins over the others. seq_length: tokens of the context for
    which the rotary embedding is stretched, None where nobody says. pretrained: as `load`, of an earlier run, whose
    weights win over --load-hf's; looked into only where `load` holds no checkpoint. verify: compare the files of the
    checkpoint or the folder with their checksums.

    Raises:
        ValueError: neither option names a model, the checkpoint is damaged, or of another model than the folder; or
        the folder's weights are not all there (see SafetensorsFolder).
    """
    load_hf, saved = model.load_hf, open_checkpoint(load, verify=verify) if load is not None else None
    checkpoint, option = saved, "--load"
    if saved is None and pretrained is not None:
        option = "--pretrained-checkpoint"
        checkpoint = open_checkpoint(pretrained, verify=verify, option=option)
        if checkpoint is None:
            raise ValueError(f"{option} {pretrained}: expected the folder of a run, found no checkpoint in it")
    start_context = None
    if load_hf is not None:
        if checkpoint is None and verify:
            check_export(load_hf, "--load-hf")
        try:
            architecture = read_architecture(load_hf)
            if checkpoint is None:
                SafetensorsFolder(load_hf, architecture)  # headers alone: what is missing is told before all else
        except ValueError as error:
            raise ValueError(f"--load-hf: {error}") from error
        start_context = architecture.max_position_embeddings
        if checkpoint is not None:
            check_same_model(checkpoint, architecture, option)
            architecture = checkpoint.architecture
    elif checkpoint is not None:
        architecture = checkpoint.architecture
    elif load is not None:
        raise ValueError(f"--load {load}: holds no checkpoint, and there is no --load-hf to start from")
    else:
        raise ValueError(
            "--load-hf: expected a Hugging Face folder to start from (or --load with a checkpoint), got none"
        )
    pretrained_from = checkpoint if saved is None else None
    return ModelSource(architecture.with_rope(model, seq_length), saved, load_hf, pretrained_from, start_context)


def row_bos_id(option: int | None, rows: TokenRows, architecture: Architecture) -> int | None:
    """The id of BOS, with which a row may begin: `--bos-id`, else that of the rows' tokenizer, else the
    checkpoint's.

    Raises:
        ValueError: the option is no id of the vocabulary, or another than the BOS of the rows.
    """
    if option is not None and not 0 <= option < architecture.vocab_size:
        raise ValueError(
            f"--bos-id: expected an id of the vocabulary, 0 to {architecture.vocab_size - 1}, got {option}"
        )
    if option is not None and rows.header.bos_id not in (None, option):
        raise ValueError(
            f"--bos-id: expected {rows.header.bos_id}, the BOS of the rows of {rows.path} (dataset.json), got {option}"
        )
    if option is not None:
        return option
    return rows.header.bos_id if rows.header.bos_id is not None else architecture.bos_token_id
