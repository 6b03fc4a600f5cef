"""How do models write? An animated SVG of one or several of them writing at the same time, each at
its own speed: the slowest takes 12 seconds of animation. It takes the settings of generate.py, as
far as a model's own sampler has them, and prints the same texts.

    python -m experiments.animate --svg=unmask.svg --prompt="ROMEO:" --length=250
    python -m experiments.animate --out=out/ar,out/masked,out/embed,out/bits --svg=four.svg
"""
import html
import sys
import time
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path

from checkpoint import find_checkpoint
from config import Sample, check, parse, run
from data import SHADES, CharTokenizer
from evaluation.likelihood import open_checkpoint
from generate import CAPTION, lay_out, parse_prompt, show_texts, write
from step import reseed

NAMES = {"ar": "autoregressive", "embed": "embeddings"}
WHITE = "#f0f6fc"
GREY = "#484f58"
WRITING = 12         # seconds of animation in which the slowest writes
STILL = 4            # seconds in which the finished texts stand, before all begins anew
COLUMN = 10          # pixels
ROW = 20


@dataclass(frozen=True)
class SvgSample(Sample):   # generate.py, and where the picture goes
    svg: str = "unmask.svg"


@dataclass(frozen=True)
class Recording:
    name: str
    seconds: list        # when each state came, 0 first
    states: list         # of each, [(text, colour), ...] of all positions


def painted(ids, confidence, known, tokenizer):
    """[(text, colour), ...]: what is known is white, what is not written yet a grey dot."""
    shades = list(SHADES.values())
    texts = tokenizer.decode_each(ids)
    cells = []
    for i, p, is_known, text in zip(ids, confidence, known, texts, strict=True):
        colour = shades[int(4.99 * p)]
        if is_known:
            colour = WHITE
        if i == len(tokenizer):
            colour = GREY
        cells.append((text, colour))
    return cells


def recording(path, typed):
    """A Recording of a checkpoint as it writes by the settings in the dict typed."""
    checkpoint = open_checkpoint(path)
    meta = checkpoint.meta
    check(isinstance(meta["alphabet"], str) and meta["alphabet"], f"{path} writes no characters")
    names = {f.name for f in fields(checkpoint.script.SAMPLER)} - {"out"}
    s = checkpoint.script.SAMPLER(**{name: typed[name] for name in names & typed.keys()})
    tokenizer = CharTokenizer(meta["alphabet"], meta["is_bytes"])
    pieces = parse_prompt(s.prompt, tokenizer)
    T = checkpoint.c.block_size
    ids, known = lay_out(pieces, s.length, T, checkpoint.method.mask_id)
    known_comes_first = bool(known[:int(known.sum())].all())
    check(checkpoint.name != "ar" or known_comes_first,
          f"{path} writes from left to right and cannot use the text after a blank")

    # once unseen, for the first call takes longer
    next(write(checkpoint.method, ids, known, T, s), None)
    reseed(s.seed)
    seconds = [0.0]
    states = [painted(ids.tolist(), known.tolist(), known.tolist(), tokenizer)]
    frames = write(checkpoint.method, ids, known, T, s)
    start_time = time.perf_counter()

    def recorded():
        for x, confidence in frames:
            seconds.append(time.perf_counter() - start_time)
            states.append(painted(x[0].tolist(), confidence[0].tolist(), known.tolist(), tokenizer))
            yield x, confidence

    show_texts(recorded(), ids, known, tokenizer, s)
    return Recording(NAMES.get(checkpoint.name, checkpoint.name), seconds, states)


