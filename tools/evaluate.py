"""What a model makes of its context: NLL on held-out rows by position and on key tokens, LongPPL, RULER, short-context
benchmarks; alone or under torchrun, in any parallel layout.

torchrun --nproc-per-node 4 tools/evaluate.py --load-hf DIR --data-path DIR --seq-length N --short-window n --output DIR
"""

import os
import sys
from collections.abc import Sequence

from megatron_tw.config import load_options, user_errors
from megatron_tw.config.evaluation import EvaluationConfig, check_evaluation


def main(argv: Sequence[str]) -> None:
    """Parse, evaluate, write, print. A user's mistake is one line on stderr and exit status 2."""
    config = load_options(argv, EvaluationConfig, prog="tools/evaluate.py", description="Evaluate a model.")
    with user_errors():
        check_evaluation(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))  # from the launcher
        from megatron_tw.evaluation.program import evaluate  # imports torch and Megatron-Core
        from megatron_tw.parallel.contact import lost_ranks_named
        from megatron_tw.parallel.layout import stop_process_group

        with lost_ranks_named(config.parallel.distributed_timeout_minutes):
            result = evaluate(config)
        if result is not None:
            result.save(config.evaluation.output)
            print(result.summary(), flush=True)
        stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
