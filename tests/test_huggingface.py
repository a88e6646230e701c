"""The Hugging Face Trainer with token weighting: the method's reference runs, under accumulation, DDP and FSDP2, and an
independent computation in fp64 of uneven masks. Models, refusals and memory: test_huggingface_models.py.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("accelerate", reason="the Trainer needs accelerate")

import transformers
from huggingface_runs import (
    DENSE,
    SPARSE,
    WINDOWS,
    Examples,
    arguments,
    collate_right_padded,
    load_sharded_tiny_llama,
    load_tiny_llama,
    logs_of,
    train,
    train_on_rank,
    whole_rows,
)
from tiny import (
    BOS,
    SEQ_LENGTH,
    STRIDE,
    TINY_LLAMA,
    WINDOW,
    Axes,
    layout_of,
    prepare_ready_rows,
    reference_rows,
    release,
)
from torch.distributed.tensor import DTensor

from megatron_tw.config import (
    DataConfig,
    ModelConfig,
    OptimizationConfig,
    RunConfig,
    TrainConfig,
    WeightingOptions,
    WindowsConfig,
)
from megatron_tw.data.loader import Batch
from megatron_tw.integrations.huggingface import TokenWeightingConfig, TokenWeightingTrainer
from megatron_tw.parallel.devices import prepare_device
from megatron_tw.training.inputs import open_inputs
from megatron_tw.training.loop import Run

METRICS = {
    "loss": "weighted_loss",
    "lm_loss": "unweighted_loss",
    "grad_norm": "grad_norm",
    "weight_std": "weight_std",
}
RELATIVE = 2e-4
LONGCE = TokenWeightingConfig(weighting="longce", **WINDOWS)
FROZEN = TokenWeightingConfig(
    weighting="sparse",
    weighting_parameters={"sparsification": 0.4},
    scorer="frozen",
    scorer_hf=str(TINY_LLAMA),
    **WINDOWS,
)
COLUMN = TokenWeightingConfig(weighting="dense", scorer="column")


def order_of(reference: Path) -> np.ndarray:
    return np.load(reference / "trajectory_uniform.npz")["row_index"]


def assert_trajectory(logs: dict[str, np.ndarray], reference: Path, name: str, steps: int = 12) -> None:
    expected = np.load(reference / f"trajectory_{name}.npz")
    for ours, theirs in METRICS.items():
        np.testing.assert_allclose(logs[ours], expected[theirs][:steps], rtol=RELATIVE, err_msg=f"{name} {ours}")


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("uniform", TokenWeightingConfig(weighting="uniform")),
        ("dense_unfrozen", DENSE),
        ("sparse_unfrozen", SPARSE),
        ("longce_unfrozen", LONGCE),
        ("sparse_frozen", FROZEN),
    ],
)
def test_one_process_with_accumulation(name, config, reference, tmp_path):
    logs = train(whole_rows(order_of(reference)), config, tmp_path, gradient_accumulation_steps=2)
    assert_trajectory(logs, reference, name)


def test_the_datasets_own_short_nll(reference, tmp_path):
    short = np.load(reference / "windows.npz")["short_nll_with_first"]
    data = whole_rows(order_of(reference), short_nll=np.pad(short, ((0, 0), (1, 0))))
    logs = train(data, COLUMN, tmp_path, per_device_train_batch_size=2, remove_unused_columns=False)
    assert_trajectory(logs, reference, "dense_frozen")


@pytest.mark.parametrize(("name", "config"), [("dense_unfrozen", DENSE), ("sparse_unfrozen", SPARSE)])
@pytest.mark.parametrize("model", [load_tiny_llama, load_sharded_tiny_llama], ids=["DDP", "FSDP2"])
def test_two_processes(name, config, model, ranks, reference, tmp_path):
    data = whole_rows(order_of(reference))
    for logs in ranks(2).run(train_on_rank, data, config, tmp_path, model=model):
        assert_trajectory(logs, reference, name)


# ---- uneven masks


def uneven_examples() -> Examples:
    """Rows of several lengths, one of them within the window, masks of several kinds, one of them of all targets."""
    examples = []
    for row, (length, masked) in enumerate([(256, slice(0, 120)), (200, slice(0, 0)), (40, slice(10, 20)),
                                            (131, slice(64, 90)), (256, slice(0, 256)), (96, slice(95, 96)),
                                            (256, slice(200, 256)), (180, slice(1, 170))]):  # fmt: skip
        ids = torch.from_numpy(reference_rows())[row % 4, :length].clone()
        labels = ids.clone()
        labels[masked] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return Examples(examples)


def reference_nll(model, ids: torch.Tensor) -> torch.Tensor:
    """NLL of tokens 1 .. of one row, from full logits."""
    logits = model(ids[None]).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


def reference_short_nll(model, ids: torch.Tensor, long: torch.Tensor) -> torch.Tensor:
    """The unfrozen scorer's, window by window, as docs/method.md says: entry j is of token j + 1."""
    short, first = long.clone(), WINDOW
    while first < len(ids):
        end = min(first + STRIDE, len(ids))
        window = ids[end - WINDOW : end].clone()
        if ids[0] == BOS:
            window[0] = BOS
        short[first - 1 : end - 1] = reference_nll(model, window)[first - end :]
        first = end
    short[:WINDOW] = long[:WINDOW]
    return short


