"""Write with a trained model: from nothing, after a prompt, or into its blanks; watch it unmask, or draw that.   settings: config.Sample

    python generate.py --prompt="ROMEO:" --watch
    python generate.py --prompt="To be, {12} that is the {8}:"         # {12}: a blank of 12 characters
    python generate.py --prompt="ROMEO:{20-60}JULIET:"                 # a blank of unknown length: by what follows, 20 to 60
    python generate.py --length=1000 --steps=64 --order=entropy
    python generate.py --svg=unmask.svg"""
import html
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from config import COLOR, DEVICE, HERE, Sample, parse, run
from data import Alphabet
from train import build, load, reseed

EVIDENCE, ORDERS, ROWS = 32, 4, 64   # characters that tell the length of the blank before them, the orders they are read in; windows a call


def newest():
    """The checkpoint that is meant when none is named: the masked model trained here, else the one in the repository."""
    trained = HERE / "out/masked/best.pt"
    return trained if trained.exists() else HERE / "results/masked.pt"


@torch.no_grad()
def evidence(method, before, after, lengths, orders, T):
    """-log p(after | before, L unknown characters between) of a masked model in nats, for each L of lengths: (len(lengths),) float64.

    By the chain rule: all of after (S,) is masked, and revealed a character at a time in each of the orders (O, S); the cross-entropy of each
    at its turn is added, the mean over the orders taken. The orders are the same for every L, so what luck they bring cancels. before (P,)
    may have MASKs, and loses of its start what a window of T has no room for; beyond after all is MASK, as `write` would have it."""
    S = orders.size(1)
    turns = orders.argsort(1)[:, None] >= torch.arange(S, device=orders.device)[:, None]                 # (O, turn, S): not yet revealed
    rows, nats = after.masked_fill(turns, method.mask).flatten(0, 1), []                                 # (O S, S)
    for L in tqdm(lengths, desc="how long is the blank", leave=False, disable=None):
        start = min(len(before), T - L - S)
        left = torch.cat([before[len(before) - start:], before.new_full((L,), method.mask)]).expand(len(rows), -1)
        x = F.pad(torch.cat([left, rows], 1), (0, T - L - S - start), value=method.mask)                 # (O S, T)
        ce = [F.cross_entropy(method.net(part, (part == method.mask).float().mean(1))[torch.arange(len(part)), start + L + now], after[now],
                              reduction="none") for part, now in zip(x.split(ROWS), orders.flatten().split(ROWS), strict=True)]
        nats.append(torch.cat(ce).double().sum() / len(orders))
    return torch.stack(nats)


def pick(method, before, after, lengths, T):
    """The length of a blank between before (P,) and after (S,) as `settle` chooses it -> (int, why)."""
    if not len(after):
        return lengths[int(torch.randint(len(lengths), ()))], "nothing known follows it, so there is no evidence: any length is as likely"
    if lengths[-1] + len(after) > T:
        raise SystemExit(f"with the {len(after)} characters that follow a blank may have {T - len(after)}, not {lengths[-1]}: a window has {T}")
    orders = torch.rand(ORDERS, len(after)).argsort(1).to(after.device)
    (best, second), at = evidence(method, before, after, lengths, orders, T).topk(2, largest=False)
    return lengths[at[0]], f"next best {lengths[at[1]]}, {second - best:.1f} nats behind, by {len(after)} that follow"


