"""
Train a dense or Mixture-of-Experts GPT.

On one GPU, or on a laptop's CPU:
$ python train.py config/train_plays_char_moe.py --num_experts=16

On the 8 GPUs of one machine (for several machines and for Slurm see nanomoe/README.md):
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_moe.py

Exit codes: 0 done; 1 a file cannot be read or written, out of memory, or numbers that are not
finite; 2 settings or data that cannot work; 129, 130, 138 and 143 stopped by SIGHUP (the terminal
has closed), Ctrl-C (SIGINT), SIGUSR1 or SIGTERM, in training after saving a checkpoint.
"""

import contextlib
import functools
import gc
import math
import os
import shlex
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

from configurator import InputError, configure, short_path
from model import ConfigError, out_of_range
from moe_model import build_config, expert_impl_problem
from nanomoe import checkpoint
from nanomoe.dataset import BatchReader, Dataset, pad_vocab_size
from nanomoe.device import (
    Timer,
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    estimate_memory,
    explain_out_of_memory,
    keep_freed_memory,
    limit_threads,
    slow_paths,
    speed,
)
from nanomoe.distributed import (
    StopSignals,
    all_reduce_sum,
    broadcast_from_rank0,
    first_of_ranks,
    full_tensor,
    gradient_sync,
    init_distributed,
    no_garbage_collection,
    one_line_comm_errors,
    parallelize,
    print0,
    rank,
    shutdown,
    sync_stop_and_time,
    torchrun_ids,
    world_size,
)
from nanomoe.errors import note, run_main
from nanomoe.init_from import (
    follow_schedule,
    initial_model,
    model_config_for,
    restore_training_state,
    say_what_changed,
    sequences_seen,
    start_run,
)
from nanomoe.log import RunLog, console_line, summarize
from nanomoe.monitor import StepGuard, first_non_finite_layer
from nanomoe.no_effect import settings_out_of_reach, settings_without_effect
from nanomoe.optim import build_optimizer, num_moments
from nanomoe.run_dir import Saver, check_disk_space, claim, prepare_run_dir
from nanomoe.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# settings: GPT-2 (124M) on OpenWebText. Config files and --key=value flags override them
# fmt: off
# output
out_dir = "out"  # checkpoints and log.jsonl go here
eval_interval = 2000  # steps between evaluations (and checkpoints); there is one at the end, too
log_interval = 1  # steps between lines on the console and in log.jsonl
load_interval = 100  # steps between lines with every expert's load and each layer's router entropy
eval_iters = 200  # validate on eval_iters * batch_size windows, spread evenly over val.bin
eval_only = False  # evaluate once and exit
always_save_checkpoint = True  # False: save only the best so far, at the end and on a signal
keep_last = 2  # keep this many newest checkpoints, and the best one; 0 = keep all
init_from = "scratch"  # or 'resume', 'auto' (resume if possible), 'upcycle', gpt2..., a path
upcycle_from = ""  # for 'upcycle' and 'auto': the model whose weights the run begins with
sample_tokens = 400  # length of the sample printed at the end; 0 = none
# wandb logging
wandb_log = False  # also log to Weights & Biases
wandb_project = "owt"  # Weights & Biases project
wandb_run_name = "gpt2"  # name of the run there
tensorboard_log = False  # also log to OUT_DIR/tensorboard, if tensorboard is installed
# data
dataset = "openwebtext"  # a folder of data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-batches per optimizer step, of all processes
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
n_layer = 12  # number of blocks
n_head = 12  # number of attention heads
n_embd = 768  # width of the model
dropout = 0.0  # for pretraining 0 is good; with little data try 0.1 and more
bias = False  # biases in linear layers and LayerNorms
norm = "layernorm"  # 'layernorm' or 'rmsnorm'
position = "learned"  # 'learned' or 'rope'
n_kv_head = 0  # key/value heads of grouped-query attention; 0 = n_head
mlp = "gelu"  # activation: 'gelu', 'gelu_tanh' (OpenAI's GPT-2), 'swiglu' or 'relu2'
mlp_dim = 0  # hidden width of the dense MLP; 0 = 4 * n_embd, for swiglu 8/3 * n_embd
qk_norm = False  # RMSNorm on each head's queries and keys
tie_weights = True  # one matrix for embedding and language-model head
gradient_checkpointing = False  # recompute activations in backward: less memory, 1/3 more time
# Mixture of Experts
use_moe = False  # MoE blocks instead of dense ones
num_experts = 4  # experts per MoE layer
top_k = 1  # experts per token
expert_dim = 0  # an expert's hidden width; 0 = the dense MLP's; -1 = at its active FLOPs
num_shared_experts = 0  # experts that every token visits, without a gate
moe_stride = 1  # every n-th block is MoE
num_dense_layers = 0  # the first blocks stay dense
router_score = "softmax"  # 'softmax' or 'sigmoid' of the router's logits
norm_top_k = True  # a token's gates sum to 1 (for top_k > 1)
route_scale = 1.0  # factor of all gates
expert_load_balance_loss_coef = 0.02  # weight of the load-balance loss
balance_scope = "global"  # that loss's load: of the whole step before ('global') or 'micro' batch
router_bias_update_rate = 0.0  # loss-free balancing: step of the bias; 0 = off, usual is 1e-3
router_z_loss_coef = 0.0  # weight of the router z-loss
router_jitter = 0.0  # in training, multiplicative noise on the router's input
capacity_factor = 0.0  # in training, an expert's limit, in even shares of the tokens; 0 = none
expert_dropout = 0.0  # dropout inside the experts
expert_impl = "auto"  # 'loop' (the reference), 'grouped' (one GEMM) or 'auto' = the faster here
# optimizer
optimizer = "adamw"  # or 'muon': Muon for the matrices of the blocks, AdamW for the rest
learning_rate = 6e-4  # the highest learning rate
max_iters = 600000  # optimizer steps of the run
max_tokens = 0  # instead of max_iters: the run's length in tokens; 0 = off
max_epochs = 0.0  # instead of max_iters: how often the run sees the training data; 0 = off
max_seconds = 0.0  # stop after this much training time (no evaluating, saving, compiling); 0 = off
weight_decay = 1e-1  # decay of matrices and embeddings; biases and norms have none
beta1 = 0.9  # AdamW: decay of the first moment
beta2 = 0.95  # AdamW: decay of the second moment
grad_clip = 1.0  # clip the gradient's norm; 0 = off
spike_guard = 0.0  # skip steps this many std above the mean (loss or gradient); 0 = off, try 6
# learning-rate schedule
decay_lr = True  # linear warm-up, then lr_schedule; False = constant
lr_schedule = "cosine"  # or 'wsd': constant, then linear; such a run can be made longer later
decay_share = 0.2  # 'wsd': this last share of the run has the decay; 0 = never decay
warmup_iters = 2000  # steps of warm-up
lr_decay_iters = 0  # step at which min_lr is reached; 0 = max_iters (or max_seconds)
min_lr = 6e-5  # the lowest learning rate, often learning_rate / 10
# system
parallel = "ddp"  # several GPUs: each holds the whole model ('ddp') or a shard of it ('fsdp')
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' or 'auto' = bfloat16 where it is faster
compile = "auto"  # torch.compile; 'auto' = on cuda only
seed = 1337  # random seed of weights, data order and dropout
deterministic = False  # bit-identical runs and resumes on a GPU, too; slower
# -----------------------------------------------------------------------------
AT_LEAST = {
    "batch_size": 1, "gradient_accumulation_steps": 1, "max_iters": 1, "eval_interval": 1,
    "log_interval": 1, "load_interval": 1, "eval_iters": 1, "keep_last": 0, "sample_tokens": 0,
    "seed": 0,
    "weight_decay": 0, "grad_clip": 0, "warmup_iters": 0, "lr_decay_iters": 0, "min_lr": 0,
    "max_tokens": 0, "max_epochs": 0, "max_seconds": 0, "spike_guard": 0, "decay_share": 0,
}
CHOICES = {
    "parallel": ("ddp", "fsdp"), "compile": (True, False, "auto"),
    "dtype": ("auto", "float32", "bfloat16", "float16"),
    "optimizer": ("adamw", "muon"), "lr_schedule": ("cosine", "wsd"),
}
RETIRED = {  # settings of earlier versions, and what holds now, see configurator.check_settings
    "backend": "it is nccl on CUDA and gloo elsewhere",
    "max_bad_steps": "a run stops after more than 10 skipped steps in a row",
    "async_save": "checkpoints are written in the background on CUDA",
    "qk_norm_over": ("it is 'head'", ("head",)),
    "upcycle_noise": ("upcycling adds no noise, which gained nothing", ("0", "0.0")),
    "debug_nans": "if a logged step is skipped, its line names the first layer that is not finite",
}
# fmt: on
# -----------------------------------------------------------------------------


