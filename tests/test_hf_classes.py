"""Exported to a class of transformers, a model computes the same there and reads back as it was."""

import json
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy

from configurator import InputError
from nanomoe.hf import classes
from nanomoe.hf import tokenizer as hf_tokenizer
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, full, needs_gpt2_tokenizer, small_model, tokens
from tests.hf_models import (
    CHARS,
    MODERN,
    MOE,
    MORE_VARIANTS,
    QK_NORM,
    SIGMOID,
    UNTIED,
    VARIANTS,
    auto,
    export,
    same_logits,
    same_weights,
    transformers,
)
from tests.preparing import learned_bpe


@pytest.mark.parametrize("name", [*VARIANTS, *map(full, MORE_VARIANTS)])
def test_export_and_back(name, tmp_path):
    model, difference = export((VARIANTS | MORE_VARIANTS)[name], tmp_path / "hf")
    assert difference < 1e-4 and [p.name for p in tmp_path.iterdir()] == ["hf"]
    theirs = auto(tmp_path / "hf")
    assert theirs.config.model_type == name.split()[0]
    same_logits(model, theirs)
    found = load(tmp_path / "hf")
    same_weights(found, model)
    assert found.training_file is None and found.step == 0 and found.settings == {}
    # as transformers saves it after a fine-tuning, under other keys; every weight except the
    # constant ones is halved
    constant = classes.extra_tensors(model.config, classes.matching_class(model.config))
    for key, p in theirs.named_parameters():
        if key not in constant:
            p.data /= 2
    theirs.save_pretrained(tmp_path / "tuned")
    tuned = load(tmp_path / "tuned")
    same_logits(tuned.build_model().eval(), theirs)
    trained = dict(model.named_parameters())
    for key, p in found.weights.items():
        assert tuned.weights[key].equal(p / 2 if key in trained else p), key


def test_fine_tuned_in_bfloat16_and_with_a_shared_expert_whose_gate_was_trained(tmp_path):
    model, _ = export(VARIANTS["qwen2_moe shared 1, dense first"], tmp_path / "hf")
    theirs = auto(tmp_path / "hf").to(torch.bfloat16)
    theirs.save_pretrained(tmp_path / "tuned")
    for name, p in load(tmp_path / "tuned").weights.items():
        assert name.endswith("router.load") or p.equal(model.state_dict()[name].bfloat16().float())
        assert p.dtype == torch.float32
    theirs.model.layers[1].mlp.shared_expert_gate.weight.data[0, 3] = 0.1
    theirs.save_pretrained(tmp_path / "tuned")
    words = r"model.layers.1.mlp.shared_expert_gate.weight is not zero$"
    with pytest.raises(InputError, match=words):
        load(tmp_path / "tuned")


MIXED = {"use_moe": True, "num_experts": 2}
ONE = {"num_experts": 1, "top_k": 1}
NEAREST = [
    (MIXED, "Qwen2Moe", "--norm=rmsnorm --position=rope --mlp=swiglu --bias=False"),
    (MIXED | {"bias": False, "norm": "rmsnorm", "position": "rope"}, "Qwen2Moe", "--mlp=swiglu"),
    (MOE | {"bias": True}, "Mixtral", "--bias=False"),
    (MOE | {"route_scale": 2.0}, "Mixtral", "--route_scale=1.0"),
    (MOE | {"bias": True, "route_scale": 2.0}, "Mixtral", "--bias=False --route_scale=1.0"),
    (MOE | QK_NORM | {"num_shared_experts": 1}, "Qwen2Moe", "--qk_norm=False"),
    (SIGMOID | {"moe_stride": 2}, "Qwen2Moe", "--router_score=softmax"),
    (SIGMOID | {"moe_stride": 2, "route_scale": 2.0}, "Glm4Moe", "--moe_stride=1"),
    (SIGMOID | ONE | {"route_scale": 2.0}, "Glm4Moe", "--num_experts=2 or more"),
    ({"mlp": "relu2"}, "GPT2", "--mlp=gelu"),
    ({"n_kv_head": 1}, "GPT2", "--n_kv_head=0"),
    (QK_NORM, "GPT2", "--qk_norm=False"),
    (MODERN | QK_NORM | {"bias": True}, "Llama", "--qk_norm=False"),
    (MODERN | {"position": "learned"}, "Llama", "--position=rope"),
]


@pytest.mark.parametrize("settings, nearest, advice", NEAREST)
def test_refusals_name_the_nearest_class(settings, nearest, advice):
    with pytest.raises(InputError) as error:
        classes.matching_class(small_model(**settings).config)
    start = f"no class of transformers computes this model; the nearest is {nearest}"
    assert str(error.value).startswith((f"{start}For", f"{start}LM"))
    assert str(error.value).endswith(f", for models trained with {advice}")


def test_a_softmax_router_with_a_bias_has_no_class():
    model = small_model(**MOE)
    assert classes.matching_class(model.config, model.state_dict()).model_type == "mixtral"
    model.transformer.h[1].mlp.router.bias[2] = 0.01
    with pytest.raises(InputError, match="--router_bias_update_rate=0"):
        classes.matching_class(model.config, model.state_dict())


def spoil(config):
    config["nanomoe"]["model"]["router_jitter"] = 0.5
    return config


def times(name, factor):
    return lambda weights: weights | {name: weights[name] * factor}


