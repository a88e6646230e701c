"""One evaluation from options to a folder: every suite checks what it can, then the model is loaded once for all."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_tw.config import flat_options
from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation
from megatron_tw.data.files import check_new_folder, new_folder
from megatron_tw.data.tokenizer import fingerprint_of
from megatron_tw.evaluation.kept import Kept
from megatron_tw.evaluation.results import Results, as_lines
from megatron_tw.evaluation.summary import summarize
from megatron_tw.evaluation.tasks import Found, Model, NeedsOtherModel, Run, Setting, WithoutModel, prepare
from megatron_tw.parallel.devices import free_memory
from megatron_tw.runtime.fingerprint import model_fingerprint
from megatron_tw.runtime.lock import hold_folder
from megatron_tw.runtime.opening import join_world, open_model
from megatron_tw.runtime.source import open_source

NO_SETTINGS = ("output", "load", "load_hf", "verify_checkpoint", "distributed_timeout_minutes")
"""Options on which no figure depends, or that the results name already."""
TEXTS = ("ruler_essay", "ruler_squad", "ruler_hotpotqa")
"""Files: the digest of what a suite read of them stands for them."""
NO_PARTS = (*NO_SETTINGS, "tasks", "data_path", "key_tokens", "longppl_evaluator", "longppl_cache", "eval_data", *TEXTS)
"""Options on which no part of an evaluation that was cut off depends, or whose content counts, not their name."""


@dataclass(frozen=True)
class Evaluation:
    """All that was found, on the writing rank."""

    config: EvaluationConfig
    results: Results
    found: tuple[Found, ...]
    kept: Kept

    def save(self, folder: str | Path) -> None:
        """Write it into a new or empty folder, which appears complete or not at all.

        Raises:
            ValueError: the folder holds something already, or a figure is NaN or infinite.
        """
        with new_folder(Path(folder)) as temporary:
            for found in self.found:
                if found.nlls is not None:
                    found.nlls.write(temporary)
                for name, content in found.files.items():
                    (temporary / name).write_bytes(content)
            self.results.write(temporary)
        self.kept.discard()

    def summary(self) -> str:
        """For people."""
        options, lines = self.config.evaluation, []
        name = Path(options.output).name
        for found in self.found:
            if found.nlls is not None:
                lines.append(summarize(found.nlls, name, options.key_tokens))
            else:
                lines += [f"{name}:", *as_lines(found.records)]
        return "\n".join(lines)


def evaluate(config: EvaluationConfig) -> Evaluation | None:
    """What --tasks asks for; on the writing rank (the last pipeline stage's first), None on the others.

    Called on every rank of the launcher's world.

    Raises:
        ValueError: an option or file that does not fit, before anything is allocated.
    """
    device = join_world(config.parallel)
    check_evaluation(config, dist.get_world_size())
    options = config.evaluation
    check_new_folder(Path(options.output))
    source = open_source(
        config.model, load=options.load, seq_length=options.seq_length, verify=options.verify_checkpoint
    )
    if options.load is not None and source.saved is None:
        raise ValueError(f"--load {options.load}: holds no checkpoint")
    setting = Setting(config, source, device)
    runs = [prepare(suite, setting, names) for suite, names in options.by_suite().items()]
    facts = {"model": model_fingerprint(source), "world_size": dist.get_world_size(), **setting.facts}
    kept = Kept(options.output, {**settings_of(config, NO_PARTS), **facts})
    texts = {name: fact for name, fact in setting.facts.items() if name in TEXTS}
    kept.check()
    with hold_folder(kept.folder, f"--output {options.output}"):
        without: dict[int, Found] = {}
        for number, run in enumerate(runs):  # one model at a time is loaded
            if isinstance(run, NeedsOtherModel):
                run.use_other_model(kept)
            elif isinstance(run, WithoutModel):
                without[number] = run(kept)
            free_memory()
        model = None
        if len(without) < len(runs):
            layout, chunks = open_model(source, config.parallel, config.compute, device)
            model = Model(config, source, layout, chunks, device, kept)
        found = tuple(without[number] if number in without else _run(run, model) for number, run in enumerate(runs))
    if model is not None and not model.writes:
        return None
    results = Results(
        model=source.name,
        layout=model.layout.describe() if model is not None else "one process",
        tokenizer_fingerprint=fingerprint_of(source.tokenizer_dir) if source.tokenizer_dir is not None else None,
        settings={**settings_of(config, (*NO_SETTINGS, *TEXTS)), **texts},
        records=tuple(record for part in found for record in part.records),
    )
    return Evaluation(config, results, found, kept)


def _run(run: Run | WithoutModel, model: Model | None) -> Found:
    assert not isinstance(run, WithoutModel)
    assert model is not None
    return run(model)


def settings_of(config: EvaluationConfig, without: tuple[str, ...]) -> dict[str, Any]:
    """The options by name, but for some."""
    return {name: value for name, value in flat_options(config).items() if name not in without}
