"""sample.py as a user runs it: the terminal, seeds, conversations, bad input."""

import io
import json
import os
import re
import signal
import subprocess
import sys

import pytest
import torch

import sample as script
from nanomoe import checkpoint
from nanomoe.load import load
from nanomoe.tokenizer import Tokenizer, load_meta
from tests.helpers import (
    ROOT,
    flags,
    needs_gpt2_tokenizer,
    one_line,
    run_script,
    save_step,
    saver_for,
    small_model,
    succeeded,
)

END = "\n---------------\n"


def text_of(done):
    return done.stdout.removesuffix(END)


def write(out_dir, model, dataset):
    """A run's folder with a checkpoint of a model."""
    out_dir.mkdir()
    facts = {"run": {"dataset": str(dataset)}, "best_val_loss": 1.0}
    with saver_for(out_dir, model, torch.optim.SGD(model.parameters()), **facts) as saver:
        save_step(saver, 1, val_loss=1.0)
    return out_dir


def sample(out_dir, *args, **settings):
    run = {"out_dir": out_dir, "dtype": "float32", "device": "cpu", "start": "MACBETH:"}
    run |= {"num_samples": 1, "max_new_tokens": 60}
    done = run_script("sample.py", *args, **run | settings)
    assert done.returncode == 0, done.stderr
    return done


def test_samples_are_repeated_by_their_seed(moe_run):
    """Three at once, one by one, uncached, and shorter. The speed goes to stderr."""
    done = sample(moe_run, num_samples=3, seed=5)
    *texts, rest = done.stdout.split(END)
    assert len(texts) == len(set(texts)) == 3 and rest == ""
    assert all(text.startswith("MACBETH:") and len(text) == 68 for text in texts)
    assert re.fullmatch(r"180 tokens in \d+\.\d\d s: [\d,]+\.\d tokens/s\n", done.stderr)
    for i, options in ((0, {}), (1, {"cached": False}), (2, {"max_new_tokens": 20})):
        text = text_of(sample(moe_run, seed=5 + i, **options))
        assert text == texts[i][: 8 + options.get("max_new_tokens", 60)]


def test_every_flag_of_the_draw_counts(moe_run):
    """How, is in test_sampling.py."""

    def text(**options):
        return sample(moe_run, **{"seed": 5} | options).stdout

    greedy = sample(moe_run, temperature=0, seed=6)
    notes = greedy.stderr.splitlines()[:-1]
    assert notes == ["note: seed has no effect: temperature is 0, which is greedy"]
    assert greedy.stdout == text(temperature=0) == text(top_k=1) == text(top_p=1e-6)
    assert text(top_k=0) == text()  # as from 200, of a vocabulary of 64
    others = [text(), text(seed=6), text(temperature=1.0), text(temperature=1.0, top_p=0.5)]
    assert len({greedy.stdout, *others}) == 5


def test_a_prompt_from_a_file_and_a_checkpoint_by_its_path(moe_run, tmp_path):
    (tmp_path / "prompt.txt").write_text("MACBETH:\nIs this")
    run = {"start": f"FILE:{tmp_path / 'prompt.txt'}", "num_samples": 2}
    out = sample(moe_run, **run).stdout
    assert out.count("MACBETH:\nIs this") == 2
    assert sample(checkpoint.latest_good(moe_run), **run).stdout == out


def coloured(text):
    """A text in colours as a list of (character, colour or None)."""
    found, on = [], None
    for code, char in re.findall(r"\x1b\[([\d;]*)m|([\s\S])", text):
        if char:
            found.append((char, on))
        else:
            on = None if code == "0" else int(code.rsplit(";", 1)[1])
    return found


@pytest.mark.parametrize("length, layer", [(60, 1), (60, 3), (10, 3)])
def test_experts_are_shown_in_colour(moe_run, length, layer):
    """The text is the same, and each character has the colour of its expert in the router."""
    plain = text_of(sample(moe_run, max_new_tokens=length))
    done = sample(moe_run, max_new_tokens=length, show_experts=layer)
    found = coloured(text_of(done))
    assert "".join(char for char, _ in found) == plain
    loaded, seen = load(moe_run), []
    model = loaded.build_model().eval()
    ids = Tokenizer(loaded.tokenizer_meta()).encode(plain).tolist()
    model.transformer.h[layer].mlp.router.register_forward_hook(
        lambda _m, _x, out: seen.extend(out[1][:, 0].tolist())
    )
    model(torch.tensor([ids[:32]]))  # block_size: later ones have been in other contexts
    colour_of = {}
    for (char, on), expert in zip(found, seen, strict=False):
        assert char == "\n" or colour_of.setdefault(expert, on) == on
    assert len(set(colour_of.values())) == len(colour_of) >= 2
    # a coloured newline would colour its whole line
    assert all((on is None) == (char == "\n") for char, on in found)
    legend, speed = done.stderr.splitlines()
    shares = [float(share) for share in re.findall(r"([\d.]+)%", legend)]
    assert legend.startswith(f"layer {layer}, ") and speed.startswith(f"{length} tokens in ")
    assert len(shares) == 4 and abs(sum(shares) - 100) < 0.3
    on, breaks = [on for _, on in found], plain.count("\n")
    for expert, c in colour_of.items():
        assert re.search(rf";{c}m {expert} ", legend)
        assert 0 <= shares[expert] * len(on) / 100 + 0.1 - on.count(c) <= breaks + 0.2


