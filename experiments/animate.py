"""What does masked diffusion look like at work? An animated SVG of a model writing: it takes the
settings of generate.py and prints the same text. A quarter of a minute on two CPU cores.

    python -m experiments.animate --svg=unmask.svg --prompt="ROMEO:" --length=250
"""
import html
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from config import Sample, parse, run
from generate import prepare, show_texts


@dataclass(frozen=True)
class SvgSample(Sample):   # generate.py, and where the picture goes
    svg: str = "unmask.svg"


def text_svg(history, known, tokenizer, seconds=8, columns=64):
    """An animated SVG of history [(x (L,), confidence (L,)), ...]: dots turn into characters, red
    where the model guessed, green where it was certain; the prompt, known (L,), is white."""
    states = torch.stack([x.cpu() for x, _ in history])                # (calls + 1, L)
    confidence = torch.stack([p.cpu() for _, p in history])
    n = len(states)
    cells = []
    row = 0
    column = 0
    width = 0
    for j in range(len(known)):
        changes = (states[1:, j] != states[:-1, j]).nonzero().flatten() + 1
        begins = [0, *changes.tolist()]
        ends = [*changes.tolist(), n]
        for begin, end in zip(begins, ends, strict=True):
            token = int(states[begin, j])
            text = tokenizer.decode([token])
            if not text.isprintable() or text == " ":
                continue
            color = f"hsl({130 * confidence[begin, j]:.0f} 70% 65%)"
            if token == len(tokenizer):                                # MASK
                color = "#484f58"
            if known[j]:
                color = "#f0f6fc"
            cells.append(f'<text x="{16 + 9.6 * column:.1f}" y="{32 + 22 * row}" fill="{color}">'
                         f'{html.escape(text)}{visible(begin / n, end / n, seconds)}</text>')
        column += 1
        width = max(width, column)
        if tokenizer.decode([int(states[-1, j])]) == "\n" or column == columns:
            row += 1
            column = 0
    w = 32 + 9.6 * width
    h = 48 + 22 * row
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h}" width="{w:.0f}" '
        f'height="{h}" font-size="16" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, '
        'monospace"><title>A masked diffusion model writing</title>',
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>', *cells, "</svg>\n"])


def visible(begin, end, seconds, writing=0.75):
    """SVG animation: visible from begin to end, shares of the writing; that is a share of the loop,
    in the rest of which the finished text stands still."""
    times = [(0, int(begin == 0))]
    if begin > 0:
        times.append((begin * writing, 1))
    if end < 1:
        times.append((end * writing, 0))
    if len(times) == 1:
        return ""
    key_times = ";".join(f"{t:.4f}" for t, _ in times)
    values = ";".join(str(v) for _, v in times)
    return (f'<animate attributeName="opacity" calcMode="discrete" dur="{seconds}s" '
            f'repeatCount="indefinite" keyTimes="{key_times}" values="{values}"/>')


def main(argv):
    s = SvgSample(**parse(argv, SvgSample))
    frames, ids, known, tokenizer = prepare(s)
    history = [(ids, known.float())]

    def record(frames):
        for x, confidence in frames:
            history.append((x[0], confidence[0]))
            yield x, confidence

    show_texts(record(frames), ids, known, tokenizer, s)
    Path(s.svg).write_text(text_svg(history, known, tokenizer), encoding="utf-8")
    print(f"wrote {s.svg}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
