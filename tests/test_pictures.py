"""experiments/pictures.py: each picture is what results/ says, and can be read by day and night."""
import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
from conftest import ROOT

from embed_diffusion import LADDER
from experiments import pictures

SIZES = {"title": 15, "small": 11, "code": 11}


def elements(svg, tag, kind=""):
    found = ET.fromstring(svg).iter(f"{{http://www.w3.org/2000/svg}}{tag}")
    return [x.attrib | {"text": x.text} for x in found if kind in x.get("class", "").split(" ")]


def box(text):
    """Left, right, top and bottom of a text, in a wide font."""
    size = SIZES.get(text["class"], 13)
    width = 0.61 * size * len(text["text"])
    before = {"start": 0, "middle": width / 2, "end": width}[text["text-anchor"]]
    left = float(text["x"]) - before
    return left, left + width, float(text["y"]) - 0.75 * size, float(text["y"])


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_a_picture_is_what_results_say_and_its_texts_do_not_touch(name):
    svg = pictures.PICTURES[name]()
    assert svg == (ROOT / f"results/{name}.svg").read_text(encoding="utf-8")
    texts = [text for kind in ["", *SIZES, "label"] for text in elements(svg, "text", kind)]
    assert len(texts) > 15
    for a, b in itertools.combinations(map(box, texts), 2):
        assert a[0] >= b[1] or b[0] >= a[1] or a[2] >= b[3] or b[2] >= a[3], (a, b)
    assert all(box(text)[0] >= 0 and box(text)[1] <= 836 for text in texts)


def luminance(colour):
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [((x + 0.055) / 1.055) ** 2.4 for x in parts]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_colours_stand_out_by_day_and_night():
    """A contrast of 4.5 is what WCAG asks of texts."""
    day, night = pictures.STYLE.split("@media (prefers-color-scheme: dark)")
    for style in (day, night):
        colours = dict(re.findall(r"([\w.]+) {[^}#]*(#\w{6})", style))
        back = luminance(colours[".back"])
        for name in ("text", ".small", ".blue", ".orange", ".green", ".pink"):
            low, high = sorted([back, luminance(colours[name])])
            assert (high + 0.05) / (low + 0.05) > 4.5, name


def test_a_line_is_where_its_numbers_are():
    lines = [("a<b", "blue", [(1, 0), (10, 5), (100, 10)]),
             ("b", "pink dashed", [(1, 5), (100, 10)])]
    svg = pictures.line_chart("A & B", "x", "y", [1, 10, 100], [0, 5, 10], lines, math.log)
    assert elements(svg, "path", "blue")[0]["d"] == "M56.0 366.0L356.0 216.0L656.0 66.0"
    assert elements(svg, "path", "dashed")[0]["d"] == "M56.0 216.0L656.0 66.0"
    labels = [(label["text"], label["y"]) for label in elements(svg, "text", "label")]
    assert labels == [("a<b", "70"), ("b", "84")]
    ticks = [tick["text"] for tick in elements(svg, "text", "small")]
    assert ticks == ["y", "x", "1", "10", "100", "0", "5", "10"]


def test_the_ladder_has_every_rung():
    assert list(pictures.RUNGS) == [*LADDER, "orderless"]