def get_lr(settings, step, seconds=0.0):
    """Learning rate of a step, counted from 0, after `seconds` of training: linear warm-up, then
    down to min_lr at lr_decay_iters, or, with max_seconds, at the end of that time.
    'cosine' falls from the end of the warm-up on. 'wsd' stays constant, then falls in a line over
    the last decay_share (Hu et al. 2024, MiniCPM, arXiv 2404.06395; Hägele et al. 2024, arXiv
    2405.18392); where warm-up and decay overlap, the smaller of the two rates holds."""
    s = SimpleNamespace(**settings)
    if not s.decay_lr:
        return s.learning_rate
    warmup = s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    last = s.lr_decay_iters or s.max_iters
    if s.lr_schedule == "wsd":
        now, end = (seconds, s.max_seconds) if s.max_seconds else (step, last)
        left = max(0, end - now) / end  # of the run
        kept = min(1, left / s.decay_share) if s.decay_share else 1
        return min(warmup, s.learning_rate - (s.learning_rate - s.min_lr) * (1 - kept))
    if step < s.warmup_iters:
        return warmup
    if s.max_seconds:
        progress = min(1, seconds / s.max_seconds)
    elif step < last:
        progress = (step - s.warmup_iters) / (last - s.warmup_iters)
    else:
        progress = 1
    return s.min_lr + (s.learning_rate - s.min_lr) * 0.5 * (1 + math.cos(math.pi * progress))


