#!/bin/bash
# Does masked diffusion gain more from repeated data? The first 100,000 characters of tiny
# Shakespeare for 200 epochs, the masked model and the baseline at three dropouts, then the baseline
# tuned. Two hours on two CPU cores; the curves are log.csv, best.pt is early stopping.
# bash experiments/repeated.sh [data_dir]; then python -m evaluation --n=0 --out=out/repeated/...
set -eu
data=${1:-data}
# the same on a GPU, which has other defaults
shape="--block_size=128 --batch_size=32 --dropout=0 --n_layer=4 --n_head=4 --n_embd=128"
arm() {   # name, what is changed
    name=$1; shift
    grep -qs finished out/repeated/$name/status && return
    python train.py --dataset=shakespeare --data_dir="$data" --train_size=100000 $shape \
        --max_iters=4883 --eval_interval=122 --out="out/repeated/$name" "$@"
}
for dropout in 0 0.2 0.4; do
    arm masked-$dropout --dropout=$dropout
    arm ar-$dropout --objective=ar --dropout=$dropout
done
arm ar-50-epochs --objective=ar --dropout=0.4 --weight_decay=1 --max_iters=1221
arm ar-25-epochs --objective=ar --dropout=0.4 --weight_decay=1 --max_iters=610 --eval_interval=61
arm ar-25-epochs-light --objective=ar --dropout=0.2 --max_iters=610 --eval_interval=61
