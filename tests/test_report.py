"""The page of --report: it holds what was computed, and works in a browser.

The browser is driven by its own debugging protocol through two pipes (--remote-debugging-pipe).
"""
import base64
import fcntl
import importlib
import io
import json
import os
import re
import shlex
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip import Tokenizer
from extras import edit
from extras.attention_maps import AttentionStore, capture_attention
from extras.options import parse
from extras.recorder import Frame, Recorder
from extras.report import TEMPLATE, command, page_data, report, unet_rows
from sampler import get_sigmas
from sd import PRESETS, StableDiffusion
from tests.command import array, assert_refused, run_cli
from tests.common import on_meta, psnr
from tests.training import tiny  # noqa: F401

ROOT = TEMPLATE.parents[1]
PROMPT = "a blue heart next to a red apple"
HOSTILE = ("</script><script>window.ran = 1</script><img src=x onerror='window.ran = 1'> \"'&amp;"
           " <!--\u2028 \U0001f34e $(ls)")
NAMES = "chromium", "chromium-browser", "google-chrome"
CHROMIUM = next(filter(None, map(shutil.which, NAMES)), None)


def data_of(page: Path) -> dict:
    text = page.read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1])


def picture(packed: str) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(packed))).convert("RGB")


def maps_of(data: dict, n: int) -> dict[str, torch.Tensor]:
    """The maps (G, h', w') of a step, by layer, as shares of the attention."""
    packed, found = data["steps"][n]["maps"], {}
    values = np.frombuffer(base64.b64decode(packed["values"]), np.uint8).astype(np.float32) / 255
    for layer, ranges in zip(data["layers"], packed["ranges"]):
        w, h = layer["size"]
        own, values = np.split(values, [len(ranges) * h * w])
        low, high = np.array(ranges, np.float32).T[..., None, None]
        own = low + (high - low) * own.reshape(-1, h, w)
        found[layer["name"]] = torch.from_numpy(own)
    assert len(values) == 0
    return found


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load(None, "cpu", torch.float32)


