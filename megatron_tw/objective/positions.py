"""Buckets of the positions of targets, in plain integers (imports no torch: reports are made without)."""

SMALLEST_EDGE = 32


def position_edges(
    seq_length: int, *, old_context: int | None = None, smallest: int = SMALLEST_EDGE
) -> tuple[int, ...]:
    """Edges of the buckets: 1, the powers of two from `smallest` on, the old context n, and N.

    Bucket i holds the positions edges[i] .. edges[i + 1] - 1.

    >>> position_edges(256, old_context=96)
    (1, 32, 64, 96, 128, 256)
    """
    assert seq_length > 1
    edges = {1, seq_length}
    power = 1
    while power < seq_length:
        if power >= smallest:
            edges.add(power)
        power *= 2
    if old_context is not None and 1 < old_context < seq_length:
        edges.add(old_context)
    return tuple(sorted(edges))
