#!/usr/bin/env bash
# Train with a recipe on this node, or as one of a job's nodes: `bash launch.sh RECIPE.yaml OPTIONS`. The recipes'
# scripts beside this file call it.
#
# NPROC_PER_NODE is the number of ranks a node (default: its GPUs, else 1). Several nodes: under Slurm by srun with one
# task a node; by hand with NNODES, NODE_RANK and MASTER_ADDR. MAX_RESTARTS, for one node: how often ranks that died are
# started again. LOG_DIR: a folder for all that each rank prints, beside the terminal.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fail() { echo "error: $1" >&2; exit 2; }

recipe="$1"
shift
python=python
if [ -z "${VIRTUAL_ENV:-}" ] && [ -x "$here/../.venv/bin/python" ]; then python="$here/../.venv/bin/python"; fi
if [ -n "${CUDA_VISIBLE_DEVICES+set}" ]; then  # nvidia-smi does not heed it
    gpus=$(tr -cs '[:alnum:]_-' '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -c '[^-]' || true)
else
    gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l || true)
fi
ranks="${NPROC_PER_NODE:-${GPUS_PER_NODE:-$((gpus > 0 ? gpus : 1))}}"
nodes="${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}"  # a step may have part of its job's nodes
node="${NODE_RANK:-${SLURM_NODEID:-}}"

[ "${SLURM_LOCALID:-0}" = 0 ] || fail "srun: expected --ntasks-per-node 1, this is task $SLURM_LOCALID of its node"
if [ "$nodes" = 1 ]; then
    rendezvous=(--standalone --max-restarts "${MAX_RESTARTS:-0}")
else
    [ "${MAX_RESTARTS:-0}" = 0 ] || fail "MAX_RESTARTS: is for one node; on $nodes start the same commands again"
    [ -n "$node" ] || fail "NODE_RANK: expected the number of this node, of $nodes; under Slurm start with srun"
    address="${MASTER_ADDR:-}"
    list="${SLURM_STEP_NODELIST:-${SLURM_JOB_NODELIST:-}}"
    if [ -z "$address" ] && [ -n "$list" ]; then
        wanted="MASTER_ADDR: expected the address of node 0, of $nodes, in the environment (export MASTER_ADDR=HOST)"
        command -v scontrol > /dev/null || fail "$wanted: there is no scontrol here that tells it"
        names="$(scontrol show hostnames "$list")" || fail "$wanted: scontrol does not tell the hosts of $list"
        address="${names%%[[:space:]]*}"
    fi
    [ -n "$address" ] || fail "MASTER_ADDR: expected the address of node 0, of $nodes"
    port="${MASTER_PORT:-$((29500 + ${SLURM_JOB_ID:-0} % 1000))}"  # jobs that share a node do not meet
    rendezvous=(--nnodes "$nodes" --node-rank "$node" --master-addr "$address" --master-port "$port")
fi
logs=()
if [ -n "${LOG_DIR:-}" ]; then logs=(--log-dir "$LOG_DIR/node_${node:-0}" --tee 3); fi
export PYTHONUNBUFFERED=1  # what a rank printed last is not lost with it
# A scheduler's SIGTERM: what a step and its checkpoint may take before the launcher kills its ranks, in seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"
tools="$(dirname "$here")/tools"
exec "$python" "$tools/launch.py" --nproc-per-node "$ranks" "${rendezvous[@]}" "${logs[@]}" "$tools/train.py" \
    --config "$recipe" "$@"
