"""The ladder of embed_diffusion.py, from the runs of results/ladder.sh: measured into results/ladder.csv, and that as a table and a picture.

    python -m experiments.ladder out/ladder --data_dir=data --n=100     # measures, then as below
    python -m experiments.ladder                                        # prints the table of results/ladder.csv, writes results/ladder.svg"""
import csv
import html
import math
import re
import sys
import textwrap
from pathlib import Path
from statistics import mean, stdev

from config import EMBED, HERE, LADDER, Evaluate, parse, run
from embed_diffusion import kit
from evaluation.evaluate import judge_of, judged, open_checkpoint, sample, sample_setup, stamp
from evaluation.metrics import text_metrics
from train import read

TABLE = HERE / "results/ladder.csv"
MASKED = 1.922 / math.log(2)   # bits/char of the masked model of the same size and steps, n = 3 (LOG.md)
NOTHING = 4.829                # of who knows only how frequent each character is
SAID = {
    "baseline": "frozen table of scale .02, predicts the noise, no positions, cosine decoding", "positions": "the network can tell the order",
    "unit": "rows of norm 1", "x0": "predicts the embedding", "softmax": "probabilities of the characters, cross-entropy: learned rounding",
    "learned": "the table is trained, too", "range": "noise range matched to rows of norm 1", "sqrt": "trains where there is something to learn",
    "selfcond": "self-conditioning", "prior": "what the noisy embedding says of its character is added", "hint": "and shown to the network",
    "timeless": "the noise level not fed", "turns": "characters take turns",
    "scaled": "longer rows, so that the schedule looks where they are told apart", "best": "a quarter of the windows with clean parts, for prompts",
    "orderless": "the last rung without positions", "diffusion-lm": "the loss of Li et al. 2022",
    "fluency-0.3": "the last rung, and .3 times the surprise of predicted pairs", "fluency-1": "and 1 times",
    "frozen": "the last rung, its drawn table frozen", "pre-frozen": "with the table of a model of War and Peace, frozen", "pre-tuned": "and trained",
}


