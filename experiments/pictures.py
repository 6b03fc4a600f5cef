"""The charts of README and docs/, drawn as SVG from the numbers in results/. A second.

    python -m experiments.pictures
"""
import csv
import html
import math
import textwrap

from config import HERE, check, run
from experiments.readme import found

# colours that the colour-blind can tell apart (Okabe and Ito), darker on white than on black
STYLE = """<style>
text { font: 13px system-ui, sans-serif; fill: #1f2328; white-space: pre }
.title { font-size: 15px; font-weight: 600 }  .small { font-size: 11px; fill: #59636e }
.code { font: 11px ui-monospace, Menlo, Consolas, monospace }  .back { fill: #ffffff }
path { fill: none; stroke: currentColor; stroke-width: 2 }  .dashed { stroke-dasharray: 5 4 }
.grid { stroke: #d1d9e0; stroke-width: 1 }  .cut { stroke: #ffffff; stroke-width: 3 }
.blue { color: #0063a6 }  .orange { color: #b84a00 }  .green { color: #00795a }
.pink { color: #a3487f }  .grey { color: #59636e }  rect.blue, text.label { fill: currentColor }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 }  .small { fill: #9198a1 }  .back { fill: #0d1117 }
.grid { stroke: #3d444d }  .cut { stroke: #0d1117 }
.blue { color: #58b3ef }  .orange { color: #f5a13c }  .green { color: #2fcb9b }
.pink { color: #ef9fce }  .grey { color: #9198a1 } }
</style>"""
NLL = "generative NLL, nats/char"


def words(x, y, text, kind="", anchor="start"):
    return (f'<text x="{x:.0f}" y="{y:.0f}" class="{kind}" text-anchor="{anchor}">'
            f"{html.escape(text)}</text>")


def path(kind, *points):
    places = [f"{x:.1f} {y:.1f}" for x, y in points]
    return f'<path class="{kind}" d="M{"L".join(places)}"/>'


