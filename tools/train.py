"""Train a model on longer rows, with weighted or plain cross-entropy; alone or under torchrun.

torchrun --nproc-per-node 4 tools/train.py --config options.yaml --load-hf DIR --data-path DIR --save DIR
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megatron_tw.config import RunConfig, check_config, load_config, user_errors
from megatron_tw.config.errors import INTERRUPTED


def main(argv: Sequence[str]) -> None:
    """Parse, check, train. A user's mistake is one line on stderr and exit status 2."""
    config = load_config(argv, prog="tools/train.py", description="Extend a model's context window.")
    config = replace(config, checkpoint=config.checkpoint.resuming())
    with user_errors():
        if not config.train.check:  # which has a line for it
            check_config(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))  # from the launcher
        from megatron_tw.parallel.contact import lost_ranks_named
        from megatron_tw.parallel.layout import stop_process_group
        from megatron_tw.training.loop import train  # after the checks: it imports torch and Megatron-Core

        with lost_ranks_named(config.parallel.distributed_timeout_minutes):
            run = None
            if config.train.check:
                check(config)
            else:
                run = train(config)
        stop_process_group()
    if run is not None and run.interrupted:
        sys.exit(INTERRUPTED)  # like a program that Ctrl-C ended, so that a script does not go on to its next line


def check(config: RunConfig) -> None:
    """Print what --check finds; an error if something is wrong."""
    from megatron_tw.planning.check import Check

    found = Check(config, Path(__file__).with_name("plan.py"))
    found.run()
    if os.environ.get("RANK", "0") == "0":
        print(found.table(), flush=True)
    if found.failed:
        raise ValueError(f"--check: failed: {found.failed}")


if __name__ == "__main__":
    main(sys.argv[1:])
