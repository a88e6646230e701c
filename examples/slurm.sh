#!/usr/bin/env bash
# A recipe in a Slurm job, on all its nodes. From the root of the clone, so often as the run needs jobs:
#
#   sbatch --job-name NAME examples/slurm.sh examples/extend_llama3_32k.sh --load-hf DIR --data-path DIR --save DIR
#
# They run one after the other (singleton). Each goes on where the one before was stopped, by its time limit or by a
# node that died; one that finds the run at its end is over at once (and fails where --save-hf holds the export by then).
# Ten minutes before the time limit Slurm sends SIGTERM: the run then ends after its step (and the held-out rows, where
# they are due), with a checkpoint; all of it must fit into these ten minutes. The nodes share the storage;
# for networks see docs/launch.md. NAME-JOB.log has what all ranks print, NAME-JOB.logs/ the same rank by rank.
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
# All of a node's memory: an exclusive job too gets what it asks for alone.
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@600
#SBATCH --dependency=singleton
#SBATCH --output=%x-%j.log
# A job that Slurm puts back into the queue, for a node that failed, does not write over what it printed before.
#SBATCH --open-mode=append
set -euo pipefail
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0   # where nodes do not find each other: the interface they share
export LOG_DIR="${LOG_DIR:-$SLURM_JOB_NAME-$SLURM_JOB_ID.logs}"
# One task a node starts all its ranks: by default Slurm may bind it, and so all of them, to the cores of one task.
exec srun --kill-on-bad-exit=1 --ntasks-per-node=1 --cpu-bind=none bash "$@"
