#!/bin/bash
# What is quality worth in network calls? Every sampler of a masked model (results/samplers.md,
# headtohead.md): 100 blocks a row, 400 in the last two tables. Three hours on two CPU cores, into
# out/samplers.md. bash experiments/samplers.sh [data_dir]
set -eu
data=${1:-data}
mkdir -p out
orders=random,confidence,margin,entropy
table() {   # settings, with commas between values
    python -m experiments.samplers --out=results/masked.pt --data_dir="$data" --n=100 "$@"
}
plain() { table --temperature=1 --remask=0 "$@"; }
{
    plain --min_distance=0 --order=random --steps=1
    plain --min_distance=0 --order=$orders --steps=8,16,32,64,128
    plain --order=$orders --steps=16,32,43,64
    plain --order=margin --steps=43 --min_distance=0,2,8,16
    plain --order=margin --counts=cosine --steps=32,64
    plain --min_distance=0 --order=random --counts=entropy --entropy_bound=0.01,0.1,1,3,6
    plain --order=random --counts=entropy --entropy_bound=3,6
    plain --min_distance=0 --order=confidence --counts=documents --steps=32,64,100
    table --remask=0 --min_distance=0 --order=random,margin --steps=128 --temperature=0.7,0.8,0.9
    table --remask=0 --order=margin --steps=43 --temperature=0.7,0.8,0.9,1.1
    table --temperature=0.9,1,1.1
    table --order=entropy
    plain --min_distance=0 --order=random --remask=0.01
    plain --min_distance=0 --order=random --steps=128 --n=400
    plain --order=random,margin --steps=8,16,43 --n=400
    table --remask=0 --order=margin --steps=43 --temperature=1.05 --n=400
} > out/samplers.md
