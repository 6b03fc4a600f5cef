"""The page in a browser, Chromium, without which these tests are not collected (conftest.py)."""
import html
import json
import math
import re
import subprocess
import zlib
from types import SimpleNamespace

from conftest import CHROMIUM
from test_evaluate import drawn

import mnist_ddpm
import train
from config import ImageSampler, Masked, Mnist, Sample
from data import CharTokenizer
from evaluation.likelihood import Checkpoint
from evaluation.report import Table, gather, page, replay
from generate import CAPTION

FLAGS = ("--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr "
         "--virtual-time-budget=3000 --dump-dom").split()
FIFTHS = {"checkpoint": 0, **{str(i): 3 for i in range(5)}}


def shown(path, step="", *flags):
    """A page as headless Chromium shows it; its console must say nothing."""
    done = subprocess.run([CHROMIUM, *flags, *FLAGS, f"file://{path}{step}"], capture_output=True,
                          text=True, timeout=120)
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    return done.stdout


def write_page(folder):
    """The page of two text models and one of digits, all untrained."""
    tiny = dict(n_layer=1, n_head=1, n_embd=16)
    meta = {"alphabet": "abcdefgh \n"}
    data = SimpleNamespace(meta=meta, tokenizer=CharTokenizer(meta["alphabet"]), T=70)
    replays = []
    paths = []
    for name, script, c, how in [
            ("masked", train, Masked(**tiny, block_size=70), Sample(steps=12)),
            ("ar", train, Masked(**tiny, block_size=70, objective="ar"), Sample(steps=12)),
            ("mnist", mnist_ddpm, Mnist(**tiny), ImageSampler(steps=6))]:
        if name == "mnist":
            data = SimpleNamespace(meta={"alphabet": ""})
        run = folder / "a_run_whose_name_is_longer_than_a_telephone_is_wide_in_any_font" / name
        run.mkdir(parents=True)
        checkpoint = Checkpoint(str(run), name, c, {}, drawn(script, c, meta), script)
        replays.append(replay(checkpoint, data, how))
        paths.append(checkpoint.path)
        rows = [f"{100 * i},{60 * i},{5 / i}" for i in range(1, 6)]
        (run / "log.csv").write_text("\n".join(["step,seconds,bits", *rows]))
    samples = [f"--- step {400 * i}\n<b>{i}\n--- step by step{i}\n" for i in range(1, 4)]
    (folder / paths[0] / "samples.txt").write_text("".join(samples))
    levels = Table("nats by share masked", FIFTHS)
    levels.add("masked", 0.5, 1.0, 1.5, 2.0, 2.5)
    columns = {"checkpoint": 0, "method": 0, "bound, nats/char": 3, "± text": 3, "± draws": 3,
               "minus the first": 3, "left to right": 3}
    bounds = Table("bounds", columns)
    for path in paths[:2]:
        bounds.add(path, "masked", (1.75, 0.01), 0.01, 0.02, 0.03, 0.04)
    path = folder / "report.html"
    path.write_text(page(gather([bounds, levels], paths, replays)), encoding="utf-8")
    return path


def test_the_page_in_a_browser(tmp_path):
    path = write_page(tmp_path)
    early = shown(path, "#step=10")
    assert early.count("<h3>") == 3 + 1 and "10 / 64" in early
    assert "masked: 2 of 12 calls" in early and "mnist: 1 of 6 calls" in early
    assert "masked: step 400<" in early and "&lt;b&gt;1\n--- step by step1<" in early
    assert "masked: step 800<" in shown(path, "#step=32")
    assert len(set(re.findall(r'<span style="color: (.*?)"', early))) > 2

    # first they write, then a row each, and the rest is folded
    body, script = early.split("<script>")
    order = re.findall(r'<(?:section|details) id="(\w+)"(?: hidden="")?( open)?', body)
    assert order == [(name, "") for name in ("writing", "models", "measured", "learning", "noise")]
    models = body[body.index('id="models"'):body.index('id="measured"')]
    assert re.findall("<th .*?>(.*?)</th>", models) == ["model", "method", "bound, nats/char"]
    assert models.count("<tr>") == 1 + 3 and models.count("1.750 ± 0.010") == 2
    assert early.count("<tr>") == 2 + 3 + 4 and early.count("<circle") == 15 + 5
    for x, y in (("training steps", "bound, bits a character or pixel"),
                 ("the way from clean to noise, %", "cross-entropy, nats a character or token")):
        assert f">{x}</text>" in body and f">{y}</text>" in body
        assert f'aria-label="{y}, over {x}"' in body
    assert f">{CAPTION[0].upper()}{CAPTION[1:]}.</p>" in body

    # it can be used
    assert played(path) == ["Play 0", "Play 1", "Play 0", "Pause 0", "Play 12", "Play 30",
                            "Over steps", "a dot", "other contents"]
    shot = tmp_path / "shot.png"
    command = [CHROMIUM, *FLAGS[:-1], "--window-size=400,3000", f"--screenshot={shot}"]
    subprocess.run([*command, f"file://{path}#step=60"], capture_output=True, timeout=120)
    assert n_colours(shot) > 2500                          # a page whose script is dead has 900


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