def before_decay(settings, step, seconds):
    """Whether a step of a 'wsd' run has the rate that it would have in a run of any length."""
    endless = settings | {"decay_share": 0.0}
    same = get_lr(settings, step, seconds) == get_lr(endless, step, seconds)
    return same and settings["lr_schedule"] == "wsd"


# -----------------------------------------------------------------------------
# before the start


def check_settings(settings, given, init, torch_device, compute_dtype):
    """Check everything that can be checked before any work, and say which settings cannot do what
    they say. Returns the model's config and the Dataset. Raises one InputError with all problems,
    one per line."""
    config = data = None
    limits = {name: {"at_least": least} for name, least in AT_LEAST.items()}
    limits |= {name: {"choices": choices} for name, choices in CHOICES.items()}
    limits["beta1"] = limits["beta2"] = {"at_least": 0, "less_than": 1}
    limits |= {"seed": {"at_least": 0, "less_than": 2**64}, "learning_rate": {"more_than": 0}}
    limits["decay_share"] = {"at_least": 0, "at_most": 1}
    problems = [out_of_range(name, settings[name], **limits[name]) for name in limits]
    problems = [problem for problem in problems if problem]
    if gradient_accumulation_steps % world_size:
        problems.append(
            f"gradient_accumulation_steps ({gradient_accumulation_steps}) is not divisible by the "
            f"number of processes ({world_size})"
        )
    if compute_dtype == "float16" and (spike_guard or parallel == "fsdp"):
        problems.append("spike_guard and parallel 'fsdp' need bfloat16 or float32, not float16")
    try:
        build_config(settings)  # first: a Dataset needs a valid block_size
        data = Dataset(dataset, block_size, seed)
        config = model_config_for(init, settings, pad_vocab_size(data.vocab_size))
    except ConfigError as error:
        problems += error.problems
    except InputError as error:
        problems.append(str(error))
    if config and init.source:
        problems += tokenizer_problems(data, init.source)
    if config and not problems:
        problems += set_length(settings, given, data, init.resumed)
    if config:
        where = torch_device.type, getattr(torch, compute_dtype)
        compiled = choose_compile(compile, torch_device)
        if problem := expert_impl_problem(config, *where, compiled):
            problems.append(problem)
    if problems:
        raise InputError("\n".join(problems))
    newest = init.resumed
    follow_schedule(init, settings, get_lr)
    if init.resumed is not newest:  # it has gone back
        set_length(settings, given, data, init.resumed)
    done = (init.resumed.step, init.resumed.seconds) if init.resumed else (0, 0.0)
    notes = settings_without_effect(settings, given, world_size)
    for line in notes + settings_out_of_reach(settings, given, data, *done):
        print0(f"note: {line}")
    return config, data


