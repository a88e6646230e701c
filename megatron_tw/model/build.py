"""From a run's configuration to this rank's model chunks, and between those and a Hugging Face folder."""

import contextlib
import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from megatron_tw.config import ActivationConfig, ComputeConfig, KernelConfig, ParallelConfig
from megatron_tw.data.files import check_place
from megatron_tw.model.architecture import Architecture, export_hf_config, megatron_vocab_size, transformer_config
from megatron_tw.model.attention import ContextParallelAttention
from megatron_tw.model.families.table import TensorParallel, export_parameter, import_parameter, tensor_names
from megatron_tw.model.gpt import TokenWeightedGPT, layer_spec, transformer_engine_available
from megatron_tw.model.huggingface import SafetensorsFolder
from megatron_tw.model.kernels import BUFFER_TOKENS, Parts
from megatron_tw.model.user_buffers import make_user_buffers
from megatron_tw.parallel.agree import raise_together
from megatron_tw.parallel.devices import Device
from megatron_tw.parallel.layout import Layout

FORWARD_ONLY = ActivationConfig()
"""Nothing is kept for a backward pass, so there is nothing to make again."""
BY_WHAT_IS_HERE = KernelConfig()
MAX_SHARD_BYTES = 5 * 10**9
"""Size at which an exported safetensors file is closed and the next one begun, as Hugging Face does."""


def build_model(
    architecture: Architecture,
    parallel: ParallelConfig,
    compute: ComputeConfig,
    layout: Layout,
    device: Device,
    *,
    activations: ActivationConfig = FORWARD_ONLY,
    kernels: KernelConfig = BY_WHAT_IS_HERE,
    tokens: int = 0,
    keep_logits_mib: int = 0,
) -> list[TokenWeightedGPT]:
    """This rank's model chunks (one without interleaving), parameters allocated on the device and not yet filled.

    activations, keep_logits_mib: of a model that will be trained; what the loss may keep for its backward pass.
    kernels: which are asked for. tokens: of a micro-batch on a rank in training; only --tp-comm-overlap needs it.

    Raises:
        ValueError: `--transformer-impl transformer_engine` where it is not installed or in fp32, kernels that are not
        here, or a layout that the model does not admit.
    """
    use_te = takes_transformer_engine(compute, available=transformer_engine_available() and device.type == "cuda")
    megatron_config = transformer_config(
        architecture,
        parallel,
        compute,
        activations,
        on_gpu=device.type == "cuda",
        num_model_chunks=layout.vpp_size,
        kernels=kernels,
        parts=Parts.here(device, transformer_engine=use_te),
    )
    if kernels.tp_comm_overlap:
        make_user_buffers(kernels, tokens=tokens, hidden_size=architecture.hidden_size, tp_size=layout.tp_size)
        setattr(megatron_config, BUFFER_TOKENS, tokens)
    chunks = []
    for vp_stage in range(layout.vpp_size or 1):
        stage = vp_stage if layout.vpp_size else None
        chunk = TokenWeightedGPT(
            architecture,
            megatron_config,
            layer_spec(architecture.family, megatron_config, transformer_engine=use_te, vp_stage=stage),
            padded_vocab_size=megatron_vocab_size(architecture, parallel, compute),
            layout=layout,
            max_sequence_length=architecture.max_position_embeddings,
            pre_process=layout.pp_rank == 0 and vp_stage == 0,
            post_process=layout.is_last_stage and vp_stage == (layout.vpp_size or 1) - 1,
            vp_stage=stage,
            loss_chunk_tokens=compute.loss_chunk_tokens,
            loss_keep_logits_bytes=keep_logits_mib << 20,
        )
        chunks.append(chunk.to(device.device))
    if activations.recompute_cp_gather:
        _gather_again(chunks)
    return chunks


def _gather_again(chunks: Sequence[TokenWeightedGPT]) -> None:
    """--recompute-cp-gather, of our own attention.

    Raises:
        ValueError: the model has another.
    """
    for chunk in chunks:
        for layer in chunk.decoder.layers:
            attention = layer.self_attention.core_attention
            if not isinstance(attention, ContextParallelAttention):
                raise ValueError(
                    "--recompute-cp-gather: expected --transformer-impl local with it; Transformer Engine's attention "
                    "keeps no gathered keys and values"
                )
            attention.gathers_again = True


def takes_transformer_engine(compute: ComputeConfig, *, available: bool) -> bool:
    """Whether the layers are Transformer Engine's. In fp32 they are not: its fused attention knows bf16 alone, what is
    left holds all scores of a row at once, and under context parallelism it has none.

    available: it is installed, and there is a GPU.

    Raises:
        ValueError: `--transformer-impl transformer_engine`, and it is not available or the precision is fp32.
    """
    if compute.transformer_impl == "transformer_engine":
        if not available:
            raise ValueError(
                "--transformer-impl transformer_engine: Transformer Engine is not installed here, or there is no GPU"
            )
        if not compute.bf16:
            raise ValueError(
                "--transformer-impl transformer_engine: expected --bf16 with it, got fp32, for which Transformer "
                "Engine has no fused attention; --transformer-impl local has"
            )
    return available and compute.bf16 and compute.transformer_impl != "local"


