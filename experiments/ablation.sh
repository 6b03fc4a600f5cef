#!/bin/bash
# The ablation table of docs/LOG.md: one change at a time, 1,400 steps each (three and a half quiet minutes of the default model on two cores).
# bash experiments/ablation.sh [data_dir]; every line is a run in out/ablation/, its bound over the whole split the last line it prints.
set -eu
data=${1:-data}
arm() {   # name, what is changed
    name=$1; shift
    python train.py --dataset=shakespeare --data_dir="$data" --weight=elbo --max_iters=1400 --eval_interval=700 --out="out/ablation/$name" "$@"
}
for seed in 1337 1 2; do
    arm baseline.$seed --seed=$seed
    arm pooled.$seed --weight=pooled --seed=$seed
    arm cosine.$seed --schedule=cosine --seed=$seed
    arm cosine-pooled.$seed --schedule=cosine --weight=pooled --seed=$seed
    arm batch-64.$seed --batch_size=64 --max_iters=700 --eval_interval=350 --warmup_iters=50 --seed=$seed
    arm ema-off.$seed --ema=0 --seed=$seed
    arm time.$seed --time=True --seed=$seed
    arm dropout.$seed --dropout=0.1 --seed=$seed
done
arm square --schedule=square
arm square-pooled --schedule=square --weight=pooled
arm adamw-1e-3 --optimizer=adamw --learning_rate=1e-3
arm adamw-3e-3 --optimizer=adamw --learning_rate=3e-3
arm adamw-6e-3 --optimizer=adamw
arm adamw-12e-3 --optimizer=adamw --learning_rate=1.2e-2
arm batch-128 --batch_size=128 --max_iters=350 --eval_interval=175 --warmup_iters=25
arm documents --schedule=cosine --weight=pooled --optimizer=adamw --learning_rate=3e-4 --time=True
# commit aa28468 has arms that lost: --positions=learned --reach=0 --schedule=genmd4; --weight=flat; three seeds: --schedule=loss --schedule=tilted
