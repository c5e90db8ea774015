"""Models of Hugging Face's transformers: exported, they compute the same there, and come back as they were; GPT-2 is read."""

import hashlib
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configurator import InputError
from nanomoe import checkpoint, hf_classes, hf_load
from nanomoe.tokenizer import Tokenizer
from tests.conftest import MACBETH, ROOT, run_script, small_model, tokens
from tests.test_bad_input import one_line
from tests.test_dataset import Bomb

transformers = pytest.importorskip("transformers")

from tools import export_hf  # noqa: E402

MODERN = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "bias": False,
    "n_head": 4,
    "n_layer": 3,
}
MOE = MODERN | {"use_moe": True, "num_experts": 4, "top_k": 2, "expert_dim": 24}
SIGMOID = MOE | {"router_score": "sigmoid"}
CHARS = {"tokenizer": "char", "vocab_size": 50, "chars": [*"\n\t ", *map(chr, range(200, 247))]}

VARIANTS = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "gpt2 tanh, no bias, untied": (
        "GPT2LMHeadModel",
        {"mlp": "gelu_tanh", "bias": False, "tie_weights": False, "mlp_dim": 40, "n_kv_head": 2},
    ),
    "llama": ("LlamaForCausalLM", MODERN | {"n_kv_head": 2}),
    "llama with biases, untied": (
        "LlamaForCausalLM",
        MODERN | {"bias": True, "tie_weights": False, "mlp_dim": 40},
    ),
    "qwen3": ("Qwen3ForCausalLM", MODERN | {"qk_norm": True, "n_kv_head": 1, "tie_weights": False}),
    "mixtral": ("MixtralForCausalLM", MOE | {"n_kv_head": 2, "tie_weights": False}),
    "mixtral, experts as wide as the MLP": (
        "MixtralForCausalLM",
        MOE | {"expert_dim": 0, "top_k": 3},
    ),
    "qwen2 free gates": ("Qwen2MoeForCausalLM", MOE | {"norm_top_k": False, "tie_weights": False}),
    "qwen2 K=1": ("Qwen2MoeForCausalLM", MOE | {"top_k": 1, "n_kv_head": 2}),
    "qwen2 shared 1, dense first": (
        "Qwen2MoeForCausalLM",
        MOE | {"num_shared_experts": 1, "num_dense_layers": 1, "mlp_dim": 40},
    ),
    "qwen2 shared 2, stride": (
        "Qwen2MoeForCausalLM",
        MOE | {"num_shared_experts": 2, "moe_stride": 2, "norm_top_k": False},
    ),
    "qwen3 moe": ("Qwen3MoeForCausalLM", MOE | {"qk_norm": True, "n_kv_head": 2}),
    "qwen3 moe K=1, stride": (
        "Qwen3MoeForCausalLM",
        MOE | {"qk_norm": True, "top_k": 1, "moe_stride": 2, "mlp_dim": 40},
    ),
    "qwen3 moe free gates, untied": (
        "Qwen3MoeForCausalLM",
        MOE | {"qk_norm": True, "norm_top_k": False, "tie_weights": False},
    ),
    "olmoe": (
        "OlmoeForCausalLM",
        MOE | {"qk_norm": True, "qk_norm_over": "width", "norm_top_k": False, "n_kv_head": 2},
    ),
    "olmoe normalised": (
        "OlmoeForCausalLM",
        MOE | {"qk_norm": True, "qk_norm_over": "width", "tie_weights": False},
    ),
    "glm shared 2, dense first": (
        "Glm4MoeForCausalLM",
        SIGMOID
        | {"num_shared_experts": 2, "num_dense_layers": 2, "route_scale": 2.5, "n_kv_head": 2},
    ),
    "glm qk-norm": (
        "Glm4MoeForCausalLM",
        SIGMOID | {"qk_norm": True, "norm_top_k": False, "tie_weights": False},
    ),
    "glm K=1": (
        "Glm4MoeForCausalLM",
        SIGMOID | {"top_k": 1, "num_shared_experts": 1, "qk_norm": True},
    ),
}