def test_experts_of_several_samples_and_of_a_long_prompt(moe_run):
    """Tokens before the start of the context have no colour, all others have one."""
    prompt = "MACBETH:\n" * 6  # 54 characters, and the model sees 32
    run = {"start": prompt, "num_samples": 2, "max_new_tokens": 40}
    done = sample(moe_run, **run, show_experts=3)
    assert done.stderr.startswith("the prompt has 54 tokens: the model sees the last 32\n")
    for text in done.stdout.split(END)[:2]:
        found = coloured(text)
        assert len(found) == 94
        assert all((on is None) == (i < 22 or char == "\n") for i, (char, on) in enumerate(found))
    assert "".join(char for char, _ in coloured(done.stdout)) == sample(moe_run, **run).stdout


def test_experts_are_those_of_the_contexts_in_which_the_text_was_drawn(moe_run, monkeypatch):
    """Far beyond block_size, where the context is cut now and then; with a cache or without."""
    model, seen = load(moe_run).build_model().eval(), []
    router = model.transformer.h[3].mlp.router
    hook = router.register_forward_hook(lambda _m, _x, out: seen.append(out[1][:, 0].tolist()))
    text = model.generate(torch.arange(40).unsqueeze(0), 101, 0.8, 200, seed=1)  # block_size is 32
    hook.remove()
    first, *later = seen
    expected = [script.NO_EXPERT] * 8 + first + [experts[-1] for experts in later]
    settings = {"show_experts": 3, "num_samples": 1, "max_new_tokens": 100, "seed": 1}
    for name, value in settings.items():
        monkeypatch.setattr(script, name, value)
    for cached in (True, False):
        monkeypatch.setattr(script, "cached", cached)
        drawn = script.first_experts(model, script.draw(model, list(range(40)), None, None))
        tokens, experts = zip(*drawn, strict=True)
        assert [token for (token,) in tokens] == text[0, :140].tolist()
        assert [expert for (expert,) in experts] == expected


def test_a_character_of_several_tokens():
    """A character is written once its last byte is there; a broken one is shown as U+FFFD."""
    tokenizer, file = Tokenizer({"tokenizer": "byte", "vocab_size": 256}), io.StringIO()
    writer, lengths = script.Writer(tokenizer, file, []), []
    for byte in "aé€".encode() + b"\xff" + "é".encode()[:1]:
        writer.write(byte, -1)
        lengths.append(len(file.getvalue()))
    assert lengths == [1, 1, 2, 2, 2, 3, 4, 4]
    writer.end()
    assert file.getvalue() == "aé€\ufffd\ufffd\n---------------\n"
    coloured_file = io.StringIO()
    writer = script.Writer(tokenizer, coloured_file, [0] * 8)
    for byte, expert in zip("é\n".encode(), (3, 5, 5), strict=True):
        writer.write(byte, expert)
    assert [char for char, on in coloured(coloured_file.getvalue()) if on] == ["é"]


def test_interactive(moe_run, monkeypatch, capsys):
    """Prompts one after another, each from the same seed. A bad one gives a line, no exit."""
    prompts = iter(["MACBETH:", "", "Straße", "MACBETH:"])

    def typed(_words):
        try:
            return next(prompts)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    for name, value in (("interactive", True), ("num_samples", 1), ("max_new_tokens", 20)):
        monkeypatch.setattr(script, name, value)
    loaded = load(moe_run)
    model, tokenizer = loaded.build_model().eval(), Tokenizer(loaded.tokenizer_meta())
    script.ask_for_prompts(model, tokenizer)
    out, err = capsys.readouterr()
    first, second, rest = out.split(END)  # nothing but samples: there is no terminal
    assert first == second == text_of(sample(moe_run, max_new_tokens=20)) and rest == ""
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2 and "the prompt is empty" in errors[0] and "'ß'" in errors[1]
    assert err.count("20 tokens in") == 2


