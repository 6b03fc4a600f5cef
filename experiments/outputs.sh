#!/bin/bash
# What do README's commands print? Writes results/outputs.md; two minutes on two CPU cores. The lines
# of four models are of the runs of experiments/curves.sh. bash experiments/outputs.sh [data_dir]
set -eu
data=${1:-data}
first() {   # a name, and what writes: the first 64 characters, / for a new line
    printf "    %-12s %s\n" "$1" "$("${@:2}" 2>/dev/null | tr '\n' / | cut -c1-64)"
}
{
    echo "As \`bash experiments/outputs.sh\` printed it."
    for prompt in "" "To be, {12} that is the {8}:" "ROMEO:{20-60}JULIET:"; do
        typed="python generate.py"
        [ -z "$prompt" ] || typed="$typed --prompt=\"$prompt\""
        printf "\n    \$ %s\n" "$typed"
        python generate.py --prompt="$prompt" 2>&1 | grep -v "results/masked.pt\|network calls" | sed 's/./    &/'
    done
    echo
    first real tail -c 111540 "$data/tinyshakespeare.txt"
    first AR python generate.py --out=out/curves/AR --temperature=1
    first masks python generate.py --out=out/curves/masked --steps=128 --order=random --temperature=1 --remask=0
    first embeddings python embed_diffusion.py sample --out=out/curves/embeddings --steps=128
    first bits python analog_bits.py sample --out=out/curves/bits --steps=128
} > results/outputs.md