def fill(model):
    """Weights that make every part matter, biases of routers too, where they may."""
    generator = torch.Generator().manual_seed(0)
    for name, p in model.state_dict().items():
        if not name.endswith("router.load") and not (
            name.endswith("router.bias") and model.config.router_score == "softmax"
        ):
            scale = p.shape[-1] ** -0.5 if p.dim() > 1 and not name.endswith("bias") else 0.3
            p.copy_(
                scale * torch.randn(p.shape, generator=generator)
                + (p.dim() == 1 and name.endswith("weight"))
            )
    return model.eval()


def as_loaded(model, tokenizer=None):
    return checkpoint.Checkpoint(
        Path("test"), 7, model.config, {}, None, None, model.state_dict(), tokenizer=tokenizer
    )


def export(settings, folder, meta=None, remote=False):
    """A filled model, exported; (model, largest difference)."""
    model = fill(small_model(**settings))
    loaded = as_loaded(model)
    family = (
        hf_classes.REMOTE if remote else hf_classes.matching_class(model.config, loaded.weights)
    )
    return model, export_hf.export(loaded, folder, family, meta)


def auto(folder, **options):
    """The model as transformers loads it, and what it has to say about the tensors."""
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, **options
    )
    return theirs.eval(), {key: value for key, value in info.items() if value}


@torch.no_grad()
def same_logits(ours, theirs, most=1e-5):
    idx = tokens(4, ours.config.block_size, vocab_size=ours.config.vocab_size)
    found, expected = ours(idx, idx)[0], theirs(idx).logits
    assert (found - expected).abs().max() <= most * max(1, expected.abs().max())
    assert found.argmax(-1).equal(expected.argmax(-1))


def same_weights(loaded, model, ignoring="router.load"):
    weights = {
        name: p
        for name, p in model.state_dict().items()
        if name in hf_classes.our_shapes(model.config)
    }
    assert loaded.config == model.config and set(loaded.weights) == set(weights)
    for name, p in weights.items():
        if name.endswith(ignoring):  # as at the start of a run
            p = torch.full_like(p, 1 / model.config.num_experts)
        assert loaded.weights[name].equal(p), name


def change(folder, **keys):
    file = folder / "config.json"
    settings = json.loads(file.read_text()) | keys
    file.write_text(json.dumps({key: value for key, value in settings.items() if value is not ...}))


# -----------------------------------------------------------------------------
# there


@pytest.mark.parametrize("name", VARIANTS)
def test_export_and_back(name, tmp_path):
    cls, settings = VARIANTS[name]
    model, difference = export(settings, tmp_path / "hf")
    assert difference < 1e-4 and [p.name for p in tmp_path.iterdir()] == ["hf"]
    theirs, complaints = auto(tmp_path / "hf")
    assert type(theirs).__name__ == cls and not complaints
    same_logits(model, theirs)
    found = checkpoint.load(tmp_path / "hf")
    same_weights(found, model)
    same_logits(found.build_model().eval(), theirs)
    assert found.weights_only and found.step == 0 and found.settings == {}
    # as transformers saves it after a fine-tuning, under other keys; here every weight but the constant ones is halved
    constant = hf_classes.constant_zero_tensors(
        model.config, hf_classes.matching_class(model.config)
    )
    for key, p in theirs.named_parameters():
        if key not in constant:
            p.data /= 2
    theirs.save_pretrained(tmp_path / "tuned")
    tuned = checkpoint.load(tmp_path / "tuned")
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
    found = checkpoint.load(tmp_path / "tuned")
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
        checkpoint.load(tmp_path / "tuned")


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"use_moe": True, "num_experts": 2}, "--norm=rmsnorm --position=rope --mlp=swiglu"),
        (
            {"use_moe": True, "num_experts": 2, "bias": False}
            | {k: MODERN[k] for k in ("norm", "position")},
            "--mlp=swiglu",
        ),
        (MOE | {"bias": True, "n_head": 2}, "MixtralForCausalLM, trained with --bias=False"),
        (MOE | {"route_scale": 2.0}, "MixtralForCausalLM, trained with --route_scale=1.0"),
        (MOE | {"qk_norm": True, "num_shared_experts": 1}, "trained with --qk_norm=False"),
        (
            MOE | {"qk_norm": True, "qk_norm_over": "width", "num_shared_experts": 1},
            "--qk_norm=False",
        ),
        (
            MOE | {"qk_norm": True, "qk_norm_over": "width", "moe_stride": 2, "route_scale": 2.0},
            "--route_scale=1.0 --qk_norm=False",
        ),
        (SIGMOID | {"moe_stride": 2}, "--router_score=softmax"),
        (
            SIGMOID | {"moe_stride": 2, "route_scale": 2.0},
            "Glm4MoeForCausalLM, trained with --moe_stride=1",
        ),
        (
            SIGMOID | {"qk_norm": True, "qk_norm_over": "width", "num_dense_layers": 1},
            "trained with --qk_norm_over=head",
        ),
        (SIGMOID | {"num_experts": 1, "top_k": 1, "route_scale": 2.0}, "--num_experts=2 or more"),
        ({"mlp": "relu2"}, "GPT2LMHeadModel, trained with --mlp=gelu"),
        ({"n_kv_head": 1}, "trained with --n_kv_head=0"),
        ({"qk_norm": True}, "GPT2LMHeadModel, trained with --qk_norm=False"),
        (MODERN | {"qk_norm": True, "qk_norm_over": "width"}, "--qk_norm=False"),
        (MODERN | {"qk_norm": True, "bias": True}, "--qk_norm=False"),
        (MODERN | {"position": "learned"}, "--position=rope"),
    ],
)
def test_refusals_name_the_nearest_class(settings, words):
    with pytest.raises(InputError) as error:
        hf_classes.matching_class(small_model(**settings).config)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_softmax_router_with_a_bias_has_no_class():
    model = small_model(**MOE)
    assert hf_classes.matching_class(model.config, model.state_dict()).name == "MixtralForCausalLM"
    model.transformer.h[1].mlp.router.bias[2] = 0.01
    with pytest.raises(InputError, match="--router_bias_update_rate=0"):
        hf_classes.matching_class(model.config, model.state_dict())


