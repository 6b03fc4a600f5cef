"""Which change makes embeddings work? Measures the runs of experiments/ladder.sh into
results/ladder.csv, prints that as a table and draws it as results/ladder.svg. Half an hour on one
CPU core with n=100; without a folder a second.

    python -m experiments.ladder out/ladder --n=100
    python -m experiments.ladder                       # only the table and the picture
"""
import csv
import html
import math
import sys
import textwrap
from dataclasses import replace
from pathlib import Path
from statistics import mean, stdev

from checkpoint import read_checkpoint
from config import EMBED_RECIPES, HERE, LADDER, Embed, check, parse, run
from evaluation.diagnostics import diagnostics
from evaluation.likelihood import Evaluate, corpus, open_checkpoint
from evaluation.metrics import text_metrics
from evaluation.report import stamp
from evaluation.samples import eval_model, eval_nll, sample_texts, sampler_settings, training_text

TABLE = HERE / "results/ladder.csv"
MASKED = 1.922 / math.log(2)   # bits/char of a masked model of this size and steps, n = 3 (LOG.md)
UNIGRAM = 4.829                # of who knows only how frequent each character is
TITLES = {
    "baseline": "frozen table of scale .02, predicts the noise, no positions, cosine decoding",
    "positions": "the network can tell the order",
    "unit": "rows of norm 1",
    "x0": "predicts the embedding",
    "softmax": "probabilities of the characters, cross-entropy: learned rounding",
    "learned": "the table is trained, too",
    "range": "noise range matched to rows of norm 1",
    "prior": "what the noisy embedding says of its character is added",
    "sqrt": "trains where there is something to learn",
    "selfcond": "self-conditioning",
    "hint": "and shown to the network",
    "timeless": "the noise level not fed",
    "turns": "characters take turns",
    "scaled": "longer rows, so that the schedule looks where they are told apart",
    "best": "a quarter of the windows with clean parts, for prompts",
    "orderless": "the last rung without positions",
    "diffusion-lm": "the loss of Li et al. 2022",
    "fluency-0.3": "the last rung, and .3 times the surprise of predicted pairs",
    "fluency-1": "and 1 times",
    "frozen": "the last rung, its drawn table frozen",
    "pre-frozen": "with the table of a model of War and Peace, frozen",
    "pre-tuned": "and trained",
}


def rounding_of(name):
    """How a run's predictions become characters: as its network was trained to."""
    if name == "diffusion-lm":
        return "clamp"
    predict = EMBED_RECIPES.get(name, {}).get("predict", "tokens")
    return "learned" if predict == "tokens" else "cosine"


def measure_rungs(folder, s):
    """-> the rows of results/ladder.csv, of the runs in folder by settings s."""
    runs = {name: rounding_of(name) for name in [*EMBED_RECIPES, *sorted(TITLES)]
            if (folder / name / "best.pt").exists()}
    check(runs, f"no run of experiments/ladder.sh in {folder}")
    more = [("scaled", "cosine"), ("scaled", "clamp"), ("diffusion-lm", "learned")]
    rows = []
    for name, rounding in [*runs.items(), *(pair for pair in more if pair[0] in runs)]:
        paths = [folder / f"{name}{seed}" for seed in ("", ".1", ".2")]
        states = [read_checkpoint(path, Embed, ["embed"]) for path in paths if path.exists()]
        check(all("bound" in state for state in states), f"{folder / name} has not finished")
        bounds = [state["bound"] for state in states]
        checkpoint = open_checkpoint(folder / name)
        data = corpus(checkpoint, s)
        how = sampler_settings(checkpoint, replace(s, rounding=rounding))
        x, _, _ = sample_texts(checkpoint, s.n, how)
        nll, _ = eval_nll(eval_model(s), x)
        texts = [data.tokenizer.decode(ids) for ids in x.tolist()]
        m = text_metrics(texts, *training_text(data))
        d = diagnostics(checkpoint.method, data, checkpoint.script.SAMPLER())
        numbers = {
            "bound": mean(bounds), "spread": stdev(bounds) if bounds[1:] else 0.0,
            **{f"ce{i}": ce for i, ce in enumerate(d["ce"])}, "norm": d["norm"],
            "near": d["nearest"], "order": d["order"], "entropy": m["entropy"][0],
            "words": m["words"][0], "words_error": m["words"][1], "fourgrams": m["fourgrams"],
            "judge": nll}
        rows.append({"rung": name, "rounding": rounding, "step": checkpoint.meta["step"],
                     "n": len(bounds), **{key: f"{x:.5g}" for key, x in numbers.items()},
                     "sample": texts[0].replace("\n", "/")})
        print(rows[-1], file=sys.stderr)
    return rows


def in_bits(row, key="bound"):
    return float(row[key]) / math.log(2)


