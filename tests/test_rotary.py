"""Each way to stretch a context: logits equal transformers', the exported folder reproduces them, and stages and
resumed runs go out from the first checkpoint."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from test_families import transformers_logits
from test_model import whole_logits
from test_training import DENSE, UNFROZEN, options, run_all
from tiny import (
    SEQ_LENGTH,
    TINY_LLAMA,
    VOCAB,
    Axes,
    layout_of,
    make_folder,
    prepare_ready_rows,
    reference_rows,
    release,
)

from megatron_tw.config import CheckpointConfig, ComputeConfig, ModelConfig, ScorerConfig, TrainConfig, parse_options
from megatron_tw.config import RunConfig as AllOptions
from megatron_tw.model.architecture import Architecture, export_hf_config, parse_architecture, read_architecture
from megatron_tw.model.build import build_model, load_hf, save_hf
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

LENGTH = 64  # of the tiny Llama here; rows of 256 tokens are 4 times as long
D = 16  # its rotary size
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": LENGTH}
WAYS: dict[str, tuple[ModelConfig, dict[str, Any]]] = {
    "none": (ModelConfig(rope_scaling_type="none"), {"rope_type": "default", "rope_theta": 10000.0}),
    "base": (ModelConfig(rotary_base=5e5), {"rope_type": "default", "rope_theta": 500000.0}),
    "linear": (
        ModelConfig(rope_scaling_type="linear"),
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
    ),
    "ntk": (
        ModelConfig(rope_scaling_type="ntk"),
        {"rope_type": "default", "rope_theta": 10000.0 * 4.0 ** (D / (D - 2))},
    ),
    "yarn": (ModelConfig(rope_scaling_type="yarn"), YARN),
    "yarn of another base": (
        ModelConfig(rope_scaling_type="yarn", rotary_base=2e4, rope_scaling_factor=8.0),
        {**YARN, "rope_theta": 20000.0, "factor": 8.0},
    ),
    "llama3": (
        ModelConfig(rope_scaling_type="llama3"),
        {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ),
}


@pytest.fixture(scope="module")
def short_llama(tmp_path_factory) -> Path:
    folder = shutil.copytree(TINY_LLAMA, tmp_path_factory.mktemp("short") / "llama")
    return edit(folder, max_position_embeddings=LENGTH)


def edit(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def stretched_logits(axes: Axes, folder: Path, ways: list[ModelConfig], target: Path) -> list[torch.Tensor | None]:
    """On a rank: logits of the model stretched in these ways, each of which is exported."""
    found = []
    with layout_of(axes) as layout:
        for number, model in enumerate(ways):
            architecture = read_architecture(folder).with_rope(model, SEQ_LENGTH)
            chunks = build_model(architecture, axes.parallel(), ComputeConfig(), layout, prepare_device())
            load_hf(chunks, folder, architecture, layout)
            found.append(whole_logits(chunks, torch.from_numpy(reference_rows()[:2]), layout))
            save_hf(chunks, target / str(number), architecture, layout, max_position_embeddings=SEQ_LENGTH)
    return found


@pytest.mark.parametrize("axes", [Axes(tp=2), Axes(cp=2)], ids=lambda axes: axes.name)
def test_logits_and_exports(axes, short_llama, ranks, tmp_path):
    ways = [model for model, _ in WAYS.values()]
    by_rank = ranks(2).run(stretched_logits, axes, short_llama, ways, tmp_path / "exports")
    seen: list[torch.Tensor] = []
    for number, (name, (_, rope)) in enumerate(WAYS.items()):
        by_hand = shutil.copytree(short_llama, tmp_path / name)
        edit(by_hand, rope_parameters=rope, max_position_embeddings=SEQ_LENGTH)
        expected = transformers_logits(by_hand)
        for found in by_rank:
            torch.testing.assert_close(found[number][..., :VOCAB], expected, atol=5e-5, rtol=0)
        export = tmp_path / "exports" / str(number)
        torch.testing.assert_close(transformers_logits(export), expected, atol=0, rtol=0)
        config = json.loads((export / "config.json").read_text())
        assert config["rope_parameters"] == rope
        assert config["max_position_embeddings"] == SEQ_LENGTH
        assert all((expected - other).abs().max() > 1e-3 for other in seen), "no two ways are the same"
        seen.append(expected)


def stages(first: Architecture, *steps: tuple[ModelConfig, int]) -> Architecture:
    """What comes of a model whose context is stretched once after the other, each time from the last export."""
    for model, length in steps:
        exported = export_hf_config(first.with_rope(model, length), max_position_embeddings=length, dtype=torch.float32)
        first = parse_architecture(json.loads(json.dumps(exported)), "config.json")
    return first


@pytest.mark.parametrize("way", ["linear", "ntk", "yarn", "llama3"])
def test_stages_go_out_from_the_first_checkpoint(way, short_llama):
    first, model = read_architecture(short_llama), ModelConfig(rope_scaling_type=way)
    at_once = stages(first, (model, 1024))
    assert stages(first, (model, 256), (model, 1024)).rope == at_once.rope
    assert stages(first, (model, 256), (model, 1024), (ModelConfig(), 1024), (model, 1024)).rope == at_once.rope
    # A stage that names the base that ntk made, as the options kept beside its checkpoints do.
    middle = stages(first, (model, 256))
    assert stages(middle, (ModelConfig(rotary_base=middle.rotary_base), 256), (model, 1024)).rope == at_once.rope
    # A base that was changed first, or that comes with it.
    based = stages(first, (ModelConfig(rotary_base=5e4), 256), (model, 1024))
    assert based.rope == stages(first, (replace(model, rotary_base=5e4), 1024)).rope
    assert based.rope != at_once.rope
    # And other ways in between.
    mixed = stages(first, (ModelConfig(rope_scaling_type="ntk"), 128), (ModelConfig(rope_scaling_type="linear"), 256))
    assert stages(mixed, (model, 1024)).rope == at_once.rope
    assert stages(mixed, (ModelConfig(rope_scaling_type="none"), 1024)).rope == first.rope


def test_the_original_length(short_llama):
    raw = json.loads((short_llama / "config.json").read_text())

    def origin_of(**rope: Any) -> int | None:
        return parse_architecture({**raw, "rope_parameters": rope, "rope_theta": 1e4}, "config.json").origin.length

    assert origin_of() == LENGTH
    assert origin_of(rope_type="yarn", factor=4.0, original_max_position_embeddings=16) == 16
    assert origin_of(rope_type="yarn", factor=4.0) == LENGTH
    linear = parse_architecture({**raw, "rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "config.json")
    given = linear.with_rope(ModelConfig(rope_scaling_type="linear", rope_scaling_factor=16.0), 1024)
    assert given.rope["factor"] == 16
    short, one = read_architecture(short_llama), "--rope-scaling-factor: expected one for --rope-scaling-type"
    unknown = "config.json does not say from which length it was scaled"
    cases: list[tuple[Architecture, Any, float | None, int | None, str]] = [
        (linear, "linear", None, 1024, f"{one} linear: {unknown}"),
        (linear, "yarn", 16.0, 1024, f"--rope-scaling-type yarn: {unknown}"),
        (short, "ntk", None, 32, f"{one} ntk: 32 tokens are fewer than the model's original 64"),
        (short, "yarn", None, None, f"{one} yarn, or --seq-length, got neither"),
    ]
    for architecture, way, factor, length, message in cases:
        model = ModelConfig(rope_scaling_type=way, rope_scaling_factor=factor)
        with pytest.raises(ValueError, match=re.escape(message)):
            architecture.with_rope(model, length)


def test_partial_rotation_is_stretched_over_its_own_size(tmp_path):
    phi = read_architecture(make_folder("phi", tmp_path / "phi", max_position_embeddings=LENGTH))
    assert (phi.head_dim, phi.rotary_dim) == (16, 8)
    assert phi.with_rope(ModelConfig(rope_scaling_type="ntk"), 256).rotary_base == 10000.0 * 4.0 ** (8 / 6)
    exported = export_hf_config(
        phi.with_rope(ModelConfig(rope_scaling_type="yarn"), 256), max_position_embeddings=256, dtype=torch.float32
    )
    # transformers 4 reads partial_rotary_factor beside rope_scaling, transformers 5 in rope_parameters.
    assert exported["partial_rotary_factor"] == exported["rope_parameters"]["partial_rotary_factor"] == 0.5
    assert "partial_rotary_factor" not in exported["rope_scaling"]


def start(axes: Axes, config: AllOptions) -> tuple[dict[str, Any], dict[str, Any]]:
    """On a rank: the ropes of a run's model and of its live scorer."""
    inputs = open_inputs(config)
    with layout_of(axes) as layout:
        run = Run.start(config, inputs, layout, prepare_device())
        try:
            scorer: Any = run.step.scorer
            return run.chunks[0].architecture.rope, scorer.model[0].architecture.rope
        finally:
            release(run.step.model)
            del run


