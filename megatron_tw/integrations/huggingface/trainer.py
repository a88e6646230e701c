"""The Hugging Face Trainer with a token-weighted loss.

    get_batch_samples   once an optimizer step, with all its micro-batches: count of targets over all processes, scheme
                        of the step, short NLL of all rows
    compute_loss        of a micro-batch: long NLL from the model's head, weights, weighted sum / the step's count
    training_step       after the last micro-batch: statistics over all processes, and whether all was finite
    log                 puts the statistics beside the Trainer's own numbers

Shape suffixes: R rows, S positions, T = S - 1 targets.
"""

import inspect
import logging
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor, nn

from megatron_tw.integrations.arguments import arguments_named
from megatron_tw.integrations.huggingface.batches import Rows
from megatron_tw.integrations.huggingface.config import COLUMN, TokenWeightingConfig, as_config
from megatron_tw.integrations.huggingface.head import output_head, token_nll
from megatron_tw.integrations.huggingface.scoring import ShortWindowScorer, load_scorer
from megatron_tw.objective import ShortNLL, StepReport, weighted_loss
from megatron_tw.weighting import Scheme, unfrozen_short_nll

if TYPE_CHECKING:
    _Base = transformers.Trainer
else:
    _Base = object

logger = logging.getLogger(__name__)

_NOT_INPUTS = ("labels", "num_items_in_batch", COLUMN)
"""What a batch holds, or a Trainer adds, that is not for a model which is called without labels."""


_LOGGED = (
    "lm_loss",
    "short_lm_loss",
    "weight_mean",
    "weight_std",
    "weight_entropy",
    "effective_sample_size",
    "zero_weight_share",
    "weight_share_beyond_context",
)
"""Of a step's metrics, what stands in the Trainer's log beside its `loss`, which is the weighted one."""


@dataclass(frozen=True)
class _MicroBatch:
    rows: Rows
    short_nll_RT: Tensor | None


