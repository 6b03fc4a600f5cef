"""The page: what was measured gets there, and a browser, Chromium, shows it."""
import html
import json
import math
import os
import re
import shutil
import subprocess
import zlib
from types import SimpleNamespace

import pytest
import torch
from conftest import run

import train
from data import Alphabet
from evaluation import evaluate
from evaluation.report import Table, curve, gather, page, spaced, writing

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
TINY = ["--dataset=pydoc", "--block_size=32", "--n_layer=1", "--n_head=1", "--n_embd=16", "--batch_size=8", "--max_iters=120", "--eval_interval=60",
        "--train_size=20000"]


def browser(path, *args):
    """Headless Chromium on a page -> (stdout, what its console said)."""
    assert CHROMIUM, "the page is tested in Chromium, which is not installed"
    flags = "--headless --no-sandbox --disable-gpu --hide-scrollbars --enable-logging=stderr --virtual-time-budget=3000".split()
    r = subprocess.run([CHROMIUM, *flags, *args, path], capture_output=True, text=True, timeout=120)
    return r.stdout, [line for line in r.stderr.splitlines() if "CONSOLE" in line]


def test_a_table_prints_its_rows_and_keeps_its_numbers(capsys):
    t = Table("bounds", {"checkpoint": 0, "steps": 0, "nats": 3, "bits": 2})
    t.add("a", 12345, 1.23456, (2.345, .06789))
    t.add("b", 7, float("nan"), None)
    t.add("c", 7, (float("nan"), 1.), "exact")
    assert capsys.readouterr().out == ("\nbounds\n\n| checkpoint | steps | nats | bits |\n|---|---:|---:|---:|\n"
                                       "| a | 12,345 | 1.235 | 2.35 ± 0.07 |\n| b | 7 |  |  |\n| c | 7 |  | exact |\n")
    assert t.rows[0] == ("a", 12345, 1.23456, (2.345, .06789))


def test_looks_are_the_first_the_last_and_evenly_between():
    assert spaced(list(range(257))) == list(range(0, 257, 4)) and spaced([1, 2]) == [1, 2]


def test_curves_are_read_and_what_is_cut_is_left_out(tmp_path):
    log = tmp_path / "log.csv"
    assert curve(tmp_path / "best.pt") is None
    for text in ("", "step,bits\n1,2\n", "step,seconds,bits\n1,2\n", "step,seconds,bits\nx,2,3\n", "step,seconds,bits\n"):
        log.write_text(text)
        assert curve(tmp_path / "best.pt") is None, text
    log.write_text("step,seconds,loss,bits\n100,60,1,4.5\n200,150,1,inf\n")
    assert curve(tmp_path / "best.pt") == {"steps": (100, 200), "minutes": (1, 2.5), "bits": (4.5, math.inf)}
    (tmp_path / "masked.csv").write_bytes(log.read_bytes())
    data = gather("now", [], [("m", tmp_path / "masked.pt"), ("none", tmp_path / "other.pt")], [])
    assert data["curves"] == [{"name": "m", "steps": [100], "minutes": [1], "bits": [4.5]}]


def unfinished(folder):
    """A run of bits that was stopped before its first report, half way to step 12."""
    evaluate.analog_bits.main([*TINY[:-3], "--max_iters=6", "--warmup_iters=1", f"--out={folder}"])
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    torch.save({**state, "config": state["config"] | {"max_iters": 12}}, folder / "ckpt.pt")
    (folder / "best.pt").unlink()


def made(tmp_path, monkeypatch, capsys):
    """The page of what --quick trains and the masked model again, beside a damaged checkpoint, one whose weights are no numbers, one of foreign
    data and an unfinished run."""
    monkeypatch.setattr(evaluate, "HERE", tmp_path)
    monkeypatch.setattr(evaluate, "QUICK", [*TINY[1:-3], "--max_iters=10", "--warmup_iters=1", "--compile=False"])
    quick = tmp_path / "out/quick"
    unfinished(quick / "bits")
    evaluate.main(["--quick", "--n=0", "--bound=False"])
    assert sorted(p.name for p in quick.iterdir()) == ["ar", "bits", "embed", "masked", "mnist"] and (tmp_path / "out/report.html").exists()
    assert train.read(quick / "bits/best.pt", ("bits",))["step"] == 12                # --quick went on with it
    times = [p.stat().st_mtime_ns for p in sorted(quick.rglob("best.pt"))]
    evaluate.main(["--quick", "--n=0", "--bound=False"])
    assert times == [p.stat().st_mtime_ns for p in sorted(quick.rglob("best.pt"))]    # what is there is not trained again
    state = torch.load(quick / "masked/best.pt", weights_only=True)
    for name in ("cut", "nan", "foreign"):
        (tmp_path / "out" / name).mkdir()
    (tmp_path / "out/cut/best.pt").write_bytes((quick / "masked/best.pt").read_bytes()[:5000])
    torch.save({**state, "data": {"name": "x"}}, tmp_path / "out/foreign/best.pt")
    torch.save({**state, "ema": {k: p * math.nan for k, p in state["ema"].items()}}, tmp_path / "out/nan/best.pt")
    unfinished(tmp_path / "out/unfinished")
    capsys.readouterr()
    found = evaluate.everything()
    assert len(found) == 9
    evaluate.main([f"--out={quick}/masked,{','.join(found)}", "--n=4", "--frontier", "--exact=0", "--digits=0",
                   "--gaussian_steps=6", "--steps=8", f"--judge={quick}/ar", "--report", f"--json={tmp_path}/sub/table.json"])
    return capsys.readouterr()


