"""The page in a browser, Chromium, without which these tests are not collected (conftest.py)."""
import html
import json
import math
import re
import subprocess
import zlib
from types import SimpleNamespace

import torch
from conftest import CHROMIUM

import mnist_ddpm
import train
from config import ImageSampler, Masked, Mnist, Sample
from data import CharTokenizer
from evaluation.likelihood import Checkpoint
from evaluation.report import Table, gather, page, replay

FLAGS = ("--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr "
         "--virtual-time-budget=3000").split()


def browser(path, *args):
    """Headless Chromium on a page -> (stdout, what its console said)."""
    done = subprocess.run([CHROMIUM, *FLAGS, *args, path], capture_output=True, text=True,
                          timeout=120)
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def write_page(folder):
    """The page of two text models and one of digits, all untrained."""
    tiny = dict(n_layer=1, n_head=1, n_embd=16)
    chars = "abcdefgh \n"
    replays = []
    for objective in ("masked", "ar"):
        c = Masked(**tiny, block_size=70, objective=objective)
        method = train.build(c, {"alphabet": chars}).eval()
        data = SimpleNamespace(meta={"alphabet": chars}, tokenizer=CharTokenizer(chars), T=70)
        checkpoint = Checkpoint(f"{folder}/{objective}.pt", objective, c, {}, method, train)
        replays.append(replay(checkpoint, data, Sample(steps=12)))
    method = mnist_ddpm.build(Mnist(**tiny), {}).eval()
    for p in method.parameters():
        torch.nn.init.normal_(p, std=0.3)
    data = SimpleNamespace(meta={"alphabet": ""})
    checkpoint = Checkpoint(f"{folder}/mnist.pt", "mnist", None, {}, method, mnist_ddpm)
    replays.append(replay(checkpoint, data, ImageSampler(steps=6)))

    runs = []
    for name in ("masked", "ar", "mnist"):
        rows = [f"{100 * i},{60 * i},{5 / i}" for i in range(1, 6)]
        (folder / f"{name}.csv").write_text("\n".join(["step,seconds,bits", *rows]))
        runs.append(f"{folder}/{name}.pt")
    levels = Table("nats by share masked", {"checkpoint": 0, **{str(i): 3 for i in range(5)}})
    levels.add("masked", 0.5, 1.0, 1.5, 2.0, 2.5)
    bounds = Table("bounds", {"checkpoint": 0, "nats": 3})
    for name in ("masked", "ar"):
        bounds.add(name, (1.75, 0.01))
    path = folder / "report.html"
    data = gather([bounds, levels], runs, replays)
    path.write_text(page(data), encoding="utf-8")
    return path


def test_the_page_in_a_browser(tmp_path):
    path = write_page(tmp_path)
    (early, console), (late, _), (start, _) = [
        browser(f"file://{path}{step}", "--dump-dom") for step in ("#step=10", "#step=60", "")]
    assert not console, console
    panes = [re.search(r'id="panes">(.*?)</section>', dom, re.S)[1]
             for dom in (early, late, start)]
    assert len(set(panes)) == 3 and all(pane.count("<h3>") == 3 for pane in panes)
    assert "10 / 64" in early and "0 / 64" in start
    assert "masked.pt: 2 of 12 calls" in early and "mnist.pt: 1 of 6 calls" in early
    assert early.count("<circle") == 15 + 5 and early.count("<tr>") == 2 + 3
    assert '<section id="learning">' in early and "1.750 ± 0.010" in early
    shot = tmp_path / "shot.png"
    browser(f"file://{path}#step=60", "--window-size=400,3000", f"--screenshot={shot}")
    assert n_colours(shot) > 2500                  # a page whose script is dead has 900
    assert played(path) == ["Play 0", "Play 1", "Play 0", "Pause 0", "Play 12", "Play 30",
                            "Over steps", "a dot"]


def played(path):
    """What the page says after each: as it opens, an arrow key, the other, space, space after 12
    ticks of its clock, the slider, the button of the curves, the keyboard's focus on a dot."""
    script = """<script>
        const said = [], tick = [];
        const tell = () => said.push($("play").textContent + " " + $("step").value);
        setInterval = f => tick.push(f); clearInterval = () => tick.splice(0);
        const press = key => document.body.dispatchEvent(
            new KeyboardEvent("keydown", {key, bubbles: true}));
        tell(); press("ArrowRight"); tell(); press("ArrowLeft"); tell(); press(" "); tell();
        for (let i = 0; i < 12; i++) tick[0]();
        press(" "); tell();
        $("step").value = 30; $("step").dispatchEvent(new Event("input")); tell();
        $("axis").click(); said.push($("axis").textContent);
        const dot = document.querySelector("#curves .dot"); dot.dispatchEvent(new Event("focus"));
        const about = $("hover").textContent;
        said.push(!$("hover").hidden && / bits at step /.test(about) && "a dot");
        document.body.dataset.said = JSON.stringify(said);
        </script></html>"""
    other = path.with_name("played.html")
    source = path.read_text(encoding="utf-8")
    other.write_text(source.replace("</html>", script), encoding="utf-8")
    dom, console = browser(f"file://{other}", "--dump-dom")
    assert not console, console
    return json.loads(html.unescape(re.search(r'data-said="(.*?)"', dom)[1]))


def n_colours(path):
    """How many different pixels a PNG of 8-bit colours has, its rows left filtered as they are."""
    raw = path.read_bytes()
    body = b""
    start = 8
    while start < len(raw):
        size = int.from_bytes(raw[start:start + 4], "big")
        if raw[start + 4:start + 8] == b"IDAT":
            body += raw[start + 8:start + 8 + size]
        start += 12 + size
    rows = zlib.decompress(body)
    return len({rows[i:i + 3] for i in range(0, len(rows) - 3, 3)})


def test_text_that_looks_like_markup_stays_text_and_a_broken_page_is_noticed(tmp_path):
    replay = {"name": "<i>a</i>", "calls": 1, "frames": [["··", "  "], ["<b", "90"]]}
    text = page({**gather([], [], [replay]), "stamp": "</script><b>now"})
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    dom, console = browser(f"file://{tmp_path}/a.html#step=64", "--dump-dom")
    dom, _ = dom.split("<script>")
    assert not console and "&lt;i&gt;a&lt;/i&gt;: 1 of 1 calls" in dom
    assert "&lt;/script&gt;&lt;b&gt;now" in dom and "<b>" not in dom
    broken = text.replace("DATA.tables.forEach", "DATA.nothing.forEach")
    (tmp_path / "b.html").write_text(broken, encoding="utf-8")
    _, console = browser(f"file://{tmp_path}/b.html", "--dump-dom")
    assert console


def test_what_is_no_number_leaves_the_page_whole(tmp_path):
    table = Table("nats by share masked", {"checkpoint": 0, **{str(i): 3 for i in range(5)}})
    table.add("<!--<script>", math.nan, 1.0, math.inf, 2.0, 3.0)
    data = gather([table], [], [])
    data["stamp"] = "<!--<script>"
    data["curves"] = [{"name": "a", "points": [[1, 0, 3], [2, 1, 2]]}]
    text = page(data).replace("curves(false)", "curves(true)")
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    dom, console = browser(f"file://{tmp_path}/a.html", "--dump-dom")
    dom, _ = dom.split("<script>", 1)
    assert not console and dom.count("<circle") == 5 and "NaN" not in dom