SPOILED = {  # a function of classes.py: how its result is changed, and the error
    "scale": (lambda _: 1, "transformers computes something else"),
    # the likeliest tokens stay
    "export_weights": (times("model.norm.weight", 1.001), "logits differ by .* at 0 of 64 pos"),
    "import_weights": (
        times("transformer.ln_f.weight", 1 + 1e-6),
        "it does not read back as it was: transformer.ln_f.weight$",
    ),
    "hf_config": (spoil, "does not read back as it was: config.json"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_an_export_that_does_not_read_back_is_removed(name, tmp_path, monkeypatch):
    change, words = SPOILED[name]
    function = getattr(classes, name)
    monkeypatch.setattr(classes, name, lambda *args: change(function(*args)))
    with pytest.raises(OSError, match=words):
        export(VARIANTS["qwen2_moe shared 1, dense first"], tmp_path / "hf")
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_that_gives_other_ids_is_removed(tmp_path, monkeypatch):
    build = hf_tokenizer.build_tokenizer
    other = {"chars": CHARS["chars"][::-1]}
    monkeypatch.setattr(hf_tokenizer, "build_tokenizer", lambda meta: build(meta | other))
    with pytest.raises(OSError, match="tokenizer gives different ids"):
        export({}, tmp_path / "hf", CHARS)
    assert not list(tmp_path.iterdir())


OWN_CODE = [  # no class of transformers computes these
    MIXED | {"num_experts": 3, "top_k": 2, "norm_top_k": False, "num_shared_experts": 1},
    full(SIGMOID | QK_NORM | {"moe_stride": 2, "mlp": "relu2"}),
    UNTIED | {"mlp": "relu2"},
]


@pytest.mark.parametrize("settings", OWN_CODE)
def test_export_with_our_own_code(settings, tmp_path):
    model, _ = export(settings, tmp_path / "hf", CHARS, remote=True)
    theirs = auto(tmp_path / "hf", trust_remote_code=True)
    assert type(theirs).__module__.startswith("transformers_modules")
    same_logits(model, theirs)
    same_weights(load(tmp_path / "hf"), model, ignoring="nothing")
    idx = tokens(2, 16)
    labels = idx.clone()
    labels[0, 3] = -100  # which is ignored
    out = theirs(input_ids=idx, labels=labels, attention_mask=torch.ones_like(idx))
    assert (out.loss - cross_entropy(out.logits[:, :-1].mT, labels[:, 1:])).abs() < 1e-5
    out.loss.backward()
    drawn = theirs.generate(idx[:, :4], max_new_tokens=9, do_sample=False)
    assert drawn.equal(model.generate(idx[:, :4], 9, temperature=0))
    # what comes after the tokens does not matter
    padded = torch.cat((torch.ones(2, 14), torch.zeros(2, 2)), dim=1)
    assert theirs(input_ids=idx, attention_mask=padded).logits.equal(out.logits)
    with pytest.raises(ValueError, match="padding before the tokens"):
        theirs(input_ids=idx, attention_mask=padded.flip(1))
    theirs.save_pretrained(tmp_path / "again")
    same_weights(load(tmp_path / "again"), model, ignoring="nothing")


# -----------------------------------------------------------------------------
# tokenizers
TEXTS = ["\n", " ", "", "\n\n  \t \n", CHARS["chars"][5] * 3 + " " + "".join(CHARS["chars"])]
BYTES = [
    MACBETH,
    "  two  spaces   three    four \n\n\n\n end  ",
    "don't we'll I'VE they're 12345 3.14 x²",
    "\r\n\x00\x7f\x80\xa0\xad",
    "Straße naïve 日本語 😀👍🏽 \u200b\u2028 עברית",
    "\u3000 \u00a0x",
    "a" * 1000,
    "a<b>c</b> <|endoftext| > {'k': [1, 2]}",
    "".join(map(chr, range(1, 1000))),
]
GPT2_TEXTS = ["one<|endoftext|>two", "<|endoftext|><|endoftext|>\n", "x <|endoftext|> y"]


TOKENIZERS = [
    (CHARS, TEXTS),
    ({"tokenizer": "byte", "vocab_size": 256}, TEXTS + BYTES),
    ({"tokenizer": "gpt2", "vocab_size": 50257}, TEXTS + BYTES + GPT2_TEXTS),
    ({"tokenizer": "bpe"}, TEXTS + BYTES + GPT2_TEXTS),
]


@pytest.mark.parametrize("meta, texts", TOKENIZERS, ids=["char", "byte", "gpt2", "bpe"])
def test_tokenizers(meta, texts, tmp_path):
    if meta["tokenizer"] == "gpt2":
        needs_gpt2_tokenizer()
    if meta["tokenizer"] == "bpe":
        meta = learned_bpe(MACBETH[:60_000], 400)
    sizes = {"vocab_size": meta["vocab_size"], "n_layer": 1, "n_embd": 8}
    export(sizes, tmp_path / "hf", meta)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(meta)
    assert len(theirs) == ours.vocab_size and load(tmp_path / "hf").tokenizer == meta
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert theirs.eos_token_id == config.get("eos_token_id") == ours.eot_token
    if meta["tokenizer"] == "gpt2":
        new = shutil.ignore_patterns("tokenizer.json", "tokenizer_config.json")
        shutil.copytree(tmp_path / "hf", tmp_path / "old", ignore=new)
        old = transformers.GPT2Tokenizer.from_pretrained(tmp_path / "old")
        assert old(MACBETH[:5000])["input_ids"] == ours.encode(MACBETH[:5000]).tolist()