def test_the_page_from_checkpoints_to_the_browser(tmp_path, monkeypatch, capsys):
    told = made(tmp_path, monkeypatch, capsys)
    for line in ("cut/best.pt is damaged", "foreign/best.pt is damaged", "nan/best.pt has weights that are no numbers",
                 "no checkpoint at " + os.path.relpath(tmp_path / "out/unfinished/best.pt") + ": its run has not yet come to its first report"):
        assert told.err.count(line) == 1, told.err
    assert told.err.count("damaged") == 2 and told.err.count("best.pt") == 4
    data = json.loads((tmp_path / "sub/table.json").read_text())
    titles = [t["title"] for t in data["tables"]]
    assert sum("pydoc, held out" in t for t in titles) == 1 and any("digits, held out" in t for t in titles) and any("samples" in t for t in titles)
    bounds = next(t for t in data["tables"] if "pydoc, held out" in t["title"])
    assert [r[1] for r in bounds["values"]] == ["masked", "ar", "bits", "embed", "masked"]
    assert bounds["values"][0][4] == pytest.approx(math.log(97), abs=1)
    one, two, minus = bounds["values"][0], bounds["values"][4], bounds["head"].index("minus the first")
    assert one[1:minus] + one[minus + 1:] == two[1:minus] + two[minus + 1:] and two[minus] == [0, 0]    # the same twice is the same digits
    assert data["replay"][0]["frames"] == data["replay"][4]["frames"]
    samples = next(t for t in data["tables"] if "samples" in t["title"])["values"]
    first = next(t for t in data["tables"] if "the first of each" in t["title"])["rows"]
    assert [r[0] for r in first] == [r[0] for r in samples] and all(len(r[1]) > 20 for r in first)
    assert len(samples) == 2 + 5 * 5 and sum("temperature" in r[0] for r in samples) == 13 and sum(", td" in r[0] for r in samples) == 8
    assert samples[2][1:-1] == samples[22][1:-1] and samples[3][2:-1] != samples[6][2:-1]                # but for the speed
    assert len(data["replay"]) == len(data["curves"]) == 6 and len(data["levels"]) == 4
    assert all(0 < nats < 6 for level in data["levels"] for nats in level["nats"])
    for r in data["replay"]:
        looks = r.get("frames") or r["images"]
        assert len(looks) == r["calls"] + 1 <= 65
    assert set(data["replay"][0]["frames"][0][0]) == {"·"} and "·" not in data["replay"][0]["frames"][-1][0]
    path = f"file://{tmp_path}/out/report.html"
    (early, console), (late, _), (start, _) = (browser(path + hash, "--dump-dom") for hash in ("#step=10", "#step=60", ""))
    assert not console, console
    panes = [re.search(r'id="panes">(.*?)</section>', dom, re.S)[1] for dom in (early, late, start)]
    assert len(set(panes)) == 3 and all(p.count("<h3>") == 6 for p in panes) and "10 / 64" in early and "0 / 64" in start
    assert early.count("<circle") >= 15 and early.count("<tr>") >= 10 and "<section id=\"learning\">" in early
    browser(path + "#step=60", "--window-size=400,3000", f"--screenshot={tmp_path}/shot.png")
    assert colours(tmp_path / "shot.png") > 5000                                      # a page whose script is dead has 900
    assert played(tmp_path / "out/report.html") == ["Play 0", "Play 1", "Play 0", "Pause 0", "Play 12", "Play 30", "Over steps", "a dot"]


def played(path):
    """What the page says after each: as it opens, an arrow key, the other, space, space after 12 ticks of its clock, the slider, the button of
    the curves, the keyboard's focus on a dot of theirs."""
    script = """<script>
        const said = [], tell = () => said.push($("play").textContent + " " + $("step").value), tick = [];
        setInterval = f => tick.push(f); clearInterval = () => tick.splice(0);
        const press = key => document.body.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
        tell(); press("ArrowRight"); tell(); press("ArrowLeft"); tell(); press(" "); tell();
        for (let i = 0; i < 12; i++) tick[0]();
        press(" "); tell(); $("step").value = 30; $("step").dispatchEvent(new Event("input")); tell();
        $("axis").click(); said.push($("axis").textContent);
        const dot = document.querySelector("#curves .dot"); dot.dispatchEvent(new Event("focus"));
        said.push(!$("hover").hidden && / bits at step /.test($("hover").textContent) && "a dot");
        document.body.dataset.said = JSON.stringify(said);
        </script></html>"""
    page = path.with_name("played.html")
    page.write_text(path.read_text(encoding="utf-8").replace("</html>", script), encoding="utf-8")
    dom, console = browser(f"file://{page}", "--dump-dom")
    assert not console, console
    return json.loads(html.unescape(re.search(r'data-said="(.*?)"', dom)[1]))


