"""What was measured, as tables in Markdown and as the page that shows checkpoints side by side: report.html, whose one marker becomes JSON."""
import base64
import csv
import json
import math
from pathlib import Path

import torch

from config import HERE
from mnist_ddpm import draw, grey
from train import reseed

LOOKS = 65   # of a text as it is written, the first with nothing there
MARK = "/*DATA*/null"
LEVELS = "nats by share masked", "cross-entropy of the predicted characters by noise, nats"   # tables of the chart; what is masked is predicted


class Table:
    """Rows that are printed as they come, in Markdown, and kept with their numbers. columns: name -> digits behind the point."""

    def __init__(self, title, columns):
        self.title, self.columns, self.rows = title, columns, []
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}", flush=True)

    def add(self, *cells):
        """A row: texts, whole numbers, numbers, pairs (number, standard error); what is None or no number stays empty."""
        self.rows.append(cells)
        print("| " + " | ".join(cell.replace("|", "\\|") for cell in self.shown(cells)) + " |", flush=True)

    def shown(self, cells):
        """A row as texts."""
        def show(cell, digits):
            if isinstance(cell, tuple):
                return " ± ".join(f"{x:.{digits}f}" for x in cell) if cell[0] == cell[0] else ""
            return cell if isinstance(cell, str) else "" if cell is None or cell != cell else f"{cell:,.{digits * isinstance(cell, float)}f}"
        return [show(cell, digits) for cell, digits in zip(cells, self.columns.values(), strict=True)]


def spaced(items):
    """At most LOOKS of items, the first and the last among them."""
    return [items[i] for i in torch.linspace(0, len(items) - 1, min(LOOKS, len(items))).round().int().tolist()]


def curve(path):
    """The curve of the run whose checkpoint is path, from its log.csv (or in results/ the .csv beside it): {steps, minutes, bits}, or None."""
    log = path.with_name("log.csv") if path.name == "best.pt" else path.with_suffix(".csv")
    try:
        with log.open(newline="", encoding="utf-8") as f:
            rows = [(int(r["step"]), float(r["seconds"]) / 60, float(r["bits"])) for r in csv.DictReader(f)]
    except (OSError, KeyError, ValueError, TypeError):   # none, or cut
        return None
    return dict(zip(("steps", "minutes", "bits"), zip(*rows, strict=True), strict=True)) if rows else None


def writing(method, alphabet, T, how):
    """A text as it is written by method with the sampler how: {calls, frames}, a frame being the text and a digit for how certain each is."""
    reseed(how.seed)
    nothing = torch.zeros(1, T, dtype=torch.long, device=next(method.parameters()).device)
    frames = [(nothing + method.mask, 0. * nothing), *method.sample(nothing, nothing > 0, how)]


    def show(ids, sure):
        glyphs, sure = alphabet.glyphs(ids), [" " if i >= len(alphabet) else str(int(9.99 * p)) for i, p in zip(ids, sure, strict=True)]
        return "".join(glyphs), "".join(len(glyph) * p for glyph, p in zip(glyphs, sure, strict=True))
    return dict(calls=len(frames) - 1, frames=[show(x[0].tolist(), p[0].tolist()) for x, p in spaced(frames)])


def drawing(method, c, digit, how):
    """A digit as it is drawn with the sampler how: {calls, images}, an image being 784 bytes in base64, the first of them grey."""
    reseed(how.seed)
    frames = [torch.zeros(28, 28), *(z[0] for z, _ in draw(method, torch.tensor([digit]), c, how))]
    return dict(calls=len(frames) - 1, images=[base64.b64encode(grey(z).numpy().tobytes()).decode() for z in spaced(frames)])


def gather(stamp, tables, runs, replay):
    """All that is to be shown, as plain lists and numbers. runs: [(name, path)]; replay: [{name, calls, frames or images}]"""
    plain = lambda x: [plain(y) for y in x] if isinstance(x, tuple | list) else None if isinstance(x, float) and not math.isfinite(x) else x
    curves = [{"name": name, **found} for name, path in runs if (found := curve(Path(path)))]
    return {"stamp": stamp, "curves": plain_curves(curves), "replay": replay,
            "levels": [{"name": row[0], "nats": plain(row[1:])} for t in tables if t.title in LEVELS for row in t.rows],
            "tables": [{"title": t.title, "head": list(t.columns), "rows": [t.shown(row) for row in t.rows], "values": plain(t.rows)}
                       for t in tables]}


def plain_curves(curves):
    """Curves without the looks whose bound is no finite number, which JSON cannot say."""
    kept = [[i for i, b in enumerate(c["bits"]) if abs(b) < float("inf")] for c in curves]
    return [{k: v if k == "name" else [v[i] for i in at] for k, v in c.items()} for c, at in zip(curves, kept, strict=True) if at]


def page(data):
    """The page of what `gather` gathered, self-contained."""
    template = (HERE / "evaluation/report.html").read_text(encoding="utf-8")
    return template.replace(MARK, json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c"), 1)
