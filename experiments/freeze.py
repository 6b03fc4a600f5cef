"""Freeze a run's best averaged weights as a small fp16 checkpoint: python -m experiments.freeze out/masked results/masked.pt"""
import sys
from pathlib import Path

import torch

run, to = Path(sys.argv[1]), Path(sys.argv[2])
state = torch.load(run / "best.pt", map_location="cpu", weights_only=True)
state["ema"] = {k: v.half() for k, v in state["ema"].items()}
state["config"]["data_dir"] = ""                     # a fact about the machine it was trained on
torch.save(state, to)
to.with_suffix(".csv").write_bytes((run / "log.csv").read_bytes())
print(f"{to}: {to.stat().st_size:,} bytes")
