#!/bin/bash
# What lowers the bound at equal time? The fixed shape (4 x 4 x 128, block 128, batch 32, 1,000
# steps), one change at a time from the default, and the two Gaussian models by their stagger. 27
# runs of five minutes on one CPU core each. bash experiments/equal.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_layer=4 --n_head=4 --n_embd=128"
arm() {   # name, script, what is changed
    out=out/equal/$1; script=$2; shift 2
    grep -qs finished $out/status && return
    python $script --dataset=shakespeare --data_dir="$data" $shape \
        --max_iters=1000 --eval_interval=500 --out=$out "$@"
}
for seed in 1337 1 2; do
    arm masked.$seed train.py --seed=$seed
    arm ar.$seed train.py --objective=ar --seed=$seed
done
arm rate-6e-3 train.py --learning_rate=6e-3
arm rate-15e-3 train.py --learning_rate=15e-3
arm adamw train.py --optimizer=adamw
arm warmup-100 train.py --warmup_iters=100
arm decay-0.1 train.py --weight_decay=0.1
arm decay-0.5 train.py --weight_decay=0.5
arm ema-0.99 train.py --ema=0.99
arm batch-16 train.py --batch_size=16 --max_iters=1600 --eval_interval=800
arm linear train.py --schedule=linear
arm square train.py --schedule=square
arm bits-uniform analog_bits.py --prompts=0 --times=uniform
arm embed-uniform embed_diffusion.py --prompts=0 --times=uniform
arm wide train.py --n_layer=3 --n_head=6 --n_embd=192
for stagger in 3 6 12 24; do
    arm bits.$stagger analog_bits.py --prompts=0 --stagger=$stagger
    arm embed.$stagger embed_diffusion.py --prompts=0 --stagger=$stagger
done
