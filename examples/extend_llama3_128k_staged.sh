#!/usr/bin/env bash
# Llama-3-8B from 8k to 32k and from there to 128k tokens, as one command: each stage starts from the weights of the one
# before. Stage 32k is extend_llama3_32k.yaml, as published in arXiv 2503.09202; stage 128k is extend_llama3_128k.yaml,
# which says what in it is our choice. A model, a folder for the runs, and each stage's rows must be named:
#
#   bash examples/extend_llama3_128k_staged.sh --load-hf DIR --save DIR \
#       32k: --data-path DIR 128k: --data-path DIR --save-hf DIR
#
# Options before `32k:` are for both stages, those behind `32k:` or `128k:` for that one; they override the recipe's.
# The runs are in the folders 32k and 128k of --save. The same command again goes on where it was stopped or killed: a
# stage that has made its last step, and its export if --save-hf asks for one, is left alone, whatever its options say by
# then. Several nodes: as launch.sh says, the same command on each.
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
fail() { echo "error: $1" >&2; exit 2; }

stages=(32k 128k)
declare -A recipe=([32k]=extend_llama3_32k.yaml [128k]=extend_llama3_128k.yaml)
both=() options_32k=() options_128k=() save=""
declare -n options=both
while [ $# -gt 0 ]; do
    case "$1" in
        32k:) declare -n options=options_32k ;;
        128k:) declare -n options=options_128k ;;
        --load|--load=*|--pretrained-checkpoint|--pretrained-checkpoint=*)
            fail "${1%%=*}: this script says it to each stage itself" ;;
        --save) [ $# -gt 1 ] || fail "--save: expected a folder"; shift; save="$1" ;;
        --save=*) save="${1#--save=}" ;;
        *) options+=("$1") ;;
    esac
    shift
done
[ -n "$save" ] || fail "--save: expected a folder for the runs of the stages"

# What option $1 says among the other arguments; nothing where it is not there.
value_of() {
    local name="$1" value=""
    shift
    while [ $# -gt 0 ]; do
        case "$1" in
            "$name") value="${2:-}" ;;
            "$name"=*) value="${1#*=}" ;;
        esac
        shift
    done
    echo "$value"
}

# Whether the run in folder $1 has made its last step, by its newest checkpoint, and the export $2, if that is named.
is_over() {
    local step
    [ -z "$2" ] || [ -f "$2/config.json" ] || return 1
    ls "$1" >/dev/null 2>&1 || return 1  # storage of a network then looks again
    step="$(cat "$1/latest_checkpointed_iteration.txt" 2>/dev/null)" || return 1
    [[ "$step" =~ ^[0-9]+$ ]] || return 1
    grep -qx "train_iters: $((10#$step))" "$1/iter_$(printf %07d "$((10#$step))")/config.yaml" 2>/dev/null
}

# Signals go to the stage that runs, and end this script with it.
child="" stopping=""
stop() { stopping=yes; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null || true; }
trap stop TERM INT

before=()
for stage in "${stages[@]}"; do
    run="$save/$stage"
    declare -n options="options_$stage"
    export_to="$(value_of --save-hf "${both[@]}" "${options[@]}")"
    if is_over "$run" "$export_to"; then
        echo "stage $stage: is over ($run)"
    else
        echo "stage $stage: $run"
        bash "$here/launch.sh" "$here/${recipe[$stage]}" "${both[@]}" "${options[@]}" "${before[@]}" \
            --load "$run" --save "$run" &
        child=$!
        wait "$child" && status=0 || status=$?
        while [ -n "$stopping" ] && kill -0 "$child" 2>/dev/null; do  # the signal has only ended the wait
            wait "$child" && status=0 || status=$?
        done
        child=""
        [ "$status" = 0 ] || exit "$status"
        nodes="${NNODES:-${SLURM_STEP_NUM_NODES:-${SLURM_NNODES:-1}}}"
        for _ in $(seq 12); do  # of several nodes, one may see late what another wrote
            if [ "$nodes" = 1 ] || is_over "$run" "$export_to"; then break; fi
            sleep 5
        done
        if ! is_over "$run" "$export_to"; then
            echo "stage $stage: stopped before its last step; the same command goes on from there"
            exit 0
        fi
    fi
    [ -z "$stopping" ] || exit 0
    before=(--pretrained-checkpoint "$run")
done
