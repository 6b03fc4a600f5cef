"""The tables of README.md, rebuilt from what lies in results/: each stands below a line <!-- table: NAME -->.

    python -m experiments.readme            # rebuilds them
    python -m experiments.readme --check    # names those that differ; exit 1 if there are any"""
import csv
import re
import sys
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "results"
README = ROOT / "README.md"


# ---- what was printed

def found(source, first, *columns):
    """Cells of the row of results/NAME.md whose first cell is `first`; source: NAME, or NAME:n for the nth such row. KeyError: there is none."""
    name, _, nth = source.partition(":")
    hits, head = [], []
    for line in (RESULTS / f"{name}.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            head = []
            continue
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if not head:
            head = cells
        elif cells[0] == first and set(columns) <= set(head):
            hits.append([cells[head.index(c)] for c in columns])
    if len(hits) <= int(nth or 0):
        raise KeyError(f"results/{name}.md: no row {first!r} with {', '.join(columns)}")
    return hits[int(nth or 0)]


def over(source, firsts, *columns, digits=3):
    """As `found`, of several rows: mean ± standard deviation of their numbers."""
    rows = [[float(cell.split()[0].replace(",", "")) for cell in found(source, first, *columns)] for first in firsts]
    return [f"{mean(values):,.{digits}f} ± {stdev(values):,.{digits}f}" for values in zip(*rows, strict=True)]


def log(name, step, column):
    """A number of results/NAME.csv at a step."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as f:
        return next(float(row[column]) for row in csv.DictReader(f) if int(row["step"]) == step)


# ---- what the README shows of it: the head of a table, then its rows

JUDGED = "judge, nats/char", "entropy, bits", "known words"
SEEDS = "1337", "1", "2"


def picked(columns, *rows):
    """A table of rows (title, source) or (title, source, first cell), the title standing for it."""
    return [("", *columns), *((title, *found(source, *(first or [title]), *columns)) for title, source, *first in rows)]


def progress():
    yield "after", "2 cores with AVX-512 bf16", "bound, nats/char"
    yield "100 steps, first sample", f"{log('masked', 100, 'seconds'):.0f} s into training", f"{log('masked', 100, 'bound'):.2f}"
    for step in 800, 1600, 2800:
        yield f"{step:,} steps", f"{log('masked', step, 'seconds') / 60:.1f} min", f"{log('masked', step, 'bound'):.2f}"


def bounds():
    nats, judge = "nats a character or pixel", "judge of tiny Shakespeare (exact)"
    yield "model", "parameters", "steps", "bound, nats/char", "bits/char", "command"
    yield ("masked, default, n = 3", *found("bounds", "masked, seed 1337", "parameters", "steps"),
           *over("bounds", [f"masked, seed {s}" for s in SEEDS], nats, "bits"), "`python train.py --dataset=shakespeare`")
    yield ("the twin (exact), dropout .1, n = 1, ± of the text", *found("bounds", judge, "parameters", "steps", nats, "bits", "command"))


def samples():
    columns = *JUDGED, "names in 1,000", "distinct 4-grams", "overlap with training", "infilled"
    return picked(columns, ("real, held out", "masked", "held out, beside 1,003,854 characters"),
                  ("default sampler, 256 calls", "masked", "results/masked.pt"),
                  ("exact: `--order=random --temperature=1 --remask=0 --steps=128`", "masked:1", "results/masked.pt"))


def calls():
    even, apart, best = "even counts: order=", "even counts, apart: order=", "head to head: order="
    return picked(("calls", *JUDGED), ("real, held out", "headtohead", "held out"),
                  ("random: exact", "headtohead", f"{best}random, temperature=1.0, steps=128"),
                  ("entropy (n = 100)", "samplers", f"{even}entropy, temperature=1.0, steps=128"),
                  ("margin (n = 100)", "samplers", f"{even}margin, temperature=1.0, steps=128"),
                  ("margin, apart 4 (n = 100)", "samplers", f"{apart}margin, temperature=1.0, apart=4, steps=64"),
                  ("margin, apart 4", "headtohead", f"{best}margin, temperature=1.0, apart=4, steps=43"),
                  ("margin, apart 4, temperature 1.05", "headtohead", f"{best}margin, temperature=1.05, apart=4, steps=43"),
                  *(("random, apart 4", "headtohead", f"{best}random, temperature=1.0, apart=4, steps={n}") for n in (43, 16, 8)),
                  ("random, not apart (n = 100)", "samplers", f"{even}random, temperature=1.0, steps=16"),
                  ("most confident, not apart (n = 100)", "samplers", f"{even}confidence, temperature=1.0, steps=16"),
                  ("all at once (n = 100)", "samplers", "one network call: order=random, temperature=1.0, steps=1"))


def speed():
    rows = ("masked, as trained", "masked, not compiled", "masked, fp32", "masked, plain: eager, fp32, AdamW", "twin, as trained",
            "twin, plain: eager, fp32, AdamW", "bits, as trained", "embeddings, as trained")
    return picked(("ms", "characters/s", "share of matmul peak", "times plain", "peak memory, MB"), *((row, "bench") for row in rows))


def writing():
    rows = "masked, one a call", "masked, three a call", "twin, one a call", "twin, nothing remembered", "bits", "embeddings"
    return picked(("network calls", "ms a call", "characters/s"), *((row, "bench") for row in rows))


def digits():
    columns = "read as asked", "Frechet distance", "precision", "recall", "nearest training digit, of a test digit's"
    head, *floors = picked(columns, *((row, "digits:7") for row in (
        "real, from the training set", "noise, pixel by pixel as in real ones", "real, blurred")))
    yield *head, "bits/dim"
    yield from ((*row, "") for row in floors)
    yield ("default: v, cosine, min-SNR, n = 3, ± over seeds", *over("digits:1", ("v-cosine", "v-cosine1", "v-cosine2"), *columns),
           *over("bounds", [f"digits, seed {s}" for s in SEEDS], "bits", digits=2))
    yield "`--recipe=levels`, 3,000 steps (186 ms each), n = 1, ± over pictures", *[""] * 5, *found("bounds", "digits, levels", "bits")
    yield ("`--recipe=ddpm`: the paper's eps, linear, plain loss, n = 1, ± over pictures", *found("digits:1", "ddpm", *columns),
           *found("bounds", "digits, ddpm", "bits"))


def td():
    rows = [(f"{name}, td {td}", "bits", f"250 steps: sampler={sampler}{f', td={td}.0' if td else ''}, gaussian_steps=250")
            for name, sampler in (("DDIM", "ddim"), ("ancestral", "ancestral")) for td in (0, 1, 10)]
    return picked((*JUDGED, "distinct 4-grams"), ("real, held out", "bits:4", "warpeace, held out"), *rows)


def side(corpus, title):
    """All text models on a corpus: n = 3, ± over seeds."""
    columns = *JUDGED, "distinct 4-grams", "characters/s"
    yield "", "parameters", "bound, nats/char", "bits/char", *columns
    yield "real, held out", "", "", "", *found(f"side-{corpus}", title, *columns)
    for title, name in ("the twin (exact)", "twin"), ("masked", "masked"), ("embeddings", "embed"), ("analog bits", "bits"):
        runs = [f"out/side/{corpus}/{name}.{s}" for s in SEEDS]
        yield (title, *found(f"side-{corpus}", runs[0], "parameters"), *over(f"side-{corpus}", runs, "bound, nats/char", "bits/char"),
               *over(f"side-{corpus}", runs, *columns[:-1]),
               *over(f"side-{corpus}", runs, "characters/s", digits=0))


def hybrids():
    rows = ("diffusion, 50 steps", "diffusion, 128 steps", "diffusion, td 0.4, 50 steps", "blocks of 32, 32 steps each",
            "blocks of 32, 50 steps each", "guided, 0.25 of the twin, 50 steps", "guided, 0.5 of the twin, 50 steps", "the twin")
    return picked((*JUDGED, "distinct 4-grams", "calls", "characters/s"), ("real", "control", "held out"), *((row, "control") for row in rows))


def steering():
    rows = [(f"{wish}, strength {strength}", f"control:{i}", wish) for wish in ("no:e", "line:30") for i, strength in enumerate((0, 1, 2, 5))]
    return picked(("texts that have it", *JUDGED), *rows)


TABLES = {f.__name__: f for f in (progress, bounds, samples, calls, speed, writing, digits, td, hybrids, steering)}
TABLES["side-shakespeare"] = lambda: side("shakespeare", "held out, beside 1,003,854 characters")
TABLES["side-warpeace"] = lambda: side("warpeace", "held out, beside 2,876,590 characters")


def markdown(rows):
    """Rows of cells as a table; numbers below 1 without their 0."""
    lines = ["| " + " | ".join(re.sub(r"(?<![\d.,=])0(?=\.\d)", "", cell) for cell in row) + " |\n" for row in rows]
    return lines[0] + "|---|" + "---:|" * (lines[0].count("|") - 2) + "\n" + "".join(lines[1:])


def rebuilt(text):
    """text with its tables as they should be, and the names of those that were not."""
    differ = []

    def table(m):
        built = markdown(list(TABLES[m[1]]()))
        differ.extend([m[1]] * (built != m[2]))
        return f"<!-- table: {m[1]} -->\n{built}"
    return re.sub(r"<!-- table: (\S+) -->\n((?:\|.*\n)*)", table, text), differ


def main(argv):
    if argv not in ([], ["--check"]):
        raise SystemExit(__doc__)
    try:
        text, differ = rebuilt(README.read_text(encoding="utf-8"))
    except (OSError, KeyError) as e:
        raise SystemExit(str(e)) from None
    if argv:
        raise SystemExit(f"README.md is not what results/ says: {', '.join(differ)}" if differ else 0)
    README.write_text(text, encoding="utf-8")
    print(f"rebuilt {', '.join(differ) or 'nothing: all as it should be'}")


if __name__ == "__main__":
    main(sys.argv[1:])
