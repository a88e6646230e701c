"""RULER's scores of a generated text: how many of the answers stand in it (scripts/eval/synthetic/constants.py)."""

import re
from collections.abc import Sequence


def string_match_all(prediction: str, references: Sequence[str]) -> float:
    """The share of the references that stand in the prediction, upper and lower case alike.

    >>> string_match_all(" 12 and 34.", ["34", "56"])
    0.5
    """
    said = _cleaned(prediction)
    return sum(reference.lower() in said for reference in references) / len(references)


def string_match_part(prediction: str, references: Sequence[str]) -> float:
    """1 where any of the references stands in the prediction, else 0: for questions whose references are different
    wordings of one answer.

    >>> string_match_part("In Denver, Colorado", ["denver", "Denver, CO"])
    1.0
    """
    said = _cleaned(prediction)
    return float(any(reference.lower() in said for reference in references))


def _cleaned(prediction: str) -> str:
    return re.sub(r"[\x00-\x1f]", "\n", prediction).strip().lower()
