"""Work that all ranks share, and errors that they raise together: a rank that failed alone would leave the others in
their next collective."""

import torch.distributed as dist


def share_of(count: int) -> range:
    """Which of `count` pieces of work are this rank's; those of all ranks are all pieces. Not collective."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    return range(count * rank // ranks, count * (rank + 1) // ranks)


def raise_together(error: OSError | ValueError | None) -> None:
    """Raise the error of the first rank that has one on every rank. Collective over the world.

    Raises:
        OSError, ValueError: as on that rank, with its text; an error of the system with its number and file.
    """
    mine: tuple[bool, tuple[int | str | None, ...]] | None = None
    if isinstance(error, OSError) and error.errno is not None:
        mine = True, (error.errno, error.strerror, None if error.filename is None else str(error.filename))
    elif error is not None:
        mine = isinstance(error, OSError), (str(error),)
    everywhere = [mine] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    for found in everywhere:
        if found is not None:
            of_system, arguments = found
            if of_system:
                raise OSError(*arguments) from error
            raise ValueError(*arguments) from error
