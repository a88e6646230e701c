#!/usr/bin/env bash
# Llama-3-8B from 8k to 32k tokens, as published in arXiv 2503.09202 (options: extend_llama3_32k.yaml beside this file).
# Options at the end override the recipe's. A model, the rows and a run folder must be named:
#
#   torchrun --nproc-per-node 8 examples/extend_llama3_32k.sh --load-hf DIR --data-path DIR --save DIR
#   bash examples/extend_llama3_32k.sh                        --load-hf DIR --data-path DIR --save DIR
#   srun --ntasks-per-node 1 bash examples/extend_llama3_32k.sh ...          # a Slurm job of any number of nodes
#   NNODES=2 NODE_RANK=0 MASTER_ADDR=host0 bash examples/extend_llama3_32k.sh ...   # and so on each node by hand
#
# NPROC_PER_NODE is the number of ranks a node (default: its GPUs, else 1).
#
# This file is bash and Python at once, since torchrun hands its script to Python. To bash the next line is the
# command `:`, which does nothing; it goes on, and never comes further than `exec`. To Python the same line opens a
# string that holds all of the bash part; it goes on behind it. (For `bash -n` the Python part is one quoted word,
# which the last line ends, so that there must be no other single quote in it.)
''':'
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fail() { echo "error: $1" >&2; exit 2; }

python=python
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$here/../.venv/bin/python" ]; then python="$here/../.venv/bin/python"; fi
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
ranks="${NPROC_PER_NODE:-${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}"
nodes="${NNODES:-${SLURM_NNODES:-1}}"

if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone)
else
    node="${NODE_RANK:-${SLURM_NODEID:-}}"
    [ -n "$node" ] || fail "NODE_RANK: expected the number of this node, of $nodes; under Slurm start with srun"
    [ "${SLURM_LOCALID:-0}" = 0 ] || fail "srun: expected --ntasks-per-node 1, this is task $SLURM_LOCALID of its node"
    address="${MASTER_ADDR:-}"
    if [ -z "$address" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
        names="$(scontrol show hostnames "$SLURM_JOB_NODELIST")"
        address="${names%%[[:space:]]*}"
    fi
    [ -n "$address" ] || fail "MASTER_ADDR: expected the address of node 0, of $nodes"
    port="${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}"  # jobs that share a node do not meet
    rendezvous=(--nnodes "$nodes" --node-rank "$node" --master-addr "$address" --master-port "$port")
fi
# A scheduler's SIGTERM: what a step and its checkpoint may take before the launcher kills its ranks, in seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
exec "$python" -m torch.distributed.run --nproc-per-node "$ranks" "${rendezvous[@]}" "$here/extend_llama3_32k.sh" "$@"
'''

import runpy
import sys
from pathlib import Path

if __name__ == "__main__":
    here = Path(__file__).resolve().parent
    main = runpy.run_path(str(here.parent / "tools" / "train.py"))["main"]
    main(["--config", str(here / "extend_llama3_32k.yaml"), *sys.argv[1:]])
# '
