#!/usr/bin/env bash
# Everything worth knowing on a machine with GPUs, in one command. It is meant to take under 10 minutes on one GPU and
# more on several; how long it takes has not been measured.
#
#   bash tools/gpu_check.sh [--output DIR] [--only PART ...] [--minutes M] [--toy]
#
# Writes DIR/report.md (default: output/gpu_check), meant for docs/measurements.md, and each part's log. A part that fails
# is reported as failed, and the rest goes on; the exit status is 0 if all passed. Each part has a time limit of its own;
# --minutes is one for all together. What a part started ends with it; Ctrl-C and SIGTERM end the run with exit status
# 130 and 143, and the report has the parts so far. Without a GPU it runs fewer parts at toy size.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh
exec python tools/benchmarks/gpu_check.py "$@"
