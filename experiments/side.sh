#!/bin/bash
# How do the four text models compare? Two corpora, the same network, steps and characters, three
# seeds; then samples in 128 network calls without any temperature, and a frontier of seed 1337.
# Three hours on two CPU cores, into out/side/*.md. bash experiments/side.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_layer=4 --n_head=4 --n_embd=128"
[ -f out/warpeace-ar/best.pt ] || { echo "first: bash experiments/bits.sh"; exit 1; }
exact="--order=random --temperature=1 --remask=0 --steps=128 --gaussian_steps=128"
for corpus in shakespeare warpeace; do
    arm() {   # name, script, what is changed
        out=out/side/$corpus/$1.$seed; script=$2; shift 2
        grep -qs finished $out/status && return
        python $script --dataset=$corpus --data_dir="$data" $shape \
            --max_iters=1000 --eval_interval=500 --seed=$seed --out=$out "$@"
    }
    for seed in 1337 1 2; do
        arm ar train.py --objective=ar --weight_decay=0.5   # its best of 0.02, 0.1 and 0.5
        arm masked train.py
        arm bits analog_bits.py --prompts=0
        arm embed embed_diffusion.py --prompts=0
    done
    evaluate() {
        model=; [ $corpus = warpeace ] && model=--eval_model=out/warpeace-ar
        python -m evaluation --data_dir="$data" $model "$@"
    }
    all=$(printf "out/side/$corpus/%s," {ar,masked,bits,embed}.{1337,1,2})
    first=$(printf "out/side/$corpus/%s.1337," ar masked bits embed)
    evaluate --n=0 --exact=0 --out=$all > out/side/$corpus.md
    evaluate --bound=False --n=100 $exact --out=$all >> out/side/$corpus.md
    for change in "--temperature=0.7 --td=0" "--temperature=0.8 --td=0.5" \
                  "--temperature=0.9 --td=1" "--temperature=1 --td=2"; do
        evaluate --bound=False --n=100 $exact $change --out=$first >> out/side/$corpus.md
    done
done
