#!/bin/bash
# Side by side: the four text models on two corpora, the same network, steps and characters, three seeds; then their samples, all in 128 network
# calls and without any temperature, and a frontier of seed 1337. bash experiments/side.sh [data_dir]
set -eu
data="${1:-data}"
judge() { [ "$1" = warpeace ] && echo --judge=out/warpeace-judge || true; }
[ -f out/warpeace-judge/best.pt ] || { echo "no judge of War and Peace in out/warpeace-judge: results/bits.sh trains it, in its first run"; exit 1; }
exact="--order=random --temperature=1 --remask=0 --steps=128 --gaussian_steps=128"
for corpus in shakespeare warpeace; do
    arm() {   # name, script, what is changed
        name=$1 script=$2; shift 2
        python "$script" --dataset=$corpus --data_dir="$data" --n_layer=4 --n_head=4 --n_embd=128 --max_iters=1000 --eval_interval=500 \
            --seed="$seed" --out="out/side/$corpus/$name.$seed" "$@"
    }
    for seed in 1337 1 2; do
        arm twin train.py --objective=ar
        arm masked train.py
        arm bits analog_bits.py --prompts=0
        arm embed embed_diffusion.py --recipe=scaled
    done
    all=$(printf "out/side/$corpus/%s," {twin,masked,bits,embed}.{1337,1,2})
    first=$(printf "out/side/$corpus/%s.1337," twin masked bits embed)
    for more in "--n=0 --exact=0 --out=$all" "--bound=False --n=100 $exact --out=$all" "--bound=False --n=100 $exact --frontier --out=$first"; do
        python -m evaluation --data_dir="$data" $(judge $corpus) $more
    done > results/side-$corpus.md
done
python -m experiments.readme
