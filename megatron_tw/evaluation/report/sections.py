"""What a report shows, in order. A section whose figures were not evaluated is left out."""

from collections.abc import Callable, Sequence

from megatron_tw.evaluation.report import figures
from megatron_tw.evaluation.report.benchmark_sections import benchmark_section, needle_section, ruler_section
from megatron_tw.evaluation.report.inputs import Shown
from megatron_tw.evaluation.report.loss_sections import loss_section, recall_section
from megatron_tw.evaluation.report.section import Section
from megatron_tw.evaluation.report.trade_off import trade_off_section
from megatron_tw.evaluation.report.weight_sections import text_section, weight_section


def sections_of(shown: Shown) -> list[Section]:
    """All that can be shown."""
    makers: Sequence[Callable[[Shown], Section | None]] = (
        recall_section, loss_section, ruler_section, needle_section, trade_off_section, benchmark_section,
        weight_section, text_section, training_section,
    )  # fmt: skip
    return [section for maker in makers if (section := maker(shown)) is not None]


def training_section(shown: Shown) -> Section | None:
    """Curves of the training runs."""
    if not shown.metrics:
        return None
    return Section(name="training", title="Training", drawings=figures.draw_training(shown.metrics))
