#!/usr/bin/env bash
# The tests of trajectories, resume, resharding, padded buckets and overlap on every supported version of Megatron-Core:
#
#   bash tools/test_versions.sh [VERSION ...]     # 0.17.1 0.18.2 0.19.2 on Python 3.12, and the trajectories on 3.13
#
# One environment serves all versions on 3.12: each is installed into a folder of its own that comes before it.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
trajectories_on_313=yes
if [ $# -gt 0 ]; then trajectories_on_313=; else set -- 0.17.1 0.18.2 0.19.2; fi

python="$(bash tools/find_python.sh 3.12)" || { echo "error: no Python 3.12 on PATH nor among pyenv's" >&2; exit 1; }
failed=()
for version in "$@"; do
    echo "== Megatron-Core $version"
    (
        PYTHON="$python" source tools/setup_env.sh
        folder="$VIRTUAL_ENV/megatron-core-$version"
        if [ ! -e "$folder/complete" ]; then
            python -m pip install -qq --disable-pip-version-check --no-deps --target "$folder" "megatron-core==$version"
            touch "$folder/complete"
        fi
        PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}" bash tools/test.sh --core
    ) || failed+=("$version")
done

if [ -n "$trajectories_on_313" ]; then
    if python="$(bash tools/find_python.sh 3.13)"; then
        PYTHON="$python" bash tools/test.sh --core -k test_trajectories || failed+=("Python 3.13")
    else
        echo "== no Python 3.13: not tested"
    fi
fi

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