@pytest.mark.parametrize("part", ["weights", "scale", "back", "tokenizer", "config"])
def test_what_does_not_read_back_is_not_left(part, tmp_path, monkeypatch):
    meta, words = None, "transformers computes something else"
    if part == "weights":
        monkeypatch.setattr(hf_classes, "scale", lambda *_: 1)
    elif part == "scale":  # the likeliest tokens stay
        write, words = hf_classes.export_weights, r"logits differ by .* at 0 of 64 positions"
        monkeypatch.setattr(
            hf_classes,
            "export_weights",
            lambda *args: {
                name: p * (1.001 if name == "model.norm.weight" else 1)
                for name, p in write(*args).items()
            },
        )
    elif part == "back":
        read, words = (
            hf_classes.import_weights,
            r"it does not read back as it was: transformer.ln_f.weight$",
        )
        monkeypatch.setattr(
            hf_classes,
            "import_weights",
            lambda *args: {
                name: p + (1e-6 if name == "transformer.ln_f.weight" else 0)
                for name, p in read(*args).items()
            },
        )
    elif part == "tokenizer":
        build, meta, words = export_hf.build_tokenizer, CHARS, "tokenizer of transformers"
        monkeypatch.setattr(
            export_hf, "build_tokenizer", lambda meta: build(meta | {"chars": meta["chars"][::-1]})
        )
    else:
        describe, words = hf_classes.hf_config, "config.json"
        monkeypatch.setattr(
            hf_classes,
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
        SIGMOID | {"moe_stride": 2, "mlp": "relu2", "qk_norm": True, "qk_norm_over": "width"},
        {"mlp": "relu2", "tie_weights": False},
    ],
)
def test_our_own_code(settings, tmp_path):
    model, _ = export(settings, tmp_path / "hf", CHARS, remote=True)
    theirs, complaints = auto(tmp_path / "hf", trust_remote_code=True)
    assert not complaints and type(theirs).__module__.startswith("transformers_modules")
    same_logits(model, theirs)
    same_weights(checkpoint.load(tmp_path / "hf"), model, ignoring="nothing")
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
    )  # what stands behind does not matter
    assert theirs(input_ids=idx, attention_mask=padded).logits.equal(out.logits)
    with pytest.raises(ValueError, match="padding before the tokens"):
        theirs(input_ids=idx, attention_mask=padded.flip(1))
    theirs.save_pretrained(tmp_path / "again")
    same_weights(checkpoint.load(tmp_path / "again"), model, ignoring="nothing")


# -----------------------------------------------------------------------------
# tokenizers


