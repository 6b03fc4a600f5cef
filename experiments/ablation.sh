#!/bin/bash
# What is each choice of masked diffusion worth? One change at a time, 1,400 steps of the default
# model each: 32 runs of three and a half minutes on two CPU cores. The last line that a run prints
# has its bound over the whole split. bash experiments/ablation.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_head=5 --n_embd=160"
arm() {   # name, what is changed
    name=$1; shift
    grep -qs finished out/ablation/$name/status && return
    python train.py --dataset=shakespeare --data_dir="$data" $shape --loss=elbo --schedule=linear \
        --learning_rate=6e-3 --max_iters=1400 --eval_interval=700 --out="out/ablation/$name" "$@"
}
for seed in 1337 1 2; do
    arm baseline.$seed --seed=$seed
    arm pooled.$seed --seed=$seed --loss=pooled
    arm cosine.$seed --seed=$seed --schedule=cosine
    arm cosine-pooled.$seed --seed=$seed --schedule=cosine --loss=pooled
    arm batch-64.$seed --seed=$seed --batch_size=64 --max_iters=700 --eval_interval=350 \
        --warmup_iters=50
    arm ema-off.$seed --seed=$seed --ema=0
    arm time.$seed --seed=$seed --time
    arm dropout.$seed --seed=$seed --dropout=0.1
done
arm square --schedule=square
arm square-pooled --schedule=square --loss=pooled
for rate in 1e-3 3e-3 6e-3 12e-3; do
    arm adamw-$rate --optimizer=adamw --learning_rate=$rate
done
arm batch-128 --batch_size=128 --max_iters=350 --eval_interval=175 --warmup_iters=25
arm documents --schedule=cosine --loss=pooled --optimizer=adamw --learning_rate=3e-4 --time