def set_length(settings, given, data, resumed):
    """Set max_iters to what max_tokens or max_epochs come to, and say so. Returns problems."""
    lengths = ("max_iters", "max_tokens", "max_epochs")
    named = [name for name in lengths if name in given and settings[name]]
    named = [name for name in named if given[name].startswith("--")] or named  # flags go first
    if len(named) > 1:
        return [f"{' and '.join(named)} say how long the run is: give one of them"]
    inherited = [name for name in lengths[1:] if settings[name]]
    length = (named or inherited or ["max_iters"])[0]
    for name in lengths[1:]:
        if name != length:
            settings[name] = 0
    if length != "max_iters":
        wanted = settings["max_tokens"] / block_size
        wanted = wanted or settings["max_epochs"] * data.windows_per_epoch
        done, seen = (resumed.step, sequences_seen(resumed, settings)) if resumed else (0, 0)
        left = max(0, math.ceil((wanted - seen) / (gradient_accumulation_steps * batch_size)))
        settings["max_iters"] = done + left
        print0(f"{length} {settings[length]:,} is {settings['max_iters']:,} steps")
    globals().update(settings)
    return []


def tokenizer_problems(data, source):
    """Why a model from a Checkpoint cannot be trained on a Dataset, as a list."""
    ids, rows = data.vocab_size, source.config.vocab_size
    if ids > rows:
        return [f"dataset '{dataset}' has {ids} token ids, the checkpoint's model {rows}"]
    if not source.same_tokenizer(data.meta):
        return [f"dataset '{dataset}' uses another tokenizer than {source.path} was trained with"]
    return []


def pick_compute_dtype(init, torch_device):
    """The precision to compute in. With dtype 'auto' a resumed run keeps the precision it had, if
    the type of device is the same."""
    resumed = init.resumed
    if dtype not in CHOICES["dtype"]:
        return "float32"  # check_settings says what is wrong
    if dtype == "auto" and resumed and resumed.device == torch_device.type:
        return resumed.dtype
    return broadcast_from_rank0(lambda: choose_dtype(dtype, torch_device))


def set_up_torch(compute_dtype):
    torch.manual_seed(seed)
    if compute_dtype == "float32":  # in lower precision, what is float32 needs all its bits
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def open_log(init, settings):
    """Prepare out_dir; rank 0's RunLog. None on other ranks, and for an evaluation alone."""
    if eval_only:
        return None
    log = None

    def prepare():
        nonlocal log
        prepare_run_dir(out_dir, init.resumed, auto=init_from == "auto")
        first_step = init.resumed.step if init.resumed else 0
        log = RunLog(out_dir, first_step, settings)

    broadcast_from_rank0(prepare)
    return log


