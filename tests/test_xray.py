"""tools/xray.py: its page needs no other file, this file computes its figures again, and a browser,
where there is one, shows them."""

import json
import math
import re
import shutil
from collections import Counter
from unittest import mock

import numpy as np
import pytest
import torch
from common import char_meta
from writing import write_texts

from nanomoe.load import load
from tests.helpers import MACBETH, one_line, run_module, small_model, succeeded, train
from tools import xray

EVAL, KNOCKOUT, T, K, E = 640, 160, 32, 2, 4
SIZES = {"eval_tokens": EVAL, "knockout_tokens": KNOCKOUT, "text_tokens": 100, "min_count": 5}
SIZES |= {"device": "cpu", "dtype": "float32"}


def look(*args, **settings):
    return run_module("tools.xray", *args, **SIZES | settings)


def page_and_data(path):
    page = path.read_text(encoding="utf-8")
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(data[1])


@pytest.fixture(scope="module")
def trained(moe_run):
    """The page of a run, its data, and what the tool says."""
    out = succeeded(look(moe_run))
    return *page_and_data(moe_run / "xray.html"), out


@pytest.fixture(scope="module")
def model(moe_run):
    return load(moe_run).build_model().eval()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run with HTML in its text and in its dataset's path."""
    folder = tmp_path_factory.mktemp("hostile")
    data = folder / "<" / "script><img src=x onerror=alert(1)>"
    text = MACBETH[:20_000] + "</script><b>&amp;\u2028\"'`${E}\\"
    write_texts(data, char_meta(text), {"train": text, "val": text[-5000:]}, "tests")
    succeeded(train(dataset=data, out_dir=folder / "run", use_moe=True))
    succeeded(look(folder / "run", text="a</script><b>&amp;\u2028\"'`${E}\\"))
    return folder / "run" / "xray.html", data


def val_windows(play, count):
    val = np.fromfile(play / "val.bin", np.uint16).astype(np.int64)
    starts = np.linspace(0, len(val) - 1 - T, count).astype(int)
    windows = torch.from_numpy(np.stack([val[s : s + T + 1] for s in starts]))
    return windows[:, :-1], windows[:, 1:]


@torch.no_grad()
def choices(model, idx):
    """{layer: (experts, gates)}, arrays of each sequence's tokens' choices, best first."""
    x, rope = model.embed(idx)
    found = {}
    for i, block in enumerate(model.transformer.h):
        out = block(x, rope)
        if hasattr(block.mlp, "router"):
            middle = block.ln_2(x + block.attn(block.ln_1(x), rope))
            best = (middle @ block.mlp.router.weight.T).softmax(dim=-1).topk(K)
            gates = best.values / best.values.sum(-1, keepdim=True)
            found[i] = best.indices.numpy(), gates.numpy()
            out = out[0]
        x = out
    return found


