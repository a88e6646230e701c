"""RULER's own way of scoring: greedy generation by lm-evaluation-harness, and how many answers stand in the text.

The examples become local tasks of lm-evaluation-harness (a YAML file and JSON lines each), which its `hf` model runs,
or `vllm` where that is installed. Its own group `ruler` is other prompts: see docs/ruler.md.
"""

import importlib.util
import json
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tw.config import ModelConfig
from megatron_tw.config.ruler import RulerOptions
from megatron_tw.data.tokenizer import Tokenizer
from megatron_tw.evaluation.harness.generation import check_model_as_saved, hugging_face_lm, keeping
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.ruler.scoring import STRING_MATCH, Sample, Scored, Work, found
from megatron_tw.evaluation.ruler.tasks import Examples
from megatron_tw.evaluation.tasks import Found, Setting, WithoutModel
from megatron_tw.runtime.source import ModelSource

METRIC_FILE = "ruler_metric.py"
SCORES_FILE = '''"""Written by megatron_tw, beside the tasks that use it."""

from megatron_tw.evaluation.ruler.metric import string_match_all, string_match_part


def all_answers(doc, results):
    return {"string_match": string_match_all(results[0], doc["answers"])}


def any_answer(doc, results):
    return {"string_match": string_match_part(results[0], doc["answers"])}
'''


def check_generation(options: RulerOptions, model: ModelConfig, source: ModelSource) -> None:
    """That what generation needs is there. Raises ValueError."""
    if source.checkpoint is not None or source.load_hf is None:
        raise ValueError(
            "--ruler-scoring generation: expected --load-hf with a Hugging Face folder (of a run: its export, by "
            f"tools/convert_checkpoint.py), got {source.name}"
        )
    if dist.get_world_size() > 1:
        raise ValueError(
            f"--ruler-scoring generation: expected one process, got {dist.get_world_size()}; exactness runs in any "
            "parallel layout"
        )
    for module in ("lm_eval", *(["vllm"] if options.ruler_backend == "vllm" else [])):
        if importlib.util.find_spec(module) is None:
            raise ValueError(f"--ruler-scoring generation: {module} is not installed")
    check_model_as_saved(model, source, "--ruler-scoring generation")


def check_first_tokens(first_ids: tuple[int, ...], tokenizer: Tokenizer) -> None:
    """That the harness can put before a prompt what is to stand there: the tokenizer's BOS, or nothing. Raises
    ValueError."""
    if first_ids not in ((), (tokenizer.bos_id,)):
        raise ValueError(
            "--bos-id: --ruler-scoring generation puts the tokenizer's own BOS before a prompt, here "
            f"{'none' if tokenizer.bos_id is None else tokenizer.bos_id}, got {', '.join(map(str, first_ids))}; "
            "exactness takes any"
        )


@dataclass(frozen=True)
class Generation(WithoutModel):
    """The suite `ruler` with --ruler-scoring generation. See `tasks`."""

    setting: Setting
    work: Work

    def __call__(self, kept: Kept) -> Found:
        lm = self._load(kept)
        scored = []
        for examples in self.work.examples:
            lm.kept_name = f"ruler-{examples.name}-{examples.length}"
            scored.append(scores_of_texts(examples, generate(lm, examples, self.work.number(examples))))
        return found(self.work, scored, STRING_MATCH)

    def _load(self, kept: Kept) -> Any:
        config, source = self.setting.config, self.setting.source
        assert source.load_hf is not None
        longest, add_bos_token = max(self.work.lengths), bool(self.work.first_ids)
        if config.ruler.ruler_backend == "hf":
            return hugging_face_lm(
                Path(source.load_hf), config, max_length=longest, kept=kept, name="ruler", add_bos_token=add_bos_token
            )
        from lm_eval.api.registry import get_model

        return keeping(get_model("vllm"), kept, "ruler")(
            pretrained=source.load_hf,
            dtype="bfloat16" if config.compute.bf16 else "float32",
            batch_size=config.evaluation.micro_batch_size,
            max_model_len=longest,
            add_bos_token=add_bos_token,
        )


def scores_of_texts(examples: Examples, texts: Sequence[str]) -> Scored:
    """The examples with RULER's score of what was generated; of each answer, where more than one must be there."""
    samples = []
    for index, text in enumerate(texts):
        prompt = examples.example(index)
        parts = [prompt.answers] if examples.task.any_answer else [(answer,) for answer in prompt.answers]
        scores = tuple(examples.task.string_match(text, part) for part in parts)
        samples.append(Sample(prompt=prompt, scores=scores, more={"said": text}))
    return Scored(name=examples.name, length=examples.length, samples=tuple(samples))


def generate(lm: Any, examples: Examples, count: int) -> list[str]:
    """What a model of lm-evaluation-harness says to the first `count` examples, greedily."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        name = write_task(Path(folder), examples, count)
        results = lm_eval.simple_evaluate(
            model=lm,
            tasks=[name],
            task_manager=TaskManager(include_path=folder, include_defaults=False, verbosity="WARNING"),
            bootstrap_iters=0,
            log_samples=True,
        )
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc"]["index"])
    assert [sample["doc"]["index"] for sample in samples] == list(range(count))
    return [sample["resps"][0][0] for sample in samples]


def write_task(folder: Path, examples: Examples, count: int) -> str:
    """One task of lm-evaluation-harness in `folder`, for `--include_path`; returns its name."""
    name = f"tw_ruler_{examples.name}_{examples.length}"
    prompts = [examples.example(index) for index in range(count)]
    documents = [
        {"index": index, "prompt": prompt.text, "answers": list(prompt.answers), "target": prompt.completion}
        for index, prompt in enumerate(prompts)
    ]
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    (folder / METRIC_FILE).write_text(SCORES_FILE, encoding="utf-8")
    score = "any_answer" if examples.task.any_answer else "all_answers"
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data.absolute())}},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": "prompt",
        "doc_to_target": "target",
        "target_delimiter": "",
        "generation_kwargs": {
            "do_sample": False,
            "temperature": 0.0,
            "max_gen_toks": examples.task.tokens_to_generate,
            "until": [],
        },
        "metric_list": [{"metric": STRING_MATCH, "aggregation": "mean", "higher_is_better": True}],
        "metadata": {"version": 1.0},
    }
    # JSON is YAML; only the function's tag is not JSON.
    lines = json.dumps(task, indent=1).removesuffix("\n}")
    text = f'{lines},\n "process_results": !function {Path(METRIC_FILE).stem}.{score}\n}}\n'
    (folder / f"{name}.yaml").write_text(text, encoding="utf-8")
    return name