def write_log(log, **entry):
    """Rank 0 writes a line, and the others wait, however slow its disk is."""
    broadcast_from_rank0(lambda: log.write(**entry) if log else None)


def describe_run(model, data, torch_device, compute_dtype, log, **facts):
    """Say what is going to happen, and write the log's first entry, with these facts."""
    params, active = model.num_params(), model.num_active_params()
    flops = model.flops_per_token()
    sequences = gradient_accumulation_steps * batch_size
    tokens = sequences * block_size
    epochs = max_iters * sequences / data.windows_per_epoch
    moments = num_moments(model, optimizer)
    state_bytes, activation_bytes = estimate_memory(model, moments, batch_size, compute_dtype)
    if parallel == "fsdp":
        state_bytes /= world_size
    compiled = "on" if choose_compile(compile, torch_device) else "off"
    for line in slow_paths(torch_device, compute_dtype, compile, model.config):
        print0(f"note: {line}")
    print0(
        f"{type(model).__name__}: {params:,} parameters, {active:,} of them active per token; "
        f"{flops / 1e6:,.1f} MFLOPs per token\n"
        f"{tokens:,} tokens per step = {gradient_accumulation_steps} micro-batches x "
        f"{batch_size} sequences x {block_size} tokens; "
        f"{max_iters:,} steps = {epochs:.2f} epochs\n"
        f"on {world_size} x {device_name(torch_device)}, {compute_dtype}, compile {compiled}; "
        f"estimated memory per process: {state_bytes / 1e9:.2f} GB for weights, gradients and "
        f"moments, {activation_bytes / 1e9:.2f} GB for activations"
    )
    write_log(
        log,
        start=time.strftime("%Y-%m-%d %H:%M:%S"),
        **facts,
        torch=torch.__version__,
        dtype=compute_dtype,
        params=params,
        active_params=active,
        flops_per_token=flops,
        tokens_per_step=tokens,
    )


# -----------------------------------------------------------------------------
# parts of a step


def to_device(windows, torch_device):
    """A batch from Dataset.read_windows as tensors (B, T) on the device."""
    x, y = torch.from_numpy(windows[0]), torch.from_numpy(windows[1])
    if torch_device.type != "cuda":
        return x.to(torch_device), y.to(torch_device)
    # from pinned memory, and only from there, a copy need not be waited for
    x, y = x.pin_memory(), y.pin_memory()
    return x.to(torch_device, non_blocking=True), y.to(torch_device, non_blocking=True)


