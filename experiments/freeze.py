"""How do the checkpoints in results/ get so small? A run's best weights in fp16, and its log.

    python -m experiments.freeze out/masked results/masked.pt
"""
from pathlib import Path

import torch

from config import check, run


def main(argv):
    check(len(argv) == 2 and argv[1].endswith(".pt"), __doc__)
    out = Path(argv[0])
    to = Path(argv[1])
    state = torch.load(out / "best.pt", map_location="cpu", weights_only=True)
    state["ema"] = {name: value.half() for name, value in state["ema"].items()}
    state["config"]["data_dir"] = ""       # a fact about the machine it was trained on
    torch.save(state, to)
    to.with_suffix(".csv").write_bytes((out / "log.csv").read_bytes())
    print(f"{to}: {to.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
