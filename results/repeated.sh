#!/bin/bash
# Repeated data: 200 epochs on the first 100,000 characters of tiny Shakespeare, masked model and twin at three dropouts, evaluated on the
# whole validation split. bash results/repeated.sh [data_dir]; the curves are the log.csv of each run, best.pt is early stopping.
set -eu
for objective in masked ar; do
    for dropout in 0 0.2 0.4; do
        python train.py --dataset=shakespeare --data_dir="${1:-data}" --objective=$objective --dropout=$dropout --train_size=100000 \
            --n_layer=4 --n_head=4 --n_embd=128 --max_iters=4883 --eval_interval=122 --out=out/repeated/$objective-$dropout
    done
done