def settle(method, alphabet, prompt, T, seed):
    """prompt with each blank {a-b} as the {L} that is likeliest by the EVIDENCE characters, or fewer, that directly follow it; told on stderr.

    L minimises -log p(what follows | what precedes, L) - log p(L). p(L) is uniform on a..b, so that its term is the same for all; where
    another blank or nothing follows there is no more than p(L), and L is drawn from it. From left to right: a blank that is settled is as many
    MASKs to the next. No filling is scored: the blank stays masked, so that a longer one pays for none of its characters."""
    pieces = alphabet.pieces(prompt)
    for i, (blank, lengths) in enumerate(pieces):
        if len(lengths) > 1:
            before, known = alphabet.prompt("".join(text for text, _ in pieces[:i]))
            after, _ = alphabet.prompt("".join(text for text, unknown in pieces[i + 1:i + 2] if not unknown))
            after = after[:min(EVIDENCE, T // 2)].to(DEVICE)
            reseed(seed, i)
            L, why = pick(method, before.masked_fill(~known, method.mask).to(DEVICE), after, lengths, T)
            print(f"{blank}: {L} characters ({why})", file=sys.stderr)
            pieces[i] = (f"{{{L}}}", [L])
    return "".join(text for text, _ in pieces)


def plan(alphabet, s, T):
    """The prompt and length of s as (ids, known), int64 and bool (L,); T characters if neither says how many."""
    ids, known = alphabet.prompt(s.prompt)
    L = s.length or (len(ids) if not known.all() else max(T, len(ids) + 1))
    if L < len(ids):
        raise SystemExit(f"length={L} is shorter than the prompt, which has {len(ids)} characters")
    pad = (0, L - len(ids))
    return F.pad(ids, pad), F.pad(known, pad)


def write(method, ids, known, T, s):
    """Fill s.n copies of ids (L,) where known (L,) is False; yields (x (n, L), confidence (n, L)) after every network call.

    The network always sees a full window of T characters. A short text is a window that is cut; a long one is written from left to right,
    each window starting half a window on, with what is written before it as clean context; in blocks (s.mode), each window ending with
    the next block, or, at the beginning of the text, what comes after it staying noise. method.start and method.free tell where the window
    begins and what of it is to be written."""
    L = len(ids)
    pad = (0, max(0, T - L))
    x = F.pad(ids, pad).to(DEVICE).repeat(s.n, 1)                    # (n, max(L, T))
    done = F.pad(known, pad).to(DEVICE).repeat(s.n, 1)
    x, sure = x.masked_fill(~done, method.mask), done.float()
    end = x.size(1)
    windows = [(start, start + T) for start in [*range(0, end - T, max(1, T // 2)), end - T]]
    if getattr(s, "mode", "") == "blocks":
        B = min(s.block, T if L <= T else T // 2)                                       # half a window at least is what was written before
        windows = [(max(0, until - T), until) for until in (min(start + B, end) for start in range(0, L, B))]
    for start, until in windows:
        w = slice(start, start + T)
        place = torch.arange(start, start + T, device=DEVICE)
        later = ~done[:, w] & (place >= until)
        method.start, method.free = start, ~done[:, w] & ~later & (place < L)
        if not (done[:, w] | later).all():
            for part, p in method.sample(x[:, w], done[:, w], s, *[later] * bool(later.any())):
                x, sure = x.clone(), sure.clone()
                x[:, w], sure[:, w] = torch.where(later, method.mask, part), torch.where(done[:, w] | later, sure[:, w], p)
                yield x[:, :L], sure[:, :L]
            done[:, w] |= ~later


def watch(frames, alphabet):
    """Show frames of (x, confidence) in the terminal as they come, one over the other, and pass them on; elsewhere, only that."""
    up = 0
    try:
        for x, sure in frames:
            if COLOR:
                columns, lines = shutil.get_terminal_size()
                texts = [alphabet.paint(i, p) for i, p in zip(x.tolist(), sure.tolist(), strict=True)]
                rows = sum(1 + max(0, len(row) - 1) // columns for i in x.tolist() for row in (alphabet.decode(i) + "\n").split("\n"))
                print((f"\x1b[{up}F" if up else "\x1b[?25l") + "\x1b[J" + "\n\n".join(texts), flush=True)
                up = min(rows - 1, lines - 1)
                time.sleep(.02)
            yield x, sure
    finally:
        print("\x1b[?25h" if COLOR else "", end="", flush=True)


def draw(frames, known, alphabet, seconds=8, columns=64):
    """An animated SVG of the first text of frames [(x, confidence), ...]: dots turn into characters, red where the model guessed, green
    where it was certain; known (L,) is the prompt, white. It needs no script, so it plays inside a README."""
    blank = torch.where(known, frames[0][0][0].cpu(), len(alphabet))                  # what was there before the first call
    steps = torch.stack([blank, *(x[0].cpu() for x, _ in frames)])                    # (calls + 1, L)
    sure = torch.stack([known.float(), *(p[0].cpu() for _, p in frames)])
    cells, row, col, width = [], 0, 0, 0
    for j, last in enumerate(steps[-1].tolist()):
        starts = [0, *((steps[1:, j] != steps[:-1, j]).nonzero().flatten() + 1).tolist()]
        for start, end in zip(starts, [*starts[1:], None], strict=True):
            token = int(steps[start, j])
            if alphabet.show(token).isprintable() and alphabet.show(token) != " ":
                color = "#f0f6fc" if known[j] else "#484f58" if token == len(alphabet) else f"hsl({130 * sure[start, j]:.0f} 70% 65%)"
                cells.append(f'<text x="{16 + 9.6 * col:.1f}" y="{32 + 22 * row}" fill="{color}">{html.escape(alphabet.show(token))}'
                             + blink(start / len(steps), end and end / len(steps), seconds) + "</text>")
        col, width = col + 1, max(width, col + 1)
        if alphabet.show(last) == "\n" or col == columns:
            row, col = row + 1, 0
    w, h = 32 + 9.6 * width, 48 + 22 * row
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w:.0f} {h}" width="{w:.0f}" height="{h}" font-size="16" '
            'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"><title>A masked diffusion model writing</title>\n'
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n' + "\n".join(cells) + "\n</svg>\n")


def blink(start, end, seconds, writing=.75):
    """SVG animation: visible from start to end (None: for good), as shares of the writing, which is that share of the loop."""
    at = [(0, int(start == 0))] * (start > 0) + [(start * writing, 1)] + ([(end * writing, 0)] if end else [])
    if len(at) == 1:
        return ""
    return (f'<animate attributeName="opacity" calcMode="discrete" dur="{seconds}s" repeatCount="indefinite" '
            f'keyTimes="{";".join(f"{t:.4f}" for t, _ in at)}" values="{";".join(str(v) for _, v in at)}"/>')


def show(method, alphabet, s, T):
    """Write s.n texts as s says and print them, or let them be watched. -> (if s.svg is to be drawn all frames of the first text, each
    (x, confidence) of (1, L), which of L are known)"""
    ids, known = plan(alphabet, s, T)
    reseed(s.seed)
    begun, calls, frames = time.time(), 0, []
    x, sure = ids.repeat(s.n, 1), known.float().repeat(s.n, 1)                        # where nothing is left to write
    writing = write(method, ids, known, T, s)
    for x, sure in watch(writing, alphabet) if s.watch else writing:
        calls += 1 + getattr(s, "twice", False) + bool(getattr(method, "twin", None))
        frames += [(x[:1].clone(), sure[:1].clone())] * bool(getattr(s, "svg", ""))
    took = time.time() - begun
    if not (s.watch and COLOR):
        print("\n\n".join(alphabet.paint(i, p, COLOR) for i, p in zip(x.tolist(), sure.tolist(), strict=True)))
    print(f"{calls} network calls, {took:.1f} s, {s.n * int((~known).sum()) / took:,.0f} characters/s", file=sys.stderr)
    return frames or [(x[:1], sure[:1])], known


def sample(argv, s, name, build, prepare=lambda *args: None):
    """python analog_bits.py sample, python embed_diffusion.py sample: s is the sampler's settings before what is typed."""
    s = parse(argv, s)
    path = Path(s.out) if s.out else HERE / "out" / name
    method, c, meta = load(path, build, (name,))
    print(f"{path}: {name}, trained on {meta['data']['name']} for {meta['step']:,} steps", file=sys.stderr)
    alphabet = Alphabet(meta["alphabet"], raw=getattr(c, "code", "") == "bytes" or meta["data"]["name"] == "enwik8")
    prepare(method, alphabet, s, c.block_size)
    show(method, alphabet, s, c.block_size)


def main(argv):
    s = parse(argv, Sample())
    path = s.out or newest()
    method, c, meta = load(path, build)
    name, alphabet = meta["method"], Alphabet(meta["alphabet"], raw=meta["data"]["name"] == "enwik8")
    if name == "masked":
        s = replace(s, prompt=settle(method, alphabet, s.prompt, c.block_size, s.seed))
    _, known = plan(alphabet, s, c.block_size)
    blank = (~known).nonzero()
    if name == "ar" and len(blank) and known[int(blank[0]):].any():
        raise SystemExit("the autoregressive twin writes from left to right: it cannot use the text after a blank; use a masked checkpoint")
    print(f"{path}: {name}, trained on {meta['data']['name']} for {meta['step']:,} steps", file=sys.stderr)
    frames, known = show(method, alphabet, s, c.block_size)
    if s.svg:
        Path(s.svg).write_text(draw(frames, known, alphabet), encoding="utf-8")
        print(f"wrote {s.svg}", file=sys.stderr)


if __name__ == "__main__":
    run(main)