def load_hf(
    chunks: Sequence[TokenWeightedGPT], directory: str | Path, architecture: Architecture, layout: Layout
) -> None:
    """Fill the model from a Hugging Face folder. Each rank reads only the slices that it owns. Collective over the
    world; a rank that holds nothing of the model takes part without chunks.

    Raises:
        ValueError: on every rank, files or tensors missing, truncated or of other shapes (see SafetensorsFolder), or
        NaN or infinity in one.
    """
    error: ValueError | OSError | None = None
    try:
        folder = SafetensorsFolder(directory, architecture)
        for chunk in chunks:
            tp = TensorParallel(layout.tp_rank, layout.tp_size, chunk.vocab_size)
            for name, parameter in chunk.named_parameters():
                shard = import_parameter(name, _layer_offset(chunk), architecture, tp, folder.read_finite)
                names = tensor_names(name, _layer_offset(chunk), architecture)
                _check_copies(folder, names, tp, architecture.vocab_size)
                with torch.no_grad():
                    parameter.copy_(shard)
    except SafetensorError as failed:
        error = ValueError(f"{directory}: cannot be read ({failed})")
    except (ValueError, OSError) as failed:
        error = failed
    raise_together(error)


def check_finite(chunks: Sequence[TokenWeightedGPT], directory: str | Path) -> None:
    """Refuse weights that are NaN or infinite. Collective over the world.

    Raises:
        ValueError: on every rank, with the folder that the weights came from and the tensor.
    """
    error = None
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if error is None and not bool(parameter.detach().isfinite().all()):
                tensors = " or ".join(tensor_names(name, _layer_offset(chunk), chunk.architecture))
                error = ValueError(f"{directory}: NaN or infinity in {tensors}")
    raise_together(error)


def _check_copies(folder: SafetensorsFolder, names: tuple[str, ...], tp: TensorParallel, vocab_size: int) -> None:
    """That tensors which the folder holds besides these, and which the model takes these for, are the same."""
    for copy, other in folder.copies.items():
        if other in names:
            rows = tp.padded_vocab_size // tp.size
            start, stop = (min(bound, vocab_size) for bound in (tp.rank * rows, (tp.rank + 1) * rows))
            if not torch.equal(folder.read(copy, 0, start, stop), folder.read(other, 0, start, stop)):
                raise ValueError(
                    f"{folder.directory}: {copy} is another than {other}, though config.json says tie_word_embeddings"
                )


def save_hf(
    chunks: list[TokenWeightedGPT],
    directory: str | Path,
    architecture: Architecture,
    layout: Layout,
    *,
    max_position_embeddings: int,
    tokenizer_dir: str | Path | None = None,
    still_ours: Callable[[], None] | None = None,
    seal: Callable[[Path], None] | None = None,
) -> None:
    """Write the model as a Hugging Face folder: safetensors, config.json with its rotary base and length, tokenizer
    files.

    Collective over the world; `directory` must be on storage that all ranks share. Written beside it first, in a folder
    of this export's own, and renamed when complete, so an interrupted export leaves nothing half-written.

    seal: called on every rank with the folder whose files are all there. still_ours: called on rank 0 before the
    folder gets its name; may raise.

    Raises:
        ValueError: `directory` exists and is not empty.
        OSError: it could not be written, on every rank; nothing of it is left.
    """
    target = Path(directory)
    check_export_target(target)
    names = [uuid.uuid4().hex[:8]]
    dist.broadcast_object_list(names, src=0)
    partial = export_workplace(target) / names[0]
    try:
        _write_folder(chunks, partial, architecture, layout, max_position_embeddings, tokenizer_dir)
        if seal is not None:
            seal(partial)
        error: OSError | ValueError | None = None
        if layout.rank == 0:
            try:
                if still_ours is not None:
                    still_ours()
                if target.exists():
                    target.rmdir()
                partial.rename(target)
            except (OSError, ValueError) as failed:
                error = failed
        raise_together(error)
    finally:
        if layout.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)
            with contextlib.suppress(OSError):  # holds something else
                partial.parent.rmdir()


def export_workplace(target: Path) -> Path:
    """Where a Hugging Face folder lies while it is written."""
    return target.with_name(target.name + ".partial")


