"""The programs and their options, so that each can say whose an option is that it does not have itself."""

from megatron_tw.config.conversion import ConversionConfig
from megatron_tw.config.evaluation import EvaluationConfig
from megatron_tw.config.options import options_of
from megatron_tw.config.plan import OwnPlanOptions
from megatron_tw.config.schema import RunConfig
from megatron_tw.config.scoring import ScoringConfig

PROGRAMS: dict[str, type] = {
    "tools/train.py": RunConfig,
    "tools/evaluate.py": EvaluationConfig,
    "tools/score_tokens.py": ScoringConfig,
    "tools/convert_checkpoint.py": ConversionConfig,
    "tools/plan.py": OwnPlanOptions,  # and those of tools/train.py, which would only be said twice
}


def programs_with(name: str) -> list[str]:
    """The programs that have an option of this name (`seq_length`)."""
    return [program for program, schema in PROGRAMS.items() if name in options_of(schema)]