class TokenWeightingMixin(_Base):
    """Gives a Trainer the token-weighted loss: `class MyTrainer(TokenWeightingMixin, SFTTrainer)`.

    Settings come as the argument `token_weighting`, or stand in the class where its arguments are another program's
    (axolotl): `token_weighting = TokenWeightingConfig(...)`.

    Raises:
        ValueError: arguments or a model that the loss does not go with; names what and why. Later, in the first step,
            rows that are not what was expected; and in any step a NaN or infinite NLL, before the update.
    """

    token_weighting: TokenWeightingConfig | None = None

    def __init__(self, *args: Any, token_weighting: TokenWeightingConfig | None = None, **kwargs: Any) -> None:
        self.token_weighting = as_config(type(self).token_weighting if token_weighting is None else token_weighting)
        given = inspect.signature(super().__init__).bind_partial(*args, **kwargs).arguments
        arguments = given.get("args", kwargs.get("args"))
        if isinstance(arguments, transformers.TrainingArguments):
            _check_arguments(arguments, self.token_weighting)  # again below; here before a dataset is tokenized
        super().__init__(*args, **kwargs)
        _check_arguments(self.args, self.token_weighting)
        self._check_trainer()
        self._head = output_head(self._plain_model())
        self._schedule = self.token_weighting.schedule
        self._scheme: Scheme | None = None
        self._micro_batches: deque[_MicroBatch] = deque()
        self._statistics: list[Tensor] = []
        self._step_metrics: list[dict[str, float]] = []
        self._output_checked = False
        self._rows_seen = False
        self._scorer = self._make_scorer()

    # ---- before the first step

    def _plain_model(self) -> nn.Module:
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    def _check_trainer(self) -> None:
        """What is known only once the Trainer has been made."""
        if self.compute_loss_func is not None:
            raise ValueError("compute_loss_func: expected None, because the weighted loss takes its place")
        if self.is_model_parallel:
            raise ValueError("model: expected one device a process, got a model that device_map spread over several")
        plugin = getattr(self.accelerator.state, "deepspeed_plugin", None)
        if plugin is not None and plugin.zero_stage == 3:
            raise ValueError("deepspeed: expected ZeRO stage 1 or 2, got 3, which splits the output projection; FSDP "
                             "splits parameters too, and works")  # fmt: skip
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        for axis in ("tp", "cp", "sp"):
            if parallelism is not None and (getattr(parallelism, f"{axis}_size", 1) or 1) > 1:
                raise ValueError(
                    f"parallelism_config: expected data parallelism only, got {axis}_size="
                    f"{getattr(parallelism, f'{axis}_size')}; rows are weighted as a whole, on one rank"
                )
        peft = getattr(self._plain_model(), "active_peft_config", None)
        if getattr(peft, "is_prompt_learning", False):
            raise ValueError("peft_config: expected adapters, got prompt tuning, whose virtual tokens have no targets")

    def _make_scorer(self) -> ShortWindowScorer | None:
        """None where no step needs one that is run."""
        config = self._settings
        if not self._schedule.needs_scorer or config.scorer == "column":
            return None
        config_of_model: Any = self._plain_model().config
        bos_id = config.bos_id
        if bos_id is None:  # of a few families the config has no such field
            bos_id = getattr(config_of_model.get_text_config(), "bos_token_id", None)
        if config.scorer == "unfrozen":
            nll = self._own_nll
        else:
            scorer = load_scorer(config, self._plain_model())
            head = output_head(scorer, argument="scorer_hf")
            scorer = scorer.to(self.args.device).eval().requires_grad_(False)
            nll = partial(self._frozen_nll, scorer, head)
        sharded = self.is_fsdp_enabled or getattr(self.model, "is_distributed_loading_by_transformers", False)
        return ShortWindowScorer(
            config=config,
            nll=nll,
            bos_id=bos_id,
            include_first=config.scorer == "frozen",
            # Every call of a sharded model gathers its parameters, on all ranks together.
            most=self._most if sharded and config.scorer == "unfrozen" else None,
        )

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """Called by the Trainer for a model of each trial, whose head is its own."""
        model: nn.Module = super().call_model_init(trial)
        self._head = output_head(model)
        return model

    @property
    def _settings(self) -> TokenWeightingConfig:
        assert self.token_weighting is not None
        return self.token_weighting

    # ---- an optimizer step

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], Tensor]:
        """The micro-batches of a step, and its count of targets over all processes. Short NLLs are made here."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        rows = [Rows.of_batch(batch, device) for batch in batches]
        count = self.accelerator.gather(sum((x.num_valid for x in rows), torch.zeros((), dtype=torch.int64)).to(device))
        self._scheme = self._schedule.at(self.state.global_step)
        self._statistics = []
        self._check_rows(rows)
        self._micro_batches = deque(
            _MicroBatch(*pair) for pair in zip(rows, self._short_nll(rows, self._scheme), strict=True)
        )
        return batches, count.sum()

    def _check_rows(self, rows: list[Rows]) -> None:
        """Once: rows of one length must be what the settings are for; of padded ones only the longest can be."""
        lengths = {length for x in rows for length in x.lengths}
        if self._rows_seen or not lengths:
            return
        self._rows_seen = True
        window, needs_scorer = self._settings.short_window, self._schedule.needs_scorer
        if len(lengths) == 1:
            with arguments_named():
                self._schedule.check_rows(max(lengths))
        if needs_scorer and self._settings.scorer == "unfrozen" and window is not None and max(lengths) <= window:
            text = f"short_window: expected less than the {max(lengths)} tokens of a row, got {window}"
            if len(lengths) == 1:
                raise ValueError(text)
            logger.warning("%s in this step; rows this short are weighted uniformly", text)

    def _most(self, number: int) -> int:
        """The largest over all processes."""
        return int(self.accelerator.gather(torch.tensor(number, device=self.args.device)).max())

    def _short_nll(self, rows: list[Rows], scheme: Scheme) -> list[Tensor] | list[None]:
        if not scheme.needs_scorer:
            return [None] * len(rows)
        if any(x.document_starts_RT is not None for x in rows):
            raise ValueError(
                "position_ids: expected 0, 1, 2, ... in every row (a scheme that compares two NLLs takes rows of one "
                "document), got some that restart"
            )
        if self._scorer is None:
            if any(x.short_nll_RT is None for x in rows):
                raise ValueError(f"{COLUMN}: expected this column in every batch with scorer='column', got none")
            return [x.short_nll_RT for x in rows if x.short_nll_RT is not None]
        for x in rows:
            x.check_padding()
        with torch.no_grad(), self.accelerator.autocast():
            return self._scorer.short_nll(rows) if rows else []

    def _own_nll(self, ids: Tensor, labels: Tensor) -> Tensor:
        """NLL of the model in training; not of DDP's wrapper, which would broadcast buffers."""
        model: Any = self.model
        model.eval()  # no dropout in scores; training_step turns it on again
        return token_nll(model, self._head, labels, {"input_ids": ids, "use_cache": False})

    @staticmethod
    def _frozen_nll(scorer: nn.Module, head: nn.Linear, ids: Tensor, labels: Tensor) -> Tensor:
        return token_nll(scorer, head, labels, {"input_ids": ids, "use_cache": False}, check_output=True)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """In training the weighted loss of a micro-batch; in evaluation the Trainer's own, with logits."""
        if not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._micro_batches, "get_batch_samples comes first"
        assert num_items_in_batch is not None
        assert self._scheme is not None
        batch = self._micro_batches.popleft()
        rows, short_nll = batch.rows, batch.short_nll_RT
        long_nll_RS = token_nll(
            model, self._head, rows.labels_RS, _model_inputs(inputs), check_output=not self._output_checked
        )
        # NLLs of 0, where nothing is labelled, would stand any scale.
        self._output_checked = self._output_checked or bool(rows.num_valid)
        window = self._settings.short_window
        if short_nll is None or window is None or self._settings.scorer != "unfrozen":
            complete: ShortNLL = short_nll
        else:
            complete = partial(unfrozen_short_nll, short_nll=short_nll, window=window)
        result = weighted_loss(
            long_nll_RS,
            complete,
            self._scheme,
            labels=rows.labels_RS,
            row_ids=rows.row_ids,
            seed=self.args.seed if self._settings.seed is None else self._settings.seed,
            document_starts=rows.document_starts_RT,
            report=StepReport((1, rows.ids_RS.shape[1]), window or 1),
        )
        assert result.statistics is not None
        self._statistics.append(result.statistics)
        # What averages gradients over the processes divides by their number; what adds up micro-batches does not.
        loss = result.sum / torch.as_tensor(num_items_in_batch).clamp(min=1) * self.accelerator.num_processes
        return (loss, {"loss": loss}) if return_outputs else loss

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        # The loss is divided by the count of the whole step. This keeps the Trainer (of every transformers 5) from
        # dividing it by the number of micro-batches too, as it does for models that take no count.
        accepts, self.model_accepts_loss_kwargs = self.model_accepts_loss_kwargs, True
        try:
            loss: Tensor = super().training_step(model, inputs, *args, **kwargs)
        finally:
            self.model_accepts_loss_kwargs = accepts
        if not self._micro_batches:
            self._finish_step()
        return loss

    def _finish_step(self) -> None:
        """The step's statistics, over all processes."""
        assert self._scheme is not None
        sums = self.accelerator.reduce(torch.stack(self._statistics).sum(0), reduction="sum")
        report = StepReport((1, 2), self._settings.short_window or 1)
        metrics = report.metrics(sums.tolist(), scored=self._scheme.needs_scorer)
        if metrics["nonfinite"]:
            raise ValueError(
                f"NLL: {metrics['nonfinite']:.0f} targets of step {self.state.global_step + 1} are NaN or infinite; no "
                "update was made"
            )
        logged = {name: metrics[name] for name in _LOGGED if name in metrics}
        if self._settings.short_window is None:
            del logged["weight_share_beyond_context"]
        if metrics["targets"]:  # else there is nothing that a mean could be of
            self._step_metrics.append(logged)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Training logs get the means of the steps since the last one, as the Trainer's `loss` is one."""
        if "loss" in logs and self._step_metrics:
            for name in self._step_metrics[-1]:
                values = [metrics[name] for metrics in self._step_metrics if name in metrics]
                logs[name] = sum(values) / len(values)
            self._step_metrics = []
        super().log(logs, *args, **kwargs)

    # ---- evaluation

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The plain loss of all targets; without logits, where only the loss is asked for."""
        inputs = {name: value for name, value in inputs.items() if name != COLUMN}
        if not prediction_loss_only or inputs.get("labels") is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        inputs = self._prepare_inputs(inputs)
        rows = Rows.of_batch(inputs, self.args.device)
        count = self.accelerator.gather(rows.num_valid).sum()  # 0: the loss is NaN, as the Trainer's own
        with torch.no_grad(), self.compute_loss_context_manager():
            nll_RS = token_nll(model, self._head, rows.labels_RS, _model_inputs(inputs), check_output=True)
        return nll_RS.sum() / count * self.accelerator.num_processes, None, None


class TokenWeightingTrainer(TokenWeightingMixin, transformers.Trainer):
    """transformers.Trainer with a token-weighted loss, for causal language models; see TokenWeightingMixin."""


def _model_inputs(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in inputs.items() if name not in _NOT_INPUTS}


def _check_arguments(args: transformers.TrainingArguments, config: TokenWeightingConfig) -> None:
    """Of TrainingArguments what does not go with a loss inside of the model's head; what a library has no such argument
    for is not asked."""
    for name, why in (
        ("use_liger_kernel", "its fused loss leaves the tokens' weights out"),
        ("torch_compile", "the loss chooses its tokens by their weights, step by step"),
        ("label_smoothing_factor", "the weights are made for the NLL alone"),
        ("orpo_alpha", "it is another objective"),
    ):
        if getattr(args, name, None):
            raise ValueError(f"{name}: expected it off with token weighting ({why}), got {getattr(args, name)}")
    loss_type = getattr(args, "loss_type", None)  # TRL
    if loss_type not in (None, "nll", "chunked_nll"):
        raise ValueError(f"loss_type: expected 'nll' with token weighting, got {loss_type!r}")
    packed = any(getattr(args, name, False) for name in ("packing", "padding_free", "sample_packing"))
    if packed and config.schedule.needs_scorer:
        raise ValueError("packing: expected rows that hold one document each, with a scheme that compares two NLLs")
    if config.scorer == "column" and config.schedule.needs_scorer and args.remove_unused_columns:
        raise ValueError(f"remove_unused_columns: expected False with scorer='column', else the Trainer drops {COLUMN}")
    if args.device.type == "mps":
        raise ValueError("use_cpu: expected True here: weights are made in float64, which the device mps does not have")
    if args.n_gpu > 1:
        raise ValueError(
            f"n_gpu: expected one process for each GPU (torchrun, accelerate launch), got {args.n_gpu} GPUs in one"
        )
