"""What a step costs, for its metrics."""

from dataclasses import dataclass

from megatron_tw.config import RunConfig
from megatron_tw.model.architecture import Architecture
from megatron_tw.model.flops import Work, model_flops, step_work
from megatron_tw.parallel.gpus import Gpu


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of the steps of one run, by formula. config: with its null options filled in."""

    architecture: Architecture
    config: RunConfig

    def of_step(
        self, rows: int, *, loss_rows: float, labelled_rows: float, attended: float, scoring: Work | None
    ) -> dict[str, float]:
        """Metrics, of all ranks. model_flops: forward and backward of the step's rows, with causal attention counted
        half, and in packed rows inside the documents. hardware_flops: what the step really did, with scoring and layers
        run again, and without the targets whose weight is zero in the loss's backward pass.

        loss_rows, labelled_rows, attended: see StepReport.metrics. scoring: None where the step was not scored.
        """
        config = self.config
        assert config.activations.loss_keep_logits_mib is not None
        work = step_work(
            self.architecture,
            seq_length=config.data.seq_length,
            rows=rows,
            train=config.train,
            parallel=config.parallel,
            compute=config.compute,
            activations=config.activations,
            keep_logits_mib=config.activations.loss_keep_logits_mib,
            loss_rows=loss_rows,
            labelled_rows=labelled_rows,
            attended=attended,
            scoring=scoring,
        )
        return {
            "model_flops": model_flops(self.architecture, rows, config.data.seq_length, attended),
            "hardware_flops": work.total,
        }


def rates(flops: float, seconds: float, ranks: int, gpu: Gpu | None) -> dict[str, float]:
    """Metrics of a step of `flops` model FLOPs on all ranks: tflops_per_second_per_gpu, and model_flops_utilization,
    its share of the peak in bf16. None of them where the GPU is not a known one, or there is none."""
    if gpu is None:
        return {}
    rate = flops / seconds / ranks
    return {"tflops_per_second_per_gpu": rate / 1e12, "model_flops_utilization": rate / gpu.peak_flops}
