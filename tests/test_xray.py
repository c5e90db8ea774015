"""tools/xray.py: its page needs no other file, this file computes its figures again, and a browser,
where there is one, shows them."""

import itertools
import json
import re
import shutil
from collections import Counter

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
    return torch.from_numpy(np.stack([val[s : s + T + 1] for s in starts]))


@torch.no_grad()
def choices(model, idx):
    """{layer: experts of each sequence and token, best first}, and the same for the gates."""
    x, rope = model.embed(idx)
    experts, gates = {}, {}
    for i, block in enumerate(model.transformer.h):
        if hasattr(block.mlp, "router"):
            middle = block.ln_2(x + block.attn(block.ln_1(x), rope))
            best = (middle @ block.mlp.router.weight.T).softmax(dim=-1).topk(K)
            experts[i], gates[i] = (
                best.indices.tolist(),
                (best.values / best.values.sum(-1, keepdim=True)).tolist(),
            )
            x = block(x, rope)[0]
        else:
            x = block(x, rope)
    return experts, gates


def test_figures(trained, model, play):
    data = trained[1]
    both = val_windows(play, EVAL // T)
    experts, _ = choices(model, both[:, :-1])
    chars = json.loads((play / "meta.json").read_text())["chars"]
    assert [row["layer"] for row in data["layers"]] == list(experts) == [1, 3]
    assert (data["experts"], data["top_k"]) == (E, K)
    for row in data["layers"]:
        windows = experts[row["layer"]]
        flat = [
            (token, chosen)
            for tokens, window in zip(both[:, :-1].tolist(), windows, strict=True)
            for token, chosen in zip(tokens, window, strict=True)
        ]
        load = Counter(e for _, chosen in flat for e in chosen)
        assert row["load"] == pytest.approx([load[e] / EVAL / K for e in range(E)], abs=1e-6)
        assert sum(row["load"]) == pytest.approx(1, abs=1e-5)

        again = [a[0] == b[0] for window in windows for a, b in itertools.pairwise(window)]
        first = Counter(chosen[0] for _, chosen in flat)
        assert len(again) == EVAL - EVAL // T and row["same"] == pytest.approx(
            np.mean(again), abs=1e-6
        )
        assert row["chance"] == pytest.approx(
            sum((n / EVAL) ** 2 for n in first.values()), abs=1e-6
        )

        pairs = Counter(pair for _, (a, b) in flat for pair in ((a, b), (b, a)))
        chance = {(a, b): load[a] * load[b] for a in range(E) for b in range(E) if a != b}
        for a in range(E):
            for b in range(E):
                share = pairs[a, b] / pairs.total()
                expected = (
                    share / (chance[a, b] / sum(chance.values())) if chance.get((a, b)) else None
                )
                assert row["pairs"][a][b] == (
                    None if expected is None else pytest.approx(expected, abs=1e-3)
                )

        occurs = Counter(token for token, _ in flat)
        for e in range(E):
            here = Counter(token for token, chosen in flat if e in chosen)
            lifts = {
                chars[v]: (n / load[e]) / (occurs[v] / EVAL)
                for v, n in here.items()
                if occurs[v] >= 5
            }
            best = sorted((lift for lift in lifts.values() if lift > 1), reverse=True)[:10]
            assert [item[1] for item in row["favourites"][e]] == pytest.approx(best, abs=1e-3)
            for token, lift, count, total in row["favourites"][e]:
                assert lift == pytest.approx(lifts[token], abs=1e-3)
                assert (count, total) == (here[chars.index(token)], occurs[chars.index(token)])
    assert any(len(item) == 10 for row in data["layers"] for item in row["favourites"])


