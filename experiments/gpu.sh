#!/bin/bash
# What only a GPU can show, in commands of under ten minutes each. From the repository's root, with tiny Shakespeare in data/:
#
#     bash experiments/gpu.sh gradients    # fp16: every parameter gets a finite gradient: masked, twin, bits and embeddings with self-conditioning
#     bash experiments/gpu.sh bench        # ms a step, characters/s, share of the fp16 peak; compiled, eager, plain
#     bash experiments/gpu.sh train        # the full-size model for nine minutes; again to go on, until it says it is finished
#     bash experiments/gpu.sh evaluate     # its bound over the whole validation split and its samples
#     bash experiments/gpu.sh twin         # the same network, autoregressive, for the same axis (nanoGPT: 1.4697)
#     bash experiments/gpu.sh big          # 12 x 12 x 768 on a corpus of enwik8's size, for throughput
#
# Tables go to out/gpu/*.md; log.csv stays beside each run. Targets: 1.55 nats/char for the masked model, masked CE below
# 2.0 where all shares are alike; clock.md has it under document 004's cosine schedule, too.
set -euo pipefail
mkdir -p out/gpu
limited() {   # nine minutes, then Ctrl-C, which saves; a later call resumes
    folder=$1; shift
    resume=$([ -e "$folder/ckpt.pt" ] && echo True || echo False)
    timeout --signal=INT 540 python train.py --out="$folder" --resume="$resume" "$@" 2>&1 | tee -a "out/gpu/$(basename "$folder").txt" || [ $? = 124 ]
}
case "${1:-}" in
gradients) python - <<'PY' | tee out/gpu/gradients.md
import torch
from evaluation.bench import Noise
import analog_bits
import embed_diffusion
import train
from config import AMP, DEVICE, Bits, Embed, Masked
from train import optimizers
for name, c, build in (("masked", Masked(time=True), train.build), ("ar", Masked(objective="ar", time=True), train.build),
                       ("bits", Bits(time=True), analog_bits.build), ("embeddings", Embed(time=True), embed_diffusion.build)):
    method = build(c, Noise(c).meta).to(DEVICE).train()
    scaler, opts = torch.amp.GradScaler(DEVICE, enabled=AMP == torch.float16), optimizers(method, c)
    for step in range(5):   # outputs start at zero: by the fifth step everything behind them has a gradient too
        for p in (g for o in opts for g in o.param_groups):
            p["lr"] = 1e-3
        scaler.scale(method(Noise(c).batch(c.batch_size))).backward()
        for o in opts:
            scaler.unscale_(o)
        dead = [n for n, p in method.named_parameters() if p.grad is None or not p.grad.isfinite().all() or not p.grad.any()]
        for o in opts:
            scaler.step(o)
            o.zero_grad()
        scaler.update()
    print(name, AMP, torch.cuda.get_device_name() if DEVICE == "cuda" else DEVICE, "dead or not finite at step 5:", dead)
    assert not dead
PY
;;
bench)    timeout 580 python -m evaluation.bench | tee out/gpu/bench.md ;;
train)    limited out/full --dataset=shakespeare --data_dir=data ;;
twin)     limited out/full-ar --dataset=shakespeare --data_dir=data --objective=ar --dropout=0.2 --max_iters=5000 --eval_interval=250 ;;
evaluate)
    timeout 60 python -m experiments.clock --out=out/full --data_dir=data | tee out/gpu/clock.md
    timeout 510 python -m evaluation --out=out/full --data_dir=data | tee out/gpu/evaluate.md ;;
big)
    [ -e data/enwik8 ] && text=enwik8 || text=out/gpu/hundred.txt   # without enwik8: 100 million characters made of War and Peace
    [ "$text" = enwik8 ] || [ -e "$text" ] || for _ in $(seq 31); do cat data/warpeace.txt; done > "$text"
    limited out/big --dataset=$text --data_dir=data --n_layer=12 --n_head=12 --n_embd=768 --eval_interval=200 --max_iters=2000 ;;
*) sed -n '2,12p' "$0"; exit 1 ;;
esac
