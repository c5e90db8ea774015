"""Exported to a class of transformers, a model computes the same there and reads back as it was."""

import json
import shutil

import pytest
import torch

from configurator import InputError
from nanomoe.hf import classes
from nanomoe.hf import tokenizer as hf_tokenizer
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer
from tests.helpers import MACBETH, needs_gpt2_tokenizer, small_model, tokens
from tests.hf_models import (
    CHARS,
    MODERN,
    MOE,
    SIGMOID,
    VARIANTS,
    auto,
    export,
    same_logits,
    same_weights,
    transformers,
)


@pytest.mark.parametrize("name", VARIANTS)
def test_export_and_back(name, tmp_path):
    cls, settings = VARIANTS[name]
    model, difference = export(settings, tmp_path / "hf")
    assert difference < 1e-4 and [p.name for p in tmp_path.iterdir()] == ["hf"]
    theirs, complaints = auto(tmp_path / "hf")
    assert type(theirs).__name__ == cls and not complaints
    same_logits(model, theirs)
    found = load(tmp_path / "hf")
    same_weights(found, model)
    same_logits(found.build_model().eval(), theirs)
    assert not found.has_training_state and found.step == 0 and found.settings == {}
    # as transformers saves it after a fine-tuning, under other keys; every weight except the
    # constant ones is halved
    constant = classes.extra_tensors(model.config, classes.matching_class(model.config))
    for key, p in theirs.named_parameters():
        if key not in constant:
            p.data /= 2
    theirs.save_pretrained(tmp_path / "tuned")
    tuned = load(tmp_path / "tuned")
    same_logits(tuned.build_model().eval(), theirs)
    assert all(
        tuned.weights[key].equal(
            p / (2 if dict(model.named_parameters()).get(key) is not None else 1)
        )
        for key, p in found.weights.items()
    )


def test_fine_tuned_in_bfloat16(tmp_path):
    model, _ = export(VARIANTS["qwen2 shared 1, dense first"][1], tmp_path / "hf")
    auto(tmp_path / "hf")[0].to(torch.bfloat16).save_pretrained(tmp_path / "tuned")
    found = load(tmp_path / "tuned")
    for name, p in found.weights.items():
        assert name.endswith("router.load") or p.equal(model.state_dict()[name].bfloat16().float())
        assert p.dtype == torch.float32


def test_a_shared_expert_whose_gate_was_trained_is_refused(tmp_path):
    export(VARIANTS["qwen2 shared 1, dense first"][1], tmp_path / "hf")
    theirs = auto(tmp_path / "hf")[0]
    theirs.model.layers[1].mlp.shared_expert_gate.weight.data[0, 3] = 0.1
    theirs.save_pretrained(tmp_path / "tuned")
    with pytest.raises(
        InputError, match=r"model.layers.1.mlp.shared_expert_gate.weight is not zero$"
    ):
        load(tmp_path / "tuned")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_moe": True, "num_experts": 2}, "--norm=rmsnorm --position=rope --mlp=swiglu"),
        (
            {"use_moe": True, "num_experts": 2, "bias": False}
            | {k: MODERN[k] for k in ("norm", "position")},
            "--mlp=swiglu",
        ),
        (
            MOE | {"bias": True, "n_head": 2},
            "MixtralForCausalLM, for models trained with --bias=False",
        ),
        (
            MOE | {"route_scale": 2.0},
            "MixtralForCausalLM, for models trained with --route_scale=1.0",
        ),
        (MOE | {"qk_norm": True, "num_shared_experts": 1}, "trained with --qk_norm=False"),
        (
            MOE | {"bias": True, "route_scale": 2.0},
            "MixtralForCausalLM, for models trained with --bias=False --route_scale=1.0",
        ),
        (SIGMOID | {"moe_stride": 2}, "--router_score=softmax"),
        (
            SIGMOID | {"moe_stride": 2, "route_scale": 2.0},
            "Glm4MoeForCausalLM, for models trained with --moe_stride=1",
        ),
        (SIGMOID | {"num_experts": 1, "top_k": 1, "route_scale": 2.0}, "--num_experts=2 or more"),
        ({"mlp": "relu2"}, "GPT2LMHeadModel, for models trained with --mlp=gelu"),
        ({"n_kv_head": 1}, "trained with --n_kv_head=0"),
        ({"qk_norm": True}, "GPT2LMHeadModel, for models trained with --qk_norm=False"),
        (MODERN | {"qk_norm": True, "bias": True}, "--qk_norm=False"),
        (MODERN | {"position": "learned"}, "--position=rope"),
    ],
)
def test_refusals_name_the_nearest_class(settings, words):
    with pytest.raises(InputError) as error:
        classes.matching_class(small_model(**settings).config)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_softmax_router_with_a_bias_has_no_class():
    model = small_model(**MOE)
    assert classes.matching_class(model.config, model.state_dict()).name == "MixtralForCausalLM"
    model.transformer.h[1].mlp.router.bias[2] = 0.01
    with pytest.raises(InputError, match="--router_bias_update_rate=0"):
        classes.matching_class(model.config, model.state_dict())


