#!/bin/bash
# How do the four text models learn? The runs of experiments/side.sh with seed 1337 on tiny
# Shakespeare, with more evaluations. Half an hour on two CPU cores, into out/curves/curves.csv and
# curves.md, which results/ keeps. bash experiments/curves.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_layer=4 --n_head=4 --n_embd=128"
arm() {   # name, script, what is changed
    out=out/curves/$1; script=$2; shift 2
    grep -qs finished $out/status && return
    python $script --dataset=shakespeare --data_dir="$data" $shape \
        --max_iters=1000 --eval_interval=200 --out=$out "$@"
}
arm AR train.py --objective=ar --weight_decay=0.5
arm masked train.py
arm embeddings embed_diffusion.py --prompts=0
arm bits analog_bits.py --prompts=0
echo model,step,seconds,bound > out/curves/curves.csv
for model in AR masked embeddings bits; do
    tail -n +2 out/curves/$model/log.csv | cut -d, -f1,2,4 | sed "s/^/$model,/"
done >> out/curves/curves.csv
all=$(printf "out/curves/%s," AR masked embeddings bits)
python -m evaluation --data_dir="$data" --n=0 --exact=0 --out=$all > out/curves/curves.md