def colours(path):
    """How many different pixels a PNG of 8-bit colours has, unfiltered rows left as they are: a blank one has a handful."""
    raw, body, at = path.read_bytes(), b"", 8
    while at < len(raw):
        size, kind = int.from_bytes(raw[at:at + 4], "big"), raw[at + 4:at + 8]
        body += raw[at + 8:at + 8 + size] if kind == b"IDAT" else b""
        at += 12 + size
    rows = zlib.decompress(body)
    return len({rows[i:i + 3] for i in range(0, len(rows) - 3, 3)})


def test_a_broken_page_is_noticed(tmp_path):
    """The console of the browser is heard, and text that looks like markup stays text."""
    data = gather("</script><b>now", [], [], [{"name": "<i>a</i>", "calls": 1, "frames": [["··", "  "], ["<b", "90"]]}])
    (tmp_path / "a.html").write_text(page(data), encoding="utf-8")
    dom, console = browser(f"file://{tmp_path}/a.html#step=64", "--dump-dom")
    dom, _ = dom.split("<script>")
    assert not console and "&lt;i&gt;a&lt;/i&gt;: 1 of 1 calls" in dom and "&lt;/script&gt;&lt;b&gt;now" in dom and "<b>" not in dom
    (tmp_path / "b.html").write_text(page(data).replace("DATA.tables.forEach", "DATA.nothing.forEach"), encoding="utf-8")
    assert browser(f"file://{tmp_path}/b.html", "--dump-dom")[1]


def test_what_is_no_number_leaves_the_page_whole(tmp_path, capsys):
    t = Table("nats by share masked", {"checkpoint": 0, **{str(i): 3 for i in range(5)}})
    t.add("<!--<script>", math.nan, 1., math.inf, 2., 3.)
    data = gather("<!--<script>", [t], [], [])
    assert data["levels"] == [{"name": "<!--<script>", "nats": [None, 1, None, 2, 3]}]
    assert data["tables"][0]["values"] == [["<!--<script>", None, 1, None, 2, 3]]
    data["curves"] = [{"name": "a", "steps": [1, 2], "minutes": [0, 1], "bits": [3, 2]}]
    (tmp_path / "a.html").write_text(page(json.loads(json.dumps(data, allow_nan=False))).replace("curves(false)", "curves(true)"), encoding="utf-8")
    dom, console = browser(f"file://{tmp_path}/a.html", "--dump-dom")
    dom, _ = dom.split("<script>", 1)
    assert not console and dom.count("<circle") == 5 and "NaN" not in dom


def test_bytes_are_shown_as_the_characters_they_are():
    alphabet = Alphabet("".join(map(chr, range(256))), raw=True)
    ids = torch.tensor([[*"é€ok".encode()]])
    method = SimpleNamespace(mask=256, parameters=lambda: iter([ids]), sample=lambda x, known, s: iter([(ids, 0. * ids + .5)]))
    looks = writing(method, alphabet, 7, SimpleNamespace(seed=0))["frames"]
    assert looks == [("·" * 7, " " * 7), ("é€ok", "4444")]


def test_weights_that_do_not_fit_are_told(tmp_path):
    run("train.py", *TINY, "--max_iters=10", f"--out={tmp_path}/a")
    state = torch.load(tmp_path / "a/best.pt", weights_only=True)
    state["ema"].popitem()
    torch.save(state, tmp_path / "a/best.pt")
    assert "its weights do not fit" in run("-m", "evaluation", f"--out={tmp_path}/a", code=1).stderr


def test_nothing_usable_is_one_line_and_exit_1(tmp_path):
    (tmp_path / "best.pt").write_bytes(b"no")
    r = run("-m", "evaluation", f"--out={tmp_path},{tmp_path}/none", code=1)
    assert len(r.stderr.strip().splitlines()) == 2 and "damaged" in r.stderr and "no checkpoint" in r.stderr


def test_what_cannot_be_written_is_told_before_anything_is_measured(tmp_path):
    (tmp_path / "file").write_text("kept")
    r = run("-m", "evaluation", f"--out={tmp_path}/none", f"--json={tmp_path}/file/table.json", code=1)
    assert len(r.stderr.strip().splitlines()) == 1 and "Error" in r.stderr and "no checkpoint" not in r.stderr
    assert (tmp_path / "file").read_text() == "kept"


def test_a_judge_of_shorter_windows_judges_in_pieces_and_writes_nothing_itself(tmp_path):
    run("train.py", *TINY, "--max_iters=10", f"--out={tmp_path}/masked")
    run("train.py", *TINY, "--max_iters=10", "--objective=ar", "--block_size=12", f"--out={tmp_path}/ar")
    out = run("-m", "evaluation", f"--out={tmp_path}/masked", f"--judge={tmp_path}/ar", "--bound=False", "--exact=0", "--n=2", "--steps=2").stdout
    assert "judge's own" not in out and out.count("±") >= 6