def seed_micro_batch(first):
    """Dropout depends on nothing but the seed and which micro-batch of the run this is. first: the
    number of its first sequence."""
    state = np.random.SeedSequence([seed, first // batch_size]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def accumulate_gradients(model, train_model, reader, scaler, torch_device, compute_dtype):
    """Forward and backward of one step's micro-batches. Returns the model's stats, summed over
    micro-batches and processes. They stay on the device, so the host does not wait for it."""
    stats = {}
    micro_steps = gradient_accumulation_steps // world_size
    for micro_step in range(micro_steps):
        first, windows = reader.next()
        x, y = to_device(windows, torch_device)
        seed_micro_batch(first)
        with gradient_sync(train_model, last=micro_step == micro_steps - 1):
            with autocast(torch_device, compute_dtype):
                loss = train_model(x, y)[1]  # the logits are not kept
            scaler.scale(loss / micro_steps).backward()
        for name, value in model.stats.items():
            stats[name] = stats.get(name, 0) + value
    return all_reduce_sum(stats)


def find_non_finite_layer(model, reader, torch_device, compute_dtype):
    """The first layer whose output is not finite in the ranks' last micro-batches, or None."""
    first, windows = reader.last
    x, _ = to_device(windows, torch_device)
    seed_micro_batch(first)
    with autocast(torch_device, compute_dtype):
        return first_of_ranks(first_non_finite_layer(model, lambda: model(x)))


@torch.no_grad()
def evaluate(model, data, torch_device, compute_dtype):
    """Mean cross-entropy in nats per token over the fixed validation windows, which the processes
    share out."""
    model.eval()
    offsets = data.val_offsets(eval_iters * batch_size)
    own = offsets[rank::world_size]
    total = torch.zeros((), dtype=torch.float64)
    # all ranks make the same number of passes, which FSDP needs
    for i in range(0, math.ceil(len(offsets) / world_size), batch_size):
        batch = own[i : i + batch_size]
        x, y = to_device(data.read_windows("val", batch or offsets[:1]), torch_device)
        with autocast(torch_device, compute_dtype):
            loss = model(x, y)[1]
        total += loss.item() * len(batch)
    model.train()
    return all_reduce_sum(total).item() / len(offsets)


def validate(model, data, torch_device, compute_dtype, step, seconds, log):
    """Evaluate, say and log the loss, and return it."""
    val_loss = evaluate(model, data, torch_device, compute_dtype)
    bits = data.bits_per_byte(val_loss)
    write_log(log, step=step, seconds=seconds, val_loss=val_loss, val_bits_per_byte=bits)
    in_bits = f" | {bits:.4f} bits per byte" if bits else ""
    print0(f"step {step}/{max_iters} | validation loss {val_loss:.4f}{in_bits}")
    return val_loss


def log_step(step, lr, stats, seconds, finished, timer, speed_of, log):
    """Write a step's numbers to the log and the console; returns them, a dict."""
    entry = {"step": step, "seconds": seconds, "lr": lr}
    entry |= summarize(stats, gradient_accumulation_steps)
    entry |= speed_of(timer.lap(step))
    if step % log_interval == 0 or step == 1 or finished:
        # the same steps wherever a run was resumed
        details = step == 1 or step % load_interval < log_interval or finished
        write_log(log, details=details, **entry)
    evaluations_left = (max_iters - step) // eval_interval
    seconds_left = (max_iters - step) * entry["ms"] / 1e3 + evaluations_left * timer.last_pause
    if max_seconds:
        seconds_left = max(0.0, max_seconds - seconds)
    print0(console_line(entry, max_iters, seconds_left))
    return entry


def warn_of_collapse(entry, warned):
    """Warn when routing collapses; returns whether it is collapsed now."""
    layers = entry.get("collapsed_layers")
    if layers and not warned:
        print0(
            f"warning: routing has collapsed in MoE layers {layers}, counted from 0: most tokens "
            "go to few of the experts; a larger expert_load_balance_loss_coef or a lower "
            "learning_rate helps"
        )
    return bool(layers)


def evaluate_and_save(model, data, torch_device, compute_dtype, saver, log, facts, save_now):
    """Evaluate the Saver's state, with these facts, and save it now, or only if it is the best.
    Returns the lowest validation loss so far."""
    step, seconds, best_val_loss = facts["step"], facts["seconds"], facts["best_val_loss"]
    if save_now:
        saver.save()  # first: whatever happens in an evaluation, the step is there
    else:
        saver.copy()
    val_loss = validate(model, data, torch_device, compute_dtype, step, seconds, log)
    lowest = lower(val_loss, best_val_loss)
    if save_now:
        saver.add_evaluation(val_loss, lowest)
    elif lowest != best_val_loss:
        saver.save(val_loss)
    return lowest


def evaluate_start(model, data, torch_device, compute_dtype, resumed, log):
    """Evaluate the model that the run begins with. If it is a checkpoint of the run's own without a
    loss, because its evaluation failed or a signal came first, add the loss to it. Returns the
    lowest loss so far."""
    step, seconds = (resumed.step, resumed.seconds) if resumed else (0, 0.0)
    val_loss = validate(model, data, torch_device, compute_dtype, step, seconds, log)
    lowest = lower(val_loss, resumed.best_val_loss if resumed else None)
    lacks_loss = resumed and not eval_only and resumed.val_loss is None
    if lacks_loss and resumed.path.parent.resolve() == Path(out_dir).resolve():
        broadcast_from_rank0(lambda: checkpoint.add_evaluation(resumed.path, val_loss, lowest))
    return lowest


def lower(val_loss, best_val_loss):
    is_best = best_val_loss is None or val_loss < best_val_loss
    return val_loss if is_best and math.isfinite(val_loss) else best_val_loss


def print_sample(model, data, torch_device, compute_dtype):
    """All ranks call it, because FSDP's forward needs them."""
    try:
        prompt = broadcast_from_rank0(lambda: Tokenizer(data.meta).encode("\n").tolist())
        idx = torch.tensor([prompt], device=torch_device)
        # the number of keys grows with every token, so compiling is not worth it
        with autocast(torch_device, compute_dtype), torch.compiler.set_stance("force_eager"):
            idx = model.generate(
                idx, sample_tokens, 0.8, 200, vocab_size=data.vocab_size, seed=seed
            )
        if rank == 0:
            print(f"\na sample:\n{Tokenizer(data.meta).decode(idx[0].tolist())}\n")
    except (InputError, OSError, FloatingPointError) as error:  # the run itself is done
        print0(f"no sample: {error}")
    script = short_path(Path(__file__).with_name("sample.py"))
    print0("more:", shlex.join(["python", script, f"--out_dir={out_dir}"]))


def finish(model, data, torch_device, compute_dtype, log, step, stop_signal=0):
    """The end of a run, or of this process if stop_signal stopped it early."""
    if stop_signal:
        name = signal.Signals(stop_signal).name
        print0(f"stopped by {name}; resume with --init_from=auto")
    else:
        write_log(log, end=time.strftime("%Y-%m-%d %H:%M:%S"), steps=step)
    if sample_tokens and not stop_signal and not eval_only:
        print_sample(model, data, torch_device, compute_dtype)
    if log:
        log.close()
    shutdown(128 + stop_signal if stop_signal else 0)


# -----------------------------------------------------------------------------


@one_line_comm_errors()
def main():
    limit_threads()
    settings, given = configure(globals(), retired=RETIRED, note=note)
    torch_device = choose_device(device)
    if torch_device.type == "cpu":
        keep_freed_memory()
    with explain_out_of_memory():
        init_distributed(torch_device)
    torchruns = torchrun_ids()
    if not eval_only and out_dir:
        broadcast_from_rank0(lambda: claim(out_dir, torchruns, settings))
    init = start_run(settings, given)  # from scratch, resumed, fine-tuned or upcycled
    globals().update(settings)  # with what the run inherits
    compute_dtype = pick_compute_dtype(init, torch_device)
    config, data = check_settings(settings, given, init, torch_device, compute_dtype)
    if init.resumed and not eval_only:
        say_what_changed(init.resumed, settings | {"dtype": compute_dtype}, data)
    log = open_log(init, settings)

    # model and optimizer
    with explain_out_of_memory():
        set_up_torch(compute_dtype)
        model = initial_model(init, config, settings).train()
        if choose_compile(compile, torch_device):
            model.compile_parts()
        train_model = parallelize(model, parallel, torch_device, compute_dtype)
        opt = build_optimizer(
            model, optimizer, learning_rate, weight_decay, (beta1, beta2), torch_device.type
        )
        scaler = torch.amp.GradScaler(torch_device.type, enabled=compute_dtype == "float16")
        guard = StepGuard(spike_guard, torch_device)
        state = {"optimizer": opt, "scaler": scaler, "guard": guard}
        first_step, seconds, best_val_loss = 0, 0.0, None  # steps done, seconds, nats
        sequences = 0  # of the training data, seen so far
        if resumed := init.resumed:
            if not eval_only:
                restore_training_state(resumed, **state)
            first_step, seconds = resumed.step, resumed.seconds
            best_val_loss, sequences = resumed.best_val_loss, sequences_seen(resumed, settings)
    device_and_dtype = (torch_device, compute_dtype)
    if not eval_only:
        broadcast_from_rank0(lambda: check_disk_space(out_dir, model, optimizer))
    facts = {"first_step": first_step, "launchers": init.torchruns, "settings": settings}
    describe_run(model, data, *device_and_dtype, log, **facts)

    if eval_only or first_step >= max_iters or 0 < max_seconds <= seconds:  # nothing to train
        with explain_out_of_memory(settings):
            evaluate_start(model, data, *device_and_dtype, resumed, log)
        return finish(model, data, *device_and_dtype, log, first_step)

    # training
    warned = False
    facts = {"device": torch_device.type, "dtype": compute_dtype, "run": settings}
    facts |= {"tokenizer": data.tokenizer_meta(), "data": data.fingerprint()}

    def facts_now():
        return facts | {
            "step": step,
            "sequences": sequences,
            "seconds": seconds,
            "best_val_loss": best_val_loss,
            "before_decay": steady,
        }

    with (
        log or contextlib.nullcontext(),
        StopSignals() as signals,
        no_garbage_collection(),
        explain_out_of_memory(settings),
        BatchReader(data, batch_size, sequences + rank * batch_size, world_size) as reader,
        Saver(out_dir, keep_last, torch_device.type == "cuda", model, state, facts_now) as saver,
    ):
        find_layer = functools.partial(find_non_finite_layer, model, reader, *device_and_dtype)
        speed_of = functools.partial(
            speed,
            tokens_per_step=gradient_accumulation_steps * batch_size * block_size,
            flops_per_token=model.flops_per_token(),
            device=torch_device,
            num_devices=world_size,
            dtype=compute_dtype,
        )
        if resumed and resumed.val_loss is None and first_step % eval_interval == 0:
            best_val_loss = evaluate_start(model, data, *device_and_dtype, resumed, log)
        validate_and_save = functools.partial(evaluate_and_save, model, data, *device_and_dtype)
        timer = Timer(torch_device, seconds)
        for step in range(first_step + 1, max_iters + 1):
            lr = get_lr(settings, step - 1, seconds)
            steady = before_decay(settings, step - 1, seconds)
            for group in opt.param_groups:
                group["lr"] = lr
            stats = accumulate_gradients(model, train_model, reader, scaler, *device_and_dtype)
            scaler.unscale_(opt)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
            loss = stats["cross_entropy"] / gradient_accumulation_steps
            with saver.changing():
                skipped = guard.step(opt, scaler, loss, full_tensor(norm))
                model.update_balance(stats, skipped)
                sequences += gradient_accumulation_steps * batch_size
                if step % 100 == 0:
                    gc.collect()
                if step == first_step + 1:  # it compiles, so its time does not count
                    timer.restart()
                stop_signal, seconds = sync_stop_and_time(signals.number, timer.seconds())
            finished = step == max_iters or 0 < max_seconds <= seconds

            if step % log_interval == 0 or step == first_step + 1 or finished:
                entry = log_step(step, lr, stats, seconds, finished, timer, speed_of, log)
                warned = warn_of_collapse(entry, warned)
                guard.report_skipped(step, scaler, print0, find_layer)

            decay_begins = steady and not before_decay(settings, step, seconds)
            if finished or (step % eval_interval == 0 and not stop_signal):
                save_now = finished or decay_begins or always_save_checkpoint
                with timer.paused():
                    best_val_loss = validate_and_save(saver, log, facts_now(), save_now)
                stop_signal, _ = sync_stop_and_time(signals.number, seconds)  # it took a while
            if not saver.is_saved and (stop_signal or decay_begins):
                with timer.paused():
                    saver.save()
            if finished or stop_signal:
                break
    finish(model, data, *device_and_dtype, log, step, 0 if finished else stop_signal)


if __name__ == "__main__":
    run_main(main)
