"""tools/xray.py: its page needs no other file, and this file computes its figures again."""

import itertools
import json
import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch

from nanomoe import checkpoint, routes
from nanomoe.load import load
from tests.helpers import MACBETH, small_model, train
from tests.xray_pages import (
    EVAL,
    KNOCKOUT,
    E,
    K,
    T,
    hostile_page,
    look,
    page_and_data,
    refused,
    small_run,
)


@pytest.fixture(scope="module")
def trained(play, tmp_path_factory):
    return small_run(play, tmp_path_factory.mktemp("xray"))


@pytest.fixture(scope="module")
def model(trained):
    return load(trained[0]).build_model().eval()


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
            model = load(trained[0]).build_model().eval()
            whole = model(both[:, :-1], both[:, 1:])[1].item()
            experts = model.transformer.h[layer].mlp.experts
            experts.c_proj[e], experts.c_proj_bias[e] = 0, 0
            differences.append(model(both[:, :-1], both[:, 1:])[1].item() - whole)
    assert [d for row in data["layers"] for d in row["knockout"]] == pytest.approx(
        differences, abs=2e-6
    )
    assert max(map(abs, differences)) > 1e-3
    both = val_windows(play, EVAL // T)
    whole = load(trained[0]).build_model().eval()(both[:, :-1], both[:, 1:])[1]
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
            with routes.knocked_out(experts, 1):
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
    routes.knockout_losses(model, 0, [(idx, idx)], torch.device("cpu"), "float32")
    routes.loss_and_routes(model, [(idx, idx)], torch.device("cpu"), "float32")
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
        f"--out_dir={checkpoint.latest_good(tmp_path / 'run')}",
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
    return hostile_page(tmp_path_factory.mktemp("hostile"))


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
    assert done.returncode == 0 and "measuring on the given text" in done.stdout, done.stderr
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
    assert look(tmp_path / "run", text="O").returncode == 0  # the checkpoint has its tokenizer
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
        ([run, tmp_path], "unexpected argument"),
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