def test_a_run_exports_resumes_and_scores_with_its_rope(short_llama, ranks, tmp_path):
    data = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    run, hf = tmp_path / "run", tmp_path / "hf"
    model = ModelConfig(load_hf=str(short_llama), rope_scaling_type="ntk")

    def config(**changes: Any) -> AllOptions:
        sections = {"train": TrainConfig(train_iters=2, global_batch_size=2, exit_interval=1), "scorer": UNFROZEN}
        checkpoint = CheckpointConfig(save=str(run), load=str(run), save_hf=str(hf))
        return options(Axes(), data, model=model, checkpoint=checkpoint, **{**sections, **changes})

    theta = 10000.0 * 4.0 ** (D / (D - 2))
    ranks(1).run(run_all, [replace(config(), checkpoint=CheckpointConfig(save=str(run)))])
    # The options as they are kept beside the checkpoint, and those that were given, come to the same.
    kept = parse_options(["--config", str(run / "iter_0000001" / "config.yaml")], AllOptions)
    assert (kept.model.rotary_base, kept.model.rope_scaling_factor) == (10000.0, 4.0)
    for resumed in (kept.model, model, ModelConfig()):
        assert read_resumed(run, resumed).rotary_base == theta
    ranks(1).run(run_all, [config(train=TrainConfig(train_iters=2, global_batch_size=2))])
    exported = json.loads((hf / "config.json").read_text())
    assert exported["rope_parameters"] == {"rope_type": "default", "rope_theta": theta}
    assert exported["max_position_embeddings"] == SEQ_LENGTH
    assert exported["extended_from"] == {"original_max_position_embeddings": LENGTH, "rope_theta": 10000.0}
    live = ScorerConfig(scorer="frozen", scorer_hf=str(short_llama))
    short = TrainConfig(train_iters=1, global_batch_size=2)
    weighted = replace(config(scorer=live, weighting=DENSE, train=short), checkpoint=CheckpointConfig())
    ((trained, frozen),) = ranks(1).run(start, Axes(), weighted)
    assert trained["rope_theta"] == theta
    assert frozen["rope_theta"] == 10000.0, "a frozen scorer keeps the rope that it was trained with"


def read_resumed(run: Path, model: ModelConfig) -> Architecture:
    from megatron_tw.runtime.run_folder import find_checkpoint

    saved = find_checkpoint(run)
    assert saved is not None
    return saved.architecture.with_rope(model, SEQ_LENGTH)
