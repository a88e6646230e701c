"""lm_eval's own models, for tasks that generate; what they have said is kept, so that a long evaluation goes on where
it stopped."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from megatron_tw.config import ModelConfig
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.config.options import flag
from megatron_tw.data.progress import Progress
from megatron_tw.evaluation.kept import Kept
from megatron_tw.model.architecture import read_architecture
from megatron_tw.runtime.source import ModelSource

REQUESTS_PER_PART = 16


def check_model_as_saved(model: ModelConfig, source: ModelSource, what: str) -> None:
    """That the options leave the rotary embedding as the folder of --load-hf has it: lm_eval's own models read that
    folder, and no option. what: that generates.

    Raises:
        ValueError: names the options, and how a folder with them is made.
    """
    assert source.load_hf is not None
    if read_architecture(source.load_hf).rope == source.architecture.rope:
        return
    names = ("rotary_base", "rope_scaling_type", "rope_scaling_factor")
    given = " ".join(f"{flag(name)} {getattr(model, name)}" for name in names if getattr(model, name) is not None)
    raise ValueError(
        f"{given}: {what} generates with the model as it lies in {source.load_hf}; write one with these options, by "
        f"tools/convert_checkpoint.py --load-hf {source.load_hf} --save RUN, then --load RUN --save-hf DIR {given} "
        "--seq-length N, and evaluate with --load-hf DIR and without them"
    )


def hugging_face_lm(
    folder: Path,
    config: EvaluationConfig,
    *,
    max_length: int,
    kept: Kept,
    name: str,
    add_bos_token: bool | None = None,
) -> Any:
    """An `lm_eval.models.huggingface.HFLM`, in this process, on the GPUs that it sees or on the CPU.

    max_length: tokens of prompt and answer together; longer prompts lose their beginning. name: under which its answers
    are kept; other requests have another. add_bos_token: whether BOS stands before a prompt; None: as the
    tokenizer does it.
    """
    import torch
    from lm_eval.models.huggingface import HFLM

    on_gpu = torch.cuda.is_available()
    return keeping(HFLM, kept, name)(
        pretrained=str(folder),
        device="cuda" if on_gpu else "cpu",
        dtype="bfloat16" if config.compute.bf16 else "float32",
        batch_size=config.evaluation.micro_batch_size,
        max_length=max_length,
        add_bos_token=add_bos_token,
        parallelize=on_gpu and torch.cuda.device_count() > 1,
    )


def keeping(model_class: Any, kept: Kept, name: str) -> Any:
    """A class of lm_eval's models, as one that keeps what it has said, under `kept_name`, at first `name`."""

    class KeepingLM(model_class):
        """Goes through the requests in portions, the longest prompts first."""

        kept_name = name

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            kept.begin()
            digest = hashlib.sha256(json.dumps([one.args for one in requests], sort_keys=True).encode()).hexdigest()
            order = sorted(range(len(requests)), key=lambda index: (-len(requests[index].args[0]), index))
            portions = [order[at : at + REQUESTS_PER_PART] for at in range(0, len(order), REQUESTS_PER_PART)]
            parts = [f"{self.kept_name}-{digest[:16]}-{number:06d}" for number in range(len(portions))]
            answers: dict[int, str] = {}
            missing = [number for number, part in enumerate(parts) if not kept.has(part)]
            total = sum(len(portions[number]) for number in missing)
            with Progress(self.kept_name, total, "requests", show=True) as progress:
                for number, portion in enumerate(portions):
                    if number in missing:
                        said = super().generate_until([requests[index] for index in portion], disable_tqdm=True)
                        content = np.frombuffer(json.dumps(said).encode(), dtype=np.uint8)
                        kept.write(parts[number], {"answers": content})
                        progress.update(len(portion))
                    said = json.loads(kept.read(parts[number])["answers"].tobytes())
                    answers |= dict(zip(portion, said, strict=True))
            return [answers[index] for index in range(len(requests))]

    return KeepingLM
