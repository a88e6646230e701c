"""Megatron-LM's own `pretrain()`, with the plug-in: the method's reference runs, stock to the last bit where weights
are uniform, exact resumes. The script that is run (megatron_lm_pretrain.py) knows nothing of the plug-in."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import BOS, SEQ_LENGTH, STRIDE, TINY_LLAMA, WINDOW, Axes, reference_rows

pytest.importorskip("megatron.training", reason="megatron.training: in Megatron-Core's wheels from 0.17 on")
pytestmark = pytest.mark.needs_core_017

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tests" / "megatron_lm_pretrain.py"
MODEL = (
    "--num-layers 4 --hidden-size 64 --ffn-hidden-size 160 --num-attention-heads 4 --group-query-attention "
    "--num-query-groups 2 --kv-channels 16 --position-embedding-type rope --rotary-base 10000 --normalization RMSNorm "
    "--norm-epsilon 1e-5 --swiglu --disable-bias-linear --untie-embeddings-and-output-weights --attention-dropout 0 "
    "--hidden-dropout 0 --tokenizer-type NullTokenizer --vocab-size 319 --make-vocab-size-divisible-by 32"
)
CPU = (
    "--transformer-impl local --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-masked-softmax-fusion "
    "--no-gradient-accumulation-fusion --no-rope-fusion --no-persist-layer-norm --distributed-backend gloo"
)
RUN = (
    "--micro-batch-size 1 --global-batch-size 2 --train-iters 12 --lr 1e-3 --lr-decay-style constant --weight-decay "
    "0.01 --clip-grad 1.0 --adam-beta1 0.9 --adam-beta2 0.95 --eval-iters 0 --eval-interval 1000 --log-interval 1 "
    "--calculate-per-token-loss --use-distributed-optimizer --no-create-attention-mask-in-dataloader --num-workers 0 "
    f"--seq-length {SEQ_LENGTH} --max-position-embeddings {SEQ_LENGTH} --weights {TINY_LLAMA}"
)
WINDOWS = f"--short-window {WINDOW} --short-stride {STRIDE} --short-window-bos-id {BOS}"
DENSE = f"--token-weighting dense --token-weighting-interpolation 0.75 {WINDOWS}"
SPARSE = f"--token-weighting sparse --token-weighting-sparsification 0.2 {WINDOWS}"
NO_WEIGHTING = f"--token-weighting dense --token-weighting-interpolation 1 {WINDOWS}"
UNIFORM = f"--token-weighting uniform {WINDOWS}"
OVERLAP = "--overlap-grad-reduce --overlap-param-gather"
OWN_ATTENTION = "--spec megatron_tw.integrations.megatron_lm.spec llama_layer"
LAYOUTS = {
    "1rank": (Axes(), ""),
    "TP2": (Axes(tp=2), ""),
    "PP2": (Axes(pp=2), ""),
    "DP2": (Axes(dp=2), OVERLAP),
    "CP2": (Axes(cp=2), OWN_ATTENTION),
    "TP2-SP": (Axes(tp=2), "--sequence-parallel"),
    "PP2-VPP": (Axes(pp=2), "--num-layers-per-virtual-pipeline-stage 1"),
    "PP2xCP2": (Axes(pp=2, cp=2), f"{OWN_ATTENTION} --pipeline-model-parallel-layout Etttt|L"),  # one without layers
}
METRICS = {
    "weighted loss": "weighted_loss",
    "lm loss": "unweighted_loss",
    "grad-norm": "grad_norm",
    "weight std": "weight_std",
}
RELATIVE = 2e-4
STEPS = 12


def pretrain(arguments: str) -> str:
    """On a rank: a run of the script by the launcher. Returns a checksum of this rank's weights after it."""
    from megatron_lm_cpu import forget_run, megatron_lm_on_cpu

    from megatron_tw.integrations.megatron_lm.__main__ import launch
    from megatron_tw.integrations.megatron_lm.plug_in import remove
    from megatron_tw.integrations.patches import applied_patches

    megatron_lm_on_cpu()
    try:
        models = launch([str(SCRIPT), *arguments.split()])["models"]
        assert bool(applied_patches()) == ("--token-weighting" in arguments), "off means off"
        digest = hashlib.sha256()
        for model in models:
            for parameter in model.parameters():
                digest.update(parameter.detach().numpy().tobytes())
            assert "compute_language_model_loss" not in vars(model), "what is set for a step is given back after it"
            assert not hasattr(model, "output_layer") or "forward" not in vars(model.output_layer)
        return digest.hexdigest()
    finally:
        remove()
        forget_run()


