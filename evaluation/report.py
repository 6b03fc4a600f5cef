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

import config
from config import DEVICE, GPU, HERE
from data import SHADES
from generate import CAPTION
from mnist_ddpm import sample_images, to_bytes
from step import reseed
from train import spaced_rows

N_FRAMES = 65    # of a text as it is written, the first with nothing there
MARKER = "/*DATA*/null"
IN_SUMMARY = (   # the beginnings of the columns of the table of one row a model
    "method", "parameters", "steps", "bound, ", "generative NLL", "known words", "calls",
    "characters/s", "read as asked", "Frechet distance", "digits/s")


def stamp():
    """One line: the command, the commit (+ if files were changed since) and the machine."""
    spec = sys.modules["__main__"].__spec__
    module = spec.name.removesuffix(".__main__") if spec else "evaluation"
    command = shlex.join(["python", "-m", module, *sys.argv[1:]])
    describe = ["git", "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        commit = subprocess.run(describe, cwd=HERE, capture_output=True, text=True).stdout.strip()
    except OSError:                # there is no git
        commit = ""
    return (f"`{command}` at commit {commit or 'unknown'}; {machine()}, "
            f"{str(config.AMP).removeprefix('torch.')}, PyTorch {torch.__version__}")


def machine():
    if GPU:
        return torch.cuda.get_device_name()
    instructions = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} with {instructions}, {torch.get_num_threads()} threads"


class Table:
    """Rows that are printed as they come, in Markdown, and kept for the page as texts. columns:
    {name: digits behind the point}."""

    def __init__(self, title, columns, rows=()):
        self.title = title
        self.columns = columns
        self.rows = []
        print(f"\n{title}\n\n| {' | '.join(columns)} |\n|---|{'---:|' * (len(columns) - 1)}")
        for row in rows:
            self.add(*row)

    def add(self, *cells):
        """A row: texts, whole numbers, numbers, pairs (number, standard error). What is None or no
        number stays empty."""
        digits = self.columns.values()
        texts = [to_text(cell, n) for cell, n in zip(cells, digits, strict=True)]
        self.rows.append(texts)
        escaped = [text.replace("|", "\\|") for text in texts]
        print(f"| {' | '.join(escaped)} |", flush=True)


def to_text(cell, digits):
    if isinstance(cell, str):
        return cell
    numbers = cell if isinstance(cell, tuple) else (cell,)
    if numbers[0] is None or math.isnan(numbers[0]):
        return ""
    if isinstance(cell, int):
        return f"{cell:,}"
    return " ± ".join(f"{x:,.{digits}f}" for x in numbers)


# what the page shows

def evenly(states):
    """At most N_FRAMES of a list, evenly spaced, the first and the last among them."""
    index = spaced_rows(torch.arange(len(states)), N_FRAMES)
    return [states[i] for i in index.tolist()]


def replay(checkpoint, data, how):
    """A text or a digit 3 as it is made with the sampler how: {name, calls, frames}. A frame is a
    text and a digit for the shade of each character, a space where nothing is written; or the 784
    bytes of an image in base64, the first of them grey."""
    method = checkpoint.method
    reseed(how.seed)
    if data.meta["alphabet"]:
        x = torch.zeros(1, data.T, dtype=torch.long, device=DEVICE)
        nothing_known = torch.zeros_like(x, dtype=torch.bool)
        nothing = torch.full_like(x, method.mask_id)
        states = [(nothing, torch.zeros(1, data.T)), *method.sample(x, nothing_known, how)]
        frames = [text_frame(data.tokenizer, x[0], p[0]) for x, p in evenly(states)]
    else:
        states = [z[0] for z, _ in sample_images(method, torch.tensor([3]), how)]
        states = [torch.zeros(28, 28), *states]
        frames = [base64.b64encode(to_bytes(z).numpy()).decode() for z in evenly(states)]
    name = f"{checkpoint.name}: {checkpoint.path}"
    return {"name": name, "calls": len(states) - 1, "frames": frames}


def text_frame(tokenizer, ids, confidence):
    ids = ids.tolist()
    texts = tokenizer.decode_each(ids)
    digits = ""
    for i, p, text in zip(ids, confidence.tolist(), texts, strict=True):
        digit = str(int(4.99 * p)) if i < len(tokenizer) else " "
        digits += digit * len(text)
    return "".join(texts), digits


def learning_curve(checkpoint):
    """[step, minutes, bits] at each evaluation of a run, from the log.csv in its folder, or in
    results/ from the .csv beside the checkpoint. Empty if there is none or it is cut."""
    path = Path(checkpoint)
    logs = [path / "log.csv", path.with_name("log.csv"), path.with_suffix(".csv")]
    points = []
    for log in filter(Path.exists, logs):
        try:
            for row in csv.DictReader(log.read_text(encoding="utf-8").splitlines()):
                minutes = float(row["seconds"]) / 60
                points.append([int(row["step"]), minutes, float(row["bits"])])
        except (OSError, KeyError, ValueError, TypeError):
            return []
    return [point for point in points if math.isfinite(point[2])]


def samples_in_training(checkpoint):
    """{name, steps, frames}: the texts in samples.txt, in the folder of a run, each after a line
    "--- step 400", without shades. None if there is no such file."""
    path = Path(checkpoint)
    found = [file for file in (path / "samples.txt", path.with_name("samples.txt"))
             if file.is_file()]
    if not found:
        return None
    text = found[0].read_text(encoding="utf-8", errors="replace")
    _, *parts = re.split(r"(?m)^--- step (\d+)\n", text)
    pairs = evenly([*zip(parts[::2], parts[1::2], strict=True)])
    frames = [[sample.removesuffix("\n"), ""] for _, sample in pairs]
    return {"name": checkpoint, "steps": [int(step) for step, _ in pairs], "frames": frames}


def summary(tables, checkpoints):
    """One row a checkpoint: what any table says of it in the columns of IN_SUMMARY."""
    rows = {path: {} for path in checkpoints}
    for table in tables:
        _, *names = table.columns
        for first, *cells in table.rows:
            for name, cell in zip(names, cells, strict=True):
                if first in rows and name.startswith(IN_SUMMARY):
                    rows[first].setdefault(name, cell)
    columns = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = [[path, *(row.get(name, "") for name in columns)] for path, row in rows.items()]
    return {"title": "", "columns": dict.fromkeys(["model", *columns], 0), "rows": cells}


def gather(tables, checkpoints, replays):
    """All that the page shows. checkpoints: their paths; replays: of each, what replay returned."""
    curves = []
    for path in checkpoints:
        points = learning_curve(path)
        if points:
            curves.append({"name": path, "points": points})
    learned = [samples_in_training(path) for path in checkpoints]
    return {"stamp": stamp(), "summary": summary(tables, checkpoints),
            "tables": [vars(table) for table in tables], "curves": curves, "replays": replays,
            "learned": [run for run in learned if run and run["frames"]]}


def page(data):
    """The page of what gather returned, self-contained."""
    template = (HERE / "evaluation/report.html").read_text(encoding="utf-8")
    shown = {**data, "caption": CAPTION, "shades": list(SHADES.values())}
    text = json.dumps(shown, allow_nan=False, ensure_ascii=False).replace("<", "\\u003c")
    return template.replace(MARKER, text, 1)