@pytest.mark.parametrize("part", ["weights", "scale", "back", "tokenizer", "config"])
def test_an_export_that_does_not_read_back_is_removed(part, tmp_path, monkeypatch):
    meta, words = None, "transformers computes something else"
    if part == "weights":
        monkeypatch.setattr(classes, "scale", lambda *_: 1)
    elif part == "scale":  # the likeliest tokens stay
        write, words = classes.export_weights, r"logits differ by .* at 0 of 64 positions"
        monkeypatch.setattr(
            classes,
            "export_weights",
            lambda *args: {
                name: p * (1.001 if name == "model.norm.weight" else 1)
                for name, p in write(*args).items()
            },
        )
    elif part == "back":
        read, words = (
            classes.import_weights,
            r"it does not read back as it was: transformer.ln_f.weight$",
        )
        monkeypatch.setattr(
            classes,
            "import_weights",
            lambda *args: {
                name: p + (1e-6 if name == "transformer.ln_f.weight" else 0)
                for name, p in read(*args).items()
            },
        )
    elif part == "tokenizer":
        build, meta, words = hf_tokenizer.build_tokenizer, CHARS, "tokenizer gives different ids"
        monkeypatch.setattr(
            hf_tokenizer,
            "build_tokenizer",
            lambda meta: build(meta | {"chars": meta["chars"][::-1]}),
        )
    else:
        describe, words = classes.hf_config, "config.json"
        monkeypatch.setattr(
            classes,
            "hf_config",
            lambda c, *more: (
                describe(c, *more)
                | {
                    "nanomoe": {
                        "model": {**vars(c), "use_moe": True, "router_jitter": 0.5},
                        "tokenizer": None,
                    }
                }
            ),
        )
    with pytest.raises(OSError, match=words):
        export(VARIANTS["qwen2 shared 1, dense first"][1], tmp_path / "hf", meta)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "settings",
    [
        {
            "use_moe": True,
            "num_experts": 3,
            "top_k": 2,
            "norm_top_k": False,
            "num_shared_experts": 1,
        },
        SIGMOID | {"moe_stride": 2, "mlp": "relu2", "qk_norm": True},
        {"mlp": "relu2", "tie_weights": False},
    ],
)
def test_export_with_our_own_code(settings, tmp_path):
    model, _ = export(settings, tmp_path / "hf", CHARS, remote=True)
    theirs, complaints = auto(tmp_path / "hf", trust_remote_code=True)
    assert not complaints and type(theirs).__module__.startswith("transformers_modules")
    same_logits(model, theirs)
    same_weights(load(tmp_path / "hf"), model, ignoring="nothing")
    idx = tokens(2, 16)
    labels = idx.clone()
    labels[0, 3] = -100
    out = theirs(input_ids=idx, labels=labels, attention_mask=torch.ones_like(idx))
    expected = torch.nn.functional.cross_entropy(
        out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    assert (out.loss - expected).abs() < 1e-5
    out.loss.backward()
    drawn = theirs.generate(idx[:, :4], max_new_tokens=9, do_sample=False)
    assert drawn.equal(model.generate(idx[:, :4], 9, temperature=0))
    padded = torch.cat(
        (torch.ones(2, 14), torch.zeros(2, 2)), dim=1
    )  # what comes after the tokens does not matter
    assert theirs(input_ids=idx, attention_mask=padded).logits.equal(out.logits)
    with pytest.raises(ValueError, match="padding before the tokens"):
        theirs(input_ids=idx, attention_mask=padded.flip(1))
    theirs.save_pretrained(tmp_path / "again")
    same_weights(load(tmp_path / "again"), model, ignoring="nothing")


# -----------------------------------------------------------------------------
# tokenizers
@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_tokenizers(kind, tmp_path):
    if kind == "gpt2":
        needs_gpt2_tokenizer()
    meta = (
        CHARS
        if kind == "char"
        else {"tokenizer": kind, "vocab_size": {"byte": 256, "gpt2": 50257}[kind]}
    )
    export({"vocab_size": meta["vocab_size"], "n_layer": 1}, tmp_path / "hf", meta)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(meta)
    assert len(theirs) == ours.vocab_size and load(tmp_path / "hf").tokenizer == meta
    texts = ["\n", " ", "", "\n\n  \t \n", CHARS["chars"][5] * 3 + " " + "".join(CHARS["chars"])]
    if kind != "char":
        texts += [
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
    if kind == "gpt2":
        texts += ["one<|endoftext|>two", "<|endoftext|><|endoftext|>\n", "x <|endoftext|> y"]
        assert (
            theirs.eos_token_id
            == json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"]
            == 50256
        )
        old = transformers.GPT2Tokenizer.from_pretrained(
            shutil.copytree(
                tmp_path / "hf",
                tmp_path / "old",
                ignore=lambda *_: ["tokenizer.json", "tokenizer_config.json"],
            )
        )
        assert old(MACBETH[:5000])["input_ids"] == ours.encode(MACBETH[:5000]).tolist()
    for text in texts:
        ids = theirs(text)["input_ids"]
        assert ids == ours.encode(text).tolist(), text
        assert theirs.decode(ids) == text
