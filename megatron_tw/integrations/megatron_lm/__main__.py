"""The launcher: a training script of Megatron-LM, run as it is, with or without token weighting.

    python -m megatron_tw.integrations.megatron_lm pretrain_gpt.py ARGUMENTS --token-weighting dense --short-window 8192

Without an option of this project nothing is rebound: the script runs as if it had been started itself.
"""

import os
import runpy
import sys
from collections.abc import Sequence
from typing import Any

from megatron_tw.integrations.megatron_lm.options import asked_for


def launch(argv: Sequence[str]) -> dict[str, Any]:
    """Run the script argv[0] with the arguments after it; answers its globals.

    Raises:
        ValueError: no script is named.
    """
    if not argv or not os.path.isfile(argv[0]):
        raise ValueError(f"expected a training script and its arguments, got {argv[0] if argv else 'nothing'}")
    script, before = argv[0], (sys.argv, sys.path[0])
    sys.argv, sys.path[0] = list(argv), os.path.dirname(os.path.abspath(script))  # as Python does for a script
    try:
        if asked_for(list(argv[1:])):
            from megatron_tw.integrations.megatron_lm.plug_in import install

            install()
        return runpy.run_path(script, run_name="__main__")
    finally:
        sys.argv, sys.path[0] = before


if __name__ == "__main__":
    try:
        launch(sys.argv[1:])
    except ValueError as error:
        if str(error).startswith(("--", "expected a training script")):
            raise SystemExit(f"megatron_tw.integrations.megatron_lm: {error}") from error
        raise
