"""A tokenizer of one's own: byte-level BPE, learned from the text or given as a tokenizer.json."""

import json
import re
import shutil

import pytest
import tokenizers
from common import bpe_meta, train_bpe
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, processors

from configurator import InputError
from nanomoe import checkpoint
from nanomoe.dataset import Dataset
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, MOE, one_line, run_module, run_script, succeeded, train
from tests.preparing import learned_bpe, write_halves


def learned():
    return learned_bpe(MACBETH[:60_000], 400)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer(learned())


@example(text=MACBETH)
@example(text="# <|endoftext|>\n")
@example(text="日本語には空白がない。ภาษาไทยไม่เว้นวรรค 👍🏽👨‍👩‍👧 e\u0301 é ﬁ \u200b\u2028 עברית")
@example(text="  \r\n\tx\n\n\n \x00\x7f\x80\xa0\xad\ufeff\U0010ffff")
@example(text="a" * 3000)
@settings(max_examples=300, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back(tokenizer, text):
    ids = tokenizer.encode_document(text).tolist()
    assert ids[-1] == tokenizer.eot_token == 0 and 0 not in ids[:-1]
    assert tokenizer.to_bytes(ids[:-1]) == text.encode()


def test_what_is_learned(tokenizer):
    assert train_bpe([MACBETH[:60_000]], 400) == learned()  # the same each time
    assert len(tokenizer.encode(MACBETH)) < 0.6 * len(MACBETH)
    assert tokenizer.encode("a<|endoftext|>").tolist()[-1] == 0  # in a prompt it is the token
    vocab = json.loads(learned()["tokenizer_json"])["model"]["vocab"]
    assert vocab["Ġ"] < 257  # the bytes are first


def given_tokenizer(change):
    """A tokenizer.json that a change has been made to."""
    built = tokenizers.Tokenizer.from_str(learned()["tokenizer_json"])
    change(built)
    return built.to_str()


def test_a_given_tokenizer_adds_and_cuts_nothing(tokenizer):
    """And a text has the same ids each time."""

    def change(built):
        built.enable_truncation(5)
        built.enable_padding(length=50)
        built.add_special_tokens(["<s>", "</s>"])
        built.post_processor = processors.TemplateProcessing(
            "<s> $A </s>", None, [("<s>", 400), ("</s>", 401)]
        )
        built.model.dropout = 0.9

    meta = bpe_meta(given_tokenizer(change))
    given = Tokenizer(meta)
    assert meta["vocab_size"] == 402
    assert given.encode(MACBETH).tolist() == tokenizer.encode(MACBETH).tolist()
    assert given.eot_token == 0 and given.decode([400]) == "<s>"


def llama():
    """BPE on characters, with ids for the bytes of those it does not know."""
    vocab = {"<unk>": 0, "▁": 1, "a": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    return models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True)


def without_bytes_from(limit):
    """Without tokens for some bytes, which only some languages need."""
    built = json.loads(learned()["tokenizer_json"])
    letters = {chr(code) for code in range(limit, 0xF5)}
    tokens = [token for token in built["model"]["vocab"] if not letters & set(token)]
    built["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    merges = [pair for pair in built["model"]["merges"] if not letters & set("".join(pair))]
    return json.dumps(built | {"model": built["model"] | {"merges": merges}})


def with_token(**options):
    token = tokenizers.AddedToken("<name>", **options)
    return given_tokenizer(lambda built: built.add_tokens([token]))


def with_part(name, part):
    return given_tokenizer(lambda built: setattr(built, name, part))


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: without_bytes_from(0xE4), "it loses bytes: 0xe4 has no token"),
        (lambda: with_token(lstrip=True), "the token '<name>' takes spaces away"),
        (lambda: with_token(single_word=True), "the token '<name>' takes spaces away"),
        (lambda: with_part("model", models.WordPiece({"a": 1})), "it is a WordPiece tokenizer"),
        (lambda: with_part("model", llama()), "it is not BPE on bytes"),
        (lambda: with_part("normalizer", normalizers.NFC()), "it loses bytes: it has a normalizer"),
        (
            lambda: with_part("pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)),
            "it loses bytes: .* comes back as",
        ),
        (lambda: "{}", "it is not a tokenizer.json"),
    ],
)
def test_what_is_refused(make, words):
    with pytest.raises(InputError, match=words):
        bpe_meta(make())


def sample(out_dir):
    done = run_script("sample.py", out_dir=out_dir, num_samples=1, max_new_tokens=60, seed=1)
    return succeeded(done)


def test_a_run_carries_its_tokenizer(tmp_path):
    """Its dataset may move. Another tokenizer is refused, a damaged one is found out."""
    data = write_halves(tmp_path / "mine", learned(), MACBETH)
    run = {"dataset": data, "out_dir": tmp_path / "run"}
    assert "bits per byte" in succeeded(train(**run))
    path = checkpoint.latest_good(tmp_path / "run")
    assert (path / "tokenizer.json").read_text() == learned()["tokenizer_json"]
    assert "tokenizer_json" not in (path / "config.json").read_text()
    before = sample(run["out_dir"])
    run["dataset"] = moved = tmp_path / "elsewhere"
    data.rename(moved)
    assert sample(run["out_dir"]) == before
    assert "after step 2" in succeeded(train(**run, init_from="resume", max_iters=4))

    write_halves(moved, learned_bpe(MACBETH[:30_000], 400), MACBETH)  # as many ids, other ones
    one_line(train(**run, init_from="resume", max_iters=6), 2, "elsewhere", "another tokenizer")

    file = checkpoint.latest_good(tmp_path / "run") / "tokenizer.json"
    file.write_text(file.read_text().replace('"', "'", 1))
    with pytest.raises(OSError, match=r"tokenizer\.json is not as it was written"):
        load(file.parent)
    file.unlink()
    with pytest.raises(OSError, match=r"tokenizer\.json is missing"):
        load(file.parent)
    (moved / "tokenizer.json").unlink()
    with pytest.raises(InputError, match=r"elsewhere' has lost .*tokenizer\.json"):
        Dataset(moved, 8)


@pytest.mark.full
def test_tools_need_no_dataset(tmp_path):
    data = write_halves(tmp_path / "mine", learned(), MACBETH)
    run = {"dataset": data, "out_dir": tmp_path / "run", **MOE}
    run |= {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu"}  # as Mixtral
    succeeded(train(**run))
    shutil.rmtree(data)
    one_line(train(**run, init_from="resume", max_iters=4), 2, "mine")
    flags = {"start": "Double, double toil", "num_samples": 1, "max_new_tokens": 5, "seed": 1}
    shown = succeeded(run_script("sample.py", out_dir=run["out_dir"], show_experts=1, **flags))
    assert "Double, double toil" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    page = tmp_path / "page.html"
    succeeded(run_module("tools.xray", run["out_dir"], text="Double, double toil", html=page))
    shown = json.loads(re.search(r'"tokens":(\[.*?"\])', page.read_text())[1])
    assert "".join(shown) == "Double, double toil"
    succeeded(run_module("tools.export_hf", run["out_dir"], f"--folder={tmp_path / 'hf'}"))
    assert sample(tmp_path / "hf")
