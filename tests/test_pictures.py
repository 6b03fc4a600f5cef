"""experiments/pictures.py: each picture is what results/ says, and can be read by day and night.
experiments/animate.py: what is drawn, and when; the colours of characters."""
import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest
import torch
from conftest import ROOT

from data import SHADES, CharTokenizer
from embed_diffusion import LADDER
from experiments import animate, pictures

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


def linear(colour):
    """#rrggbb -> linear red, green and blue."""
    parts = [int(colour[i:i + 2], 16) / 255 for i in (1, 3, 5)]
    return torch.tensor([((x + 0.055) / 1.055) ** 2.4 for x in parts])


def luminance(colour):
    return float(linear(colour) @ torch.tensor([0.2126, 0.7152, 0.0722]))


def test_colours_stand_out_by_day_and_night():
    """A contrast of 4.5 is what WCAG asks of texts."""
    day, night = pictures.STYLE.split("@media (prefers-color-scheme: dark)")
    for style in (day, night):
        colours = dict(re.findall(r"([\w.]+) {[^}#]*(#\w{6})", style))
        back = luminance(colours[".back"])
        for name in ("text", ".small", ".blue", ".orange", ".green", ".pink"):
            low, high = sorted([back, luminance(colours[name])])
            assert (high + 0.05) / (low + 0.05) > 4.5, name


# what linear red, green and blue become for them (Machado, Oliveira & Fernandes 2009)
BLINDNESS = {
    "none": [[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
                   [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
                     [-0.011820, 0.042940, 0.968881]]}


@pytest.mark.parametrize("kind", BLINDNESS)
def test_colours_of_characters_can_be_told_apart_also_by_the_colour_blind(kind):
    """From orange to blue: each is lighter than the last, and bluer, in CIELAB, and stands out by 3
    on white and on black. The numbers are what a terminal of 256 colours shows as these."""
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722],
                           [0.0193, 0.1192, 0.9505]])
    lightness = []
    yellow = []
    for number, colour in SHADES.items():
        seen = torch.tensor(BLINDNESS[kind], dtype=torch.float) @ linear(colour)
        _, y, z = (to_xyz @ seen.clamp(0, 1) / torch.tensor([0.9505, 1, 1.089])) ** (1 / 3)
        lightness.append(float(116 * y - 16))
        yellow.append(float(200 * (y - z)))
        assert 1.05 / (luminance(colour) + 0.05) > 3 and (luminance(colour) + 0.05) / 0.05 > 3
        levels = [0, 95, 135, 175, 215, 255]
        shown = [levels[(number - 16) // n % 6] for n in (36, 6, 1)]
        if number >= 232:
            shown = [8 + 10 * (number - 232)] * 3
        assert colour == "#" + bytes(shown).hex()
    assert lightness == sorted(lightness) and lightness[-1] > lightness[0] + 5
    assert all(a > b + 8 for a, b in itertools.pairwise(yellow)) and yellow[0] > 0 > yellow[-1]


def cells(svg):
    """(place, character, colour, key times, values) of each in an SVG of animate.py."""
    for group in ET.fromstring(svg).findall("{*}text"):
        change = group.find("{*}animate")
        when = "", ""
        if change is not None:
            when = change.get("keyTimes"), change.get("values")
        for cell in group.findall("{*}tspan"):
            yield int(cell.get("x")), int(cell.get("y")), cell.text, group.get("fill"), *when


def test_what_a_known_recording_shows_and_when():
    """Two rows of two models, the second twice as fast: 12 of 16 seconds are 4 of the slower."""
    tokenizer = CharTokenizer("a<\x1b\n")
    known = [True, False, False, True]
    states = [animate.painted(ids, p, known, tokenizer) for ids, p in [
        ([0, 4, 4, 2], [1.0, 0.0, 0.0, 1.0]), ([0, 4, 1, 2], [1.0, 0.0, 0.5, 1.0]),
        ([0, 3, 1, 2], [1.0, 0.9, 0.5, 1.0])]]
    slow = animate.Recording("slow", [0.0, 2.0, 4.0], states)
    fast = animate.Recording("fast", [0.0, 1.0, 2.0], states)
    svg = animate.text_svg([slow, fast])
    orange, _, grey, _, blue = SHADES.values()
    shown = list(cells(svg))
    assert (16, 62, "a", "#f0f6fc", "", "") in shown                   # the prompt
    assert (26, 62, "·", "#484f58", "0;0.7500", "1;0") in shown        # a new line comes
    assert (16, 82, "·", "#484f58", "0;0.3750", "1;0") in shown        # in the second row
    assert (16, 82, "<", grey, "0;0.3750", "0;1") in shown
    assert (432, 82, "<", grey, "0;0.1875", "0;1") in shown            # of the faster
    assert len(shown) == 8 and "\x1b" not in svg
    assert ">slow: 2 calls, 4.0 s<" in svg and ">fast: 2 calls, 2.0 s<" in svg
    assert 'keyTimes="0;0.7500;1" values="0;400.0;400.0"' in svg       # the bars
    assert 'keyTimes="0;0.3750;1" values="0;200.0;200.0"' in svg

    # a colour that changes, between two states, at last
    ages = [[("a", orange)], [("a", grey)], [("b", orange)]]
    svg = animate.text_svg([animate.Recording("x", [0.0, 1.0, 4.0], ages)])
    assert [(text, *more) for _, _, text, *more in cells(svg)] == [
        ("a", orange, "0;0.1875", "1;0"), ("a", grey, "0;0.1875;0.7500", "0;1;0"),
        ("b", orange, "0;0.7500", "0;1")]


def test_a_row_ends_where_the_text_has_a_new_line_at_last_or_is_full():
    text = [(char, "") for char in "ab\ncde\nfghi"]
    assert animate.rows_of_text(text, 3) == [[0, 1, 2], [3, 4, 5, 6], [7, 8, 9], [10]]


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
