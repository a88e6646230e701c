"""The callback for Megatron-Bridge, as far as it goes without CUDA: Megatron-Bridge's training imports Transformer
Engine and asks for a GPU, so its signatures are read from its sources, and its own callback manager drives the
callback. What the callback puts in place is the schedule of test_megatron_lm_training.py."""

import ast
import importlib.util
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from megatron_tw.integrations.megatron_bridge import TokenWeighting, callback
from megatron_tw.integrations.megatron_bridge.callback import BRIDGE_SEAMS
from megatron_tw.integrations.megatron_bridge.checks import check_config
from megatron_tw.integrations.megatron_lm.schedule import Step, TokenWeightedSchedule
from megatron_tw.integrations.patches import applied_patches


def source_of(module: str) -> Path:
    """The file of a module of the installed Megatron-Bridge; the test is skipped where none is."""
    try:
        distribution = metadata.distribution("megatron-bridge")
    except metadata.PackageNotFoundError:
        pytest.skip("megatron-bridge is not installed (Python 3.12, and Transformer Engine to import it)")
    return Path(str(distribution.locate_file(module.replace(".", "/") + ".py")))


def schedule_of_core(**given: Any) -> None:
    """Stands for Megatron-Core's."""


def config_of(**model: Any) -> Any:
    return SimpleNamespace(
        model=SimpleNamespace(seq_length=256, calculate_per_token_loss=True, **model),
        dataset=SimpleNamespace(dataloader_type="single"),
        rng=SimpleNamespace(seed=7),
    )


@pytest.mark.parametrize("seam", BRIDGE_SEAMS, ids=lambda seam: seam.target)
def test_seams_of_the_installed_megatron_bridge(seam):
    tree: Any = ast.parse(source_of(seam.module).read_text())
    for part in seam.name.split("."):
        found = {getattr(node, "name", None): node for node in tree.body}
        imported = [name.name for node in tree.body if isinstance(node, ast.ImportFrom) for name in node.names]
        if part in imported:  # a name of Megatron-Core's, which CORE_SEAMS says more of
            return
        assert part in found, f"{seam.target} is gone"
        tree = found[part]
    parameters = tuple(argument.arg for argument in [*tree.args.posonlyargs, *tree.args.args, *tree.args.kwonlyargs])
    assert parameters in seam.known


@pytest.fixture
def stand_in(monkeypatch):
    """A module in the place of Megatron-Bridge's training loop, with the name that is rebound there."""
    train: Any = ModuleType("megatron.bridge.training.train")
    train.get_forward_backward_func = lambda pp_size=None, vp_size=None: schedule_of_core
    monkeypatch.setitem(sys.modules, train.__name__, train)
    monkeypatch.setattr(callback, "check_seams", lambda seams: None)
    return train


class Events:
    """Fires events as Megatron-Bridge's manager does."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def fire(self, event: str, context: Any) -> None:
        getattr(self.callback, event)(context)


@pytest.mark.parametrize("kind", ["events", "megatron-bridge"])
def test_the_schedule_is_put_in_and_taken_out(kind, stand_in):
    weighting = TokenWeighting("dense", interpolation=0.5, short_window=64, bos_id=1)
    manager: Any = Events(weighting)
    if kind == "megatron-bridge":
        spec = importlib.util.spec_from_file_location(
            "bridge_callbacks", source_of("megatron.bridge.training.callbacks")
        )
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules["bridge_callbacks"] = module
        spec.loader.exec_module(module)
        manager = module.normalize_callbacks([weighting])
        assert manager.has_callbacks("on_data_init_start")
        assert not manager.has_callbacks("on_eval_end")
    own = stand_in.get_forward_backward_func
    progress = SimpleNamespace(step=3, consumed_train_samples=12)
    context = SimpleNamespace(state=SimpleNamespace(cfg=config_of(), train_state=progress))
    for _ in range(2):
        manager.fire("on_data_init_start", context)
        assert stand_in.get_forward_backward_func is not own
        schedule = stand_in.get_forward_backward_func(pp_size=1, vp_size=None)
        assert isinstance(schedule, TokenWeightedSchedule)
        assert schedule.own is schedule_of_core
        assert schedule.step() == Step(iteration=3, consumed=12, seed=7)
        assert schedule.schemes.at(0) == weighting.options.schedule().at(0)
        progress.step = 4
        assert schedule.step().iteration == 4, "asked at every step"
        progress.step = 3
        assert stand_in.get_forward_backward_func is own, "a loop takes it once; one without the callback gets its own"
        assert applied_patches() == ()
    manager.fire("on_data_init_start", context)  # of a run that ends before its loop
    weighting.remove()
    assert stand_in.get_forward_backward_func is own


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda config: setattr(config.model, "calculate_per_token_loss", False),
            "model.calculate_per_token_loss: expe",
        ),
        (lambda config: setattr(config.model, "mtp_num_layers", 1), "model.mtp_num_layers: cannot go with"),
        (lambda config: setattr(config.model, "cuda_graph_impl", "local"), "model.cuda_graph_impl: cannot go with"),
        (lambda config: setattr(config.dataset, "reset_attention_mask", True), "dataset.reset_attention_mask: cannot"),
        (
            lambda config: setattr(config.dataset, "dataloader_type", "batch"),
            'dataset.dataloader_type: expected "single"',
        ),
        (
            lambda config: setattr(config.dataset, "enable_in_batch_packing", True),
            "dataset.enable_in_batch_packing: can",
        ),
        (lambda config: setattr(config, "peft", "lora"), "peft: cannot go with"),
        (
            lambda config: setattr(config, "dist", SimpleNamespace(use_decentralized_pg=True)),
            "dist.use_decentralized_pg:",
        ),
        (
            lambda config: setattr(config.model, "dist_train", SimpleNamespace(use_dist_train=True)),
            "model.dist_train.use_dist_train: cannot go with",
        ),
        (
            lambda config: setattr(config.model, "gtp_weight_remat_size", 2),
            "model.gtp_weight_remat_size: cannot go with",
        ),
        (lambda config: setattr(config.model, "seq_length", 64), "^short_window: expected less than 64"),
    ],
)
def test_what_cannot_be_gone_with_is_refused_by_name(change, message):
    options, config = TokenWeighting("dense", short_window=64).options, config_of()
    check_config(config, options)
    change(config)
    with pytest.raises(ValueError, match=message):
        check_config(config, options)


@pytest.mark.parametrize(
    ("weighting", "options", "message"),
    [
        ("dens", {"short_window": 64}, "^weighting: expected one of uniform, dense"),
        ("dense", {"short_window": 64, "interpolation": 3}, "^interpolation: expected 0"),
        ("dense", {"short_window": 64, "short_stride": 0}, "^short_stride: expected 1 or more, got 0"),
        ("dense", {}, "^short_window: the weighting compares"),
        ("dense", {"nonesuch": 1}, "expected options of .*min_short_context.*, got nonesuch"),
    ],
)
def test_wrong_arguments_are_named_at_once(weighting, options, message):
    with pytest.raises(TypeError if "nonesuch" in options else ValueError, match=message):
        TokenWeighting(weighting, **options)
