#!/bin/bash
# The ladder of embeddings: every recipe of config.EMBED on tiny Shakespeare, fixed shape, equal steps; then the arms beside the last rung.
# bash experiments/ladder.sh [data_dir], then python -m experiments.ladder out/ladder --data_dir=...
set -eu
data="${1:-data}"
arm() {   # name, what is changed
    name=$1; shift
    python embed_diffusion.py --dataset=shakespeare --data_dir="$data" --n_layer=4 --n_head=4 --n_embd=128 --max_iters=1000 --eval_interval=500 \
        --out="out/ladder/$name" "$@"
}
for recipe in $(python -c "from config import EMBED; print(*EMBED)"); do arm "$recipe" --recipe="$recipe"; done
for seed in 1 2; do
    arm baseline.$seed --recipe=baseline --seed=$seed
    arm scaled.$seed --recipe=scaled --seed=$seed
done
for weight in 0.3 1; do arm fluency-$weight --recipe=scaled --fluency=$weight; done
python -m experiments.export_table out/warpeace-judge out/warpeace-table.txt   # the twin of War and Peace that results/bits.sh trains
for seed in 1337 1 2; do
    at=.$seed; [ $seed = 1337 ] && at=""
    arm frozen$at --recipe=scaled --learned=False --seed=$seed
    arm pre-tuned$at --recipe=scaled --table=out/warpeace-table.txt --seed=$seed
    arm pre-frozen$at --recipe=scaled --table=out/warpeace-table.txt --learned=False --seed=$seed
done
