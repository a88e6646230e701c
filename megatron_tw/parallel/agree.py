"""Errors that all ranks raise together: a rank that failed alone would leave the others in their next collective."""

import torch.distributed as dist


def raise_together(error: OSError | ValueError | None) -> None:
    """Raise the error of the first rank that has one on every rank. Collective over the world.

    Raises:
        OSError, ValueError: as on that rank, with its text.
    """
    mine = None if error is None else (isinstance(error, OSError), str(error))
    everywhere: list[tuple[bool, str] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, mine)
    for found in everywhere:
        if found is not None:
            of_system, text = found
            if of_system:
                raise OSError(text) from error
            raise ValueError(text) from error
