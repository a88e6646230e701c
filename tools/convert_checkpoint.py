"""A run's checkpoint to Hugging Face format, and the other way; alone or under torchrun, in any parallel layout.

python tools/convert_checkpoint.py --load RUN --save-hf DIR
python tools/convert_checkpoint.py --load-hf DIR --save RUN
"""

import os
import sys
from collections.abc import Sequence

from megatron_tw.config import load_options, user_errors
from megatron_tw.config.conversion import ConversionConfig, check_conversion


def main(argv: Sequence[str]) -> None:
    """Parse, convert. A user's mistake is one line on stderr and exit status 2."""
    config = load_options(argv, ConversionConfig, prog="tools/convert_checkpoint.py", description="Convert weights.")
    with user_errors():
        check_conversion(config, world_size=int(os.environ.get("WORLD_SIZE", "1")))  # from the launcher
        from megatron_tw.parallel.contact import lost_ranks_named
        from megatron_tw.parallel.layout import stop_process_group
        from megatron_tw.programs.convert import convert  # imports torch and Megatron-Core

        with lost_ranks_named(config.parallel.distributed_timeout_minutes):
            written = convert(config)
        if os.environ.get("RANK", "0") == "0":
            print(f"written: {written}")
        stop_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