def logged(folder: Path) -> dict[str, list[float]]:
    """What Megatron-LM wrote for TensorBoard, by name, a value a step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: dict[str, dict[int, float]] = {}
    for file in sorted(folder.glob("events.*")):
        accumulator = EventAccumulator(str(file), size_guidance={"scalars": 0})
        accumulator.Reload()
        for name in accumulator.Tags()["scalars"]:
            events.setdefault(name, {}).update({event.step: event.value for event in accumulator.Scalars(name)})
    return {name: [values[step] for step in sorted(values)] for name, values in events.items()}


@pytest.fixture(scope="module")
def run(ranks, reference, tmp_path_factory) -> Any:
    """run(layout, options) -> (what was logged, checksums of the weights by rank); of the reference's rows."""
    folder = tmp_path_factory.mktemp("megatron_lm")
    order = np.load(reference / "trajectory_uniform.npz")["row_index"]
    np.save(folder / "rows.npy", reference_rows()[order.flatten()])

    def call(layout: str, options: str = "", base: str = RUN) -> tuple[dict[str, list[float]], list[str]]:
        axes, extra = LAYOUTS[layout]
        logs = folder / f"logs{len(list(folder.glob('logs*')))}"
        logs.mkdir()
        parallel = (
            f"--tensor-model-parallel-size {axes.tp} --pipeline-model-parallel-size {axes.pp} "
            f"--context-parallel-size {axes.cp}"
        )
        arguments = (
            f"--rows {folder}/rows.npy {base} {MODEL} {CPU} {parallel} {extra} --tensorboard-dir {logs} {options}"
        )
        checksums = ranks(axes.world_size).run(pretrain, arguments)
        return logged(logs), checksums

    return call


DENSE_RUN, SPARSE_RUN = ("trajectory_dense_unfrozen", DENSE), ("trajectory_sparse_unfrozen", SPARSE)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_trajectories(layout, run, reference):
    for name, options in [DENSE_RUN] if layout in ("TP2-SP", "PP2-VPP", "PP2xCP2") else [DENSE_RUN, SPARSE_RUN]:
        logs, _ = run(layout, options)
        expected = np.load(reference / f"{name}.npz")
        for ours, theirs in METRICS.items():
            np.testing.assert_allclose(logs[ours], expected[theirs], rtol=RELATIVE, atol=1e-6, err_msg=f"{name} {ours}")


@pytest.mark.parametrize("layout", ["1rank", "TP2", "PP2", "DP2"])
def test_uniform_is_stock_bit_for_bit(layout, run):
    stock, stock_weights = run(layout)
    scored, scored_weights = run(layout, UNIFORM)
    assert "short lm loss" not in stock
    assert len(scored["short lm loss"]) == STEPS
    for name in ("lm loss", "grad-norm"):
        assert scored[name] == stock[name], name
    assert scored_weights == stock_weights


def test_our_loss_with_equal_weights_is_stock(run):
    stock, _ = run("1rank")
    ours, _ = run("1rank", NO_WEIGHTING)
    for name in ("lm loss", "grad-norm"):
        np.testing.assert_allclose(ours[name], stock[name], rtol=1e-6, err_msg=name)
    np.testing.assert_allclose(ours["weighted loss"], stock["lm loss"], rtol=1e-6)