def played(path):
    """What the page says after each: as it opens, an arrow key, the other, space, space after 12
    ticks of its clock, the slider, the button of the curves, the keyboard's focus on a dot; then
    its picture and text are others than as it opened."""
    script = """<script>
        const said = [], tick = [];
        const tell = () => said.push($("play").textContent + " " + $("step").value);
        const canvas = document.querySelector("canvas"), pre = document.querySelector("pre");
        const picture = canvas.toDataURL(), text = pre.textContent;
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
        said.push(canvas.toDataURL() != picture && pre.textContent != text && "other contents");
        document.body.dataset.said = JSON.stringify(said);
        </script></html>"""
    other = path.with_name("played.html")
    source = path.read_text(encoding="utf-8")
    other.write_text(source.replace("</html>", script), encoding="utf-8")
    return json.loads(html.unescape(re.search(r'data-said="(.*?)"', shown(other))[1]))


def on_a_telephone(path, *flags):
    """What a page in a frame of 390 pixels says of itself, all unfolded: {inner, how wide it is;
    width, of what is in it; figure, of a chart; back, text, its colours}."""
    script = """<script>addEventListener("load", () => setTimeout(() => {
        document.querySelectorAll("details").forEach(one => { one.open = true; });
        const style = getComputedStyle(document.body);
        parent.postMessage({width: document.documentElement.scrollWidth, inner: innerWidth,
            figure: document.querySelector("#curves svg").getBoundingClientRect().width,
            back: style.backgroundColor, text: style.color}, "*");
    }, 500));</script></html>"""
    inside = path.with_name("inside.html")
    source = path.read_text(encoding="utf-8")
    inside.write_text(source.replace("</html>", script), encoding="utf-8")
    outside = path.with_name("outside.html")
    outside.write_text("""<iframe src="inside.html" style="width: 390px; height: 900px; border: 0">
        </iframe><script>addEventListener("message", e => {
        document.body.dataset.said = JSON.stringify(e.data); });</script>""")
    return json.loads(html.unescape(re.search(r'data-said="(.*?)"', shown(outside, "", *flags))[1]))


def test_the_page_on_a_telephone_by_day_and_night(tmp_path):
    path = write_page(tmp_path)
    day = on_a_telephone(path)
    night = on_a_telephone(path, "--blink-settings=preferredColorScheme=0")
    for said in (day, night):
        assert said["inner"] == 390 and said["width"] <= 390 and 300 < said["figure"] <= 390
    assert day["back"] == "rgb(255, 255, 255)" and night["back"] == "rgb(13, 17, 23)"
    assert day["text"] != night["text"]


def test_what_looks_like_markup_stays_text_and_what_is_no_number_is_left_out(tmp_path):
    """As the page opens its curves are over time, where the logarithm of 0 minutes is asked for."""
    replay = {"name": "<i>a</i>", "calls": 1, "frames": [["··", "  "], ["<b", "90"]]}
    table = Table("nats by share masked", FIFTHS)
    table.add("<!--<script>", math.nan, 1.0, math.inf, 2.0, 3.0)
    data = gather([table], [], [replay])
    data["stamp"] = "</script><b>now<!--<script>"
    data["curves"] = [{"name": "a", "points": [[1, 0, 3], [2, 1, 2]]}]
    text = page(data).replace("curves(false)", "curves(true)")
    (tmp_path / "a.html").write_text(text, encoding="utf-8")
    dom, _ = shown(tmp_path / "a.html", "#step=64").split("<script>")
    assert "&lt;i&gt;a&lt;/i&gt;: 1 of 1 calls" in dom
    assert "&lt;/script&gt;&lt;b&gt;now" in dom and "<b>" not in dom
    assert dom.count("<circle") == 3 + 2 and "NaN" not in dom
