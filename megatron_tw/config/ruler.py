"""Options of RULER, for evaluations."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from megatron_tw.config.options import flag

TASKS_WITHOUT_TEXT = ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
"""Those that need no file of the user's."""


@dataclass(frozen=True, kw_only=True)
class RulerOptions:
    """RULER: 13 synthetic long-context tasks (docs/ruler.md)."""

    ruler_lengths: tuple[int, ...] | None = None
    """Tokens of a prompt and its answer together, of each length that is tried (null: --seq-length, else the model's
    context)."""
    ruler_samples: int = 500
    """Examples of each task at each length."""
    ruler_seed: int = 42
    """Seed of the examples."""
    ruler_essay: str | None = None
    """Text file, or RULER's PaulGrahamEssays.json: the haystack of five niah tasks (null: they are not run)."""
    ruler_squad: str | None = None
    """SQuAD 2.0's dev-v2.0.json, for qa_1 (null: it is not run)."""
    ruler_hotpotqa: str | None = None
    """HotpotQA's hotpot_dev_distractor_v1.json, for qa_2 (null: it is not run)."""
    ruler_scoring: Literal["exactness", "generation"] = "exactness"
    """exactness: whether the gold answers are the model's first choices, in one forward pass under any layout.
    generation: RULER's own, by lm-evaluation-harness, one process, on --load-hf."""
    ruler_backend: Literal["hf", "vllm"] = "hf"
    """Model of lm-evaluation-harness that generates."""


def check_ruler(options: RulerOptions) -> None:
    """Raises ValueError, naming the option."""
    for name, value, least in (("ruler_samples", options.ruler_samples, 1), ("ruler_seed", options.ruler_seed, 0)):
        if value < least:
            raise ValueError(f"{flag(name)}: expected {least} or more, got {value}")
    lengths: Sequence[int] = options.ruler_lengths if options.ruler_lengths is not None else (1,)
    if not lengths or min(lengths) < 1 or len({*lengths}) < len(lengths):
        raise ValueError(f"--ruler-lengths: expected different numbers of tokens, got {list(lengths)}")
