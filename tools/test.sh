#!/usr/bin/env bash
# Lint, types and tests: `bash tools/test.sh [--full] [pytest options]`. Without a GPU too; --full adds the slow tests.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

selection=(-m "not full")
if [ "${1:-}" = "--full" ]; then
    selection=()
    shift
fi

export OMP_NUM_THREADS=1  # ranks share the cores: threads of their own only slow them down
echo "== ruff check" && ruff check .
echo "== ruff format" && ruff format --check .
echo "== mypy" && mypy
echo "== pytest" && exec python -m pytest --durations=15 "${selection[@]}" "$@"