@pytest.mark.parametrize("kind", ["char", "byte", "gpt2"])
def test_tokenizers(kind, tmp_path):
    meta = (
        CHARS
        if kind == "char"
        else {"tokenizer": kind, "vocab_size": {"byte": 256, "gpt2": 50257}[kind]}
    )
    export({"vocab_size": meta["vocab_size"], "n_layer": 1}, tmp_path / "hf", meta)
    theirs, ours = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf"), Tokenizer(meta)
    assert len(theirs) == ours.vocab_size and checkpoint.load(tmp_path / "hf").tokenizer == meta
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


# -----------------------------------------------------------------------------
# and back: OpenAI's GPT-2


def gpt2(**settings):
    torch.manual_seed(1)
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            **{"vocab_size": 50, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 4}
            | settings
        )
    ).eval()
    for p in theirs.parameters():
        p.data = torch.randn(p.shape) * (p.shape[0] ** -0.5 if p.dim() > 1 else 0.3)
    return theirs


def save_as_hub(theirs, folder, suffix=".safetensors"):
    """As the hub's gpt2: without a prefix and a head, with masks, no keys but those of 2019."""
    weights = {
        name.removeprefix("transformer."): p.contiguous()
        for name, p in theirs.state_dict().items()
        if "lm_head" not in name
    }
    for i in range(theirs.config.n_layer):
        weights |= {
            f"h.{i}.attn.bias": torch.ones(1, 1, 16, 16).tril(),
            f"h.{i}.attn.masked_bias": torch.tensor(-1e4),
        }
    folder.mkdir()
    if suffix == ".bin":
        torch.save(
            weights | {"lm_head.weight": weights["wte.weight"]}, folder / "pytorch_model.bin"
        )
    else:
        save_file(weights, folder / "model.safetensors")
    c = theirs.config
    (folder / "config.json").write_text(
        json.dumps(
            {
                "activation_function": c.activation_function,
                "architectures": ["GPT2LMHeadModel"],
                "attn_pdrop": 0.1,
                "layer_norm_epsilon": 1e-05,
                "model_type": "gpt2",
                "n_ctx": 16,
                "n_embd": c.n_embd,
                "n_head": c.n_head,
                "n_layer": c.n_layer,
                "n_positions": 16,
                "task_specific_params": {},
                "vocab_size": c.vocab_size,
            }
        )
    )
    return folder


@pytest.mark.parametrize(
    "form", ["hub", "bin", "saved", "shards", "file", "gelu", "untied", "inner"]
)
def test_import_gpt2(form, tmp_path):
    theirs = gpt2(
        **{
            "gelu": {"activation_function": "gelu"},
            "untied": {"tie_word_embeddings": False},
            "inner": {"n_inner": 72},
            "saved": {"activation_function": "gelu_pytorch_tanh"},
        }.get(form, {})
    )
    folder = where = tmp_path / "gpt2"
    if form in ("hub", "bin", "file"):
        save_as_hub(theirs, folder, ".bin" if form == "bin" else ".safetensors")
        where = folder / "model.safetensors" if form == "file" else folder
    else:
        theirs.save_pretrained(folder, **{"max_shard_size": "20KB"} if form == "shards" else {})
        assert len(list(folder.glob("*.safetensors"))) > 1 or form != "shards"
    found = checkpoint.load(where)
    assert (
        found.config.mlp == ("gelu" if form == "gelu" else "gelu_tanh")
        and found.config.vocab_size == 50
    )
    assert (
        found.tokenizer is None
        and found.weights_only
        and found.step == 0
        and found.config.dropout == 0
    )
    same_logits(found.build_model().eval(), theirs)
    assert checkpoint.locate(where) == checkpoint.latest_good(where) == where


def test_sample_from_gpt2_and_export_it_again(tmp_path):
    theirs = gpt2(vocab_size=50257, n_embd=8, n_layer=1)
    folder = save_as_hub(theirs, tmp_path / "gpt2")
    done = run_script(
        "sample.py", init_from=folder, start="To be", num_samples=1, max_new_tokens=5, device="cpu"
    )
    assert done.returncode == 0 and done.stdout.startswith("To be"), done.stderr
    found = checkpoint.load(folder)
    assert found.tokenizer == {"tokenizer": "gpt2", "vocab_size": 50257}
    padded = checkpoint.load(save_as_hub(gpt2(vocab_size=50304, n_embd=8), tmp_path / "padded"))
    assert padded.config.vocab_size == 50304 and padded.tokenizer == found.tokenizer
    export_hf.export(
        found, tmp_path / "again", hf_classes.matching_class(found.config, found.weights)
    )
    back = checkpoint.load(tmp_path / "again")
    assert back.config == found.config and all(
        p.equal(found.weights[name]) for name, p in back.weights.items()
    )


