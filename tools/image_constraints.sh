#!/usr/bin/env bash
# Constraints for an installation into an image that brings its own GPU stack: what of it is installed here keeps its
# version, and constraints.txt decides the rest. Prints them: `bash tools/image_constraints.sh > /tmp/constraints.txt`.
# MEGATRON_CORE=VERSION takes that version of Megatron-Core, which must fit the image's Transformer Engine, in place of
# the one that constraints.txt names for the image's Python.
#
# Only the GPU stack is the image's own: torch and what is compiled against it. Pinning everything that the image holds
# does not resolve: its idna, click, packaging and others are older than constraints.txt asks for.
set -euo pipefail
constraints="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)/constraints.txt"
gpu_stack='^(torch|torchvision|torchaudio|torch-tensorrt|torchao|pytorch-triton|triton|numpy|apex|flash-attn|flash-attn-3|transformer-engine.*|nvidia-.*|cuda-.*)=='

# `pip list`, not `pip freeze`: the latter names the image's own wheels by a path that is gone.
image="$(python -m pip list --format=freeze --disable-pip-version-check | sed 's/==/ == /' \
    | awk '{ gsub(/[_.]+/, "-", $1); print tolower($1) "==" $3 }' | grep -E "$gpu_stack" || true)"
echo "$image"
echo "${MEGATRON_CORE:+megatron-core==$MEGATRON_CORE}"
sed 's/#.*//' "$constraints" | awk -v image="$image" -v megatron_core="${MEGATRON_CORE:-}" '
    BEGIN { split(image, lines, "\n"); for (i in lines) { split(lines[i], part, "=="); have[part[1]] }
            if (megatron_core) have["megatron-core"] }
    NF { split($1, part, "=="); name = tolower(part[1]); gsub(/[_.]+/, "-", name); if (!(name in have)) print $0 }'