@pytest.fixture(scope="module")
def page(sd, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "story.html"
    report(sd, path, PROMPT, seed=3, steps=8).save(path.with_suffix(".png"))
    return path


# --- what the page holds ---

def test_the_page_holds_what_was_computed(sd, page):
    data, store, steps = data_of(page), AttentionStore(), []
    with capture_attention(sd.unet, store):
        sd.generate(PROMPT, seed=3, steps=8, callback=lambda step: (
            store.step(step), steps.append(step)))
    assert np.array_equal(picture(data["final"]), array(page.with_suffix(".png")))
    sigmas = get_sigmas("dpmpp_2m", 8, sd.schedule)
    assert data["sigmas"] == sigmas and [one["sigma"] for one in data["steps"]] == sigmas[:-1]
    guesses = sd.decode_latents(torch.cat([step.denoised for step in steps]))
    for one in data["steps"]:
        place, index = one["decoded"]["guess"]
        assert psnr(picture(data["pictures"][place]), guesses[index]) > 32
        assert abs(index - one["index"]) <= 2
    x = np.frombuffer(base64.b64decode(data["steps"][5]["sketch"]["x"]), np.uint8)
    c_in = sd.schedule.prediction.c_in(sigmas[5])
    wanted = (c_in * steps[4].x[0, :3] / 6 + 0.5).clamp(0, 1).permute(1, 2, 0) * 255
    assert np.abs(x.reshape(8, 8, 3) - wanted.numpy()).max() <= 0.51
    moved = [one["moved"]["guess"] for one in data["steps"]]
    assert moved[0] == 0
    assert moved[3] == pytest.approx(float((steps[3].denoised - steps[2].denoised).norm()), 1e-4)


def test_maps_are_those_of_attention_maps(sd, page):
    data, store = data_of(page), AttentionStore()
    with capture_attention(sd.unet, store):
        sd.generate(PROMPT, seed=3, steps=8, callback=store.step)
    found = [maps_of(data, n) for n in range(8)]
    for name, wanted in store.layers.items():
        block = next(one for one in found[0] if name.startswith(one + "."))
        own = torch.stack([one[block] for one in found]).mean(0)[None]
        own = F.interpolate(own, size=(8, 8), mode="bilinear")[0]
        for chip, shown in zip(data["chips"], own):
            share = wanted[0, chip["places"]].sum(0)
            assert (shown - share).abs().max() < 0.01 * share.max() + 1e-25


def test_chips_are_the_tokens(page):
    data = data_of(page)
    ids = Tokenizer()(PROMPT)[0].tolist()
    for chip in data["chips"]:
        assert {ids[place] for place in chip["places"]} == {chip["id"]}
    assert [chip["kind"] for chip in data["chips"]] == ["start", *["word"] * 8, "end", "padding"]
    assert sorted(place for chip in data["chips"] for place in chip["places"]) == list(range(77))


@pytest.mark.parametrize("sampler", ["heun", "euler_a"])
def test_both_guesses_are_recorded_once_a_step(sd, sampler):
    settings = sd.resolve_options(steps=3, sampler=sampler)
    recorder = Recorder(sd, [PROMPT] * 2, edit.run_sigmas(sd, settings, 1.0))
    with capture_attention(sd.unet, recorder.maps), recorder.watch():
        sd.generate([PROMPT] * 2, "a cat", callback=recorder.step, **settings)
    assert [frame.index for frame in recorder.frames] == [0, 1, 2] and "generate" not in vars(sd)
    for frame in recorder.frames:
        z = frame.latents
        guided = z["negative"] + 3 * (z["positive"] - z["negative"])
        assert torch.allclose(z["guess"], guided, atol=1e-4)
        assert all(len(value) == 2 for value in [*z.values(), *frame.maps.values()])


def test_rows_of_the_unet():
    rows = {row["name"]: row for row in unet_rows(on_meta(StableDiffusion, PRESETS["sd1"]).unet,
                                                  [64, 96])}
    found = {name: (row["size"], row["channels"]) for name, row in rows.items() if "size" in row}
    assert found["input_blocks.3"] == ([48, 32], 320) and found["middle_block"] == ([12, 8], 1280)
    assert found["output_blocks.2"] == ([24, 16], 1280) and found["out"] == ([96, 64], 4)
    assert sum(row["parameters"] for row in rows.values()) == 859_520_964


# --- the command ---

def test_pages_of_several_pictures(tiny, tmp_path, capsys):  # noqa: F811
    code, err, out = run_cli(
        capsys, HOSTILE, "--negative=-a cat, dog", "--n", 2, "--batch-size", 2, "--steps", 4,
        "--cfg-end", 0.5, "--ckpt", tiny, "--attn", tmp_path / "maps", "--out", tmp_path / "p.png",
        "--report", tmp_path / "s.html")
    assert code == 0, err
    for seed in 0, 1:
        path = tmp_path / f"s-{seed}.html"
        data = data_of(path)
        assert str(path) in out and data["prompt"] == HOSTILE
        assert np.array_equal(picture(data["final"]), array(tmp_path / f"p-{seed}.png"))
        assert [one["gap"] is None for one in data["steps"]] == [False, False, True, True]
        again = parse(shlex.split(data["command"])[2:])
        assert (again.prompt, again.negative, again.seed, again.ckpt, again.cfg_end) == (
            HOSTILE, "-a cat, dog", seed, str(tiny), 0.5)
        text = path.read_text("utf-8")
        assert text.count("<script") == 2 and "\u2028" not in text and "<img src=x" not in text
    assert data["home"] is None and str(ROOT) not in text


def test_long_prompts_and_pictures_from_pictures(tiny, tmp_path, capsys):  # noqa: F811
    Image.new("RGB", (40, 40), "red").save(tmp_path / "in.png")
    code, err, _ = run_cli(
        capsys, "a (red:1.2) cat, " * 30, "--init", tmp_path / "in.png", "--steps", 4, "--ckpt",
        tiny, "--strength", 0.5, "--guidance", 1, "--width", 40, "--deepcache", 2,
        "--out", tmp_path / "p.png", "--report", tmp_path / "s.html")
    assert code == 0, err
    data = data_of(tmp_path / "s.html")
    assert len(data["steps"]) == 2 == len(data["sigmas"]) - 1 and data["latent"] == [5, 4]
    assert [chip["kind"] for chip in data["chips"]].count("start") == 2
    assert sum(len(chip["places"]) for chip in data["chips"]) == 154
    assert all(one["gap"] is None for one in data["steps"])


@pytest.mark.parametrize("words, said", [
    (["--report", "s.htm"], "--report must end in .html"),
    (["--report", "file/s.html"], "cannot write into file"),
    (["--scale", "2", "--report", "s.html"], "--scale means nothing")])
def test_wrong_use(tiny, tmp_path, capsys, monkeypatch, words, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("no folder")
    assert said in assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, *words)


def test_many_prompts_have_no_page(tmp_path, capsys):
    (tmp_path / "list.txt").write_text("a cat\n")
    code, err, _ = run_cli(capsys, "--prompts", tmp_path / "list.txt", "--report", "s.html")
    assert code == 2 and "--prompts does not go with --report" in err


def test_the_command_leaves_out_what_is_usual():
    assert command({"prompt": "it's", "seed": 0, "steps": 5, "lora": ["a", "b"], "lowmem": True,
                    "report": "s.html", "out": "x.png", "n": 3}) == (
        "python sd.py 'it'\"'\"'s' --steps 5 --lora a --lora b --report s.html --lowmem")


# --- the file ---

def test_the_page_of_sd1_is_bounded(sd, monkeypatch):
    """Sizes of SD 1.x at 512x512 with a prompt of 75 tokens in 20 steps, and all of it noise."""
    noise = Image.fromarray(torch.randint(256, (256, 256, 3), dtype=torch.uint8).numpy())
    monkeypatch.setattr("extras.report.decode", lambda sd, z: [noise] * len(z))
    recorder = Recorder(sd, ["cat " * 75], get_sigmas("euler", 20))
    sides = [64] * 2 + [32] * 2 + [16] * 2 + [8] + [16] * 3 + [32] * 3 + [64] * 3
    maps = {f"block.{i}": torch.rand(1, side * side, 77) for i, side in enumerate(sides)}
    names = "x", "guess", "negative", "positive"
    for n in range(20):
        latents = {name: torch.randn(1, 4, 64, 64) for name in names}
        recorder.frames.append(Frame(n, 1.0, latents, maps))
    recorder.last = latents["x"]
    data = page_data(recorder, 0, noise.resize((512, 512)), sd.resolve_options(
        width=512, height=512) | {"prompt": "cat " * 75, "negative": "", "seed": 0})
    assert len(json.dumps(data)) < 15e6
    assert 2 <= sum(one["maps"] is not None for one in data["steps"]) < 20


def test_the_built_in_models_page_is_small(page):
    assert page.stat().st_size < 0.6e6


def test_the_example_is_of_this_template():
    """Beside the data. If not, make it anew: python sd.py "a blue heart next to a red apple"
    --seed 3 --report docs/report-example.html
    """
    example = (ROOT / "docs/report-example.html").read_text("utf-8")
    before, after = TEMPLATE.read_text("utf-8").split("__DATA__")
    assert example.startswith(before) and example.endswith(after)
    assert data_of(ROOT / "docs/report-example.html")["home"] == ".." and len(example) < 1.5e6


def test_the_code_that_is_named_is_there(page):
    """Names in the template, and those of the sampler and the guide."""
    text = TEMPLATE.read_text("utf-8")
    named = [one.split() for part in re.findall(r'data-code="([^"]*)"', text)
             for one in part.split(";") if " " in one.strip()]
    named += [one.split() for one in data_of(page)["code"]]
    assert len(named) > 10
    for file, name in named:
        thing = importlib.import_module(file.removesuffix(".py").replace("/", "."))
        for part in name.split("."):
            thing = getattr(thing, part)


def test_the_files_are_short():
    assert len(TEMPLATE.read_text("utf-8").splitlines()) <= 400
    assert len(TEMPLATE.with_suffix(".py").read_text("utf-8").splitlines()) <= 250


# --- a browser ---

class Browser:
    """Headless Chromium with one tab. `seen` are all events; `run` evaluates JavaScript in it."""

    def __init__(self, folder: Path):
        (theirs_in, self.out), (self.inp, theirs_out) = os.pipe(), os.pipe()
        high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 50) for fd in (theirs_in, theirs_out)]
        words = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
                 "--disable-dev-shm-usage", "--remote-debugging-pipe", "--hide-scrollbars",
                 f"--user-data-dir={folder}", "about:blank"]
        null = (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0)
        self.pid = os.posix_spawn(CHROMIUM, words, os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, high[0], 3), (os.POSIX_SPAWN_DUP2, high[1], 4), null],
            setpgroup=0)
        for fd in theirs_in, theirs_out, *high:
            os.close(fd)
        self.number, self.session, self.seen, self.rest = 0, None, [], b""
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in "Page", "Runtime", "Log", "Network":
            self.ask(f"{domain}.enable")

    def read(self) -> dict:
        while b"\0" not in self.rest:
            part = os.read(self.inp, 2**20)
            assert part, "the browser is gone"
            self.rest += part
        text, _, self.rest = self.rest.partition(b"\0")
        return json.loads(text)

    def ask(self, method: str, **params) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": params}
        if self.session is not None:
            message["sessionId"] = self.session
        os.write(self.out, json.dumps(message).encode() + b"\0")
        while True:
            found = self.read()
            if found.get("id") == self.number:
                assert "error" not in found, (method, found["error"])
                return found["result"]
            self.seen.append(found)

    def open(self, page: Path, width: int, height: int = 900, scheme: str = "light") -> None:
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=height,
                 deviceScaleFactor=1, mobile=width < 600)
        self.ask("Emulation.setEmulatedMedia", features=[
            {"name": "prefers-color-scheme", "value": scheme}])
        self.seen.clear()
        self.ask("Page.navigate", url=page.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.seen):
            self.seen.append(self.read())

    def run(self, script: str):
        found = self.ask("Runtime.evaluate", expression=script, returnByValue=True,
                         awaitPromise=True)
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def key(self, name: str) -> None:
        for kind in "keyDown", "keyUp":
            self.ask("Input.dispatchKeyEvent", type=kind, key=name, code=name,
                     text="\r" if name == "Enter" else "",
                     windowsVirtualKeyCode={"ArrowLeft": 37, "ArrowRight": 39, "Home": 36,
                                            "End": 35, "Tab": 9, "Enter": 13}[name])

    def point(self, selector: str, click: bool = False) -> None:
        """Move the mouse to the middle of an element."""
        place = json.dumps(selector)
        x, y = self.run(f"(() => {{const e = document.querySelector({place});"
                        "e.scrollIntoView({block: 'center'}); const r = e.getBoundingClientRect();"
                        "return [r.x + r.width / 2, r.y + r.height / 2]})()")
        kinds = ["mouseMoved", *(["mousePressed", "mouseReleased"] if click else [])]
        for kind in kinds:
            self.ask("Input.dispatchMouseEvent", type=kind, x=x, y=y, clickCount=int(click),
                     button="left" if click else "none")

    def shot(self, path: Path, whole: bool = True) -> None:
        found = self.ask("Page.captureScreenshot", captureBeyondViewport=whole, format="png")
        path.write_bytes(base64.b64decode(found["data"]))

    def close(self) -> None:
        os.killpg(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        os.close(self.out)
        os.close(self.inp)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    if CHROMIUM is None:
        pytest.skip("needs a browser: chromium, as Debian's package has it")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def quiet(browser: Browser, page: Path) -> None:
    """Nothing in the console, and no request but for the page itself."""
    loud = "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"
    assert [event for event in browser.seen if event.get("method") in loud] == []
    urls = [event["params"]["request"]["url"] for event in browser.seen
            if event.get("method") == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("data:")} == {page.as_uri()}


OVERLAY = "document.getElementById('overlay').toDataURL()"
TEXT = "document.getElementById('{}').textContent"
PLACES = """[...document.querySelectorAll('section, figure, .row, table, #curve, p')].map(e => {
  const r = e.getBoundingClientRect(); return [r.x, r.y + scrollY, r.width, r.height].join() })"""
CONTRASTS = """(() => {
  const parse = (c) => c.match(/[0-9.]+/g).map(Number);
  const light = (c) => c.slice(0, 3).map(v => v / 255).map(v =>
    v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) =>
    s + v * [.2126, .7152, .0722][i], 0);
  const found = [];
  for (const e of document.querySelectorAll('body *:not(script):not(noscript)')) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || !e.getClientRects().length) continue;
    let back = e;
    while (back && (parse(getComputedStyle(back).backgroundColor)[3] ?? 1) === 0)
      back = back.parentElement;
    const [a, b] = [getComputedStyle(e).color, getComputedStyle(back).backgroundColor]
      .map(c => light(parse(c))).sort((p, q) => q - p);
    found.push([(a + .05) / (b + .05), e.outerHTML.slice(0, 80)]);
  }
  return found;
})()"""


@pytest.mark.parametrize("width", [360, 800, 1600])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser, page, width, scheme):
    browser.open(page, width, scheme=scheme)
    assert browser.run("document.documentElement.scrollWidth") <= width
    background = browser.run("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(21, 21, 26)"}[scheme]
    found = browser.run(CONTRASTS)
    assert len(found) > 80 and [one for one in found if one[0] < 4.5] == []
    assert browser.run("[...document.images].every(e => e.alt && e.naturalWidth > 0)")
    assert browser.run("[...document.querySelectorAll('canvas, svg')]"
                       ".every(e => e.getAttribute('aria-label'))")

    # keys, and then the slider, move the pictures; nothing else moves
    places, seen = browser.run(PLACES), []
    for key in "Home", "ArrowRight", "ArrowRight", "ArrowLeft", "End", "ArrowLeft":
        browser.key(key)
        seen.append(browser.run(TEXT.format("n-step")))
        assert browser.run(PLACES) == places
    assert seen == ["1 of 8", "2 of 8", "3 of 8", "2 of 8", "finished", "8 of 8"]
    browser.key("Home")
    before = browser.run("[x.src, guess.src, document.getElementById('x-sketch').toDataURL()]")
    browser.point("#slider", click=True)
    after = browser.run("[x.src, guess.src, document.getElementById('x-sketch').toDataURL()]")
    assert browser.run(TEXT.format("n-step")) == "5 of 8"
    assert all(a != b for a, b in zip(before, after))

    # pointing at a word changes the overlay, clicking keeps it
    empty = browser.run(OVERLAY)
    browser.point(".chip:nth-child(4)")
    heart = browser.run(OVERLAY)
    assert heart != empty and "heart:" in browser.run(TEXT.format("legend"))
    browser.point("#formula")
    assert browser.run(OVERLAY) == empty
    for n in 4, 9:
        browser.point(f".chip:nth-child({n})", click=True)
    browser.point("#formula")
    assert browser.run("new Set([...document.querySelectorAll('.swatch')].map("
                       "e => e.style.background)).size") == 2
    both = browser.run(OVERLAY)
    browser.run("[...document.querySelectorAll('#rows button')].at(-1).click()")
    assert browser.run(OVERLAY) not in (both, heart, empty)
    assert browser.run("[...document.querySelectorAll('tr.on')].map(e => e.dataset.name)") == [
        "output_blocks.3"]
    browser.run("document.getElementById('clear').click()")
    browser.key("Tab")                              # the keyboard reaches what the mouse does
    assert browser.run(PLACES) == places
    assert browser.run("play(true); new Promise(done => setTimeout(() => done(state.n), 500))") > 4
    quiet(browser, page)


