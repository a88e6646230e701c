#!/usr/bin/env bash
# Prints an interpreter of a version of Python, where there is one: `bash tools/find_python.sh 3.12`. Looks on PATH, then
# among pyenv's.
set -euo pipefail
version="${1:?usage: find_python.sh VERSION}"

for candidate in "python$version" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$version".*/bin/python; do
    # pyenv's shim of a version that is not switched on is on PATH too, and fails.
    if [ "$("$candidate" -c 'import sys; print("{}.{}".format(*sys.version_info))' 2>/dev/null)" = "$version" ]; then
        "$candidate" -c 'import sys; print(sys.executable)'
        exit 0
    fi
done
exit 1
