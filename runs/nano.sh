#!/usr/bin/env bash
# Makes the nano model and its dense twin from the corpora, then measures both.
#   QNEXT_DATA=<folder of the shared data> runs/nano.sh
# Takes about 25 minutes on one H100 or H200. Safe to kill: a second call goes on where it was.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${QNEXT_DATA:?names the folder of the shared data}"
python=${PYTHON:-python3}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}

if [ ! -f out/data/nano/manifest.json ]; then
    "$python" -m qnext data prepare configs/nano/prepare.toml
fi

for run in train train_dense; do
    "$python" -m qnext train "configs/nano/$run.toml" --resume "$@"
done

validation=$QNEXT_DATA/pretrain/en_val.jsonl.zst
for model in nano nano-dense; do
    for stage in model-long model; do
        for windows in first all; do
            echo "== $model, $stage"
            "$python" -m qnext eval "out/$model/$stage" --bpb "$validation" --windows "$windows" --mtp
        done
    done
done

# What ships; the tokenizer and the chat template are already there.
cp out/nano/model/*.safetensors* out/nano/model/config.json qnext/assets/nano/
cp out/nano/log.jsonl qnext/assets/nano/training_log.jsonl
