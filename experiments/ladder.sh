#!/bin/bash
# Why do embeddings fail, and what cures them? Every recipe of embed_diffusion.RECIPES on tiny
# Shakespeare, then arms beside the last rung: 32 runs of two minutes on two CPU cores, and half an
# hour for their bounds and samples, into out/ladder.md. bash experiments/ladder.sh [data_dir]
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_layer=4 --n_head=4 --n_embd=128"
arm() {   # name, what is changed
    name=$1; shift
    grep -qs finished out/ladder/$name/status && return
    python embed_diffusion.py --dataset=shakespeare --data_dir="$data" $shape \
        --max_iters=1000 --eval_interval=500 --out="out/ladder/$name" "$@"
}
for recipe in $(python -c "import embed_diffusion; print(*embed_diffusion.RECIPES)"); do
    arm $recipe --recipe=$recipe
done
for seed in 1 2; do
    arm baseline.$seed --recipe=baseline --seed=$seed
    arm scaled.$seed --recipe=scaled --seed=$seed
done
for weight in 0.3 1; do arm fluency-$weight --recipe=scaled --fluency=$weight; done
table=out/warpeace-table.txt   # of the model that experiments/bits.sh trains
python -m experiments.table out/warpeace-ar --out=$table --data_dir="$data"
for seed in 1337 1 2; do
    at=.$seed; [ $seed = 1337 ] && at=
    arm frozen$at --recipe=scaled --train_table=False --seed=$seed
    arm pre-tuned$at --recipe=scaled --table=$table --seed=$seed
    arm pre-frozen$at --recipe=scaled --table=$table --train_table=False --seed=$seed
done
all=$(printf "%s," out/ladder/*)
python -m evaluation --data_dir="$data" --n=100 --exact=0 --out=$all > out/ladder.md
for rounding in clamp cosine; do
    python -m evaluation --data_dir="$data" --n=100 --bound=False --rounding=$rounding \
        --out=out/ladder/scaled,out/ladder/diffusion-lm >> out/ladder.md
done
