#!/bin/bash
# What is each choice of analog bits worth? One change at a time on tiny Shakespeare; then War and
# Peace, its evaluation model and its samplers. Three hours on two CPU cores.
# bash experiments/bits.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0"
small="--dataset=shakespeare --data_dir=$data $shape --n_layer=4 --n_head=4 --n_embd=128
    --max_iters=1000 --eval_interval=500"
large="--dataset=warpeace --data_dir=$data $shape --n_head=5 --n_embd=160"
arm() {   # name, what is changed
    name=$1; shift
    grep -qs finished out/bits-arms/$name/status && return
    python analog_bits.py $small --prompts=0 --out="out/bits-arms/$name" "$@"
}
for seed in 1337 1 2; do arm seed$seed --seed=$seed; done
arm together --stagger=0
arm no-self-conditioning --self_cond=False
arm per-bit --head=bits
arm bytes --code=bytes
arm linear --schedule=linear
arm cosine --schedule=cosine
arm no-prior --output_prior=False
arm no-hint --feed_posterior=False
arm elbo --loss=elbo
python train.py $small --objective=ar --out=out/bits-arms/ar
python train.py $large --objective=ar --max_iters=4000 --out=out/warpeace-ar
python analog_bits.py $large --block_size=64 --batch_size=64 \
    --max_iters=6000 --eval_interval=1000 --out=out/bits
table() {   # settings, with commas between values
    python -m experiments.samplers --out=out/bits --eval_model=out/warpeace-ar \
        --data_dir="$data" --n=64 "$@"
}
both="--sampler=ddim,ancestral"
table $both --gaussian_steps=10,50,250 --td=0,0.5,1,2,5,10
table $both --gaussian_steps=25 --td=0,1 --two_pass=True
table --sampler=ancestral --gaussian_steps=2000 --td=1
