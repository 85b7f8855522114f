#!/usr/bin/env bash
# Measures on one GPU what docs/leaderboard.md says of GPUs, step by step, each into its own log and JSON.
#   runs/measure_gpu.sh FOLDER [STEP...]        steps with limits add up to some 45 minutes
# The step "recipe" needs SHARDS, the folder that `qnext data prepare configs/nano/prepare.toml` wrote.
# fla-core, where it is installed, runs beside the delta rule; transformers beside serving and training.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${1:?names the folder for logs}")
shift
steps=${*:-tests kernels serve fp8 fp8-head train accumulate curves recipe sanitize}
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
mkdir -p "$out"

run() { # NAME COMMAND...
    local name=$1
    shift
    echo "== $name: $*"
    "$@" > "$out/$name.log" 2>&1 || echo "   exit code $?, see $out/$name.log"
    tail -n 25 "$out/$name.log" | cut -c 1-220
}

bench() { # NAME OPTIONS...
    local name=$1
    shift
    run "$name" "$python" -m qnext bench "$@" --json "$out/$name.json"
}

few="decode-1x1024 decode-8x1024 decode-1x32768 decode-8x32768 prefill-32768 prefill-131072 steps-1"
for step in $steps; do
    case $step in
        tests) run tests "$python" -m pytest -q -m gpu tests ;;
        kernels) bench kernels kernels --seconds 900 ;;
        serve) bench serve serve --cold --peer transformers --seconds 600 ;;
        # shellcheck disable=SC2086 # the cells are words
        fp8 | fp8-head) bench "$step" serve --dtype "$step" --cells $few --seconds 300 ;;
        train) bench train train --peer transformers --seconds 400 ;;
        accumulate) bench accumulate train --train-cells 4096 --accumulate 8 --seconds 120 ;;
        curves) run curves "$python" -m benchmarks.curves --steps 200 ;;
        recipe)
            run recipe "$python" -m benchmarks.recipe configs/nano/train.toml --minutes 5 \
                --set "data.shards=${SHARDS:?names the folder of prepared shards}"
            ;;
        sanitize) run sanitize "$python" -m benchmarks.sanitize ;;
        *)
            echo "step $step: want tests, kernels, serve, fp8, fp8-head, train, accumulate, curves, recipe, sanitize" >&2
            exit 2
            ;;
    esac
done