def text_svg(recordings):
    """The text of an SVG: one recording 64 columns wide, or several in two rows of 40."""
    columns = 40
    n_wide = 2
    if len(recordings) == 1:
        columns = 64
        n_wide = 1
    slowest = max(r.seconds[-1] for r in recordings)
    pane_width = COLUMN * columns + 16
    n_rows = max(len(rows_of_text(r.states[-1], columns)) for r in recordings)
    pane_height = 56 + ROW * n_rows
    parts = []
    for i, r in enumerate(recordings):
        x = 16 + pane_width * (i % n_wide)
        y = 28 + pane_height * (i // n_wide)
        parts += pane(r, x, y, columns, slowest)

    # what colours and bars mean, below
    width = 16 + pane_width * n_wide
    height = 12 + pane_height * -(-len(recordings) // n_wide)
    lines = [*CAPTION.split("; "), f"a full bar is {slowest:.1f} seconds, shown in {WRITING}"]
    for line in lines:
        height += 18
        parts.append(f'<text x="16" y="{height}" fill="#9198a1" font-size="12">{line}</text>')
    height += 16
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-size="16" font-family="ui-monospace, SFMono-Regular, Menlo, '
        'Consolas, monospace"><title>How language models write</title>',
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>', *parts, "</svg>\n"])


def rows_of_text(state, columns):
    """The positions in each row of a text; a new line ends a row, also one that is full."""
    rows = [[]]
    for j, (text, _) in enumerate(state):
        if len(rows[-1]) == columns and text != "\n":
            rows.append([])
        rows[-1].append(j)
        if text == "\n":
            rows.append([])
    return rows


def pane(r, left, top, columns, slowest):
    """Elements: what a recording is called, a bar that grows as long as it writes, and its text,
    where all that has the same colour at the same time is one element."""
    share = r.seconds[-1] / slowest
    title = f"{r.name}: {len(r.states) - 1} calls, {r.seconds[-1]:.1f} s"
    bar = f'<rect x="{left}" y="{top + 8}" height="3" width='
    grown = COLUMN * columns * share
    times = f"0;{share * WRITING / (WRITING + STILL):.4f};1"
    parts = [f'<text x="{left}" y="{top}" fill="{WHITE}">{title}</text>',
             f'{bar}"{COLUMN * columns}" fill="{GREY}"/>',
             f'{bar}"{grown:.1f}" fill="{WHITE}">{animation("width", "linear", times)}'
             f' values="0;{grown:.1f};{grown:.1f}"/></rect>']

    # the same texts, of one colour, from one state to another
    groups = {}
    for row, positions in enumerate(rows_of_text(r.states[-1], columns)):
        for column, j in enumerate(positions):
            place = f'x="{left + COLUMN * column}" y="{top + 34 + ROW * row}"'
            for first, end in runs(r.states, j):
                text, colour = r.states[first][j]
                if text.isprintable() and text != " ":
                    cell = f"<tspan {place}>{html.escape(text)}</tspan>"
                    groups.setdefault((first, end, colour), []).append(cell)
    for (first, end, colour), cells in groups.items():
        until = None
        if end < len(r.states):
            until = r.seconds[end] / slowest
        shown = visible(r.seconds[first] / slowest, until)
        parts.append(f'<text fill="{colour}">{"".join(cells)}{shown}</text>')
    return parts


def runs(states, j):
    """(first, end) of the states in a row in which position j shows the same."""
    n = len(states)
    changes = [k for k in range(1, n) if states[k][j] != states[k - 1][j]]
    return pairwise([0, *changes, n])


def animation(attribute, mode, times):
    """The beginning of an SVG animation."""
    return (f'<animate attributeName="{attribute}" calcMode="{mode}" dur="{WRITING + STILL}s" '
            f'repeatCount="indefinite" keyTimes="{times}"')


def visible(begin, end):
    """SVG animation: visible from begin to end, or if that is None for good, shares of the time in
    which the slowest writes."""
    scale = WRITING / (WRITING + STILL)
    times = ["0"]
    values = [str(int(begin == 0))]
    if begin > 0:
        times.append(f"{begin * scale:.4f}")
        values.append("1")
    if end is not None:
        times.append(f"{end * scale:.4f}")
        values.append("0")
    if len(times) == 1:
        return ""
    return f'{animation("opacity", "discrete", ";".join(times))} values="{";".join(values)}"/>'


def main(argv):
    typed = parse(argv, SvgSample)
    s = SvgSample(**typed)
    paths = [path for path in s.out.split(",") if path]
    if len(paths) < 2:
        paths = [find_checkpoint(s.out, "masked")]
    recordings = [recording(path, typed) for path in paths]
    Path(s.svg).write_text(text_svg(recordings), encoding="utf-8")
    print(f"wrote {s.svg}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
