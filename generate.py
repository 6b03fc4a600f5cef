"""Write with a trained model: from nothing, after a prompt, or into its blanks.
settings: config.Sample

    python generate.py --prompt="ROMEO:" --watch
    python generate.py --prompt="To be, {12} that is the {8}:"      # {12}: 12 unknown characters
    python generate.py --prompt="ROMEO:{20-60}JULIET:"              # {20-60}: of unknown length
    python generate.py --length=1000 --steps=64 --order=entropy
"""
import re
import shutil
import sys
import time
import unicodedata

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from checkpoint import find_checkpoint, load
from config import COLOR, CUDA_GRAPHS, DEVICE, Masked, Sample, check, parse, run
from data import clean, tokenizer_of
from step import reseed
from train import build

MAX_EVIDENCE = 32      # characters after a blank by which its length is chosen
N_ORDERS = 4           # orders in which they are scored
BATCH = 64             # windows in one call
CAPTION = ("colours, from orange (0) to blue (1): the probability of a character when it was "
           "written; of bits and embeddings, the share of the steps since it last changed")


# A prompt is a list of pieces: known characters as a list of ids, a blank as a range of lengths.
# "Hi {12}, {20-60}" is [[ids of "Hi "], range(12, 13), [ids of ", "], range(20, 61)].

def parse_prompt(text, tokenizer):
    """str -> pieces; \\n is a new line, \\\\ a backslash, {{ a brace."""
    pieces = []
    text = clean(text)
    for literal, a, b in re.findall(r"((?:\{\{|[^{])+)|\{(\d{1,6})(?:-(\d{1,6}))?\}|\{", text):
        if literal:
            pieces.append(tokenizer.encode(unescape(literal)).tolist())
        else:
            shortest = int(a or 0)
            longest = int(b or shortest)
            check(0 < shortest <= longest, f"prompt {text!r}: a blank is written {{12}} or "
                                           "{20-60}, a brace {{")
            pieces.append(range(shortest, longest + 1))
    return pieces


def unescape(text):
    """Text with a new line for \\n, \\ for \\\\, { for {{."""
    meaning = {r"\n": "\n", r"\\": "\\", "{{": "{"}
    return "".join(meaning.get(part, part) for part in re.split(r"(\\n|\\\\|\{\{)", text))


def join_pieces(pieces, mask_id):
    """Pieces, of which no blank has an unknown length -> ids, known: int64 and bool (L,)."""
    ids = []
    known = []
    for piece in pieces:
        if isinstance(piece, list):
            ids += piece
            known += [True] * len(piece)
        else:
            check(len(piece) == 1, "a blank of unknown length needs a masked checkpoint")
            ids += [mask_id] * piece[0]
            known += [False] * piece[0]
    return torch.tensor(ids, dtype=torch.long), torch.tensor(known, dtype=torch.bool)


def lay_out(pieces, length, T, mask_id):
    """ids, known (L,) of a text of `length` characters. 0: as many as the prompt if it has blanks;
    else T, a window, or T more than the prompt if that has more than half a window."""
    ids, known = join_pieces(pieces, mask_id)
    n = len(ids)
    if not length:
        length = n
        if known.all():
            length = T if n <= T // 2 else n + T
    check(length >= n, f"length={length} is shorter than the prompt, which has {n}")
    return F.pad(ids, (0, length - n), value=mask_id), F.pad(known, (0, length - n))


@torch.no_grad()
def length_log_likelihood(method, before, after, lengths, orders, T):
    """A masked model's estimate of log p(after | before, L unknown characters between them), for
    each L of lengths: (len(lengths),) float64.

    By the chain rule: after (A,) is masked and revealed one character at a time, in each of the
    orders (n_orders, A); the log-probabilities of what is revealed are summed, and averaged over
    the orders, which are the same for every L. before (P,) may have MASKs; its start is cut if all
    of it does not fit into a window of T."""
    n_orders, A = orders.shape
    mask_id = method.mask_id
    # row r of an order: its first r characters are revealed, the next one is asked for
    turn = orders.argsort(1)                                           # when each is revealed
    row = torch.arange(A, device=orders.device)[:, None]
    hidden = turn[:, None] >= row                                      # (n_orders, A, A)
    suffix = after.masked_fill(hidden, mask_id).flatten(0, 1)          # (n_orders A, A)
    next_position = orders.flatten()                                   # (n_orders A,)
    totals = []
    for L in tqdm(lengths, desc="how long is the blank", leave=False, disable=None):
        prefix = before[max(0, len(before) - (T - L - A)):]
        prefix = F.pad(prefix, (0, L), value=mask_id).expand(len(suffix), -1)
        x = torch.cat([prefix, suffix], 1)                             # (n_orders A, <= T)
        start = prefix.size(1)
        x = F.pad(x, (0, T - x.size(1)), value=mask_id)
        total = 0.0
        for rows, position in zip(x.split(BATCH), next_position.split(BATCH), strict=True):
            logits = method.net(rows, (rows == mask_id).float().mean(1))
            logits = logits[torch.arange(len(rows)), start + position]         # (rows, V)
            total -= F.cross_entropy(logits, after[position], reduction="none").double().sum()
        totals.append(total / n_orders)
    return torch.stack(totals)


