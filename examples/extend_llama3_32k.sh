#!/usr/bin/env bash
# Llama-3-8B from 8k to 32k tokens, as published in arXiv 2503.09202 (options: extend_llama3_32k.yaml beside this file).
# Options at the end override the recipe's. A model, the rows and a run folder must be named:
#
#   torchrun --nproc-per-node 8 examples/extend_llama3_32k.sh --load-hf DIR --data-path DIR --save DIR
#   bash examples/extend_llama3_32k.sh                        --load-hf DIR --data-path DIR --save DIR
#   srun --kill-on-bad-exit=1 --ntasks-per-node 1 --cpu-bind=none bash examples/extend_llama3_32k.sh ...   # Slurm
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash examples/extend_llama3_32k.sh ...   # and so on each node by hand
#
# NPROC_PER_NODE is the number of ranks a node (default: its GPUs, else 1); launch.sh has the rest.
#
# This file is bash and Python at once, since torchrun hands its script to Python. To bash the next line is the
# command `:`, which does nothing; it goes on, and never comes further than `exec`. To Python the same line opens a
# string that holds the bash part; it goes on behind it. (For `bash -n` the Python part is one quoted word, which the
# last line ends, so that there must be no other single quote in it.)
''':'
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
exec bash "$here/launch.sh" "$here/extend_llama3_32k.yaml" "$@"
'''

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    main = runpy.run_path(str(here.parent / "tools" / "train.py"))["main"]
    main(["--config", str(here / "extend_llama3_32k.yaml"), *sys.argv[1:]])
# '
