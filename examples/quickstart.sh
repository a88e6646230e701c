#!/usr/bin/env bash
# The whole job on a laptop: extend the context of a small model with weighted losses, and compare them.
#
#   bash examples/quickstart.sh [--output DIR] [--short]
#
#   --output DIR   where everything is written (default: output/quickstart in this project)
#   --short        a much shorter version, to see that everything runs: its models have learned nothing yet
#
# Text: the Python standard library's source files. A small Llama is trained on rows of n tokens; from it, three models
# are extended to N tokens with uniform, dense and sparse weights, on 4 CPU ranks as TP 2 x CP 2; all are evaluated on
# held-out files and compared; the best one is exported and opened with transformers.
# A stage that has finished is not run again: after an interruption, the same command goes on where it stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { echo "error: $1" >&2; exit 2; }

output="$root/output/quickstart" size=full
while [ $# -gt 0 ]; do
    case "$1" in
        --output) [ $# -ge 2 ] || fail "--output: expected a folder"; output="$2"; shift 2 ;;
        --short) size=short; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "$1: expected --output DIR, --short or --help" ;;
    esac
done

if [ "$size" = full ]; then
    corpus_bytes=12000000 vocab=1024 hidden=128 layers=2       # the model
    n=128 base_rows=16 base_steps=850                          # base training: rows of n tokens, rows a step, steps
    N=512 stride=96 rows=8 steps=100 lr=2e-3 rope=100000       # extension; stride of the short windows
    eval_rows=200 eval_stride=64 eval_ranks=2 eval_interval=25 # evaluation; steps between held-out losses
else
    corpus_bytes=1000000 vocab=512 hidden=64 layers=2
    n=64 base_rows=16 base_steps=30
    N=256 stride=48 rows=4 steps=4 lr=1e-3 rope=100000
    eval_rows=8 eval_stride=32 eval_ranks=1 eval_interval=4
fi

source "$root/tools/setup_env.sh"
mkdir -p "$output/done"
output="$(cd "$output" && pwd)"
[ "$(cat "$output/done/size" 2>/dev/null || echo $size)" = $size ] ||
    fail "--output $output: holds a run of the other length; name another folder"
echo $size > "$output/done/size"
cd "$root"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # ranks share the cores
export PYTHONWARNINGS=ignore::FutureWarning,ignore::UserWarning # what libraries say would tear the progress bars
export CUDA_VISIBLE_DEVICES= # CPU ranks, also on a machine with a GPU or two
launch=(python -m torch.distributed.run --standalone --nproc-per-node)

number=0
stage() { # stage NAME TITLE COMMAND...: run the command, which makes the folder $output/NAME, unless it did so before
    local name="$1" title="$2" started=$SECONDS
    shift 2
    number=$((number + 1))
    printf '\n== %d/16 %s\n' "$number" "$title"
    if [ -e "$output/done/${name//\//-}" ]; then echo "done before"; return; fi
    rm -rf "${output:?}/$name" # what an interrupted run left
    "$@"
    printf '# %s\n%s\n' "$title" "${*//$root\//}" >> "$output/commands.txt"
    touch "$output/done/${name//\//-}"
    echo "-- $((SECONDS - started)) s"
}

stage corpus "Documents: the standard library's source files, a tenth of them held out" \
    python examples/quickstart.py corpus --output "$output/corpus" --max-bytes $corpus_bytes --min-document-bytes $((8 * N))
stage tokenizer "Tokenizer: sentencepiece, $vocab pieces" \
    python examples/quickstart.py tokenizer --corpus "$output/corpus/train.jsonl" --vocab-size $vocab --output "$output/tokenizer"
rows() { # rows NAME DOCUMENTS TOKENS
    stage "rows/$1" "Rows of $3 tokens: $1" python tools/preprocess_data.py --input "$output/corpus/$2.jsonl" \
        --tokenizer "$output/tokenizer" --seq-length "$3" --output "$output/rows/$1"
}
rows short train $n
rows long train $N
rows heldout heldout $N

stage start "Start model: a small Llama with random weights" python examples/quickstart.py model \
    --tokenizer "$output/tokenizer" --seq-length $n --hidden-size $hidden --layers $layers --output "$output/start"
stage train/base "Base model: context of $n tokens, 2 ranks, data parallel" \
    "${launch[@]}" 2 tools/train.py --load-hf "$output/start" --data-path "$output/rows/short" --seq-length $n \
    --weighting uniform --micro-batch-size $((base_rows / 2)) --global-batch-size $base_rows --train-iters $base_steps \
    --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-iters $((base_steps / 20)) --weight-decay 0.1 \
    --save "$output/train/base/run" --save-hf "$output/train/base/hf"

extend() { # extend NAME OPTION...
    local name="$1"
    shift
    stage "train/$name" "Extension to $N tokens, $name weights, 4 ranks, TP 2 x CP 2" \
        "${launch[@]}" 4 tools/train.py --load-hf "$output/train/base/hf" --data-path "$output/rows/long" --seq-length $N \
        --tensor-model-parallel-size 2 --context-parallel-size 2 --rotary-base $rope \
        --micro-batch-size $rows --global-batch-size $rows --train-iters $steps --lr $lr --lr-decay-style cosine \
        --lr-warmup-iters $((steps / 10)) --valid-data-path "$output/rows/heldout" --eval-interval $eval_interval --eval-iters 4 \
        --save "$output/train/$name/run" --save-hf "$output/train/$name/hf" "$@"
}
scorer=(--scorer unfrozen --short-window $n --short-stride $stride)
extend uniform --weighting uniform
extend dense --weighting dense --interpolation 0.75 "${scorer[@]}"
extend sparse --weighting sparse --sparsification 0.2 "${scorer[@]}"

evaluate() { # evaluate NAME
    stage "evaluation/$1" "Evaluation on held-out files: $1" \
        "${launch[@]}" $eval_ranks tools/evaluate.py --load "$output/train/$1/run" --data-path "$output/rows/heldout" --seq-length $N \
        --short-window $n --short-stride $eval_stride --context-parallel-size $eval_ranks --micro-batch-size 4 \
        --eval-rows $eval_rows --output "$output/evaluation/$1"
}
for name in base uniform dense sparse; do evaluate $name; done

evaluations=() runs=()
for name in base uniform dense sparse; do
    evaluations+=("$name=$output/evaluation/$name")
    [ $name = base ] || runs+=("$name=$output/train/$name/run")
done
stage report "Report" python tools/report.py --title "Quickstart: from $n to $N tokens on Python's standard library" \
    --evaluations "${evaluations[@]}" --runs "${runs[@]}" --key-tokens uniform --commands "$output/commands.txt" \
    --output "$output/report"
stage model "Export of the best extended model, opened with transformers" python examples/quickstart.py export \
    --evaluations "$output"/evaluation/{uniform,dense,sparse} --models "$output"/train/{uniform,dense,sparse}/hf \
    --rows "$output/rows/heldout" --output "$output/model"
printf '\nFinished in %d min %d s.\nReport: %s\nModel:  %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$output/report/report.html" "$output/model"
