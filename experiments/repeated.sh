#!/bin/bash
# Repeated data: the first 100,000 characters of tiny Shakespeare, masked model and twin at three dropouts for 200 epochs, then the twin tuned,
# evaluated on the whole validation split. bash experiments/repeated.sh [data_dir]; the curves are the log.csv of each run, best.pt is early stopping.
set -eu
data="${1:-data}"
once() {
    name=$1; shift
    python train.py --dataset=shakespeare --data_dir="$data" --train_size=100000 --n_layer=4 --n_head=4 --n_embd=128 --out="out/repeated/$name" "$@"
}
for objective in masked ar; do
    for dropout in 0 0.2 0.4; do
        once $objective-$dropout --objective=$objective --dropout=$dropout --max_iters=4883 --eval_interval=122
    done
done
once ar-50-epochs --objective=ar --dropout=0.4 --weight_decay=1 --max_iters=1221 --eval_interval=122
once ar-25-epochs --objective=ar --dropout=0.4 --weight_decay=1 --max_iters=610 --eval_interval=61
once ar-25-epochs-light --objective=ar --dropout=0.2 --max_iters=610 --eval_interval=61
