#!/usr/bin/env bash
# The tests of trajectories, resume, resharding, padded buckets and overlap on every supported version of Megatron-Core:
#
#   bash tools/test_versions.sh [VERSION ...]     # 0.17.1 0.18.2 0.19.2 on Python 3.12, and the trajectories on 3.13
#   bash tools/test_versions.sh --stacks          # the integrations with TRL, PEFT and Megatron-Bridge, on Python 3.12
#
# One environment serves all versions on 3.12: each is installed into a folder of its own that comes before it. So are
# the stacks, without what they ask for: TRL and PEFT find it in the environment; of Megatron-Bridge, which asks for
# Transformer Engine, the tests read the sources.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
stacks="trl==1.16.0 peft==0.21.2 megatron-bridge==0.6.2"
tests_of_stacks="tests/test_huggingface_models.py tests/test_megatron_bridge.py"

# install_beside FOLDER PACKAGE ...: into a folder of the active environment, without what they ask for; nothing the second time.
install_beside() {
    local folder="$VIRTUAL_ENV/$1"
    shift
    if [ "$(cat "$folder/complete" 2>/dev/null)" != "$*" ]; then
        rm -rf "$folder"
        python -m pip install -qq --disable-pip-version-check --no-deps --target "$folder" "$@"
        echo "$*" > "$folder/complete"
    fi
    export PYTHONPATH="$folder${PYTHONPATH:+:$PYTHONPATH}"
}

if [ "${1:-}" = --stacks ]; then
    python="$(bash tools/find_python.sh 3.12)" || { echo "error: no Python 3.12 on PATH nor among pyenv's" >&2; exit 1; }
    PYTHON="$python" source tools/setup_env.sh
    install_beside stacks $stacks
    echo "== $stacks"
    export OMP_NUM_THREADS=1
    exec python -m pytest -rs $tests_of_stacks
fi

trajectories_on_313=yes
if [ $# -gt 0 ]; then trajectories_on_313=; else set -- 0.17.1 0.18.2 0.19.2; fi

python="$(bash tools/find_python.sh 3.12)" || { echo "error: no Python 3.12 on PATH nor among pyenv's" >&2; exit 1; }
failed=()
for version in "$@"; do
    echo "== Megatron-Core $version"
    (
        PYTHON="$python" source tools/setup_env.sh
        install_beside "megatron-core-$version" "megatron-core==$version"
        bash tools/test.sh --core
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
