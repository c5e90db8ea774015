"""tools/xray.py: its page is whole in itself, its figures are those that this file computes in another way, and a browser
shows them."""

import itertools
import json
import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from common import char_meta, write_texts

from nanomoe import checkpoint
from tests.conftest import MACBETH, ROOT, flags, small_model, train
from tools import xray

EVAL, KNOCKOUT, T, K, E = 640, 160, 32, 2, 4
SIZES = {
    "eval_tokens": EVAL,
    "knockout_tokens": KNOCKOUT,
    "text_tokens": 100,
    "min_count": 5,
    "device": "cpu",
    "dtype": "float32",
}


def look(*args, **settings):
    return subprocess.run(
        [sys.executable, "-m", "tools.xray", *map(str, args), *flags(**SIZES | settings)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def page_and_data(path):
    page = path.read_text(encoding="utf-8")
    return page, json.loads(
        re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1]
    )


def refused(done, words):
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and words in done.stderr, (
        done.stdout,
        done.stderr,
    )


@pytest.fixture(scope="module")
def trained(play, tmp_path_factory):
    """A model of four layers, of which 1 and 3 are MoE and have biases, and its page."""
    out_dir = tmp_path_factory.mktemp("xray") / "run"
    assert (
        train(
            dataset=play,
            out_dir=out_dir,
            n_layer=4,
            use_moe=True,
            num_experts=E,
            top_k=K,
            moe_stride=2,
            bias=True,
            learning_rate=0.003,
            max_iters=60,
            warmup_iters=10,
            expert_load_balance_loss_coef=0.1,
        ).returncode
        == 0
    )
    done = look(out_dir)
    assert done.returncode == 0, done.stderr
    return out_dir, done.stdout


@pytest.fixture(scope="module")
def model(trained):
    return checkpoint.load(trained[0]).build_model().eval()


def val_windows(play, count):
    val = np.fromfile(play / "val.bin", np.uint16).astype(np.int64)
    starts = np.linspace(0, len(val) - 1 - T, count).astype(int)
    return torch.from_numpy(np.stack([val[s : s + T + 1] for s in starts]))


@torch.no_grad()
def choices(model, idx):
    """{layer: for each sequence, each token, its experts, best first} and the same of gates, in plain steps."""
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
    _, data = page_and_data(trained[0] / "xray.html")
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
def test_losses_without_an_expert(trained, play):
    _, data = page_and_data(trained[0] / "xray.html")
    both, differences = val_windows(play, KNOCKOUT // T), []
    for layer in (1, 3):
        for e in range(E):
            model = checkpoint.load(trained[0]).build_model().eval()
            whole = model(both[:, :-1], both[:, 1:])[1].item()
            experts = model.transformer.h[layer].mlp.experts
            experts.c_proj[e], experts.c_proj_bias[e] = 0, 0
            differences.append(model(both[:, :-1], both[:, 1:])[1].item() - whole)
    assert [d for row in data["layers"] for d in row["knockout"]] == pytest.approx(
        differences, abs=2e-6
    )
    assert max(map(abs, differences)) > 1e-3
    both = val_windows(play, EVAL // T)
    whole = checkpoint.load(trained[0]).build_model().eval()(both[:, :-1], both[:, 1:])[1]
    assert data["about"]["loss"].startswith(f"{whole:.4f} nats")


def test_the_text(trained, model, play):
    _, data = page_and_data(trained[0] / "xray.html")
    val, chars = (
        np.fromfile(play / "val.bin", np.uint16)[:100].tolist(),
        json.loads((play / "meta.json").read_text())["chars"],
    )
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
    experts, before = (
        model.transformer.h[1].mlp.experts,
        {k: v.clone() for k, v in model.state_dict().items()},
    )
    for error in (None, KeyboardInterrupt):
        try:
            with xray.knocked_out(experts, 1):
                assert (
                    not experts.c_proj[1].any()
                    and experts.c_proj[0].any()
                    and experts.c_proj[2].any()
                )
                if error:
                    raise error
        except KeyboardInterrupt:
            pass
        assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    idx = torch.arange(16).view(2, 8)
    xray.knock_out(model, 0, [(idx, idx)], torch.device("cpu"), "float32")
    xray.loss_and_routes(model, [(idx, idx)], torch.device("cpu"), "float32")
    assert all(torch.equal(before[name], p) for name, p in model.state_dict().items())
    assert not model.transformer.h[0].mlp.router._forward_hooks


def test_nothing_from_outside(trained):
    page, _ = page_and_data(trained[0] / "xray.html")
    assert not re.findall(
        r"https?://|\b(?:src|href|srcset|action)\s*=|url\(|@import|\bfetch\(|\bimport\(", page
    )
    assert "default-src 'none'" in page and len(page) < 100_000
    assert (
        str(trained[0] / "xray.html") in trained[1]
        and "layer 1: load" in trained[1]
        and "layer 2" not in trained[1]
    )


def test_top_1_with_shared_experts(play, tmp_path):
    assert (
        train(
            dataset=play,
            out_dir=tmp_path / "run",
            use_moe=True,
            num_experts=E,
            top_k=1,
            num_shared_experts=1,
            num_dense_layers=1,
        ).returncode
        == 0
    )
    done = look(
        f"--out_dir={checkpoint.locate(tmp_path / 'run')}",
        html=tmp_path / "page.html",
        knockout_tokens=0,
        text="Hail, Macbeth",
    )
    assert done.returncode == 0, done.stderr
    _, data = page_and_data(tmp_path / "page.html")
    assert [row["layer"] for row in data["layers"]] == [1] and data["layers"][0]["pairs"] is None
    assert data["layers"][0]["knockout"] == [None] * E and data["text"]["tokens"] == list(
        "Hail, Macbeth"
    )
    assert "1 shared" in data["about"]["model"] and len(data["text"]["expert"][0]) == 13
    assert not list((tmp_path / "run").glob("*.html"))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """The page of a run whose text and whose dataset's path hold HTML."""
    folder = tmp_path_factory.mktemp("hostile")
    data, text = (
        folder / "<" / "script><img src=x onerror=alert(1)>",
        MACBETH[:20_000] + "</script><b>&amp;\u2028\"'`${E}\\",
    )
    write_texts(data, char_meta(text), {"train": text, "val": text[-5000:]}, "tests")
    assert train(dataset=data, out_dir=folder / "run", use_moe=True).returncode == 0
    done = look(folder / "run", text="a</script><b>&amp;\u2028\"'`${E}\\")
    assert done.returncode == 0, done.stderr
    return folder / "run" / "xray.html", data


def test_html_in_text_and_path(hostile):
    page, data = page_and_data(hostile[0])
    assert page.count("</script>") == 2 and "<b>&amp;" not in page
    assert "".join(data["text"]["tokens"]) == "a</script><b>&amp;\u2028\"'`${E}\\"
    assert str(hostile[1]) in data["about"]["measured on"]


def test_without_the_dataset_s_tokens(play, tmp_path):
    data = shutil.copytree(play, tmp_path / "data")
    assert train(dataset=data, out_dir=tmp_path / "run", use_moe=True).returncode == 0
    (data / "val.bin").unlink()
    refused(look(tmp_path / "run"), "or give a text with --text=")
    (tmp_path / "text.txt").write_text(MACBETH[:75])
    done = look(tmp_path / "run", text=f"FILE:{tmp_path / 'text.txt'}", knockout_tokens=40)
    assert done.returncode == 0 and "the figures are of the given text" in done.stdout, done.stderr
    _, found = page_and_data(tmp_path / "run" / "xray.html")
    assert "75 tokens of the given text, in 3 windows" in found["about"]["measured on"]
    assert (
        "on 40 tokens" in found["about"]["loss"] and found["layers"][0]["knockout"][0] is not None
    )
    for settings in (
        {"text": "O"},
        {"text": "O", "knockout_tokens": 0},
    ):  # no neighbours, nothing to predict
        assert look(tmp_path / "run", **settings).returncode == 0
        _, found = page_and_data(tmp_path / "run" / "xray.html")
        assert found["layers"][0]["same"] is None and set(found["layers"][0]["knockout"]) == {None}
    shutil.rmtree(data)
    refused(look(tmp_path / "run", text="O"), "--dataset=")
    assert look(tmp_path / "run", dataset=play).returncode == 0


def test_bad_input_is_one_line(trained, play, tmp_path):
    assert train(dataset=play, out_dir=tmp_path / "dense").returncode == 0
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe")
    run = trained[0]
    for args, words in (
        ([tmp_path / "dense"], "it has no experts to look at"),
        ([tmp_path], "no checkpoint in"),
        ([tmp_path / "nowhere"], "no checkpoint at"),
        ([run, tmp_path], "one run at a time"),
        ([run, "--text=Straße €"], "outside the vocabulary: 'ß' '€'"),
        ([run, "--text="], "the text is empty"),
        ([run, f"--text=FILE:{tmp_path / 'empty.txt'}"], "the text is empty"),
        ([run, f"--text=FILE:{tmp_path / 'bytes.txt'}"], "is not UTF-8"),
        ([run, "--txt=x"], "'text'"),
    ):
        refused(look(*args), words)
    refused(look(run, eval_tokens=0), "eval_tokens is 0")
    refused(look(run, knockout_tokens=-1), "knockout_tokens is -1")
    refused(look(run, device="tpu"), "device is 'tpu'")


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


def test_in_a_browser(trained, browser):
    _, data = page_and_data(trained[0] / "xray.html")
    for width in (1000, 400):
        size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        browser.get((trained[0] / "xray.html").as_uri())
        assert browser.get_log("browser") == []
        overflowing = browser.execute_script("""return [...document.querySelectorAll("body *")].filter(node =>
            !node.closest(".box table") && node.getBoundingClientRect().right > document.documentElement.clientWidth + 0.5)
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
        shown = browser.execute_script("""return [...document.querySelectorAll("#text span")].map(node =>
            [node.textContent, getComputedStyle(node).backgroundColor, node.title])""")
        first = data["text"]["expert"][i][::K]
        assert [text.removesuffix("\n").replace("⏎", "\n") for text, _, _ in shown] == data["text"][
            "tokens"
        ]
        colours = dict(zip(first, (colour for _, colour, _ in shown), strict=True))
        assert [colour for _, colour, _ in shown] == [colours[e] for e in first]
        assert len(set(colours.values())) == len(colours) > 1
        legend = browser.execute_script("""return [...document.querySelectorAll("#legend button")].map(node =>
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
        favourites = browser.execute_script("""return [...document.querySelectorAll("#favourites td:last-child")].map(td =>
            td.children.length)""")
        assert favourites == [len(row) for row in data["layers"][i]["favourites"]]
        seen[i] = [colour for _, colour, _ in shown]
    assert seen[0] != seen[1]
    legend = browser.find_elements("css selector", "#legend button")
    legend[1].click()  # only its tokens stay coloured
    faint = browser.execute_script("""return [...document.querySelectorAll("#text span")].map(node =>
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