# -----------------------------------------------------------------------------
# bad input


@pytest.mark.parametrize(
    "keys, words",
    [
        (
            {"model_type": "opt"},
            ["its model_type is 'opt'", "expected 'gpt2' or a model that tools/export_hf.py wrote"],
        ),
        (
            {
                "activation_function": "relu",
                "scale_attn_by_inverse_layer_idx": True,
                "layer_norm_epsilon": 1e-6,
                "scale_attn_weights": False,
            },
            [
                "activation_function is 'relu', expected one of gelu, gelu_new",
                "layer_norm_epsilon is 1e-06, expected 1e-05",
                "scale_attn_by_inverse_layer_idx is True",
                "scale_attn_weights is False",
            ],
        ),
        ({"reorder_and_upcast_attn": True}, ["reorder_and_upcast_attn is True, expected False"]),
        ({"n_head": 5}, ["n_embd (32) is not divisible by n_head (5)"]),
        ({"n_head": "4"}, ["cannot be read"]),
        (
            {"n_embd": None, "vocab_size": 1.5},
            ["n_embd is None, expected a whole number", "vocab_size is 1.5"],
        ),
        ({"n_embd": ...}, ["config.json has no 'n_embd'"]),
        ({"n_ctx": ..., "n_positions": ...}, ["config.json has no 'n_ctx'"]),
        (
            {"vocab_size": 60, "n_layer": 1},
            [
                "transformer.wte.weight: expected (60, 32), found (50, 32)",
                "transformer.h.1.attn.c_attn.weight is unknown",
                "transformer.h.1.ln_2.bias is unknown",
            ],
        ),
        (
            {"n_inner": 64},
            [
                "h.0.mlp.c_fc.weight: expected (32, 64), found (32, 128)",
                "h.1.mlp.c_proj.weight: expected (64, 32)",
                "h.1.mlp.c_fc.bias: expected (64,), found (128,)",
            ],
        ),
        (
            {"n_layer": 3, "tie_word_embeddings": False},
            [
                "transformer.h.2.ln_1.weight is missing",
                "h.2.mlp.c_proj.bias is missing",
                "lm_head.weight is missing",
            ],
        ),
    ],
)
def test_other_architectures_and_tensors(keys, words, tmp_path):
    folder = save_as_hub(gpt2(), tmp_path / "gpt2")
    change(folder, **keys)
    with pytest.raises(InputError) as error:
        checkpoint.load(folder)
    for word in (str(folder), *words):
        assert word in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "keys, words",
    [
        (
            {"rms_norm_eps": 1e-6, "num_experts_per_tok": 1},
            ["rms_norm_eps is 1e-06, expected 1e-05", "num_experts_per_tok is 1, expected 2"],
        ),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5}},
            [
                "rope_type is 'linear', expected 'default'",
                "rope_theta is 500000.0, expected 10000.0",
            ],
        ),
        ({"rope_scaling": {"rope_type": "yarn"}}, ["rope_type is 'yarn'"]),
        ({"model_type": "mistral"}, ["model_type is 'mistral'"]),
        ({"hidden_act": ...}, ["hidden_act is None, expected 'silu'"]),
        ({"num_local_experts": 5}, ["num_experts is 5, expected 4"]),
        ({"nanomoe": {}}, ["config.json has no 'model'"]),
        ({"nanomoe": {"model": {"n_layer": 0}}}, ["n_layer is 0"]),
        ({"nanomoe": 3}, ["cannot be read"]),
    ],
)
def test_an_export_that_was_edited(keys, words, tmp_path):
    export(VARIANTS["mixtral"][1], tmp_path / "hf")
    change(tmp_path / "hf", **keys)
    with pytest.raises(InputError) as error:
        checkpoint.load(tmp_path / "hf")
    for word in words:
        assert word in str(error.value)


