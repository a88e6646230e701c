"""How sure a figure is."""

import math

Z95 = 1.959964
"""Of a two-sided interval of 95%."""


def wilson(share: float, samples: int, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share of independent samples (Wilson 1927): also right near 0 and 1, and with few.

    >>> tuple(round(bound, 3) for bound in wilson(0.9, 10))
    (0.596, 0.982)
    >>> tuple(round(bound, 3) for bound in wilson(0.0, 20))
    (0.0, 0.161)
    """
    assert samples > 0
    assert 0 <= share <= 1
    middle = share + z * z / (2 * samples)
    reach = z * math.sqrt(share * (1 - share) / samples + z * z / (4 * samples * samples))
    scale = 1 + z * z / samples
    return max(0.0, (middle - reach) / scale), min(1.0, (middle + reach) / scale)


def of_mean(errors: list[float | None]) -> float | None:
    """Standard error of the plain mean of independent figures with these standard errors; None: one is not known."""
    known = [error for error in errors if error is not None]
    if len(known) < len(errors) or not errors:
        return None
    return math.sqrt(sum(error * error for error in known)) / len(errors)
