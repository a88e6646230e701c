# Sourced, not run: `source tools/setup_env.sh`. Afterwards `python` has the package and its pinned dependencies.
#
# In an active virtual environment it installs there. Where the package is installed already without one (the
# Docker image), it uses that. Otherwise it creates .venv beside pyproject.toml. A stamp makes the next time fast:
# nothing is installed until pyproject.toml or constraints.txt change. PYTHON=... names the interpreter; where .venv or
# the active environment has another version of Python, it gets an environment of its own (.venv-3.12).

_tw_root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

_tw_is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

# Isolated: an egg-info in this folder, which stays when .venv is removed, is no installation.
_tw_is_installed() { python -I -c 'import importlib.metadata as m; m.version("megatron-tw")' 2>/dev/null; }

_tw_find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if _tw_is_new_enough "$candidate"; then echo "$candidate"; return 0; fi
    done
    echo "error: Python 3.11 or newer is needed, found ${PYTHON:-python3}: $("${PYTHON:-python3}" --version 2>&1);" \
        "install one, or name it: PYTHON=/path/to/python3.11" >&2
    return 1
}

# Without a GPU, take PyTorch's CPU build: the one on PyPI for Linux brings gigabytes of CUDA libraries. Where
# that index cannot be reached, the ordinary installation that follows takes PyPI's.
_tw_install_cpu_torch() {
    [ "$(uname -s)-$(uname -m)" = "Linux-x86_64" ] || return 0
    command -v nvidia-smi >/dev/null && return 0
    python -c 'import torch' 2>/dev/null && return 0
    python -m pip install -qq --no-deps --retries 0 --timeout 10 --index-url https://download.pytorch.org/whl/cpu \
        "$(grep '^torch==' "$_tw_root/constraints.txt")" 2>/dev/null || true
}

# Major and minor version of an interpreter, as in "3.12".
_tw_version() { "$1" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null; }

# The environment to work in: prints its folder, or nothing where the package is installed without one.
_tw_environment() {
    local default="${VIRTUAL_ENV:-$_tw_root/.venv}" version
    if [ -n "${PYTHON:-}" ] && _tw_is_new_enough "$PYTHON"; then
        version="$(_tw_version "$PYTHON")"
        if [ -x "$default/bin/python" ] && [ "$(_tw_version "$default/bin/python")" != "$version" ]; then
            echo "$_tw_root/.venv-$version"
            return
        fi
    elif [ ! -d "$default" ] && _tw_is_installed; then
        return
    fi
    echo "$default"
}

_tw_setup() {
    local environment base
    environment="$(_tw_environment)"
    if [ -z "$environment" ]; then return 0; fi
    if [ "$environment" != "${VIRTUAL_ENV:-}" ]; then
        if [ ! -x "$environment/bin/python" ]; then
            base="$(_tw_find_python)" || return 1
            echo "Creating $environment with $("$base" --version)"
            "$base" -m venv "$environment" || return 1
        fi
        source "$environment/bin/activate"
    fi
    if ! _tw_is_new_enough python; then
        echo "error: Python 3.11 or newer is needed, $VIRTUAL_ENV has $(python --version 2>&1)" >&2
        return 1
    fi
    local stamp="$VIRTUAL_ENV/.megatron_tw" state
    state="$_tw_root $(cat "$_tw_root/pyproject.toml" "$_tw_root/constraints.txt" | cksum)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$state" ]; then
        echo "Installing into $VIRTUAL_ENV (once; a few minutes)"
        _tw_install_cpu_torch
        python -m pip install -qq --disable-pip-version-check \
            -c "$_tw_root/constraints.txt" -e "$_tw_root[all,dev]" || return 1
        echo "$state" > "$stamp"
    fi
}

_tw_setup