def test_damaged_files(tmp_path):
    folder = tmp_path / "gpt2"
    gpt2().save_pretrained(folder, max_shard_size="20KB")
    shard = sorted(folder.glob("*.safetensors"))[1]
    whole = shard.read_bytes()
    shard.write_bytes(whole[:100])
    with pytest.raises(OSError, match=f"{shard.name} is damaged"):
        checkpoint.load(folder)
    shard.unlink()
    with pytest.raises(OSError, match=f"{shard.name} is missing"):
        checkpoint.load(folder)
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(OSError, match=r"index.json is damaged"):
        checkpoint.load(folder)
    for file in folder.glob("model*"):
        file.unlink()
    with pytest.raises(InputError, match=r"it has no weights, expected model.safetensors"):
        checkpoint.load(folder)
    torch.save({"wte.weight": Bomb()}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin is refused"):
        checkpoint.load(folder)
    torch.save({"wte.weight": 3}, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"pytorch_model.bin holds something else than tensors"):
        checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(OSError, match=r"config.json is damaged"):
        checkpoint.load(folder)
    save_file({"a": torch.ones(1)}, tmp_path / "alone.safetensors")
    with pytest.raises(InputError, match=r"needs its config.json beside it"):
        checkpoint.load(tmp_path / "alone.safetensors")


def test_integers_and_an_untied_head_are_refused(tmp_path):
    folder = save_as_hub(gpt2(), tmp_path / "gpt2")
    weights = load_file(folder / "model.safetensors")
    weights["h.1.mlp.c_fc.weight"] = weights["h.1.mlp.c_fc.weight"].to(torch.int8)
    weights["lm_head.weight"] = weights["wte.weight"] + 1
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(
        InputError,
        match=r"c_fc.weight: expected .* of torch.int8; lm_head.weight is not the embedding",
    ):
        checkpoint.load(folder)


def test_what_counts_as_a_name_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out").mkdir()
    assert all(
        map(
            hf_load.looks_like_hub_id,
            (
                "gpt2",
                "gpt2-xl",
                "org/model",
                "openai-community/gpt2",
                "a-b/c.d_e-1",
                Path("org/model"),
            ),
        )
    )
    assert not any(
        map(
            hf_load.looks_like_hub_id,
            ("gpt3", "out/run", "a/b/c", "/a/b", "./a", "../a", "org/", "/org", "a/b c", "no", ""),
        )
    )
    with pytest.raises(InputError, match=r"^no checkpoint at out/run: no such file or folder$"):
        checkpoint.load("out/run", on_hub=True)
    assert not checkpoint.exists("not/there-yet")  # which asks no one
    (tmp_path / "gpt2").mkdir()
    assert not hf_load.looks_like_hub_id("gpt2")
    with pytest.raises(InputError, match="no checkpoint in gpt2"):
        checkpoint.load("gpt2", on_hub=True)


# -----------------------------------------------------------------------------
# the hub


@pytest.fixture
def serve():
    """A function of folders by name that starts a small hub; its address and the list of what it was asked."""
    servers = []

    def start(repos, private=()):
        asked = []

        class Hub(http.server.BaseHTTPRequestHandler):
            def do_GET(self, body=True):
                asked.append(self.path)
                api = re.match(r"/api/models/(\w+/\w+)(/tree/)?", self.path)
                resolve = re.match(r"/(\w+/\w+)/resolve/\w+/(.*)", self.path)
                name, more = (api or resolve).groups() if api or resolve else ("", "")
                if name not in repos:
                    return self.answer(
                        401 if name in private else 404, {"X-Error-Code": "RepoNotFound"}, b"", body
                    )
                files, extra = list(repos[name].iterdir()), {}
                if resolve:
                    data = (repos[name] / more).read_bytes()
                    extra = {
                        "ETag": f'"{hashlib.sha1(data).hexdigest()}"',
                        "X-Repo-Commit": "0" * 40,
                    }
                elif more:
                    data = json.dumps(
                        [
                            {
                                "type": "file",
                                "path": p.name,
                                "size": p.stat().st_size,
                                "oid": "1" * 40,
                            }
                            for p in files
                        ]
                    ).encode()
                else:
                    data = json.dumps(
                        {
                            "id": name,
                            "sha": "0" * 40,
                            "siblings": [{"rfilename": p.name} for p in files],
                        }
                    ).encode()
                self.answer(200, extra, data, body)

            def answer(self, code, headers, data, body):
                self.send_response(code)
                for key, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def do_HEAD(self):
                self.do_GET(body=False)

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def use_hub(monkeypatch, tmp_path):
    """A function of an address that makes it the hub, with an empty cache for the test; returns checkpoint.load, which in turn
    returns the message if it fails."""
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.setattr(hf_load, "SECONDS", 2)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")

    def use(address, offline=False):
        for key, value in (
            ("ENDPOINT", address),
            ("HF_HUB_OFFLINE", offline),
            ("HF_HUB_CACHE", str(tmp_path / "cache")),
            ("HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"),
        ):
            monkeypatch.setattr(constants, key, value)

        def load(name):
            try:
                return checkpoint.load(name, on_hub=True)
            except (InputError, OSError) as error:
                assert "\n" not in str(error)
                return f"{type(error).__name__}: {error}"

        return load

    return use


def test_download_and_cache(serve, use_hub, tmp_path):
    theirs = gpt2()
    tiny = save_as_hub(theirs, tmp_path / "tiny")
    (tiny / "README.md").write_text("not needed")
    gpt2(vocab_size=60).save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    pickled = save_as_hub(gpt2(), tmp_path / "pickled", ".bin")
    repos = {"org/tiny": tiny, "org/shards": tmp_path / "shards", "org/pickled": pickled}
    address, asked = serve(repos, private=["org/hidden"])
    load = use_hub(address)
    # others fetch a config alone
    from huggingface_hub import hf_hub_download

    hf_hub_download("org/tiny", "config.json", cache_dir=tmp_path / "cache")
    same_logits(load("org/tiny").build_model().eval(), theirs)
    assert load("org/shards").config.vocab_size == 60
    assert load("org/pickled").startswith(
        "InputError: org/pickled on the hub has no config.json with a model.safetensors"
    )
    for name in ("org/nothing", "org/hidden"):
        assert load(name) == (
            f"InputError: no checkpoint at {name}: no such file or folder here, and no model {name} on "
            f"{address}, or it is private (then: hf auth login)"
        )
    assert "no model openai-community/gpt2-xl on" in load("gpt2-xl") and not any(
        "README" in path for path in asked
    )
    # from then on without a network; but half a download is none
    load = use_hub("http://127.0.0.1:9")
    assert load("org/tiny").config.vocab_size == 50 and load("org/shards").config.vocab_size == 60
    next((tmp_path / "cache").rglob("snapshots/*/model-00002*")).unlink()
    assert load("org/shards").startswith("OSError: no checkpoint at org/shards")


def test_without_a_network(use_hub):
    deaf = http.server.HTTPServer(
        ("127.0.0.1", 0), http.server.BaseHTTPRequestHandler
    )  # takes connections, answers nothing
    for address in ("http://127.0.0.1:9", f"http://127.0.0.1:{deaf.server_port}"):
        start = time.perf_counter()
        assert use_hub(address)("gpt2").startswith(
            "OSError: no checkpoint at gpt2: no such file or folder here, and "
            f"openai-community/gpt2 could not be fetched from {address} ("
        )
        assert time.perf_counter() - start < 10
    deaf.server_close()
    assert "HF_HUB_OFFLINE forbids to fetch org/name" in use_hub(
        "http://127.0.0.1:9", offline=True
    )("org/name")


def test_sample_without_a_network(tmp_path):
    env = {
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
        "HF_ENDPOINT": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "sample.py"), "--init_from=gpt2", "--device=cpu"],
        env=os.environ | env,
        capture_output=True,
        text=True,
        timeout=120,
    )
    one_line(done, 1, "no checkpoint at gpt2", "could not be fetched from http://127.0.0.1:9")