def test_a_conversation_in_a_terminal(moe_run):
    """The start of a long sample can be read at once, Ctrl-C ends the sample and not the
    conversation, and closing the pipe ends the process."""

    def prepare():
        signal.signal(signal.SIGINT, signal.default_int_handler)

    options = flags(out_dir=moe_run, interactive=True, num_samples=1, max_new_tokens=10**6)
    command = [sys.executable, str(ROOT / "sample.py"), *options, "--device=cpu"]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, **pipes, text=True, cwd=ROOT, preexec_fn=prepare) as process:

        def begin():
            process.stdin.write("MACBETH:\n")
            process.stdin.flush()
            assert process.stdout.read(60).startswith("MACBETH:") and process.poll() is None

        begin()
        os.kill(process.pid, signal.SIGINT)
        rest = ""
        while not rest.endswith(END):
            char = process.stdout.read(1)
            assert char, rest
            rest += char
        begin()
        process.stdout.close()
        assert process.wait(60) == 0
        assert re.fullmatch(r"[\d,]+ tokens in .* tokens/s\n", process.stderr.read())


def test_a_sample_ends_at_the_end_of_a_text(play_gpt2, tmp_path):
    needs_gpt2_tokenizer()
    model = small_model(vocab_size=50304, tie_weights=False, block_size=32)
    model.transformer.ln_f.weight.data.zero_()
    model.transformer.ln_f.bias.data.fill_(1.0)
    model.lm_head.weight.data.zero_()
    model.lm_head.weight.data[50256] = 1.0  # <|endoftext|>, and nothing else
    run = write(tmp_path / "run", model, play_gpt2)
    done = sample(run, num_samples=2, start="<|endoftext|>Macbeth", temperature=0)
    assert done.stdout == "<|endoftext|>Macbeth\n---------------\n" * 2
    assert done.stderr.startswith("0 tokens in")
    done = sample(run, start="Macbeth", temperature=0, stop_at_end=False, max_new_tokens=3)
    assert done.stdout.startswith("Macbeth" + 3 * "<|endoftext|>")
    assert done.stderr.startswith("3 tokens in")


def test_bad_input(moe_run, play, tmp_path):
    dense, broken = small_model(vocab_size=64), small_model(vocab_size=64)
    broken.transformer.ln_f.weight.data[0] = float("nan")
    dense, broken = write(tmp_path / "dense", dense, play), write(tmp_path / "nan", broken, play)
    for settings, code, *words in (
        ({"top_p": 0}, 2, "top_p is 0.0"),
        ({"top_p": 1.5}, 2, "top_p is 1.5"),
        ({"show_experts": -2}, 2, "show_experts is -2"),
        ({"show_experts": 1, "compile": True}, 2, "compile=False"),
        ({"show_experts": 2}, 2, "show_experts is 2", "layers 1, 3"),
        ({"show_experts": 0, "out_dir": dense}, 2, "has experts in no layer"),
        ({"num_samples": 0}, 2, "num_samples is 0"),
        ({"init_from": "nowhere"}, 2, "no checkpoint at nowhere"),
        ({"out_dir": "tests"}, 2, "no checkpoint in"),
        ({"start": "Straße €"}, 2, "outside the vocabulary: 'ß' '€'"),
        ({"start": "FILE:nothing.txt"}, 1, "nothing.txt"),
        ({"temperature": -1}, 2, "temperature is -1.0"),
        ({"dataset": "nowhere"}, 2, "no dataset 'nowhere'"),
        ({"device": "cuda:abc"}, 2, "device is 'cuda:abc'"),
        ({"start": "MACBETH\udcff"}, 2, "vocabulary"),  # a byte that is no UTF-8
        ({"out_dir": broken}, 1, "logits are not finite"),
    ):
        done = run_script("sample.py", **{"out_dir": moe_run, "device": "cpu"} | settings)
        one_line(done, code, *words)
    run = {"init_from": moe_run, "device": "cpu", "num_samples": 1, "max_new_tokens": 5}
    succeeded(run_script("sample.py", out_dir="nowhere", **run))  # what train.py's init_from takes


def test_what_a_terminal_cannot_show_is_no_reason_to_fail(moe_run, play, tmp_path):
    meta = load_meta(play)
    chars = [char if char != "M" else "é" for char in meta["chars"]]
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"chars": chars}))
    run = {"dataset": tmp_path, "start": "é", "max_new_tokens": 3}
    assert sample(moe_run, **run, env={"PYTHONIOENCODING": "ascii"}).stdout.startswith("?")
