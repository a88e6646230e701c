"""Short NLLs of prepared rows by a frozen scorer, for training with --scorer frozen --scores DIR; alone or under
torchrun, in any parallel layout. A run that was cut off goes on where it stopped.

torchrun --nproc-per-node 4 tools/score_tokens.py --load-hf DIR --data-path DIR --short-window n --output DIR
"""

import os
import sys
from collections.abc import Sequence

from megatron_tw.config import load_options, user_errors
from megatron_tw.config.scoring import ScoringConfig, check_scoring


def main(argv: Sequence[str]) -> None:
    """Parse, score, write. A user's mistake is one line on stderr and exit status 2."""
    config = load_options(
        argv, ScoringConfig, prog="tools/score_tokens.py", description="Make the short NLLs of rows by a frozen model."
    )
    with user_errors():
        check_scoring(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))  # from the launcher
        from megatron_tw.parallel.contact import lost_ranks_named
        from megatron_tw.parallel.layout import stop_process_group
        from megatron_tw.programs.scoring import score_tokens  # imports torch and Megatron-Core

        with lost_ranks_named(config.parallel.distributed_timeout_minutes):
            scores = score_tokens(config)
        if os.environ.get("RANK", "0") == "0":
            print(f"scores: {scores}", flush=True)
        stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
