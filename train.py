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
import gc
import math
import shlex
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from configurator import InputError, read_settings, short_path
from model import GPT
from nanomoe import checkpoint
from nanomoe.dataset import BatchReader, Dataset
from nanomoe.device import (
    Timer,
    autocast,
    choose_compile,
    choose_device,
    device_name,
    estimate_memory,
    explain_out_of_memory,
    keep_freed_memory,
    limit_threads,
    set_up_torch,
    slow_paths,
    speed,
    to_device,
)
from nanomoe.distributed import (
    StopSignals,
    all_reduce_sum,
    broadcast_from_rank0,
    exchange,
    first_of_ranks,
    full_tensor,
    gradient_sync,
    no_garbage_collection,
    one_line_comm_errors,
    print0,
    rank,
    shutdown,
    torchrun_ids,
    world_size,
)
from nanomoe.errors import note, run_main
from nanomoe.guard import StepGuard, first_non_finite_layer
from nanomoe.init_from import choose_start, initial_model, make_plan
from nanomoe.log import RunLog, console_line, summarize
from nanomoe.optim import build_optimizer, num_moments
from nanomoe.run_dir import Saver, check_disk_space, claim, open_log
from nanomoe.schedule import Schedule
from nanomoe.settings import RETIRED
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
optimizer = "adamw"  # or 'muon' (the matrices of the blocks; AdamW trains the rest)
learning_rate = 6e-4  # the highest learning rate
max_iters = 600000  # optimizer steps of the run
max_tokens = 0  # instead of max_iters: the run's length in tokens; 0 = off
max_epochs = 0.0  # instead of max_iters: how often the run sees the training data; 0 = off
max_seconds = 0.0  # stop after this much training time (no evaluating, saving, compiling); 0 = off
weight_decay = 1e-1  # decay of matrices and embeddings; biases and norms have none
beta1 = 0.9  # decay of AdamW's first moment
beta2 = 0.95  # and of its second
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
# fmt: on
# -----------------------------------------------------------------------------


@dataclass
class Run:
    """What the functions below share, beside the settings above."""

    device: torch.device
    settings: dict  # all settings, for the log and the checkpoints
    data: Dataset
    schedule: Schedule
    log: RunLog  # of rank 0; that of other ranks writes nothing
    model: GPT  # its parameters are the weights that are saved
    train_model: torch.nn.Module  # the model as DDP or FSDP trains it
    opt: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    guard: StepGuard
    flops_per_token: float  # of the model, counted once: it goes through all parameters
    # so far
    first_step: int = 0  # optimizer steps done before this start
    step: int = 0  # and until now
    sequences: int = 0  # training sequences seen
    seconds: float = 0.0  # of training
    best_val_loss: float | None = None  # nats per token
    before_decay: bool = False  # whether the last step's rate is that of a run of any length
    stop_signal: int = 0  # that any rank got
    collapsed: bool = False  # whether routing had collapsed when it was last looked at
    # while it trains
    reader: BatchReader | None = None
    saver: Saver | None = None
    signals: StopSignals | None = None
    timer: Timer | None = None

    def is_over(self):
        return self.schedule.is_over(self.step, self.seconds)


# -----------------------------------------------------------------------------
# before the start


def build_run(plan, torch_device, log):
    """Model and optimizer, as they are at the run's first step."""
    set_up_torch(torch_device, seed, dtype, deterministic)
    model, line = initial_model(plan)
    if line:
        print0(line)
    if choose_compile(compile, torch_device):
        model.compile_parts()
    if world_size > 1:
        from nanomoe.parallel import parallelize  # late: only for several processes

        train_model = parallelize(model, parallel, torch_device, dtype)
    else:
        train_model = model.to(torch_device)
    betas = (beta1, beta2)
    run = Run(
        device=torch_device,
        settings=plan.settings,
        data=plan.data,
        schedule=plan.schedule,
        log=log,
        model=model.train(),
        train_model=train_model,
        opt=build_optimizer(
            model, optimizer, learning_rate, weight_decay, betas, torch_device.type
        ),
        scaler=torch.amp.GradScaler(torch_device.type, enabled=dtype == "float16"),
        guard=StepGuard(spike_guard, torch_device),
        flops_per_token=model.flops_per_token(),
    )
    if resumed := plan.start.resumed:
        run.step = run.first_step = resumed.step
        run.sequences = resumed.sequences_seen(plan.settings)
        run.seconds, run.best_val_loss = resumed.seconds, resumed.best_val_loss
        if not eval_only:
            from nanomoe.inherit import restore_training_state  # late: only to resume

            restore_training_state(resumed, run.opt, run.scaler, run.guard)
    return run


