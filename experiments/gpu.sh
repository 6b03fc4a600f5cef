#!/bin/bash
# What only a GPU can show, in parts of at most 100 seconds. Each keeps its log in out/gpu.
# bash experiments/gpu.sh [data_dir] [parts], parts of: tests bench siblings run cosine decay
set -u
data=${1:-data}
parts=${2:-tests bench siblings run}
mkdir -p out/gpu
part() {   # name of the log, command
    local name=$1 start=$SECONDS; shift
    timeout -s INT 100 "$@" > "out/gpu/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - start)) s, the last line:"
    tail -n 1 "out/gpu/$name.log"
}
pieces() {   # a run to its end, in six pieces of 100 seconds at most; name, command
    local name=$1; shift
    part "$name.1" "$@" --out="out/gpu/runs/$name"
    for i in 2 3 4 5 6; do
        grep -qs finished "out/gpu/runs/$name/status" && return
        part "$name.$i" "$@" --out="out/gpu/runs/$name" --resume
    done
}
masked="python train.py --dataset=shakespeare --data_dir=$data"
for what in $parts; do
    case $what in
    tests) part tests pytest -q -n 4 tests/test_cuda.py ;;
    bench) part bench python -m evaluation.bench --gpu ;;
    siblings)
        for script in analog_bits embed_diffusion mnist_ddpm; do
            part $script python $script.py --data_dir="$data" --max_iters=1200 --windows=200 \
                --out=out/gpu/runs/$script
            part $script.sample python $script.py sample --out=out/gpu/runs/$script
            part $script.evaluation python -m evaluation --data_dir="$data" --n=20 --digits=100 \
                --windows=200 --out=out/gpu/runs/$script
        done ;;
    run)
        pieces masked $masked
        part generate python generate.py --out=out/gpu/runs/masked --prompt="ROMEO:"
        part evaluation python -m evaluation --data_dir="$data" --out=out/gpu/runs/masked ;;
    cosine)    # document 004's number: pooled masked CE under its schedule
        pieces cosine $masked --schedule=cosine ;;
    decay)     # two runs at once
        for decay in 0.1 0.5 1; do
            pieces masked-$decay $masked --max_iters=4000 --weight_decay=$decay &
            pieces ar-$decay $masked --max_iters=4000 --weight_decay=$decay --objective=ar
            wait
        done ;;
    esac
done
