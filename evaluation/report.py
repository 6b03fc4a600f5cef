"""What was measured: tables in Markdown, and the page that shows checkpoints side by side, which is
report.html with JSON in place of its one marker."""
import base64
import csv
import json
import math
import platform
import re
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from config import AMP, DEVICE, GPU, HERE
from mnist_ddpm import sample_images, to_bytes
from train import reseed

N_LOOKS = 65    # at a text as it is written, the first with nothing there
MARKER = "/*DATA*/null"
# the tables of the chart by noise level: what is masked is predicted, and no more
CE_TITLE = "cross-entropy of the predicted characters by noise, nats"
CHARTED = ("nats by share masked", CE_TITLE)


def stamp():
    """One line: the command, the commit (+ if files were changed since) and the machine."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "evaluation"
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    commit = git("rev-parse", "--short", "HEAD") or "unknown"
    if git("status", "--porcelain", "-uno"):
        commit += "+"
    return (f"`{command}` at commit {commit}; {machine()}, {str(AMP).removeprefix('torch.')}, "
            f"PyTorch {torch.__version__}")


def git(*args):
    try:
        done = subprocess.run(["git", *args], cwd=HERE, capture_output=True, text=True)
    except OSError:                # there is no git
        return ""
    return done.stdout.strip()


def machine():
    if GPU:
        return torch.cuda.get_device_name()
    cpu = platform.machine()
    path = Path("/proc/cpuinfo")
    if path.exists():
        names = re.findall(r"model name\s*: (.*)", path.read_text())
        cpu = [*names, cpu][0]
    return f"{cpu}, {torch.get_num_threads()} threads"


class Table:
    """Rows that are printed as they come, in Markdown, and kept with their numbers. columns: {name:
    digits behind the point}."""

    def __init__(self, title, columns, rows=()):
        self.title = title
        self.columns = columns
        self.rows = []
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}",
              flush=True)
        for row in rows:
            self.add(*row)

    def add(self, *cells):
        """A row: texts, whole numbers, numbers, pairs (number, standard error). What is None or no
        number stays empty."""
        self.rows.append(cells)
        texts = [text.replace("|", "\\|") for text in self.to_texts(cells)]
        print(f"| {' | '.join(texts)} |", flush=True)

    def to_texts(self, cells):
        digits = self.columns.values()
        return [to_text(cell, n) for cell, n in zip(cells, digits, strict=True)]


def to_text(cell, digits):
    if isinstance(cell, str):
        return cell
    number = cell
    if isinstance(cell, tuple):
        number = cell[0]
    if number is None or math.isnan(number):
        return ""
    if isinstance(cell, tuple):
        return " ± ".join(f"{x:.{digits}f}" for x in cell)
    if isinstance(cell, float):
        return f"{cell:,.{digits}f}"
    return f"{cell:,}"


# what the page shows

def looks(items):
    """At most N_LOOKS of items, evenly spaced, the first and the last among them."""
    index = torch.linspace(0, len(items) - 1, min(N_LOOKS, len(items))).round().int()
    return [items[i] for i in index.tolist()]


def replay_text(method, tokenizer, T, how):
    """A text as it is written with the sampler how: {calls, frames}, a frame being the text and a
    digit for the confidence in each character, a space where nothing is written."""
    reseed(how.seed)
    x = torch.full((1, T), method.mask_id, device=DEVICE)
    nothing_known = torch.zeros_like(x, dtype=torch.bool)
    states = [(x, torch.zeros(1, T)), *method.sample(torch.zeros_like(x), nothing_known, how)]
    frames = []
    for x, confidence in looks(states):
        ids = x[0].tolist()
        texts = tokenizer.decode_each(ids)
        digits = ""
        for i, p, text in zip(ids, confidence[0].tolist(), texts, strict=True):
            digit = str(int(9.99 * p)) if i < len(tokenizer) else " "
            digits += digit * len(text)
        frames.append(("".join(texts), digits))
    return {"calls": len(states) - 1, "frames": frames}


def replay_digit(method, digit, how):
    """A digit as it is drawn with the sampler how: {calls, images}, an image being 784 bytes in
    base64, the first of them grey."""
    states = [z[0] for z, _ in sample_images(method, torch.tensor([digit]), how)]
    states = [torch.zeros(28, 28), *states]
    images = [to_bytes(z).numpy().tobytes() for z in looks(states)]
    return {"calls": len(states) - 1,
            "images": [base64.b64encode(image).decode() for image in images]}


def learning_curve(path):
    """The curve of the run whose checkpoint is path, from log.csv, or in results/ from the .csv
    beside it: {steps, minutes, bits}, without bounds that are no finite number; or None."""
    log = path.with_suffix(".csv")
    if path.name == "best.pt":
        log = path.with_name("log.csv")
    curve = {"steps": [], "minutes": [], "bits": []}
    try:
        with log.open(newline="", encoding="utf-8") as f:
            for row in csv.DictReader(f):
                bits = float(row["bits"])
                if math.isfinite(bits):
                    curve["steps"].append(int(row["step"]))
                    curve["minutes"].append(float(row["seconds"]) / 60)
                    curve["bits"].append(bits)
    except (OSError, KeyError, ValueError, TypeError):     # there is none, or it is cut
        return None
    return curve if curve["bits"] else None


def plain(x):
    """Tuples as lists, and None for numbers that JSON cannot say."""
    if isinstance(x, tuple | list):
        return [plain(y) for y in x]
    if isinstance(x, float) and not math.isfinite(x):
        return None
    return x


def gather(stamp, tables, runs, replay):
    """All that is to be shown, as plain lists and numbers. runs: [(name, path of the checkpoint)];
    replay: [{name, calls, frames or images}]"""
    curves = []
    for name, path in runs:
        curve = learning_curve(Path(path))
        if curve:
            curves.append({"name": name, **curve})
    levels = []
    for table in tables:
        if table.title in CHARTED:
            levels += [{"name": row[0], "nats": plain(row[1:])} for row in table.rows]
    return {
        "stamp": stamp,
        "curves": curves,
        "replay": replay,
        "levels": levels,
        "tables": [{"title": table.title, "head": list(table.columns),
                    "rows": [table.to_texts(row) for row in table.rows],
                    "values": plain(table.rows)} for table in tables],
    }


def page(data):
    """The page of what gather returned, self-contained."""
    template = (HERE / "evaluation/report.html").read_text(encoding="utf-8")
    text = json.dumps(data, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace(MARKER, text, 1)