def test_a_scheme_without_windows(run):
    """EXACT: no context is there to be beyond. The mean weight is 1 + alpha * the share of the tail."""
    logs, _ = run(
        "1rank", "--token-weighting exact --token-weighting-tau 64 --token-weighting-alpha 0.5 --train-iters 2"
    )
    targets = SEQ_LENGTH - 1
    np.testing.assert_allclose(logs["weight mean"], 1 + 0.5 * (targets - 63) / targets, rtol=1e-6)
    assert not [name for name in logs if "beyond" in name or "short" in name]


def test_micro_batches_of_two_rows_with_evaluation(run, reference):
    """As one row at a time; what evaluates goes past the weights, and leaves nothing behind."""
    rows = RUN.replace("--micro-batch-size 1", "--micro-batch-size 2")
    rows = rows.replace("--eval-iters 0 --eval-interval 1000", "--eval-iters 1 --eval-interval 2")
    logs, _ = run("1rank", DENSE, base=rows)
    expected = np.load(reference / "trajectory_dense_unfrozen.npz")
    for ours, theirs in METRICS.items():
        np.testing.assert_allclose(logs[ours], expected[theirs], rtol=RELATIVE, atol=1e-6, err_msg=ours)
    assert len(logs["lm loss validation"]) >= 6


def metadata_of(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint says of its tensors."""
    from torch.distributed.checkpoint import FileSystemReader

    (folder,) = checkpoint.glob("iter_*")
    return {name: str(entry) for name, entry in FileSystemReader(folder).read_metadata().state_dict_metadata.items()}


def test_a_killed_run_goes_on_exactly_and_its_checkpoints_are_stock(run, tmp_path):
    saving = "--save-interval 5 --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable"
    killed = f"--save {tmp_path}/killed --load {tmp_path}/killed {saving}"
    straight, straight_weights = run("DP2", DENSE)
    with pytest.raises(RuntimeError, match="died"):
        run("DP2", f"{DENSE} {killed} --die-at 7")
    run("DP2", f"--save {tmp_path}/stock {saving} --train-iters 5")
    assert metadata_of(tmp_path / "killed") == metadata_of(tmp_path / "stock")
    run("DP2", f"--load {tmp_path}/killed --train-iters 6 --override-opt-param-scheduler")  # by Megatron-LM alone
    resumed, resumed_weights = run("DP2", f"{DENSE} {killed}")
    for name in METRICS:
        assert resumed[name] == straight[name][5:], name
    assert resumed_weights == straight_weights


def install_and_remove_twice() -> None:
    """On a rank, with Megatron-LM itself: what a patch rebinds, and gives back."""
    from importlib import import_module

    from megatron_tw.integrations.megatron_lm.plug_in import install, remove
    from megatron_tw.integrations.patches import applied_patches, patches_of

    def bound() -> list[Any]:
        return [getattr(import_module(patch.module), patch.name, None) for patch in patches_of("megatron_lm")]

    own = bound()
    for _ in range(2):
        install()
        install()
        there = [patch for patch, name in zip(patches_of("megatron_lm"), own, strict=True) if name is not None]
        assert applied_patches() == tuple(there)
        assert all(patch.optional for patch in patches_of("megatron_lm") if patch not in there)
        assert all(now is not before for now, before in zip(bound(), own, strict=True) if before is not None)
        remove()
        remove()
        assert bound() == own
        assert applied_patches() == ()


def test_patches_of_megatron_lm_itself(ranks):
    ranks(1).run(install_and_remove_twice)


def test_the_launcher_refuses_in_one_line(tmp_path):
    np.save(tmp_path / "rows.npy", reference_rows())
    arguments = f"--rows {tmp_path}/rows.npy {RUN} {MODEL} {CPU} {DENSE} --reset-attention-mask"
    command = [sys.executable, "-m", "megatron_tw.integrations.megatron_lm", str(SCRIPT), *arguments.split()]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )
    assert done.returncode != 0
    assert done.stderr.strip().splitlines()[-1] == (
        "megatron_tw.integrations.megatron_lm: --reset-attention-mask: cannot go with --token-weighting, got True: a "
        "short window sees across the documents of its row, and the long pass would not"
    )