def measure(folder, argv):
    """Measure every run in folder: rows of results/ladder.csv."""
    s = parse(argv, Evaluate())
    names = [*EMBED, *sorted(p.name for p in folder.iterdir() if p.name not in EMBED and not re.search(r"\.[12]$", p.name))]
    hows = [(name, "clamp" if name == "diffusion-lm" else "learned" if EMBED.get(name, {}).get("predict", "tokens") == "tokens" else "cosine")
            for name in names if (folder / name / "best.pt").exists()]
    rows = []
    hows += [(name, other) for name, other in (("scaled", "cosine"), ("scaled", "clamp"), ("diffusion-lm", "learned")) if name in dict(hows)]
    for name, rounding in hows:
        k, s = open_checkpoint(folder / name), parse([*argv, f"--rounding={rounding}"], Evaluate())
        seeds = [read(path, ("embed",)) for path in (folder / f"{name}{seed}" / "best.pt" for seed in (".1", ".2", "")) if path.exists()]
        bounds = [*{state["config"].seed: state["bound"] for state in seeds if "bound" in state}.values()]
        if not bounds:
            raise SystemExit(f"{folder / name} has not ended: python embed_diffusion.py --resume --out={folder / name}")
        data, blocks, judge = sample_setup(k, s, judge_of(s))
        x, _, _ = sample(k, len(blocks), s)
        texts, facts = [data.alphabet.decode(i) for i in x.tolist()], kit(k.method, data)
        m = text_metrics(texts, data.source, data.words)
        rows.append(dict(
            rung=name, rounding=rounding, step=k.meta["step"], n=len(bounds), bound=mean(bounds), spread=stdev(bounds) if bounds[1:] else 0.,
            **{f"ce{i}": ce for i, ce in enumerate(facts["ce"])}, norm=facts["norm"], near=facts["near"], order=facts["order"],
            entropy=m["entropy"][0], words=m["words"][0], words_error=m["words"][1], fourgrams=m["fourgrams"], judge=judged(judge, x)[0],
            sample=texts[0].replace("\n", "/")))
        print(rows[-1], file=sys.stderr)
    if not rows:
        raise SystemExit(f"no run of results/ladder.sh in {folder}")
    with TABLE.open("w", newline="", encoding="utf-8") as f:
        writer = csv.DictWriter(f, rows[0])
        writer.writeheader()
        writer.writerows({k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    print(stamp() + "\n")


def markdown(rows):
    """The table, and a sample of each rung in three lines."""
    yield ("| rung | what is new | bound, bits/char | cross-entropy of the predicted text in fifths of the noise, bits | table: norm, nearest | "
           "a character tells of the next, bits | entropy, bits | known words | distinct 4-grams | judge, nats/char |")
    yield "|---|---|---:|---|---:|---:|---:|---:|---:|---:|"
    for r in rows:
        f = {k: float(v) for k, v in r.items() if k not in ("rung", "rounding", "sample")}
        spread = f" ± {f['spread'] / math.log(2):.3f} (n = {r['n']})" if f["n"] > 1 else ""
        yield (f"| {r['rung']}, {r['rounding']} | {SAID.get(r['rung'], '')} | {f['bound'] / math.log(2):,.3f}{spread} | "
               + " ".join(f"{f[f'ce{i}']:.2f}" for i in range(5)) + f" | {f['norm']:.2f}, {f['near']:.2f} | {f['order']:.2f} | {f['entropy']:.2f} | "
               f"{f['words']:.3f} ± {f['words_error']:.3f} | {f['fourgrams']:.3f} | {f['judge']:.2f} |")
    yield "\nThe first of the samples; / is a new line:\n"
    for r in rows:
        lines = [r["sample"][i:i + 43] for i in range(0, len(r["sample"]), 43)]
        title = f"{r['rung']}, {r['rounding']}"
        yield "\n".join(f"    {'' if i else title:24}{line}" for i, line in enumerate(lines))


def picture(rows):
    """The rungs as an SVG: a bar as long as the bound in bits/char, up to 8; the cross-entropy of the predicted text in fifths of the noise, beside
    the know-nothing line; what samples and the table are like; a sample in three lines."""
    rows = [r for r in rows if r["rung"] in [*LADDER, "orderless"] and r["rounding"] == ("cosine" if r["rung"] in list(LADDER)[:4] else "learned")]
    left, unit, line, end, tall = 92, 22, 64, 8, 7
    fifths, kit_at, text_at, height, at = 332, 412, 540, 40 + line * len(rows), lambda bits: left + unit * min(bits, end)
    say = lambda x, y, words, fill="#c9d1d9", size=12, **k: (f'<text x="{x:.0f}" y="{y:.0f}" fill="{fill}" font-size="{size}"'
                                                          + "".join(f' {n}="{v}"' for n, v in k.items()) + f">{html.escape(words)}</text>")
    rect = lambda x, y, w, h, fill: f'<rect x="{x:.0f}" y="{y:.1f}" width="{w:.0f}" height="{h:.1f}" rx="2" fill="{fill}"/>'
    dashed = lambda x1, y1, x2, y2: f'<line x1="{x1:.0f}" y1="{y1:.1f}" x2="{x2:.0f}" y2="{y2:.1f}" stroke="#8b949e" stroke-dasharray="3 3"/>'
    parts = [say(x, 18, words, "#8b949e", 11, **k) for x, words, k in (
        (16, "bits/char", {}), (at(MASKED) + 6, "masked", {"text-anchor": "end"}), (at(NOTHING) - 6, "letter frequencies", {}),
        (fifths, "by noise", {}), (kit_at, "samples, table", {}), (text_at, "what it writes", {}))]
    for i, r in enumerate(rows):
        y, bits = 32 + line * i, float(r["bound"]) / math.log(2)
        ces = [float(r[f"ce{j}"]) for j in range(5)]
        parts += [rect(left, y, at(bits) - left, 22, "#1f6feb"), say(left - 8, y + 15, r["rung"], **{"text-anchor": "end"}),
                  say(at(bits) + 6, y + 15, f"{bits:,.2f}" if bits < end else f"{bits:,.1f}"),
                  *(rect(fifths + 12 * j, y + 44 - tall * ce, 10, tall * ce, "#3fb950") for j, ce in enumerate(ces)),
                  dashed(fifths - 3, y + 44 - tall * NOTHING, fifths + 61, y + 44 - tall * NOTHING),
                  *(say(kit_at, y + 11 + 13 * j, words.format(**{k: float(r[k]) for k in ("words", "entropy", "norm", "near")}), size=11)
                    for j, words in enumerate(("words {words:.0%} known", "entropy {entropy:.2f}", "rows {norm:.2f}, {near:.2f}"))),
                  *(say(text_at, y + 11 + 13 * j, r["sample"][43 * j:43 * j + 43], size=11, **{"xml:space": "preserve"}) for j in range(3)),
                  *(say(16, y + 37 + 12 * j, words, "#8b949e", 10) for j, words in enumerate(textwrap.wrap(SAID[r["rung"]], 48))),
                  *(dashed(at(level), y - 6, at(level), y + 26) for level in (MASKED, NOTHING))]
    return (f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 840 {height}" width="840" height="{height}" '
            'font-family="ui-monospace, SFMono-Regular, Menlo, Consolas, monospace"><title>From a baseline that fails to one that writes</title>\n'
            '<rect width="100%" height="100%" rx="8" fill="#0d1117"/>\n' + "\n".join(parts) + "\n</svg>\n")


def main(argv):
    if argv:
        measure(Path(argv[0]), argv[1:])
    with TABLE.open(newline="", encoding="utf-8") as f:
        rows = list(csv.DictReader(f))
    print("\n".join(markdown(rows)))
    (HERE / "results/ladder.svg").write_text(picture(rows), encoding="utf-8")


if __name__ == "__main__":
    run(main)
