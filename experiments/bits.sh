#!/bin/bash
# Analog bits: one change at a time on tiny Shakespeare, fixed shape; then War and Peace and its judge. bash experiments/bits.sh [data_dir]
set -eu
data="${1:-data}"
arm() {
    name=$1; shift
    python analog_bits.py --dataset=shakespeare --data_dir="$data" --n_layer=4 --n_head=4 --n_embd=128 --max_iters=1000 --eval_interval=500 --prompts=0 \
        --out="out/bits-arms/$name" "$@"
}
for seed in 1337 1 2; do arm seed$seed --seed=$seed; done
arm together --spread=0
arm no-self-conditioning --selfcond=False
arm per-bit --head=bits
arm bytes --code=bytes
arm random --code=random
arm linear --schedule=linear
arm cosine --schedule=cosine
arm no-prior --prior=False
arm no-hint --hint=False
arm elbo --weight=elbo
python train.py --dataset=shakespeare --data_dir="$data" --objective=ar --n_layer=4 --n_head=4 --n_embd=128 --max_iters=1000 --eval_interval=500 --out=out/bits-arms/twin
python train.py --dataset=warpeace --data_dir="$data" --objective=ar --max_iters=4000 --out=out/warpeace-judge
python analog_bits.py --dataset=warpeace --data_dir="$data" --block_size=64 --batch_size=64 --max_iters=6000 --eval_interval=1000 --out=out/bits
python -m experiments.samplers --out=out/bits --judge=out/warpeace-judge --data_dir="$data" --n=64