def describe_run(run, launchers):
    """Say what is going to happen, and write the log's first line. launchers: the torchruns that
    started the processes."""
    model = run.model
    params, active = model.num_params(), model.num_active_params()
    sequences = gradient_accumulation_steps * batch_size
    tokens = sequences * block_size
    epochs = max_iters * sequences / run.data.windows_per_epoch
    moments = num_moments(model, optimizer)
    state_bytes, activation_bytes = estimate_memory(model, moments, batch_size, dtype)
    if parallel == "fsdp":
        state_bytes /= world_size
    compiled = "on" if choose_compile(compile, run.device) else "off"
    for line in slow_paths(run.device, dtype, compile, model.config):
        print0(f"note: {line}")
    print0(
        f"{type(model).__name__}: {params:,} parameters, {active:,} of them active per token; "
        f"{run.flops_per_token / 1e6:,.1f} MFLOPs per token\n"
        f"{tokens:,} tokens per step = {gradient_accumulation_steps} micro-batches x "
        f"{batch_size} sequences x {block_size} tokens; "
        f"{max_iters:,} steps = {epochs:.2f} epochs\n"
        f"on {world_size} x {device_name(run.device)}, {dtype}, compile {compiled}; "
        f"estimated memory per process: {state_bytes / 1e9:.2f} GB for weights, gradients and "
        f"moments, {activation_bytes / 1e9:.2f} GB for activations"
    )
    run.log.write(
        start=time.strftime("%Y-%m-%d %H:%M:%S"),
        first_step=run.first_step,
        launchers=launchers,
        settings=run.settings,
        torch=torch.__version__,
        dtype=dtype,
        params=params,
        active_params=active,
        flops_per_token=run.flops_per_token,
        tokens_per_step=tokens,
    )


# -----------------------------------------------------------------------------
# a step


def seed_dropout(micro_batch):
    """Dropout depends on nothing but the seed and the micro-batch's number in the run."""
    state = np.random.SeedSequence([seed, micro_batch]).generate_state(1, np.uint64)
    torch.manual_seed(int(state[0]))