def svg(title, height, parts):
    """The text of an SVG 836 pixels wide: a title above the parts, which are elements."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 836 {height}" width="836">'
    back = '<rect class="back" width="100%" height="100%" rx="8"/>'
    return "\n".join([head, f"<title>{html.escape(title)}</title>", STYLE, back,
                      words(16, 26, title, "title"), *parts, "</svg>\n"])


def line_chart(title, x_name, y_name, x_ticks, y_ticks, lines, scale=float):
    """The text of an SVG. lines: (label at its end, classes, points [(x, y)]); the axes go from the
    first of their ticks to the last, x by scale, a function of x."""
    x_first = scale(x_ticks[0])
    x_unit = 600 / (scale(x_ticks[-1]) - x_first)
    y_unit = 300 / (y_ticks[-1] - y_ticks[0])

    def at(x, y):
        return 56 + x_unit * (scale(x) - x_first), 366 - y_unit * (y - y_ticks[0])

    # axes
    parts = [words(16, 46, y_name, "small"), words(356, 406, x_name, "small", "middle")]
    for tick in x_ticks:
        x, y = at(tick, y_ticks[0])
        parts.append(words(x, y + 18, f"{tick:,}", "small", "middle"))
    for tick in y_ticks:
        x, y = at(x_ticks[0], tick)
        parts.append(path("grid", (x, y), (x + 600, y)))
        parts.append(words(x - 8, y + 4, f"{tick:g}", "small", "end"))

    # lines from the highest end down; a label that would touch the last one is moved down
    free = 0
    for label, kind, points in sorted(lines, key=lambda item: -item[2][-1][1]):
        places = [at(x, y) for x, y in points]
        x, y = places[-1]
        parts.append(path(kind, *places))
        if label:
            free = max(free + 14, y + 4)
            parts.append(words(x + 8, free, label, f"label {kind}"))
    return svg(title, 422, parts)


def bar_chart(title, names, longest, marks, rows):
    """The text of an SVG. rows: (name, what it is, length, text); a bar longer than longest is cut.
    names: of the columns; marks: {name: length}, dashed from the first row to the last."""
    left = 250
    unit = 250 / longest
    height = 96 + 48 * len(rows)
    parts = [words(x, 52, name, "small") for x, name in zip((16, left, 556), names, strict=True)]
    for name, length in marks.items():
        x = left + unit * length
        parts.append(words(x, 76, name, "small", "middle"))
        parts.append(path("grid dashed", (x, 84), (x, height - 12)))
    for y, (name, what, length, text) in zip(range(90, height, 48), rows, strict=False):
        width = unit * min(length, longest)
        end = left + width
        parts.append(f'<rect class="blue" x="{left}" y="{y}" width="{width:.1f}" height="24"/>')
        if length > longest:
            parts += [path("cut", (end - x, y + 28), (end - x + 10, y - 4)) for x in (36, 26)]
        parts += [words(end + 8, y + 17, f"{length:#.3g}"), words(16, y + 10, name)]
        for i, part in enumerate(textwrap.wrap(what, 38)):
            parts.append(words(16, y + 24 + 12 * i, part, "small"))
        for i in (0, 1):
            parts.append(words(556, y + 10 + 14 * i, text[40 * i:40 * i + 40], "code"))
    return svg(title, height, parts)


# the pictures

MODELS = {"bits": "green", "embeddings": "orange", "masked": "blue", "AR": "pink"}
ORDERS = {"entropy": "pink", "confidence": "orange", "margin": "green", "random": "blue"}
RUNGS = {
    "baseline": "frozen table of scale 0.02, predicts the noise, no positions",
    "positions": "the network can tell the order",
    "unit": "rows of norm 1",
    "x0": "predicts the embedding, not the noise",
    "softmax": "predicts characters, with cross-entropy: learned rounding",
    "learned": "the table is trained, too",
    "range": "noise range matched to rows of norm 1",
    "prior": "what the noisy embedding alone says of its character is added to the logits",
    "sqrt": "trains most where there is most to learn (sqrt schedule)",
    "selfcond": "self-conditioning: the network is shown its own earlier prediction",
    "hint": "it is also shown what the noisy embedding alone says",
    "timeless": "it is not told the noise level",
    "turns": "characters have noise levels of their own and come one after another",
    "scaled": "rows of norm 2.65, and the noise range that suits them",
    "orderless": "the last rung without positions",
}


def rows_of(name):
    with (HERE / f"results/{name}.csv").open(newline="", encoding="utf-8") as f:
        return list(csv.DictReader(f))


def numbers(source, first, *columns):
    return [float(cell.split()[0]) for cell in found(source, first, *columns)]


def bound_over_training():
    """A run's evaluations have the same windows and noise every time: what they are off by is
    taken from the last, of which curves.md has the bound over the whole validation split."""
    rows = rows_of("curves")
    lines = []
    for model, colour in MODELS.items():
        bound, = numbers("curves", f"out/curves/{model}", "bound, nats/char")
        points = [(int(r["step"]), float(r["bound"])) for r in rows if r["model"] == model]
        off = points[-1][1] - bound
        points = [(step, y - off) for step, y in points]
        lines.append((f"{model} {bound:.2f}", colour, points))
    return line_chart("Bound over training", "steps of 32 windows of 128 characters",
                      "nats a character: lower is better", range(0, 1001, 200),
                      [1.4, 1.8, 2.2, 2.6, 3, 3.4], lines)


def loss_by_noise():
    fifths = ["0-20%", "20-40%", "40-60%", "60-80%", "80-100%"]
    middles = [10, 30, 50, 70, 90]
    lines = []
    for model, source in [("masked", "curves"), ("embeddings", "curves:1"), ("bits", "curves:1")]:
        nats = numbers(source, f"out/curves/{model}", *fifths)
        lines.append((model, MODELS[model], list(zip(middles, nats, strict=True))))
    return line_chart("Loss by noise level", "noise level, %: share masked, or of the noise range",
                      "cross-entropy of the predicted characters, nats", middles,
                      [0, 0.5, 1, 1.5, 2, 2.5, 3, 3.5], lines)


def quality_by_calls():
    def points(first, steps):
        row = f"even counts{first}, steps="
        return [(n, *numbers("samplers", f"{row}{n}", NLL)) for n in steps]
    lines = []
    for order, colour in ORDERS.items():
        how = f": order={order}, temperature=1.0"
        near = points(how, (128, 64, 32, 16, 8))
        # where a call reveals one character, there is no distance to keep
        far = [near[0], *points(f", apart{how}, apart=4", (64, 43, 32, 16))]
        lines += [(order, colour, near), ("", f"{colour} dashed", far)]
    return line_chart("Quality against network calls", "network calls for 128 characters",
                      "generative NLL, nats a character: lower is better; dashed: min_distance 4",
                      [128, 64, 32, 16, 8], [2, 2.5, 3, 3.5, 4, 4.5, 5, 5.5], lines, math.log)


def likelihood_by_calls():
    def points(order, distance):
        row = f"order {order}, steps"
        rows = [(128, f"{row} 128")]
        rows += [(n, f"{row} {n}, min_distance {distance}") for n in (64, 43, 32, 16, 8)]
        return [(n, *numbers("sampler_nll", first, "nats/char")) for n, first in rows]
    lines = []
    for order, colour in {**ORDERS, "left": "grey"}.items():
        lines += [(order, colour, points(order, 0)), ("", f"{colour} dashed", points(order, 4))]
    return line_chart("Exact likelihood against network calls", "network calls for 128 characters",
                      "-log p of held-out text, nats a character: lower is better; dashed: "
                      "min_distance 4", [128, 64, 32, 16, 8],
                      [1.6, 1.8, 2, 2.2, 2.4, 2.6, 2.8, 3, 3.2], lines, math.log)


def embedding_ladder():
    # the first row of a rung has the rounding that it was trained for
    measured = {row["rung"]: row for row in reversed(rows_of("ladder"))}
    rows = []
    for name, what in RUNGS.items():
        bits = float(measured[name]["bound"]) / math.log(2)
        rows.append((name, what, bits, measured[name]["sample"]))
    masked, = numbers("side-shakespeare:1", "out/side/shakespeare/masked.1337", "bits/char")
    marks = {"masked": masked, "letter frequencies": 4.83}
    names = ("one change at a time", "bound, bits a character: lower is better", "what it writes")
    return bar_chart("From a baseline that fails to one that writes", names, 6, marks, rows)


def bound_by_stagger():
    masked, = numbers("equal", "masked, seed 1337", "bound, nats/char")
    lines = [(f"masked {masked:.2f}", "blue", [(3, masked), (24, masked)])]
    for model in ("embeddings", "bits"):
        points = []
        for n in (3, 12, 24):
            cell, = found("equal", f"{model}, stagger {n}", "bound, nats/char")
            bound, error = map(float, cell.split(" ± "))
            points.append((n, bound))
            lines.append(("", MODELS[model], [(n, bound - error), (n, bound + error)]))
        lines.append((f"{model} {bound:.2f}", MODELS[model], points))
    return line_chart("Noise that comes one character after another", "stagger",
                      "nats a character: lower is better", [3, 6, 12, 24],
                      [1.84, 1.88, 1.92, 1.96, 2, 2.04], lines, math.log)


PICTURES = {"training": bound_over_training, "noise": loss_by_noise, "calls": quality_by_calls,
            "likelihood": likelihood_by_calls, "ladder": embedding_ladder,
            "stagger": bound_by_stagger}


def main(argv):
    check(not argv, __doc__)
    for name, draw in PICTURES.items():
        (HERE / f"results/{name}.svg").write_text(draw(), encoding="utf-8")


if __name__ == "__main__":
    run(main)