def reference_step(kappa: float | None) -> dict[str, float]:
    """The first step on all rows in fp64: dense with lambda 0.75, or the top kappa of a row's targets."""
    model = load_tiny_llama().double()
    weighted, plain, count = torch.zeros(()).double(), 0.0, 0
    for example in uneven_examples().examples:
        ids, valid = example["input_ids"], example["labels"][1:] != -100
        long = reference_nll(model, ids)
        with torch.no_grad():
            score = (long - reference_short_nll(model, ids, long.detach())).abs()[valid]
        number = int(valid.sum())
        if number == 0:
            continue
        if kappa is None:
            weights = score / score.sum() * number if score.sum() > 0 else torch.ones(number)
            weights = 0.75 + 0.25 * weights
        else:
            top = int(kappa * number)
            weights = torch.zeros(number).double()
            weights[score.argsort(descending=True)[:top]] = number / top
        weighted = weighted + (weights * long[valid]).sum()
        plain += float(long.detach()[valid].sum())
        count += number
    (weighted / count).backward()
    norm = torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm()
    return {"loss": float(weighted.detach()) / count, "lm_loss": plain / count, "grad_norm": float(norm)}


@pytest.fixture(scope="module")
def expected_step() -> dict[str, float]:
    return reference_step(None)


@pytest.mark.parametrize(
    ("model", "processes", "batch", "accumulation"),
    [
        (load_tiny_llama, 1, 2, 4),
        (load_tiny_llama, 2, 1, 4),
        (load_tiny_llama, 2, 2, 2),
        (load_sharded_tiny_llama, 2, 1, 4),
    ],
    ids=["accumulation", "DDP", "DDP of batches", "FSDP2"],
)
def test_uneven_masks_and_lengths(model, processes, batch, accumulation, ranks, tmp_path, expected_step):
    """Unequal counts of targets, and of short windows, on the two ranks and in their micro-batches."""
    options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "model": model}
    if processes == 1:
        by_rank = [train(uneven_examples(), DENSE, tmp_path, **options)]
    else:
        by_rank = ranks(2).run(train_on_rank, uneven_examples(), DENSE, tmp_path, **options)
    for logs in by_rank:
        assert {name: logs[name][0] for name in expected_step} == pytest.approx(expected_step, rel=1e-5)


def masked_rows() -> Examples:
    """Three steps of four rows, of whose targets this process leaves out another part each time."""
    rng = np.random.default_rng(0)
    examples = []
    for row in range(12):
        ids = torch.from_numpy(reference_rows())[row % 4]
        labels = ids.clone()
        first = int(rng.integers(1, SEQ_LENGTH - 1))
        labels[first : first + int(rng.integers(0, SEQ_LENGTH))] = -100
        examples.append({"input_ids": ids, "labels": labels})
    return Examples(examples)


def our_steps_on_rank(data: Examples, rows: Path, steps: int) -> list[dict[str, float]]:
    """On one of two ranks: the project's own training step on the rows that the Trainer gives this rank, two
    micro-batches of one row a step."""
    config = RunConfig(
        parallel=Axes(dp=2).parallel(),
        model=ModelConfig(load_hf=str(TINY_LLAMA)),
        data=DataConfig(data_path=(str(rows),), seq_length=SEQ_LENGTH),
        train=TrainConfig(train_iters=steps, global_batch_size=4),
        weighting=WeightingOptions(weighting="dense", interpolation=0.75),
        windows=WindowsConfig(short_window=WINDOW, short_stride=STRIDE),
        optimizer=OptimizationConfig(
            lr=1e-3, lr_decay_style="constant", weight_decay=0.01, adam_beta1=0.9, adam_beta2=0.95, clip_grad=1.0
        ),
    )
    metrics = []
    with layout_of(Axes(dp=2)) as layout:
        run = Run.start(config, open_inputs(config), layout, prepare_device())
        for step in range(steps):
            mine = [4 * step + 2 * micro_batch + layout.dp_rank for micro_batch in range(2)]
            chosen = [data[row] for row in mine]
            batches = [
                Batch(
                    tokens=example["input_ids"][None],
                    row_index=torch.tensor([row]),
                    valid=(example["labels"] != -100)[None, 1:],
                )
                for row, example in zip(mine, chosen, strict=True)
            ]
            metrics.append(run.step(batches, step))
        release(run.step.model)
    return metrics