def test_the_keyboard_alone(browser, page):
    browser.open(page, 800)
    empty = browser.run(OVERLAY)
    for _ in range(4):
        browser.key("Tab")
    assert "heart" in browser.run(TEXT.format("legend")) and browser.run(OVERLAY) != empty
    browser.key("Enter")
    browser.key("ArrowLeft")
    assert browser.run("state.pins.join()") == "3" and browser.run("state.n") == 7


def test_a_tap_keeps_a_word_and_lets_it_go(browser, page):
    browser.open(page, 360)
    browser.ask("Emulation.setTouchEmulationEnabled", enabled=True)
    place = browser.run("(r => ({x: r.x + 5, y: r.y + 5}))("
                        "document.querySelector('.chip:nth-child(4)').getBoundingClientRect())")
    for pins in "3", "":
        browser.ask("Input.dispatchTouchEvent", type="touchStart", touchPoints=[place])
        browser.ask("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        assert browser.run("new Promise(done => setTimeout(() => done(state.pins.join()), 100))"
                           ) == pins
        assert browser.run("state.near") is None
    browser.ask("Emulation.setTouchEmulationEnabled", enabled=False)


def test_a_hostile_prompt_is_text(browser, sd, tmp_path):
    path = tmp_path / "hostile.html"
    report(sd, path, HOSTILE, negative=HOSTILE, steps=2, text=HOSTILE)
    browser.open(path, 800)
    assert HOSTILE in browser.run(TEXT.format("prompt"))
    assert browser.run(TEXT.format("text")) == HOSTILE == browser.run("D.prompt")
    assert browser.run("typeof window.ran") == "undefined"
    assert browser.run("document.scripts.length") == 2 and "<img" in browser.run("document.title")
    quiet(browser, path)


def test_what_the_page_computes_of_maps(browser, sd, page):
    """All layers, all steps, one word: the mean of attention_maps.py."""
    store = AttentionStore()
    with capture_attention(sd.unet, store):
        sd.generate(PROMPT, seed=3, steps=8, callback=store.step)
    browser.open(page, 800)
    found = torch.tensor(browser.run("[...mapOf(8)]")).view(8, 8)
    wanted = store.mean()[0, 8]
    assert (found - wanted).abs().max() < 0.01 * wanted.max()