# -----------------------------------------------------------------------------
# the command


def write_checkpoint(folder, settings, **run):
    model = fill(small_model(**settings))
    weights = {
        name: p
        for name, p in model.state_dict().items()
        if name in hf_classes.our_shapes(model.config)
    }
    folder.mkdir()
    checkpoint.write(
        folder,
        3,
        weights,
        {"optimizer": {}},
        {
            "step": 3,
            "model": hf_classes.config_to_dict(model.config),
            "run": run,
            "val_loss": None,
            "best_val_loss": None,
            "seconds": 0,
        },
    )
    return model


@pytest.fixture
def command(monkeypatch, capsys):
    """tools.export_hf's main with these arguments; returns its output, or the message with which it ends."""

    def call(*arguments):
        for key in ("out_dir", "folder", "dataset", "remote_code"):
            monkeypatch.setattr(export_hf, key, "" if key != "remote_code" else False)
        monkeypatch.setattr(sys, "argv", ["export_hf", *map(str, arguments)])
        try:
            export_hf.main()
        except (InputError, OSError) as error:
            assert "\n" not in str(error)
            return f"{type(error).__name__}: {error}"
        out, err = capsys.readouterr()
        assert not err
        return out

    return call


def run_command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "tools.export_hf", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
    )


def test_command(play, tmp_path, command):
    data, out, hf = (
        shutil.copytree(play, tmp_path / "data"),
        tmp_path / "out",
        tmp_path / "new" / "hf",
    )
    chars = json.loads((data / "meta.json").read_text())["chars"]
    model = write_checkpoint(out, MOE | {"vocab_size": len(chars)}, dataset=str(data))
    done = run_command(out, hf)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert (
        len(lines) == 3
        and "after 3 steps: MixtralForCausalLM (softmax router" in lines[0]
        and "differ by" in lines[1]
    )
    assert lines[2].startswith(f"{hf}: 0.") and lines[2].endswith("with the tokenizer 'char'")
    assert {p.name for p in hf.iterdir()} == {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    found = checkpoint.load(hf)
    same_weights(found, model)
    assert found.tokenizer == {"tokenizer": "char", "vocab_size": len(chars), "chars": chars}
    done = run_script(
        "sample.py", init_from=hf, start=MACBETH[:20], num_samples=1, max_new_tokens=5, device="cpu"
    )
    assert done.returncode == 0 and done.stdout.startswith(MACBETH[:20]), done.stderr
    before = {p: p.stat().st_mtime_ns for p in hf.iterdir()}
    assert command(out, hf).endswith("new/hf exists, and is not an empty folder")
    assert before == {p: p.stat().st_mtime_ns for p in hf.iterdir()}
    # without its dataset, and into a folder that is there but empty
    shutil.move(data, tmp_path / "moved")
    (tmp_path / "empty").mkdir()
    printed = command(out, tmp_path / "empty")
    assert (
        "without a tokenizer: " in printed
        and "there is no dataset" in printed
        and "--dataset=" in printed
    )
    assert {p.name for p in (tmp_path / "empty").iterdir()} == {"config.json", "model.safetensors"}
    assert "with the tokenizer 'char'" in command(
        out, tmp_path / "named", f"--dataset={tmp_path / 'moved'}"
    )
    assert command(out, tmp_path / "bad", "--dataset=nothing").startswith(
        "InputError: there is no dataset 'nothing'"
    )
    (tmp_path / "moved" / "meta.json").write_text(
        json.dumps({"tokenizer": "byte", "vocab_size": 256, "dtype": "uint16"})
    )
    assert "has 256 token ids, the model of" in command(
        out, tmp_path / "bad", f"--dataset={tmp_path / 'moved'}"
    )
    assert not list(tmp_path.glob("bad*"))


def test_command_says_no(tmp_path, command):
    for arguments, words in (
        ([], "expected a checkpoint and a new folder"),
        (["a"], "expected a checkpoint"),
        (["a", "b", "c"], "expected a checkpoint"),
        (["a", ROOT / "README.md"], "is not an empty folder"),
        (["nowhere", tmp_path / "hf"], "no checkpoint at nowhere"),
    ):
        found = command(*arguments)
        assert found.startswith("InputError: ") and words in found
    write_checkpoint(tmp_path / "out", {"use_moe": True})
    one_line(
        run_command(tmp_path / "out", tmp_path / "hf"),
        2,
        "--norm=rmsnorm --position=rope --mlp=swiglu",
        "or export it with --remote_code=True",
    )
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    printed = command(tmp_path / "out", tmp_path / "hf", "--remote_code=True")
    assert (
        "NanoMoEForCausalLM" in printed and "came without a tokenizer; or give its place" in printed
    )
    assert (tmp_path / "hf" / "modeling_nanomoe.py").exists()


def test_transformers_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(InputError, match="pip install transformers"):
        export_hf.import_transformers()