def ladder_table(rows):
    """The lines of the table, and of a sample of each rung."""
    lines = [
        "| rung | what is new | bound, bits/char | cross-entropy of the predicted text in fifths "
        "of the noise, bits | table: norm, nearest | a character tells of the next, bits | "
        "entropy, bits | known words | distinct 4-grams | judge, nats/char |",
        "|---|---|---:|---|---:|---:|---:|---:|---:|---:|"]
    samples = ["\nThe first of the samples; / is a new line:\n"]
    for r in rows:
        v = {key: float(r[key]) for key in r if key not in ("rung", "rounding", "sample")}
        spread = f" ± {in_bits(r, 'spread'):.3f} (n = {r['n']})" if v["n"] > 1 else ""
        ce = " ".join(f"{v[f'ce{i}']:.2f}" for i in range(5))
        title = f"{r['rung']}, {r['rounding']}"
        lines.append(
            f"| {title} | {TITLES.get(r['rung'], '')} | {in_bits(r):,.3f}{spread} | {ce} | "
            f"{v['norm']:.2f}, {v['near']:.2f} | {v['order']:.2f} | {v['entropy']:.2f} | "
            f"{v['words']:.3f} ± {v['words_error']:.3f} | {v['fourgrams']:.3f} | "
            f"{v['judge']:.2f} |")
        for i in range(0, len(r["sample"]), 43):
            samples.append(f"    {title:24}{r['sample'][i:i + 43]}")
            title = ""
    return lines + samples


# the picture

LEFT = 92            # where the bars begin, 22 pixels a bit
FIFTHS = 332         # where the cross-entropies by noise begin, 7 pixels a bit
FACTS = 412
TEXTS = 540
LONGEST = 8          # bits of the longest bar
GREY = "#8b949e"


def x_of(bits):
    return LEFT + 22 * min(bits, LONGEST)


def words(x, y, text, fill="#c9d1d9", size=12, more=""):
    return (f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" font-size="{size}"{more}>'
            f'{html.escape(text)}</text>')


def bar(x, y, width, height, fill):
    return (f'<rect x="{x:.0f}" y="{y:.1f}" width="{width:.0f}" height="{height:.1f}" rx="2" '
            f'fill="{fill}"/>')


def dashes(x1, y1, x2, y2):
    return (f'<line x1="{x1:.0f}" y1="{y1:.1f}" x2="{x2:.0f}" y2="{y2:.1f}" stroke="{GREY}" '
            'stroke-dasharray="3 3"/>')


def draw_rung(r, y):
    """The parts of a rung's row: a bar as long as its bound, cross-entropies by noise beside the
    unigram's, what samples and table are like, a sample in three lines."""
    bound = in_bits(r)
    number = f"{bound:,.2f}" if bound < LONGEST else f"{bound:,.1f}"
    parts = [bar(LEFT, y, x_of(bound) - LEFT, 22, "#1f6feb"),
             words(LEFT - 8, y + 15, r["rung"], more=' text-anchor="end"'),
             words(x_of(bound) + 6, y + 15, number)]
    for i in range(5):
        height = 7 * float(r[f"ce{i}"])
        parts.append(bar(FIFTHS + 12 * i, y + 44 - height, 10, height, "#3fb950"))
    at = y + 44 - 7 * UNIGRAM
    parts.append(dashes(FIFTHS - 3, at, FIFTHS + 61, at))
    facts = [f"words {float(r['words']):.0%} known", f"entropy {float(r['entropy']):.2f}",
             f"rows {float(r['norm']):.2f}, {float(r['near']):.2f}"]
    parts += [words(FACTS, y + 11 + 13 * i, fact, size=11) for i, fact in enumerate(facts)]
    for i in range(3):
        text = r["sample"][43 * i:43 * i + 43]
        parts.append(words(TEXTS, y + 11 + 13 * i, text, size=11, more=' xml:space="preserve"'))
    for i, line in enumerate(textwrap.wrap(TITLES[r["rung"]], 48)):
        parts.append(words(16, y + 37 + 12 * i, line, GREY, 10))
    return parts + [dashes(x_of(x), y - 6, x_of(x), y + 26) for x in (MASKED, UNIGRAM)]


def picture(rows):
    """The ladder as an SVG."""
    shown = [r for r in rows if r["rung"] in [*LADDER, "orderless"]
             and r["rounding"] == rounding_of(r["rung"])]
    height = 40 + 64 * len(shown)
    heads = {"bits/char": 16, "letter frequencies": x_of(UNIGRAM) - 6, "by noise": FIFTHS,
             "samples, table": FACTS, "what it writes": TEXTS}
    parts = [words(x, 18, text, GREY, 11) for text, x in heads.items()]
    parts.insert(1, words(x_of(MASKED) + 6, 18, "masked", GREY, 11, ' text-anchor="end"'))
    for i, r in enumerate(shown):
        parts += draw_rung(r, 32 + 64 * i)
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" width="840" '
        f'height="{height}" font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace">'
        '<title>From a baseline that fails to one that writes</title>',
        '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>', *parts, "</svg>\n"])


def main(argv):
    if argv:
        rows = measure_rungs(Path(argv[0]), Evaluate(**parse(argv[1:], Evaluate)))
        with TABLE.open("w", newline="", encoding="utf-8") as f:
            writer = csv.DictWriter(f, rows[0])
            writer.writeheader()
            writer.writerows(rows)
        print(stamp() + "\n")
    with TABLE.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    print("\n".join(ladder_table(rows)))
    (HERE / "results/ladder.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    run(main)