@torch.no_grad()
def test_losses_without_an_expert(trained, moe_run, model, play):
    data = trained[1]
    both, differences = val_windows(play, KNOCKOUT // T), []
    whole = model(both[:, :-1], both[:, 1:])[1].item()
    for layer in (1, 3):
        for e in range(E):
            without = load(moe_run).build_model().eval()
            experts = without.transformer.h[layer].mlp.experts
            experts.c_proj[e], experts.c_proj_bias[e] = 0, 0
            differences.append(without(both[:, :-1], both[:, 1:])[1].item() - whole)
    assert [d for row in data["layers"] for d in row["knockout"]] == pytest.approx(
        differences, abs=2e-6
    )
    assert max(map(abs, differences)) > 1e-3
    both = val_windows(play, EVAL // T)
    whole = model(both[:, :-1], both[:, 1:])[1]
    assert data["about"]["loss"].startswith(f"{whole:.4f} nats")


def test_the_text(trained, model, play):
    data = trained[1]
    val = np.fromfile(play / "val.bin", np.uint16)[:100].tolist()
    chars = json.loads((play / "meta.json").read_text())["chars"]
    assert data["text"]["tokens"] == [chars[v] for v in val] and data["text"]["window"] == T
    for i, layer in enumerate((1, 3)):
        expected, gates = [], []
        for start in range(0, 100, T):  # three windows, and four tokens more
            found = choices(model, torch.tensor([val[start : start + T]]))
            expected += [e for chosen in found[0][layer][0] for e in chosen]
            gates += [g for chosen in found[1][layer][0] for g in chosen]
        assert data["text"]["expert"][i] == expected and data["text"]["gate"][i] == pytest.approx(
            gates, abs=1e-3
        )


@pytest.mark.parametrize("bias", [True, False])
def test_weights_are_put_back(bias):
    model = small_model(use_moe=True, num_experts=3, bias=bias).eval()
    before = {name: p.clone() for name, p in model.state_dict().items()}

    def are_back():
        return all(p.equal(before[name]) for name, p in model.state_dict().items())

    experts = model.transformer.h[1].mlp.experts
    with pytest.raises(KeyboardInterrupt), xray.knocked_out(experts, 1):
        assert [bool(p.any()) for p in experts.c_proj] == [True, False, True]
        raise KeyboardInterrupt
    assert are_back()
    idx = torch.arange(16).view(2, 8)
    xray.knockout_losses(model, 0, [(idx, idx)], torch.device("cpu"), "float32")
    xray.loss_and_routes(model, [(idx, idx)], torch.device("cpu"), "float32")
    assert are_back() and not model.transformer.h[0].mlp.router._forward_hooks


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
    driver, chrome = (
        shutil.which("chromedriver"),
        next(
            filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
        ),
    )
    if not driver or not chrome:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = chrome
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    browser = webdriver.Chrome(
        options=options, service=webdriver.ChromeService(executable_path=driver)
    )
    yield browser
    browser.quit()


def test_in_a_browser(trained, moe_run, browser):
    data = trained[1]
    for width in (1000, 400):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((moe_run / "xray.html").as_uri())
        assert browser.get_log("browser") == []
        overflowing = browser.execute_script("""
            const width = document.documentElement.clientWidth
            return [...document.querySelectorAll("body *")]
                .filter(node => !node.closest(".box table"))
                .filter(node => node.getBoundingClientRect().right > width + 0.5)
                .map(node => node.outerHTML.slice(0, 80))""")
        assert not overflowing
        widths = browser.execute_script("return [innerWidth, document.documentElement.scrollWidth]")
        assert widths[0] == width >= widths[1]
    seen = {}
    buttons = browser.find_elements("css selector", "#layers button")
    assert [b.text for b in buttons] == ["layer 1", "layer 3"]
    for i in (0, 1):
        if i:
            buttons[i].click()
        assert [b.get_attribute("aria-pressed") for b in buttons] == [
            str(j == i).lower() for j in (0, 1)
        ]
        shown = browser.execute_script("""
            return [...document.querySelectorAll("#text span")].map(node =>
                [node.textContent, getComputedStyle(node).backgroundColor, node.title])""")
        first = data["text"]["expert"][i][::K]
        assert [text.removesuffix("\n").replace("⏎", "\n") for text, _, _ in shown] == data["text"][
            "tokens"
        ]
        colours = dict(zip(first, (colour for _, colour, _ in shown), strict=True))
        assert [colour for _, colour, _ in shown] == [colours[e] for e in first]
        assert len(set(colours.values())) == len(colours) > 1
        legend = browser.execute_script("""
            return [...document.querySelectorAll("#legend button")].map(node =>
                getComputedStyle(node).backgroundColor)""")
        assert all(legend[e] == colour for e, colour in colours.items())
        for n, (_, _, title) in enumerate(shown):
            experts, gates = (
                data["text"][name][i][n * K : n * K + K] for name in ("expert", "gate")
            )
            assert all(
                f"expert {e}: gate {gate}" in title for e, gate in zip(experts, gates, strict=True)
            )
        cells = browser.execute_script("""return ["pairs", "load", "knockout", "same"].map(id =>
            [...document.querySelectorAll(`#${id} td`)].map(td => td.textContent))""")
        pairs = [value for row in data["layers"][i]["pairs"] for value in row]
        assert [None if cell == "–" else float(cell) for cell in cells[0]] == [
            None if value is None else pytest.approx(value, abs=0.0051) for value in pairs
        ]
        assert list(map(float, cells[1])) == pytest.approx(
            [100 * v for row in data["layers"] for v in row["load"]], abs=0.051
        )
        assert list(map(float, cells[2])) == pytest.approx(
            [v for row in data["layers"] for v in row["knockout"]], abs=0.00051
        )
        assert float(cells[3][0]) == pytest.approx(100 * data["layers"][0]["same"], abs=0.051)
        shades = browser.execute_script(
            """return [...document.querySelectorAll("#load td")].map(td => td.style.background)"""
        )
        for value, shade in zip(
            (v for row in data["layers"] for v in row["load"]), shades, strict=True
        ):
            assert value == 1 / E or ("--more" if value > 1 / E else "--less") in shade
        favourites = browser.execute_script("""
            return [...document.querySelectorAll("#favourites td:last-child")].map(td =>
                td.children.length)""")
        assert favourites == [len(row) for row in data["layers"][i]["favourites"]]
        seen[i] = [colour for _, colour, _ in shown]
    assert seen[0] != seen[1]
    legend = browser.find_elements("css selector", "#legend button")
    legend[1].click()  # only its tokens stay coloured
    faint = browser.execute_script("""
        return [...document.querySelectorAll("#text span")].map(node =>
            node.classList.contains("faint"))""")
    assert faint == [e != 1 for e in first] and legend[1].get_attribute("aria-pressed") == "true"
    assert browser.get_log("browser") == []


def test_html_in_a_browser(hostile, browser):
    browser.get(hostile[0].as_uri())
    assert browser.get_log("browser") == []
    assert not browser.find_elements("css selector", "img, p + b, #text b")
    assert str(hostile[1]) in browser.find_element("css selector", "dl").text
    assert "no pairs" in browser.find_element(
        "id", "about_pairs"
    ).text and not browser.find_elements("id", "pairs")