def test_ddp_with_accumulation_and_uneven_masks_is_our_trainer(ranks, tmp_path):
    """Both on two ranks with two micro-batches a step, on the same rows."""
    data, steps = masked_rows(), 3
    rows = prepare_ready_rows(reference_rows(), tmp_path / "rows")
    (ours, _) = ranks(2).run(our_steps_on_rank, data, rows, steps)
    for logs in ranks(2).run(train_on_rank, data, DENSE, tmp_path / "hf", gradient_accumulation_steps=2):
        for theirs, name in (("loss", "weighted_loss"), ("lm_loss", "lm_loss"), ("grad_norm", "grad_norm")):
            expected = [metrics[name] for metrics in ours]
            np.testing.assert_allclose(logs[theirs], expected, rtol=RELATIVE, err_msg=name)


def test_uneven_masks_with_sparse_weights(tmp_path):
    # A quarter of 10 and 255 targets: without a tie among scores of 0, of which this computation breaks none.
    rows = Examples([x for x in uneven_examples().examples if len(x["input_ids"]) > 180][:2])
    model = load_tiny_llama().double()
    config = TokenWeightingConfig(weighting="sparse", weighting_parameters={"sparsification": 0.25}, **WINDOWS)
    logs = train(rows, config, tmp_path, per_device_train_batch_size=2)
    count, kept, weighted = 0, 0, 0.0
    with torch.no_grad():
        for example in rows.examples:
            ids, valid = example["input_ids"], example["labels"][1:] != -100
            long = reference_nll(model, ids)
            score = (long - reference_short_nll(model, ids, long)).abs()[valid]
            number, top = int(valid.sum()), int(0.25 * int(valid.sum()))
            weighted += float(long[valid][score.argsort(descending=True)[:top]].sum()) * number / top
            count, kept = count + number, kept + top
    assert logs["loss"][0] == pytest.approx(weighted / count, rel=1e-5)
    assert logs["zero_weight_share"][0] == pytest.approx(1 - kept / count)


def is_sharded(_: object = None) -> bool:
    """On a rank: whether the head's weight is a shard outside of its forward."""
    head = load_sharded_tiny_llama().get_output_embeddings()
    return isinstance(head.weight, DTensor) and head.weight.to_local().shape[0] < head.weight.shape[0]


def test_the_sharded_models_head_is_a_shard(ranks):
    assert ranks(2).run(is_sharded) == [True, True]


# ---- the Trainer's own ways


def test_resume_is_exact(tmp_path, reference):
    data = whole_rows(order_of(reference))
    options: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2}
    straight = train(data, SPARSE, tmp_path / "straight", **options)
    interrupted = TokenWeightingTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path / "resumed", **options, save_strategy="steps", save_steps=2),
        train_dataset=data,
        token_weighting=SPARSE,
    )
    interrupted.train()
    resumed = TokenWeightingTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path / "resumed", **options),
        train_dataset=data,
        token_weighting=SPARSE,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "resumed" / "checkpoint-2"))
    logs = logs_of(resumed)
    for name in METRICS:
        assert logs[name].tolist() == straight[name].tolist(), name


def test_a_schedule_goes_by_the_step(tmp_path, reference):
    schedule = "0: uniform; 2: base; 3: sparse sparsification=0.2"
    config = TokenWeightingConfig(weighting="dense", weighting_schedule=schedule, **WINDOWS)
    logs = train(whole_rows(order_of(reference)), config, tmp_path, gradient_accumulation_steps=2, max_steps=4)
    assert (logs["weight_std"][:2] == 0).all()
    assert 0 < logs["weight_std"][2] < 1 < logs["weight_std"][3]
    assert logs["zero_weight_share"] == pytest.approx([0, 0, 0, 0.8])


def test_logs_are_means_of_the_steps_since_the_last(tmp_path, reference):
    data = whole_rows(order_of(reference))
    options: dict[str, Any] = {"gradient_accumulation_steps": 2, "max_steps": 4}
    every, second = (
        train(data, DENSE, tmp_path, logging_steps=steps, **options) for steps in (1, 2)
    )  # fmt: skip
    for name in ("loss", "lm_loss", "weight_std"):
        assert second[name] == pytest.approx(every[name].reshape(2, 2).mean(1), rel=1e-6)
    of_the_trainer = {"loss", "grad_norm", "learning_rate", "epoch", "step"}
    assert every.keys() - of_the_trainer == {
        *("lm_loss", "short_lm_loss", "weight_mean", "weight_std", "weight_entropy", "effective_sample_size"),
        *("zero_weight_share", "weight_share_beyond_context"),
    }  # fmt: skip


