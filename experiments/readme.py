"""Are the tables of README.md and docs/ what results/ says? Each stands below a line
<!-- table: NAME --> and is rebuilt from the tables in results/, which keep the words they were
printed with; here they get today's (docs/names.md). A second.

    python -m experiments.readme            # rebuilds them
    python -m experiments.readme --check    # names those that differ; exit 1 if there are any
"""
import csv
import re
from functools import partial
from pathlib import Path
from statistics import mean, stdev

from config import check, run

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TODAY = {"judge, nats/char": "generative NLL, nats/char", "the twin": "the AR baseline",
         "twin": "AR baseline"}
JUDGED = ["judge, nats/char", "entropy, bits", "known words"]
FOURGRAMS = "distinct 4-grams"
SEEDS = ["1337", "1", "2"]


def found(source, first, *columns):
    """Cells of the row of results/NAME.md whose first cell is `first`; source: NAME, or NAME:n for
    the nth such row. KeyError: there is none."""
    name, _, nth = source.partition(":")
    hits = []
    head = []
    for line in (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif cells[0] == first and set(columns) <= set(head):
            hits.append([cells[head.index(column)] for column in columns])
    if len(hits) <= int(nth or 0):
        raise KeyError(f"results/{name}.md: no row {first!r} with {', '.join(columns)}")
    return hits[int(nth or 0)]


def averaged(source, firsts, *columns, digits=3):
    """As `found`, of several rows: mean ± standard deviation of their numbers."""
    rows = [found(source, first, *columns) for first in firsts]
    cells = []
    for column in zip(*rows, strict=True):
        values = [float(cell.split()[0].replace(",", "")) for cell in column]
        cells.append(f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}")
    return cells


def log(name, step, column):
    """A number of results/NAME.csv at a step."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as f:
        rows = {int(row["step"]): row for row in csv.DictReader(f)}
    return float(rows[step][column])


def picked(columns, *rows):
    """A table: its head, and rows (title, source) or (title, source, first cell), where the title
    stands for the first cell."""
    table = [["", *columns]]
    for title, source, *first in rows:
        table.append([title, *found(source, *(first or [title]), *columns)])
    return table


# what the pages show: each function returns the head of its table, then the rows

def progress():
    rows = [["after", "2 cores with AVX-512 bf16", "bound, nats/char"]]
    for step in (100, 800, 1600, 2800):
        seconds = log("masked", step, "seconds")
        bound = f"{log('masked', step, 'bound'):.2f}"
        rows.append([f"{step:,} steps", f"{seconds / 60:.1f} min", bound])
        if step == 100:
            rows[-1] = ["100 steps, first sample", f"{seconds:.0f} s into training", bound]
    return rows


def bounds():
    nats = "nats a character or pixel"
    masked = [f"masked, seed {seed}" for seed in SEEDS]
    columns = ["parameters", "steps", nats, "bits", "command"]
    return [
        ["model", "parameters", "steps", "bound, nats/char", "bits/char", "command"],
        ["masked, default, n = 3", *found("bounds", masked[0], "parameters", "steps"),
         *averaged("bounds", masked, nats, "bits"), "`python train.py --dataset=shakespeare`"],
        ["AR baseline (exact), dropout 0.1, n = 1, ± of the text",
         *found("bounds", "judge of tiny Shakespeare (exact)", *columns)]]


def samples():
    return picked([*JUDGED, "names in 1,000", FOURGRAMS, "overlap with training", "infilled"],
                  ("real, held out", "masked", "held out, beside 1,003,854 characters"),
                  ("default sampler, 256 calls", "masked", "results/masked.pt"),
                  ("exact: `--order=random --temperature=1 --remask=0 --steps=128`", "masked:1",
                   "results/masked.pt"))


def calls():
    best = "head to head: order="
    even = "even counts: order="
    near = ", temperature=1.0, steps="
    far = ", temperature=1.0, apart=4, steps="
    return picked(
        ["calls", *JUDGED],
        ("real, held out", "headtohead", "held out"),
        ("random: exact", "headtohead", f"{best}random{near}128"),
        ("entropy (n = 100)", "samplers", f"{even}entropy{near}128"),
        ("margin (n = 100)", "samplers", f"{even}margin{near}128"),
        ("margin, min_distance 4 (n = 100)", "samplers",
         f"even counts, apart: order=margin{far}64"),
        ("margin, min_distance 4", "headtohead", f"{best}margin{far}43"),
        ("margin, min_distance 4, temperature 1.05", "headtohead",
         f"{best}margin, temperature=1.05, apart=4, steps=43"),
        *[("random, min_distance 4", "headtohead", f"{best}random{far}{steps}")
          for steps in (43, 16, 8)],
        ("random, min_distance 0 (n = 100)", "samplers", f"{even}random{near}16"),
        ("most confident, min_distance 0 (n = 100)", "samplers", f"{even}confidence{near}16"),
        ("all at once (n = 100)", "samplers", f"one network call: order=random{near}1"))


def speed():
    rows = ["masked, as trained", "masked, not compiled", "masked, fp32",
            "masked, plain: eager, fp32, AdamW", "twin, as trained",
            "twin, plain: eager, fp32, AdamW", "bits, as trained", "embeddings, as trained"]
    columns = ["ms", "characters/s", "share of matmul peak", "times plain", "peak memory, MB"]
    return picked(columns, *[(row, "bench") for row in rows])


def writing():
    rows = ["masked, one a call", "masked, three a call", "twin, one a call",
            "twin, nothing remembered", "bits", "embeddings"]
    return picked(["network calls", "ms a call", "characters/s"], *[(row, "bench") for row in rows])


def digits():
    columns = ["read as asked", "Frechet distance", "precision", "recall",
               "nearest training digit, of a test digit's"]
    real = ["real, from the training set", "noise, pixel by pixel as in real ones", "real, blurred"]
    head, *floors = picked(columns, *[(row, "digits:7") for row in real])
    runs = [f"digits, seed {seed}" for seed in SEEDS]
    return [
        [*head, "bits/dim"], *[[*row, ""] for row in floors],
        ["default: v, cosine, min-SNR, n = 3, ± over seeds",
         *averaged("digits:1", ["v-cosine", "v-cosine1", "v-cosine2"], *columns),
         *averaged("bounds", runs, "bits", digits=2)],
        ["`--recipe=levels`, 3,000 steps (186 ms each), n = 1, ± over pictures", *[""] * 5,
         *found("bounds", "digits, levels", "bits")],
        ["`--recipe=ddpm`: the paper's eps, linear, plain loss, n = 1, ± over pictures",
         *found("digits:1", "ddpm", *columns), *found("bounds", "digits, ddpm", "bits")]]


def td():
    rows = [("real, held out", "bits:4", "warpeace, held out")]
    for title, sampler in [("DDIM", "ddim"), ("ancestral", "ancestral")]:
        for value, setting in [("0", ""), ("1", ", td=1.0"), ("10", ", td=10.0")]:
            first = f"250 steps: sampler={sampler}{setting}, gaussian_steps=250"
            rows.append((f"{title}, td {value}", "bits", first))
    return picked([*JUDGED, FOURGRAMS], *rows)


def side(corpus, n_train):
    """All text models on a corpus: n = 3, ± over seeds."""
    source = f"side-{corpus}"
    columns = [*JUDGED, FOURGRAMS]
    real = found(source, f"held out, beside {n_train} characters", *columns, "characters/s")
    rows = [["", "parameters", "bound, nats/char", "bits/char", *columns, "characters/s"],
            ["real, held out", "", "", "", *real]]
    names = {"AR baseline (exact)": "twin", "masked": "masked", "embeddings": "embed",
             "analog bits": "bits"}
    for title, name in names.items():
        runs = [f"out/side/{corpus}/{name}.{seed}" for seed in SEEDS]
        rows.append([title, *found(source, runs[0], "parameters"),
                     *averaged(source, runs, "bound, nats/char", "bits/char"),
                     *averaged(source, runs, *columns),
                     *averaged(source, runs, "characters/s", digits=0)])
    return rows


def four():
    """The table of the README: `side` of tiny Shakespeare, fewer columns, no errors."""
    shown = [0, 2, 3, 4, 6, 8]
    return [[row[i].split(" ±")[0] for i in shown] for row in side("shakespeare", "1,003,854")]


def hybrids():
    rows = ["diffusion, 50 steps", "diffusion, 128 steps", "diffusion, td 0.4, 50 steps",
            "blocks of 32, 32 steps each", "blocks of 32, 50 steps each",
            "guided, 0.25 of the twin, 50 steps", "guided, 0.5 of the twin, 50 steps", "the twin"]
    return picked([*JUDGED, FOURGRAMS, "calls", "characters/s"], ("real", "control", "held out"),
                  *[(row, "control") for row in rows])


def steering():
    return picked(["texts that have it", *JUDGED],
                  *[(f"{steer}, strength {strength}", f"control:{i}", steer)
                    for steer in ("no:e", "line:30") for i, strength in enumerate((0, 1, 2, 5))])


TABLES = {f.__name__: f for f in (progress, bounds, samples, calls, speed, writing, digits, td,
                                  hybrids, steering, four)}
TABLES["side-shakespeare"] = partial(side, "shakespeare", "1,003,854")
TABLES["side-warpeace"] = partial(side, "warpeace", "2,876,590")


def markdown(rows):
    """Rows of cells as a table, in today's words."""
    lines = [f"| {' | '.join(row)} |\n" for row in rows]
    rule = "|---|" + "---:|" * (len(rows[0]) - 1) + "\n"
    table = "".join([lines[0], rule, *lines[1:]])
    for old, new in TODAY.items():
        table = table.replace(old, new)
    return table


def rebuilt(text):
    """text with its tables as they should be, and the names of those that were not."""
    differ = []

    def rebuild(match):
        name = match[1]
        table = markdown(TABLES[name]())
        if table != match[2]:
            differ.append(name)
        return f"<!-- table: {name} -->\n{table}"
    text = re.sub(r"<!-- table: (\S+) -->\n((?:\|.*\n)*)", rebuild, text)
    return text, differ


def main(argv):
    check(argv in ([], ["--check"]), __doc__)
    differ = []
    for path in PAGES:
        try:
            text, names = rebuilt(path.read_text(encoding="utf-8"))
        except KeyError as error:
            raise SystemExit(f"{error}") from None
        differ += [f"{path.name}: {name}" for name in names]
        if names and not argv:
            path.write_text(text, encoding="utf-8")
    names = ", ".join(differ)
    if argv:
        check(not differ, f"not what results/ says: {names}")
    else:
        print(f"rebuilt {names or 'nothing: all as it should be'}")


if __name__ == "__main__":
    run(main)
