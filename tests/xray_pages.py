"""Pages of tools/xray.py, made as a user makes them, and how the tests read them."""

import json
import re

from common import char_meta
from writing import write_texts

from tests.helpers import MACBETH, run_module, train

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
    return run_module("tools.xray", *args, **SIZES | settings)


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


def small_run(play, folder):
    """Train four layers, of which 1 and 3 are MoE with biases. Returns the run and the output."""
    out_dir = folder / "run"
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


def hostile_page(folder):
    """The page of a run with HTML in its text and in its dataset's path."""
    data, text = (
        folder / "<" / "script><img src=x onerror=alert(1)>",
        MACBETH[:20_000] + "</script><b>&amp;\u2028\"'`${E}\\",
    )
    write_texts(data, char_meta(text), {"train": text, "val": text[-5000:]}, "tests")
    assert train(dataset=data, out_dir=folder / "run", use_moe=True).returncode == 0
    done = look(folder / "run", text="a</script><b>&amp;\u2028\"'`${E}\\")
    assert done.returncode == 0, done.stderr
    return folder / "run" / "xray.html", data
