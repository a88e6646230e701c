#!/usr/bin/env bash
# Lint, types and tests: `bash tools/test.sh [--full | --core] [pytest options]`. Without a GPU too; --full adds the slow
# tests, --core runs only those that ask for a version of Megatron-Core (trajectories, resume, what needs a newer one),
# and no lint. PYTHON=/path/to/python3.12 tests on another interpreter, in an environment of its own. Without pytest
# options two processes share the tests: many of them keep only one core busy.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source tools/setup_env.sh

selection=(-m "not full") lint=yes
case "${1:-}" in
    --full) selection=(); shift ;;
    --core) selection=(-m "(core or needs_core_017) and not full") lint=; shift ;;
esac

export OMP_NUM_THREADS=1  # ranks share the cores: threads of their own only slow them down
python - <<'EOF'
import importlib.metadata as metadata, platform
packages = ("torch", "megatron-core", "transformers")
print("== Python", platform.python_version(), *(f"{name} {metadata.version(name)}" for name in packages))
EOF
if [ -n "$lint" ]; then
    echo "== ruff check" && ruff check .
    echo "== ruff format" && ruff format --check .
    echo "== mypy" && mypy
fi
[ $# -gt 0 ] || set -- -n 2 --dist worksteal
echo "== pytest" && exec python -m pytest --durations=15 "${selection[@]}" "$@"
