"""What a section of a report is."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_tw.evaluation.report.drawing import Drawing
from megatron_tw.evaluation.table import Table


@dataclass(frozen=True, kw_only=True)
class Section:
    """Of the page, and of report.json under its name."""

    name: str
    title: str
    lead: str = ""
    """A sentence on how to read it."""
    drawings: Sequence[Drawing] = ()
    tables: Sequence[Table] = ()
    html: str = ""
    notes: Sequence[str] = ()
    figures: Mapping[str, Any] = field(default_factory=dict)
    """For report.json."""
