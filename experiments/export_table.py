"""The input embedding of a text checkpoint (masked or ar) as a table that embed_diffusion.py --table reads:

    python -m experiments.export_table out/warpeace-judge out/warpeace-table.txt
    python -m experiments.export_table out/warpeace-judge out/table/warpeace.safetensors          # and out/table/tokenizer.json

In .txt, as GloVe: a character and its numbers on each line, a space written as ▁ and a new line as a backslash and n."""
import json
from pathlib import Path

from config import run
from train import build, load


def main(argv):
    if len(argv) != 2 or Path(argv[1]).suffix not in (".txt", ".safetensors"):
        raise SystemExit("python -m experiments.export_table CHECKPOINT TABLE.txt or TABLE.safetensors")
    (method, _, meta), to = load(argv[0], build), Path(argv[1])
    rows, chars = method.net.inp.weight[:-1].detach().cpu().float().numpy(), meta["alphabet"]                # the last row is MASK
    to.parent.mkdir(parents=True, exist_ok=True)
    if to.suffix == ".txt":
        names = ({" ": "\u2581", "\n": "\\n"}.get(ch, ch) for ch in chars)
        lines = [" ".join([name, *(f"{x:.9g}" for x in row)]) for name, row in zip(names, rows.tolist(), strict=True)]
        to.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")
    else:
        vocab = json.dumps({"model": {"vocab": {ch: i for i, ch in enumerate(chars)}}})
        if (tokenizer := to.with_name("tokenizer.json")).exists() and tokenizer.read_text(encoding="utf-8") != vocab:
            raise SystemExit(f"{tokenizer} is that of another table: choose another folder")
        header = json.dumps({"embed_tokens.weight": {"dtype": "F32", "shape": rows.shape, "data_offsets": [0, rows.nbytes]}}).encode()
        header += b" " * (-len(header) % 8)                                                                  # numbers begin at a multiple of 8
        to.write_bytes(len(header).to_bytes(8, "little") + header + rows.astype("<f4").tobytes())
        tokenizer.write_text(vocab, encoding="utf-8")
    print(f"{to}: {rows.shape[1]} numbers for each of {len(chars)} characters")


if __name__ == "__main__":
    run(main)