def _write_folder(
    chunks: list[TokenWeightedGPT],
    folder: Path,
    architecture: Architecture,
    layout: Layout,
    max_position_embeddings: int,
    tokenizer_dir: str | Path | None,
) -> None:
    """All files of an export. Collective over the world.

    Raises:
        OSError: on every rank, what one of them met.
    """
    error: OSError | None = None
    if layout.rank == 0:
        try:
            folder.mkdir(parents=True)
        except OSError as failed:
            error = failed
    raise_together(error)
    written: dict[str, list[str]] = {}
    if layout.dp_rank == 0 and layout.cp_rank == 0:
        written, error = _write_shards(chunks, architecture, layout, folder)
    raise_together(error)
    everywhere: list[dict[str, list[str]] | None] = [None] * layout.world_size
    dist.all_gather_object(everywhere, written)
    if layout.rank == 0:
        try:
            files = {file: names for part in everywhere if part for file, names in part.items()}
            _number_files(files, folder)
            dtype = next(chunks[0].parameters()).dtype
            config = export_hf_config(architecture, max_position_embeddings=max_position_embeddings, dtype=dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
            if tokenizer_dir is not None:
                copy_tokenizer(Path(tokenizer_dir), folder)
                lengthen_tokenizer(folder, config["max_position_embeddings"])
        except OSError as failed:
            error = failed
    raise_together(error)


def check_export_target(target: Path, option: str = "--save-hf") -> None:
    """Refuse to export over something, or to where no folder can be put (`check_place`)."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{option} {target}: expected a new or empty folder, found one that holds files")
    check_place(target, option)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the tokenizer files of a folder (and a generation_config.json), whatever else it holds, into `target`."""
    for pattern in ("token*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "*.model",
                    "chat_template*", "generation_config.json"):  # fmt: skip
        for file in source.glob(pattern):
            if file.is_file():
                target.mkdir(exist_ok=True)
                shutil.copy(file, target / file.name)


def lengthen_tokenizer(folder: Path, length: int) -> None:
    """Raise `model_max_length` in tokenizer_config.json to the context of `length` tokens: above it, transformers warns
    of texts that are too long, or cuts them. A file that names none, or that is no JSON, stays as it is."""
    path = folder / "tokenizer_config.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        known = settings["model_max_length"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return
    if isinstance(known, int | float) and known < length:
        text = json.dumps({**settings, "model_max_length": length}, indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _write_shards(
    chunks: list[TokenWeightedGPT], architecture: Architecture, layout: Layout, folder: Path
) -> tuple[dict[str, list[str]], OSError | None]:
    """This pipeline stage's tensors in files of up to MAX_SHARD_BYTES, written by tensor-parallel rank 0. Returns
    file -> names, and the first error: gathering goes on after it, because the other ranks take part."""
    pending: dict[str, Tensor] = {}
    written: dict[str, list[str]] = {}
    failed: OSError | None = None

    def flush() -> None:
        nonlocal failed
        if pending and failed is None:
            file = folder / f"stage-{layout.pp_rank:05d}-{len(written):05d}.safetensors"
            try:
                save_file(pending, file, metadata={"format": "pt"})
                file.chmod(folder.stat().st_mode & 0o666)  # safetensors makes it for its owner alone
            except (OSError, SafetensorError) as error:
                failed = OSError(f"{file.name}: {error}")
            written[file.name] = list(pending)
        pending.clear()

    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            shards = _gather_shards(parameter.detach(), layout)
            if shards is None:
                continue
            for hf_name, tensor in export_parameter(name, _layer_offset(chunk), architecture, shards):
                if sum(t.numel() * t.element_size() for t in pending.values()) > MAX_SHARD_BYTES:
                    flush()
                pending[hf_name] = tensor.contiguous().cpu().clone()
    flush()
    return written, failed


def _gather_shards(parameter: Tensor, layout: Layout) -> list[Tensor] | None:
    """The parameter's shards in tensor-parallel order on tensor-parallel rank 0 (one at a time in memory), None
    elsewhere."""
    if layout.tp_size == 1:
        return [parameter]
    shards = [torch.empty_like(parameter) for _ in range(layout.tp_size)]
    dist.all_gather(shards, parameter.contiguous(), group=layout.tp_group)
    return shards if layout.tp_rank == 0 else None


def _number_files(files: dict[str, list[str]], folder: Path) -> None:
    """Give the files Hugging Face's names, and write the index when there is more than one."""
    if len(files) == 1:
        (folder / next(iter(files))).rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, file in enumerate(sorted(files), start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        (folder / file).rename(folder / name)
        weight_map |= dict.fromkeys(files[file], name)
    total = sum(file.stat().st_size for file in folder.glob("model-*.safetensors"))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


def _layer_offset(chunk: TokenWeightedGPT) -> int:
    """Global number, from 0, of the chunk's first layer."""
    return chunk.decoder.layers[0].layer_number - 1 if len(chunk.decoder.layers) else 0