def infer_blank_lengths(method, pieces, T, seed, things="characters"):
    """Pieces with each blank {a-b} replaced by a {L}, from left to right: the likeliest L, by the
    up to 32 known characters right after it, or if there are none any L of a..b by chance. A blank
    whose length is chosen is MASKs to the next."""
    pieces = list(pieces)
    for i, lengths in enumerate(pieces):
        if isinstance(lengths, list) or len(lengths) == 1:
            continue
        before, _ = join_pieces(pieces[:i], method.mask_id)
        after = []
        if i + 1 < len(pieces) and isinstance(pieces[i + 1], list):
            after = pieces[i + 1][:min(MAX_EVIDENCE, T // 2)]
        check(lengths[-1] + len(after) <= T,
              f"with the {len(after)} {things} that follow, a blank may have {T - len(after)}, "
              f"not {lengths[-1]}: a window has {T}")
        reseed(seed, i)
        if after:
            orders = torch.rand(N_ORDERS, len(after)).argsort(1).to(DEVICE)
            after = torch.tensor(after, device=DEVICE)
            scores = length_log_likelihood(method, before.to(DEVICE), after, lengths, orders, T)
            (best, second), index = scores.topk(2)
            L = lengths[index[0]]
            why = (f"next best {lengths[index[1]]}, {best - second:.1f} nats behind, "
                   f"by {len(after)} that follow")
        else:
            L = lengths[int(torch.randint(len(lengths), ()))]
            why = "nothing known follows it: any length is as likely"
        print(f"{{{lengths[0]}-{lengths[-1]}}}: {L} {things} ({why})", file=sys.stderr)
        pieces[i] = range(L, L + 1)
    return pieces


def write(method, ids, known, T, s, windows=None, sample=None):
    """Fill s.n copies of ids (L,) where known (L,) is False; yields (x, confidence), (n, L) each,
    after every step of the sampler.

    The network always reads a whole window of T characters. A short text is the beginning of one,
    whose rest stays unwritten. A long one is written from left to right, each window starting half
    a window after the last. To write in another way: windows [(start, end), ...], where what
    follows end stays unwritten, and sample(x, known, locked, start), called for method.sample."""
    L = len(ids)
    pad = (0, max(0, T - L))
    x = F.pad(ids, pad).to(DEVICE).repeat(s.n, 1)                      # (n, max(L, T))
    known = F.pad(known, pad).to(DEVICE).repeat(s.n, 1)
    x = x.masked_fill(~known, method.mask_id)
    confidence = known.float()
    windows = windows or half_windows(L, T)
    # shown in a terminal only
    bar = tqdm(desc="writing", unit=" calls", leave=False, disable=s.watch or None)
    for start, end in windows:
        if known[:, start:end].all():
            continue
        window = slice(start, start + T)
        part = slice(start, end)
        n = end - start
        locked = ~known[:, window]
        locked[:, :n] = False
        if sample:
            frames = sample(x[:, window], known[:, window], locked, start)
        else:
            frames = method.sample(x[:, window], known[:, window], s, locked)
        for x_window, p in frames:
            x = x.clone()
            x[:, part] = x_window[:, :n]
            confidence = confidence.clone()
            confidence[:, part] = torch.where(known[:, part], confidence[:, part], p[:, :n])
            bar.update()
            yield x[:, :L], confidence[:, :L]
        known[:, part] = True
    bar.close()


def half_windows(L, T):
    """(start, end) of the windows of T over a text of L, each half a window after the last."""
    last = max(0, L - T)
    return [(start, min(start + T, L)) for start in [*range(0, last, max(1, T // 2)), last]]


def open_model(out, name, settings, build, methods):
    """The checkpoint to write with -> its method, settings, dict and tokenizer."""
    path = find_checkpoint(out, name)
    method, c, meta = load(path, settings, build, methods)
    if CUDA_GRAPHS:
        method.net = Recorded(method.net)
    print(f"{path}: {meta['method']}, trained on {meta['data']['name']} for {meta['step']:,} steps",
          file=sys.stderr)
    return method, c, meta, tokenizer_of(meta)


class Recorded(nn.Module):
    """The same network; a call without gradients or a cache replays a CUDA graph, one for each
    shape of x and t."""

    def __init__(self, net):
        super().__init__()
        self.net = net
        self.recorded = {}

    def forward(self, x, t, *kv_cache):
        if kv_cache or torch.is_grad_enabled():
            return self.net(x, t, *kv_cache)
        key = x.shape, x.dtype, t.shape, t.dtype
        if key not in self.recorded:
            inputs = x.clone(), t.clone()
            self.net(*inputs)              # libraries set themselves up, which is not recorded
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = self.net(*inputs)
            self.recorded[key] = graph, inputs, out
        graph, inputs, out = self.recorded[key]
        inputs[0].copy_(x)
        inputs[1].copy_(t)
        graph.replay()
        return out.clone()


def show_texts(frames, ids, known, tokenizer, s, calls_per_frame=1):
    """Print the last of the frames, or let them be watched."""
    # what is shown where nothing is left to write
    x = ids.repeat(s.n, 1)
    confidence = known.float().repeat(s.n, 1)
    n_calls = 0
    start_time = time.perf_counter()
    watching = s.watch and COLOR
    if COLOR:
        print(CAPTION, file=sys.stderr)
    if watching:
        frames = watch(frames, tokenizer)
    for x, confidence in frames:
        n_calls += calls_per_frame
    seconds = time.perf_counter() - start_time
    for i, painted in enumerate(painted_texts(tokenizer, x, confidence), 1):
        if s.n > 1:
            print(f"--- text {i} of {s.n}")
        print("".join(painted))
    report = f"{n_calls} network calls"
    if not watching:
        speed = s.n * int((~known).sum()) / max(seconds, 1e-9)
        report += f", {seconds:.1f} s, {speed:,.0f} {tokenizer.things}/s"
    print(report, file=sys.stderr)


def prepare(s):
    """Open the checkpoint and lay out the text that s, a config.Sample, asks for. -> the frames of
    write, ids and known (L,), tokenizer"""
    method, c, meta, tokenizer = open_model(s.out, "masked", Masked, build, ["masked", "ar"])
    pieces = parse_prompt(s.prompt, tokenizer)
    if meta["method"] == "masked":
        pieces = infer_blank_lengths(method, pieces, c.block_size, s.seed, tokenizer.things)
    ids, known = lay_out(pieces, s.length, c.block_size, method.mask_id)
    known_comes_first = bool(known[:int(known.sum())].all())
    check(meta["method"] == "masked" or known_comes_first, "the autoregressive baseline writes from"
          " left to right and cannot use the text after a blank: use a masked checkpoint")

    reseed(s.seed)
    return write(method, ids, known, c.block_size, s), ids, known, tokenizer


def texts(s):
    """The texts that s, a config.Sample, asks for: s.n str."""
    frames, ids, _, tokenizer = prepare(s)
    x = ids.repeat(s.n, 1)
    for x, _ in frames:
        pass
    return [tokenizer.decode(row) for row in x.tolist()]


def main(argv):
    s = Sample(**parse(argv, Sample))
    show_texts(*prepare(s), s)


# -------------------------------------------------------------------------------------------------
# the terminal

def painted_texts(tokenizer, x, confidence):
    """(n, L) each -> n texts as they are shown, each a list of tokens."""
    rows = zip(x.tolist(), confidence.tolist(), strict=True)
    return [tokenizer.paint(ids, p) for ids, p in rows]


def screen_rows(text, columns):
    """The rows in which a text, a list of tokens as they are shown, stands in a terminal. A Chinese
    character is two columns wide, an accent none, a tab is shown as a space."""
    rows = [""]
    used = 0
    for shown in text:
        parts = re.fullmatch(r"((?:\x1b\[[0-9;]*m)?)(.*?)((?:\x1b\[0m)?)", shown, re.DOTALL)
        colour, token, end = parts.groups()
        for ch in token:
            width = 0
            if not unicodedata.combining(ch):
                width = 1 + (unicodedata.east_asian_width(ch) in "WF")
            if ch == "\n" or used + width > columns:
                rows.append("")
                used = 0
            if ch != "\n":
                rows[-1] += colour + ch.replace("\t", " ") + end
                used += width
    return rows


def erase(height):
    """What makes a terminal go up so many rows and forget what follows."""
    up = f"\x1b[{height}F" if height else ""
    return f"{up}\x1b[J"


def watch(frames, tokenizer):
    """Show frames (x, confidence) in the terminal, each over the last, and pass them on. Of a text
    that is higher than the terminal, the rows that end with the last one that has changed."""
    before = []
    height = 0
    try:
        print("\x1b[?25l", end="")                                     # hide the cursor
        for x, confidence in frames:
            columns, lines = shutil.get_terminal_size()
            rows = []
            for text in painted_texts(tokenizer, x, confidence):
                rows += [*screen_rows(text, columns), ""]
            changed = [i for i, row in enumerate(rows) if row not in before[i:i + 1]]
            end = max([lines - 1, *[i + 1 for i in changed]])
            part = rows[:end][1 - lines:]
            print(erase(height) + "\n".join(part), flush=True)
            height = len(part)
            before = rows
            time.sleep(0.02)
            yield x, confidence
        print(erase(height), end="")                                   # the whole text comes here
    finally:
        print("\x1b[?25h", end="", flush=True)                         # show it again


if __name__ == "__main__":
    run(main)