def test_figures(trained, model, play):
    data = trained[1]
    idx, _ = val_windows(play, EVAL // T)
    found = choices(model, idx)
    chars = json.loads((play / "meta.json").read_text())["chars"]
    assert [row["layer"] for row in data["layers"]] == list(found) == [1, 3]
    assert (data["experts"], data["top_k"]) == (E, K)
    occurs = Counter(idx.flatten().tolist())
    for row in data["layers"]:
        chosen, _ = found[row["layer"]]
        visited = [(chosen == e).any(axis=-1) for e in range(E)]  # which tokens each expert gets
        load = np.array([tokens.sum() for tokens in visited])
        assert row["load"] == pytest.approx(load / EVAL / K, abs=1e-6)
        assert sum(row["load"]) == pytest.approx(1, abs=1e-5)

        first = chosen[:, :, 0]
        again = first[:, 1:] == first[:, :-1]
        assert again.size == EVAL - EVAL // T
        assert row["same"] == pytest.approx(again.mean(), abs=1e-6)
        shares = np.bincount(first.flatten()) / EVAL
        assert row["chance"] == pytest.approx(np.square(shares).sum(), abs=1e-6)

        together = np.array([[(a & b).sum() for b in visited] for a in visited], float)
        by_chance = np.outer(load, load).astype(float)
        for pairs in (together, by_chance):
            np.fill_diagonal(pairs, np.nan)  # no pair of two experts
            pairs /= np.nansum(pairs)
        by_chance[by_chance == 0] = np.nan
        lift = together / by_chance
        assert np.array(row["pairs"], float) == pytest.approx(lift, abs=1e-3, nan_ok=True)

        for tokens, favourites, visits in zip(visited, row["favourites"], load, strict=True):
            here = Counter(idx.numpy()[tokens].tolist())
            often = [v for v in here if occurs[v] >= 5]
            lifts = {chars[v]: (here[v] / visits) / (occurs[v] / EVAL) for v in often}
            best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[:10]
            assert [lift for _, lift, *_ in favourites] == pytest.approx(best, abs=1e-3)
            for token, lift, *counts in favourites:
                assert lift == pytest.approx(lifts[token], abs=1e-3)
                assert counts == [here[chars.index(token)], occurs[chars.index(token)]]
    assert any(len(item) == 10 for row in data["layers"] for item in row["favourites"])


@torch.no_grad()
def test_losses_without_an_expert(trained, moe_run, model, play):
    data = trained[1]
    few, differences = val_windows(play, KNOCKOUT // T), []
    whole = model(*few)[1].item()
    for layer in (1, 3):
        for e in range(E):
            without = load(moe_run).build_model().eval()
            experts = without.transformer.h[layer].mlp.experts
            experts.c_proj[e], experts.c_proj_bias[e] = 0, 0
            differences.append(without(*few)[1].item() - whole)
    found = [d for row in data["layers"] for d in row["knockout"]]
    assert found == pytest.approx(differences, abs=2e-6)
    assert max(map(abs, differences)) > 1e-3
    whole = model(*val_windows(play, EVAL // T))[1]
    assert data["about"]["loss"].startswith(f"{whole:.4f} nats")


def test_the_text(trained, model, play):
    text = trained[1]["text"]
    val = np.fromfile(play / "val.bin", np.uint16)[:100].tolist()
    chars = json.loads((play / "meta.json").read_text())["chars"]
    assert text["tokens"] == [chars[v] for v in val] and text["window"] == T
    # three windows, and four tokens more
    windows = [choices(model, torch.tensor([val[i : i + T]])) for i in range(0, 100, T)]
    for i, layer in enumerate((1, 3)):
        experts, gates = (
            np.concatenate([part.flatten() for part in parts])
            for parts in zip(*(window[layer] for window in windows), strict=True)
        )
        assert text["expert"][i] == experts.tolist()
        assert text["gate"][i] == pytest.approx(gates, abs=1e-3)


def test_the_model_stays_as_it_is(monkeypatch):
    """Its weights and its routers' hooks, also if somebody interrupts."""
    model = small_model(use_moe=True, num_experts=3).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    idx = torch.arange(16).view(2, 8)
    how = [(idx, idx)], torch.device("cpu"), "float32"
    xray.knockout_losses(model, 0, *how)
    xray.loss_and_routes(model, *how)
    monkeypatch.setattr(model, "forward", mock.Mock(side_effect=KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        xray.knockout_losses(model, 0, *how)
    assert all(p.equal(before[name]) for name, p in model.state_dict().items())
    assert not model.transformer.h[0].mlp.router._forward_hooks


def test_nothing_from_outside(trained):
    page, _, out = trained
    outside = r"https?://|\b(?:src|href|srcset|action)\s*=|url\(|@import|\bfetch\(|\bimport\("
    assert not re.findall(outside, page)
    assert "default-src 'none'" in page and len(page) < 100_000
    assert "xray.html" in out and "layer 1: load" in out and "layer 2" not in out


def test_top_1_with_shared_experts(play, tmp_path):
    run = {"use_moe": True, "num_experts": E, "top_k": 1, "num_shared_experts": 1}
    succeeded(train(dataset=play, out_dir=tmp_path / "run", **run, num_dense_layers=1))
    page, text = tmp_path / "page.html", "Hail, Macbeth"
    step = f"--out_dir={tmp_path / 'run' / 'step-00000002'}"
    succeeded(look(step, html=page, knockout_tokens=0, text=text))
    _, data = page_and_data(page)
    (layer,) = data["layers"]
    assert (layer["layer"], layer["pairs"], layer["knockout"]) == (1, None, [None] * E)
    assert "1 shared" in data["about"]["model"] and data["text"]["tokens"] == list(text)
    assert len(data["text"]["expert"][0]) == 13 and not list((tmp_path / "run").glob("*.html"))


def test_html_in_text_and_path(hostile):
    page, data = page_and_data(hostile[0])
    assert page.count("</script>") == 2 and "<b>&amp;" not in page
    assert "".join(data["text"]["tokens"]) == "a</script><b>&amp;\u2028\"'`${E}\\"
    assert str(hostile[1]) in data["about"]["measured on"]


def test_without_the_dataset_s_tokens(play, tmp_path):
    data, run = shutil.copytree(play, tmp_path / "data"), tmp_path / "run"
    succeeded(train(dataset=data, out_dir=run, use_moe=True))
    (data / "val.bin").unlink()
    one_line(look(run), 2, "or give a text with --text=")
    (tmp_path / "text.txt").write_text(MACBETH[:75])
    out = succeeded(look(run, text=f"FILE:{tmp_path / 'text.txt'}", knockout_tokens=40))
    assert "measuring on the given text" in out
    _, found = page_and_data(run / "xray.html")
    assert "75 tokens of the given text, in 3 windows" in found["about"]["measured on"]
    assert "on 40 tokens" in found["about"]["loss"]
    assert found["layers"][0]["knockout"][0] is not None
    for settings in ({}, {"knockout_tokens": 0}):  # no neighbours, nothing to predict
        succeeded(look(run, text="O", **settings))
        _, found = page_and_data(run / "xray.html")
        assert found["layers"][0]["same"] is None and set(found["layers"][0]["knockout"]) == {None}
    shutil.rmtree(data)
    succeeded(look(run, text="O"))  # the checkpoint has its tokenizer
    succeeded(look(run, dataset=play))


def test_bad_input_is_one_line(moe_run, dense_run, tmp_path):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    for args, words in (
        ([dense_run], "it has no experts to look at"),
        ([tmp_path], "no checkpoint in"),
        ([tmp_path / "nowhere"], "no checkpoint at"),
        ([moe_run, tmp_path], "unexpected argument"),
        ([moe_run, "--text=Straße €"], "outside the vocabulary: 'ß' '€'"),
        ([moe_run, "--text="], "the text is empty"),
        ([moe_run, f"--text=FILE:{tmp_path / 'empty.txt'}"], "the text is empty"),
        ([moe_run, f"--text=FILE:{tmp_path / 'bytes.txt'}"], "is not UTF-8"),
        ([moe_run, "--txt=x"], "'text'"),
        ([moe_run, "--eval_tokens=0"], "eval_tokens is 0"),
        ([moe_run, "--knockout_tokens=-1"], "knockout_tokens is -1"),
        ([moe_run, "--device=tpu"], "device is 'tpu'"),
    ):
        one_line(run_module("tools.xray", *args), 2, words)


# -----------------------------------------------------------------------------
# in a browser


@pytest.fixture(scope="module")
def browser():
    try:
        from selenium import webdriver
    except ImportError:
        pytest.skip("no selenium")
    driver = shutil.which("chromedriver")
    names = ("chromium", "chromium-browser", "google-chrome")
    chrome = next(filter(None, map(shutil.which, names)), None)
    if not driver or not chrome:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    service = webdriver.ChromeService(executable_path=driver)
    browser = webdriver.Chrome(options=options, service=service)
    yield browser
    browser.quit()


def test_in_a_browser(trained, moe_run, browser):
    data = trained[1]

    def each(selector, value):
        """A value, in JavaScript, of each node."""
        nodes = f"[...document.querySelectorAll('{selector}')]"
        return browser.execute_script(f"return {nodes}.map(node => {value})")

    for width in (1000, 400):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((moe_run / "xray.html").as_uri())
        assert browser.get_log("browser") == []
        outside = each(
            "body :not(.box table, .box table *)",
            "node.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5"
            " && node.outerHTML.slice(0, 80)",
        )
        assert outside and not any(outside)
        widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths[0] == width >= widths[1]
    seen = []
    colour = "getComputedStyle(node).backgroundColor"
    buttons = browser.find_elements("css selector", "#layers button")
    assert [b.text for b in buttons] == ["layer 1", "layer 3"]
    for i, row in enumerate(data["layers"]):
        if i:
            buttons[i].click()
        pressed = [b.get_attribute("aria-pressed") for b in buttons]
        assert pressed == [str(j == i).lower() for j in (0, 1)]
        texts, colours, titles = zip(
            *each("#text span", f"[node.textContent, {colour}, node.title]"), strict=True
        )
        texts = [text.removesuffix("\n").replace("⏎", "\n") for text in texts]
        assert texts == data["text"]["tokens"]
        experts, gates = (data["text"][name][i] for name in ("expert", "gate"))
        first = experts[::K]
        colour_of = dict(zip(first, colours, strict=True))
        assert list(colours) == [colour_of[e] for e in first]
        assert len(set(colour_of.values())) == len(colour_of) > 1
        legend = each("#legend button", colour)
        assert all(legend[e] == colour for e, colour in colour_of.items())
        for n, (expert, gate) in enumerate(zip(experts, gates, strict=True)):
            assert f"expert {expert}: gate {gate}" in titles[n // K]

        def numbers(name):
            texts = each(f"#{name} td", "node.textContent")
            return [math.nan if text == "–" else float(text) for text in texts]

        pairs = np.array(row["pairs"], float).flatten()
        assert numbers("pairs") == pytest.approx(pairs, abs=0.0051, nan_ok=True)
        load = [v for row in data["layers"] for v in row["load"]]
        assert numbers("load") == pytest.approx([100 * v for v in load], abs=0.051)
        knockout = [v for row in data["layers"] for v in row["knockout"]]
        assert numbers("knockout") == pytest.approx(knockout, abs=0.00051)
        assert numbers("same")[0] == pytest.approx(100 * data["layers"][0]["same"], abs=0.051)
        for value, shade in zip(load, each("#load td", "node.style.background"), strict=True):
            assert value == 1 / E or ("--more" if value > 1 / E else "--less") in shade
        favourites = each("#favourites td:last-child", "node.children.length")
        assert favourites == [len(tokens) for tokens in row["favourites"]]
        seen.append(colours)
    assert seen[0] != seen[1]
    legend = browser.find_elements("css selector", "#legend button")
    legend[1].click()  # only its tokens stay coloured
    assert each("#text span", "node.classList.contains(`faint`)") == [e != 1 for e in first]
    assert legend[1].get_attribute("aria-pressed") == "true"
    assert browser.get_log("browser") == []


def test_html_in_a_browser(hostile, browser):
    browser.get(hostile[0].as_uri())
    assert browser.get_log("browser") == []
    assert not browser.find_elements("css selector", "img, p + b, #text b, #pairs")
    assert str(hostile[1]) in browser.find_element("css selector", "dl").text
    assert "no pairs" in browser.find_element("id", "about_pairs").text