def test_a_step_without_targets_is_in_no_mean(tmp_path, reference):
    """Its answers were cut away, say. Steps of two rows, of which the second has no label at all."""
    rows = whole_rows(order_of(reference)).examples[:6]
    masked = [{**row, "labels": torch.full_like(row["labels"], -100)} for row in rows[2:4]]
    data, options = Examples([*rows[:2], *masked, *rows[4:]]), {"gradient_accumulation_steps": 2, "max_steps": 3}
    logs = []
    for steps in (1, 3):
        trainer = TokenWeightingTrainer(
            model=load_tiny_llama(),
            args=arguments(tmp_path, logging_steps=steps, **options),
            train_dataset=data,
            token_weighting=DENSE,
        )
        trainer.train()
        logs.append([entry["lm_loss"] for entry in trainer.state.log_history if "lm_loss" in entry])
    every, (of_three,) = logs
    assert len(every) == 2
    assert of_three == pytest.approx(np.mean(every), rel=1e-6)
    trainer = TokenWeightingTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path),
        train_dataset=data,
        eval_dataset=Examples(masked),
        token_weighting=DENSE,
    )
    assert np.isnan(trainer.evaluate()["eval_loss"]), "as the Trainer's own: no loss, not one of 0"


def test_models_made_anew_for_every_trial_train(tmp_path, reference):
    data = whole_rows(order_of(reference)[:2])
    losses = []
    for given in ({"model": load_tiny_llama()}, {"model_init": lambda: load_tiny_llama()}):
        trainer = TokenWeightingTrainer(
            **given, args=arguments(tmp_path, max_steps=2), train_dataset=data, token_weighting=DENSE
        )
        trainer.train()
        losses.append(logs_of(trainer)["loss"].tolist())
    assert losses[0] == losses[1]


def test_exact_counts_context_from_the_start_of_a_document(tmp_path):
    """Documents of 96 and 160 tokens in a row: the tail of 64 tokens or more is 32 and 96 targets."""
    ids = torch.from_numpy(reference_rows())[0]
    positions = torch.cat((torch.arange(96), torch.arange(160)))
    data = Examples([{"input_ids": ids, "labels": ids, "position_ids": positions}])
    config = TokenWeightingConfig(weighting="exact", weighting_parameters={"tau": 64, "alpha": 0.5})
    trainer = TokenWeightingTrainer(
        model=load_tiny_llama(), args=arguments(tmp_path), train_dataset=data, token_weighting=config
    )
    trainer.train()
    tail = (96 - 64) + (160 - 64)
    assert logs_of(trainer)["weight_mean"][0] == pytest.approx(1 + 0.5 * tail / 255)


def test_evaluation_and_generation_go_on(tmp_path, reference):
    data = whole_rows(order_of(reference)[:1])

    def accuracy(prediction: Any) -> dict[str, float]:
        return {"accuracy": float((prediction.predictions.argmax(-1)[:, :-1] == prediction.label_ids[:, 1:]).mean())}

    trainer = TokenWeightingTrainer(
        model=load_tiny_llama(),
        args=arguments(tmp_path, eval_strategy="epoch", prediction_loss_only=True, per_device_eval_batch_size=4),
        train_dataset=data,
        eval_dataset=uneven_examples(),
        data_collator=collate_right_padded,
        token_weighting=DENSE,
    )
    trainer.train()
    stock = transformers.Trainer(
        model=trainer.model,
        args=arguments(tmp_path, per_device_eval_batch_size=4),
        eval_dataset=uneven_examples(),
        data_collator=collate_right_padded,
        compute_metrics=accuracy,
    )
    in_between = next(entry for entry in trainer.state.log_history if "eval_loss" in entry)
    expected = stock.evaluate()
    assert in_between["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    trainer.args.prediction_loss_only, trainer.compute_metrics = False, accuracy
    with_logits = trainer.evaluate()
    assert with_logits["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-5)
    assert with_logits["eval_accuracy"] == expected["eval_accuracy"]
    prompt = torch.from_numpy(reference_rows())[:1, :16]
    model: Any = trainer.model
    longer = model.generate(prompt, max_new_tokens=4, do_sample=False, pad_token_id=0)
    with torch.no_grad():
        assert longer[0, 16] == model(prompt).logits[0, -1].argmax()


def test_bf16_is_near_fp32(tmp_path, reference):
    data = whole_rows(order_of(reference)[:2])
    full, mixed = (train(data, DENSE, tmp_path, bf16=bf16) for bf16 in (False, True))
    for name in ("loss", "lm_loss"):
        assert mixed[name] == pytest.approx(full[name], rel=0.02), name
        assert (mixed[name] != full[name]).any(), name