def train_step(run):
    """One step of the optimizer. Returns the model's stats, summed over micro-batches and
    processes, and the gradient's norm. They stay on the device: the host does not wait for it."""
    model, opt, scaler = run.model, run.opt, run.scaler
    for group in opt.param_groups:
        group["lr"] = run.schedule.lr(run.step, run.seconds)

    # forward and backward of each micro-batch; the gradients add up
    stats = {}
    micro_steps = gradient_accumulation_steps // world_size
    for micro_step in range(micro_steps):
        first, windows = run.reader.next()
        x, y = to_device(windows, run.device)
        seed_dropout(first // batch_size)
        # the processes exchange gradients in the last micro-batch alone
        with gradient_sync(run.train_model, last=micro_step == micro_steps - 1):
            with autocast(run.device, dtype):
                loss = run.train_model(x, y)[1]  # the logits are not kept
            scaler.scale(loss / micro_steps).backward()
        for name, value in model.stats.items():
            stats[name] = stats.get(name, 0) + value
    stats = all_reduce_sum(stats)

    # clip the gradient, and judge the step by loss and norm
    scaler.unscale_(opt)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = full_tensor(norm)
    bad = run.guard.is_bad(stats["cross_entropy"] / gradient_accumulation_steps, norm)

    # update weights and moments, which do not fit each other until this block ends
    with run.saver.changing():
        optimizer_step(opt, scaler, bad)
        opt.zero_grad(set_to_none=True)
        model.update_balance(stats, skipped=bad)
        run.before_decay = run.schedule.before_decay(run.step, run.seconds)
        run.sequences += gradient_accumulation_steps * batch_size
        run.step += 1
        if run.step == run.first_step + 1:  # it compiles, so its time does not count
            run.timer.restart()
        run.seconds = run.timer.seconds()
    return stats, norm


def optimizer_step(opt, scaler, bad):
    """optimizer.step(), or nothing if the step is bad (a bool tensor)."""
    if not opt.defaults.get("fused"):
        if bad:
            opt.zero_grad(set_to_none=True)  # without gradients a step does nothing
    elif not scaler.is_enabled():
        opt.found_inf = bad.float()  # a fused optimizer looks at it on the device
    scaler.step(opt)  # calls opt.step(); with float16 not if a gradient overflowed
    scaler.update()


def find_non_finite_layer(run):
    """The first layer whose output is not finite in the ranks' last micro-batches, or None."""
    first, windows = run.reader.last
    x, _ = to_device(windows, run.device)
    seed_dropout(first // batch_size)
    with autocast(run.device, dtype):
        return first_of_ranks(first_non_finite_layer(run.model, lambda: run.model(x)))


def agree(run):
    """All ranks agree on the seconds of training, and on a signal that any of them got. Raises
    rank 0's error if it could not write its log."""
    run.stop_signal, run.seconds = exchange(run.signals.number, run.seconds, run.log.error)


# -----------------------------------------------------------------------------
# the log


def log_step(run, stats, norm):
    """Write a step's numbers to the log and the console."""
    step = run.step
    entry = {"step": step, "seconds": run.seconds, "lr": run.opt.param_groups[0]["lr"]}
    entry |= summarize(stats, gradient_accumulation_steps) | {"grad_norm": norm.item()}
    entry |= speed(
        run.timer.lap(step),
        tokens_per_step=gradient_accumulation_steps * batch_size * block_size,
        flops_per_token=run.flops_per_token,
        device=run.device,
        num_devices=world_size,
        dtype=dtype,
    )
    is_last = run.is_over()
    if step % log_interval == 0 or step == 1 or is_last:
        # by the step's number: a resumed run logs the same details
        details = step == 1 or step % load_interval < log_interval or is_last
        run.log.write(details=details, **entry)
    seconds_left = run.schedule.seconds_left(step, run.seconds, entry["ms"] / 1e3)
    if not max_seconds:
        seconds_left += (max_iters - step) // eval_interval * run.timer.last_pause
    print0(console_line(entry, max_iters, seconds_left))
    warn_of_collapse(run, entry.get("collapsed_layers"))
    run.guard.report_skipped(step, run.scaler, lambda: find_non_finite_layer(run))


def warn_of_collapse(run, layers):
    """Say once when routing collapses."""
    if layers and not run.collapsed:
        print0(
            f"warning: routing has collapsed in MoE layers {layers}, counted from 0: most tokens "
            "go to few of the experts; a larger expert_load_balance_loss_coef or a lower "
            "learning_rate helps"
        )
    run.collapsed = bool(layers)


# -----------------------------------------------------------------------------
# evaluating and saving


@torch.no_grad()
def evaluate(run):
    """Mean cross-entropy in nats per token over the fixed validation windows, which the processes
    share out."""
    run.model.eval()
    offsets = run.data.val_offsets(eval_iters * batch_size)
    own = offsets[rank::world_size]
    total = torch.zeros((), dtype=torch.float64)
    # all ranks make the same number of passes, which FSDP needs
    for i in range(0, math.ceil(len(offsets) / world_size), batch_size):
        batch = own[i : i + batch_size]
        x, y = to_device(run.data.read_windows("val", batch or offsets[:1]), run.device)
        with autocast(run.device, dtype):
            loss = run.model(x, y)[1]
        total += loss.item() * len(batch)
    run.model.train()
    return all_reduce_sum(total).item() / len(offsets)


def validate(run):
    """Evaluate, say and log the loss, and return it. It may be the best so far."""
    val_loss = evaluate(run)
    bits = run.data.bits_per_byte(val_loss)
    run.log.write(step=run.step, seconds=run.seconds, val_loss=val_loss, val_bits_per_byte=bits)
    in_bits = f" | {bits:.4f} bits per byte" if bits else ""
    print0(f"step {run.step}/{max_iters} | validation loss {val_loss:.4f}{in_bits}")
    best = math.inf if run.best_val_loss is None else run.best_val_loss
    if val_loss < best:  # not if it is NaN
        run.best_val_loss = val_loss
    return val_loss


def evaluate_start(run, resumed):
    """Evaluate the model that the run begins with. If it is a checkpoint of the run's own without a
    loss, because its evaluation failed or a signal came first, add the loss to it."""
    val_loss = validate(run)
    lacks_loss = resumed and not eval_only and resumed.val_loss is None
    if lacks_loss and resumed.path.parent.resolve() == Path(out_dir).resolve():
        broadcast_from_rank0(
            lambda: checkpoint.add_evaluation(resumed.path, val_loss, run.best_val_loss)
        )


def evaluate_and_save(run, save_now):
    """Evaluate the last step, and save it now, or only if it is the best."""
    best_so_far = run.best_val_loss
    if save_now:
        run.saver.save()  # first: whatever happens in an evaluation, the step is there
    else:
        run.saver.copy()
    val_loss = validate(run)
    if save_now:
        run.saver.add_evaluation(val_loss, run.best_val_loss)
    elif run.best_val_loss != best_so_far:
        run.saver.save(val_loss=val_loss)


def checkpoint_facts(run) -> checkpoint.Facts:
    """What a checkpoint says of the run's state now, beside weights and moments."""
    return {
        "step": run.step,
        "sequences": run.sequences,
        "seconds": run.seconds,
        "best_val_loss": run.best_val_loss,
        "before_decay": run.before_decay,
        "device": run.device.type,
        "dtype": dtype,
        "run": run.settings,
        "tokenizer": run.data.tokenizer_meta(),
        "data": run.data.fingerprint(),
    }


# -----------------------------------------------------------------------------
# the end


def print_sample(run):
    """All ranks call it, because FSDP's forward needs them."""
    try:
        prompt = broadcast_from_rank0(lambda: Tokenizer(run.data.meta).encode("\n").tolist())
        idx = torch.tensor([prompt], device=run.device)
        # the number of keys grows with every token, so compiling is not worth it
        with autocast(run.device, dtype), torch.compiler.set_stance("force_eager"):
            idx = run.model.generate(
                idx, sample_tokens, 0.8, 200, vocab_size=run.data.vocab_size, seed=seed
            )
        if rank == 0:
            print(f"\na sample:\n{Tokenizer(run.data.meta).decode(idx[0].tolist())}\n")
    except (InputError, OSError, FloatingPointError) as error:  # the run itself is done
        print0(f"no sample: {error}")
    script = short_path(Path(__file__).with_name("sample.py"))
    print0("more:", shlex.join(["python", script, f"--out_dir={out_dir}"]))


def finish(run):
    """The end of a run, or of this process if a signal has stopped it early."""
    code = 0
    if run.is_over() or eval_only:
        run.log.write(end=time.strftime("%Y-%m-%d %H:%M:%S"), steps=run.step)
        if sample_tokens and not eval_only:
            print_sample(run)
    else:
        code = 128 + run.stop_signal
        print0(f"stopped by {signal.Signals(run.stop_signal).name}; resume with --init_from=auto")
    run.log.close()
    exchange(0, 0.0, run.log.error)
    shutdown(code)


# -----------------------------------------------------------------------------


@contextlib.contextmanager
def training(run):
    """What is open while the run trains. An error in it saves the last step."""
    state = {"optimizer": run.opt, "scaler": run.scaler, "guard": run.guard}
    background = run.device.type == "cuda"
    first = run.sequences + rank * batch_size
    with (
        run.log,
        StopSignals() as run.signals,
        no_garbage_collection(),
        explain_out_of_memory(run.settings),
        BatchReader(run.data, batch_size, first, world_size) as run.reader,
        Saver(
            out_dir, keep_last, background, run.model, state, lambda: checkpoint_facts(run)
        ) as run.saver,
    ):
        run.timer = Timer(run.device, run.seconds)
        yield


@one_line_comm_errors()
def main():
    limit_threads()
    settings, given = read_settings(globals(), retired=RETIRED, note=note)
    torch_device = choose_device(settings["device"])
    if torch_device.type == "cpu":
        keep_freed_memory()
    if world_size > 1:
        from nanomoe.parallel import connect  # late: only for several processes

        connect(torch_device)

    # decide everything, before anything is built or written
    torchruns = torchrun_ids()
    restarted = False
    if settings["out_dir"] and not settings["eval_only"]:
        restarted = broadcast_from_rank0(lambda: claim(settings["out_dir"], torchruns, settings))
    start = choose_start(settings, given, restarted)
    plan = make_plan(settings, given, start, torch_device)
    globals().update(plan.settings)  # from here on nobody changes them
    for line in plan.lines:
        print0(line)

    resumed = plan.start.resumed
    log = open_log(plan.settings, resumed)
    with explain_out_of_memory():
        run = build_run(plan, torch_device, log)
    if not eval_only:
        broadcast_from_rank0(lambda: check_disk_space(out_dir, run.model, optimizer))
    describe_run(run, torchruns)

    if eval_only or run.is_over():  # nothing to train
        with explain_out_of_memory(plan.settings):
            evaluate_start(run, resumed)
        return finish(run)

    with training(run):
        if resumed and resumed.val_loss is None and run.step % eval_interval == 0:
            with run.timer.paused():
                evaluate_start(run, resumed)
        while not run.is_over() and not run.stop_signal:
            # forward, backward, clip, optimizer.step(), zero_grad, update of the balance
            stats, norm = train_step(run)
            if run.step % 100 == 0:
                gc.collect()  # on all ranks at the same step
            agree(run)

            # log
            if run.step % log_interval == 0 or run.step == run.first_step + 1 or run.is_over():
                log_step(run, stats, norm)

            # evaluate and save
            decay_begins = run.before_decay and not run.schedule.before_decay(run.step, run.seconds)
            if run.is_over() or (run.step % eval_interval == 0 and not run.stop_signal):
                with run.timer.paused():
                    save_now = run.is_over() or decay_begins or always_save_checkpoint
                    evaluate_and_save(run, save_now)
                agree(run)  # a signal may have come meanwhile
            if not run.saver.is_saved and (run.stop_signal or decay_begins):
                with run.timer.paused():
                    run.saver.save()
    finish(run)


if __name__ == "__main__":
    run_main(main)
