#!/usr/bin/env bash
# What only a GPU can show, in parts that each end within 100 seconds; one that fails does not stop the next.
#     bash experiments/gpu.sh FOLDER            # where the logs go; OLD=folder of an older commit is timed beside
out=${1:?a folder for the logs}
mkdir -p "$out"
part() {
    name=$1; shift
    start=$SECONDS
    timeout 100 "$@" >"$out/$name.log" 2>&1
    echo "$name: exit code $?, $((SECONDS - start)) s"
}
part tests pytest -q -n 0 -s tests/test_cuda.py
part bench python -m evaluation.gpu_bench
