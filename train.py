"""
Train a dense or Mixture-of-Experts GPT.

On one GPU, or on a laptop's CPU:
$ python train.py config/train_plays_char_moe.py --batch_size=16

On the 8 GPUs of one machine (on several, and under Slurm: see the README):
$ torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_moe.py

Exit codes: 0 done; 1 a file cannot be read or written, out of memory, or numbers that are not finite; 2 settings or data
that cannot work; 128 and the signal's number, 130, 138 or 143, stopped by Ctrl-C (SIGINT), SIGUSR1 or SIGTERM after saving.
"""

import contextlib
import gc
import math
import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from configurator import InputError, configure, run_main
from model import out_of_range
from moe_model import build_config, build_model
from nanomoe import checkpoint, distributed
from nanomoe.dataset import Dataset, pad_vocab_size
from nanomoe.device import (
    autocast,
    choose_compile,
    choose_device,
    choose_dtype,
    device_name,
    estimate_memory,
    explain_out_of_memory,
    limit_threads,
    peak_flops,
    synchronized_time,
)
from nanomoe.distributed import print0, rank, world_size
from nanomoe.init_from import adapt_weights, inherit_settings, model_config_for, resolve_init_from
from nanomoe.monitor import StepGuard, console_line, summarize, watch_for_non_finite
from nanomoe.run_dir import RunLog, Saver, check_disk_space, prepare_run_dir
from nanomoe.tokenizer import Tokenizer

# -----------------------------------------------------------------------------
# settings: GPT-2 (124M) on OpenWebText. Config files and --key=value flags override them
# output
out_dir = "out"  # checkpoints and log.jsonl go here
eval_interval = (
    2000  # steps between evaluations, each followed by a checkpoint; there is one at the end, too
)
log_interval = 1  # steps between lines on the console and in log.jsonl
eval_iters = 200  # validate on eval_iters * batch_size windows, spread evenly over val.bin (or on all that it has)
eval_only = False  # evaluate once and exit
always_save_checkpoint = (
    True  # save after every evaluation, not only when the validation loss is the lowest so far
)
keep_last = 2  # keep so many newest checkpoints, and the best one; 0 = keep all
async_save = "auto"  # write checkpoints in the background, from a copy in the host's memory; 'auto' = on cuda only
init_from = "scratch"  # 'scratch'; 'resume' (out_dir's newest good checkpoint); 'auto' (that if there is one); 'upcycle';
# or OpenAI's weights, 'gpt2', 'gpt2-medium', 'gpt2-large' or 'gpt2-xl'; or the path of a checkpoint or Hugging Face model
upcycle_from = ""  # for 'upcycle' and 'auto': begin with this model's weights, 'gpt2' or a path; with use_moe as experts
upcycle_noise = 0.0  # and add so many standard deviations of noise to the experts
sample_tokens = 400  # length of the sample that is printed at the end, 0 = none
# wandb logging
wandb_log = False  # also log to Weights & Biases
wandb_project = "owt"  # its project
wandb_run_name = "gpt2"  # its run
# data
dataset = "openwebtext"  # a folder of data/, or a path
gradient_accumulation_steps = 5 * 8  # micro-batches per optimizer step, over all processes together
batch_size = 12  # sequences per micro-batch
block_size = 1024  # tokens per sequence
# model
n_layer = 12  # blocks
n_head = 12  # attention heads
n_embd = 768  # width
dropout = 0.0  # for pretraining 0 is good; for little data try 0.1 and more
bias = False  # in linear layers and LayerNorms
norm = "layernorm"  # 'layernorm' or 'rmsnorm'
position = "learned"  # 'learned' or 'rope'
n_kv_head = 0  # key/value heads of grouped-query attention; 0 = n_head
mlp = "gelu"  # 'gelu', 'gelu_tanh' (as OpenAI's GPT-2), 'swiglu' or 'relu2'; also of the experts
mlp_dim = 0  # hidden width of the dense MLP; 0 = 4 * n_embd, for swiglu 8/3 * n_embd
qk_norm = False  # RMSNorm on queries and keys
qk_norm_over = "head"  # each 'head' by itself, or the 'width' of all together
tie_weights = True  # one matrix for embedding and language-model head
gradient_checkpointing = (
    False  # recompute activations in backward: less memory, about a third more time
)
# Mixture of Experts
use_moe = False  # MoE blocks instead of dense ones
num_experts = 4  # experts per MoE layer
top_k = 1  # experts per token
expert_dim = 0  # hidden width of an expert; 0 = the dense MLP's; -1 = that / (top_k + num_shared_experts), for equal FLOPs
num_shared_experts = 0  # experts that every token visits
moe_stride = 1  # every n-th block is MoE
num_dense_layers = 0  # the first blocks stay dense
router_score = "softmax"  # 'softmax' or 'sigmoid', of the router's logits
norm_top_k = True  # a token's gates sum to 1 (for top_k > 1)
route_scale = 1.0  # factor of all gates
expert_load_balance_loss_coef = 0.02  # weight of the load-balance loss
balance_scope = (
    "global"  # the load in it: 'global', of a whole optimizer step, or 'micro', of each micro-batch
)
router_bias_update_rate = (
    0.0  # loss-free balancing: step of the bias that evens out the load; 0 = off, usual is 1e-3
)
router_z_loss_coef = 0.0  # weight of the router z-loss
router_jitter = 0.0  # multiplicative noise on the router's input in training
capacity_factor = 0.0  # in training an expert drops a sequence's tokens beyond this times T * top_k / num_experts; 0 = never
expert_dropout = 0.0  # dropout inside the experts
expert_impl = "auto"  # 'grouped' (one GEMM), 'split' (sorted, one by one), 'loop' (the reference), 'auto' = the fastest here
# AdamW
learning_rate = 6e-4  # the highest
max_iters = 600000  # optimizer steps of the run
max_seconds = 0.0  # or, if not 0, as many steps as take so long, without evaluating, saving and a start's first step
weight_decay = 1e-1  # on matrices and embeddings
beta1 = 0.9  # decay of the first moment
beta2 = 0.95  # decay of the second moment
grad_clip = 1.0  # clip the gradient's norm; 0 = off
spike_guard = 0.0  # skip a step whose loss or gradient norm is so many standard deviations above the last ones; 0 = off, try 6
max_bad_steps = 10  # a step whose gradient is not finite updates nothing; after more than so many in a row the run stops
# learning-rate schedule
decay_lr = True  # linear warm-up, then cosine; off = constant
warmup_iters = 2000  # steps of warm-up
lr_decay_iters = 0  # step at which min_lr is reached; 0 = max_iters; with max_seconds, it is reached at their end
min_lr = 6e-5  # the lowest, often learning_rate / 10
# system
parallel = "ddp"  # processes hold the whole model each ('ddp'), or a share of it ('fsdp'), for models too large for one GPU
backend = "auto"  # 'nccl', 'gloo' or 'auto'
device = "auto"  # 'cuda', 'cuda:1', 'mps', 'cpu' or 'auto'
dtype = "auto"  # 'float32', 'bfloat16', 'float16' (with a gradient scaler) or 'auto': bfloat16 where it is faster
compile = "auto"  # torch.compile; 'auto' = on cuda only
seed = 1337  # of weights, data order and dropout
deterministic = False  # on a GPU, too, results that are equal to the last bit in every run and after resuming; slower
debug_nans = False  # stop at the first activation that is not finite, and name its layer
# -----------------------------------------------------------------------------


def get_lr(step, seconds=0.0):
    """Learning rate of a step (counted from 0): linear warm-up, cosine to min_lr at lr_decay_iters, min_lr after. With
    max_seconds, the cosine runs over the seconds of training so far."""
    last = lr_decay_iters or max_iters
    if not decay_lr:
        return learning_rate
    if step < warmup_iters:
        return learning_rate * (step + 1) / (warmup_iters + 1)
    progress = (
        seconds / max_seconds
        if max_seconds
        else (step - warmup_iters) / (last - warmup_iters)
        if step < last
        else 1
    )
    return min_lr + (learning_rate - min_lr) * 0.5 * (1 + math.cos(math.pi * min(progress, 1)))


def check_settings(settings, source, weights_only):
    """Check everything that can be checked before any work; all problems in one InputError, one a line. Returns the model's
    config and the Dataset.

    source: the Checkpoint to start from, which the settings took over, or None. weights_only: not to go on with its run.
    """
    data = config = None
    found = out_of_range(
        settings,
        at_least=dict.fromkeys(
            (
                "batch_size",
                "gradient_accumulation_steps",
                "max_iters",
                "eval_interval",
                "log_interval",
                "eval_iters",
            ),
            1,
        )
        | dict.fromkeys(
            (
                "keep_last",
                "sample_tokens",
                "seed",
                "weight_decay",
                "grad_clip",
                "warmup_iters",
                "lr_decay_iters",
                "min_lr",
                "max_seconds",
                "max_bad_steps",
                "spike_guard",
                "upcycle_noise",
            ),
            0,
        ),
        choices={
            "backend": ("auto", "nccl", "gloo"),
            "parallel": ("ddp", "fsdp"),
            "compile": (True, False, "auto"),
            "dtype": ("auto", "float32", "bfloat16", "float16"),
            "async_save": (True, False, "auto"),
        },
        below_one=("beta1", "beta2"),
    )
    found += [
        f"{name} is {value}, expected a finite number"
        for name, value in settings.items()
        if isinstance(value, float) and not math.isfinite(value)
    ]
    if not learning_rate > 0:
        found.append(f"learning_rate is {learning_rate}, expected more than 0")
    if seed >= 2**64:
        found.append(f"seed is {seed}, expected less than 2**64")
    if gradient_accumulation_steps % world_size:
        found.append(
            f"gradient_accumulation_steps ({gradient_accumulation_steps}) is not divisible by the number of "
            f"processes ({world_size})"
        )
    try:
        build_config(settings)
        data = Dataset(dataset, block_size, seed)
        if source is None:
            config = build_config(settings | {"vocab_size": pad_vocab_size(data.vocab_size)})
        else:
            config = model_config_for(source, settings, weights_only)
            if data.vocab_size > config.vocab_size:
                found.append(
                    f"dataset '{dataset}' has {data.vocab_size} token ids, the checkpoint's model {config.vocab_size}"
                )
            elif not source.same_tokenizer(data.meta):
                found.append(
                    f"dataset '{dataset}' has other token ids than those that {source.path} was trained on"
                )
    except InputError as error:
        found.append(str(error))
    except ValueError as error:  # the model's config, all its problems
        found += str(error).split("; ")
    if found:
        raise InputError("\n".join(found))
    return config, data


def move(windows, where):
    """A batch as Dataset.windows gives it, to tensors on the device."""
    x, y = (torch.from_numpy(a) for a in windows)
    if where.type == "cuda":  # from pinned memory the copy waits for nothing
        return x.pin_memory().to(where, non_blocking=True), y.pin_memory().to(
            where, non_blocking=True
        )
    return x.to(where), y.to(where)


@torch.no_grad()
def evaluate(model, data, where, compute_dtype):
    """Mean cross-entropy in nats per token over the fixed validation windows, which the processes share."""
    model.eval()
    starts = data.val_offsets(eval_iters * batch_size)
    mine, total = starts[rank::world_size], torch.zeros((), dtype=torch.float64)
    for i in range(
        0, math.ceil(len(starts) / world_size), batch_size
    ):  # as often in all processes, which FSDP needs
        some = mine[i : i + batch_size]
        with autocast(where, compute_dtype):
            loss = model(*move(data.read_windows("val", some or starts[:1]), where))[1]
        total += loss.item() * len(some)
    model.train()
    return distributed.all_reduce_sum(total).item() / len(starts)


def print_sample(model, data, where, compute_dtype):
    """By all processes, for FSDP's forward needs them."""
    try:
        prompt = torch.tensor(
            [distributed.broadcast_from_rank0(lambda: Tokenizer(data.meta).encode("\n").tolist())],
            device=where,
        )
        # the number of keys grows with every token: not worth compiling
        with autocast(where, compute_dtype), torch.compiler.set_stance("force_eager"):
            ids = model.generate(
                prompt, sample_tokens, 0.8, 200, vocab_size=data.vocab_size, seed=seed
            )[0].tolist()
        if rank == 0:
            print(f"\na sample:\n{Tokenizer(data.meta).decode(ids)}\n")
    except (
        InputError,
        OSError,
        FloatingPointError,
    ) as error:  # no reason to let a finished run fail
        print0(f"no sample: {error}")
    print0(
        f"more: python {os.path.relpath(Path(__file__).with_name('sample.py'))} --out_dir={out_dir}"
    )


@distributed.one_line_comm_errors()
def main():
    limit_threads()
    settings, given = configure(globals())
    where = choose_device(device)
    distributed.init_distributed(backend, where)
    launchers = distributed.torchrun_ids()
    path, weights_only = distributed.broadcast_from_rank0(
        lambda: resolve_init_from(settings, launchers)
    )  # rank 0 looks, all take what it found
    source = checkpoint.read(path) if path else None
    if source:
        weights_only |= source.weights_only
        inherit_settings(source, settings, given, weights_only)
        globals().update(settings)
    config, data = check_settings(settings, source, weights_only)
    resumed = None if weights_only else source
    if dtype == "auto" and resumed and resumed.device == where.type:
        compute_dtype = resumed.dtype  # a new measurement might come to another answer
    else:
        compute_dtype = distributed.broadcast_from_rank0(lambda: choose_dtype(dtype, where))
    if compute_dtype == "float16" and (spike_guard or parallel == "fsdp"):
        raise InputError(
            "spike_guard and parallel 'fsdp' are for bfloat16 and float32, not for float16 and its scaler"
        )
    if (
        compute_dtype == "float32"
    ):  # else float32 is for the few things that need it, the router's scores
        torch.set_float32_matmul_precision("high")  # TF32 on a GPU
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    log = None  # on rank 0

    def open_log():
        nonlocal log
        prepare_run_dir(out_dir, resumed)
        log = RunLog(out_dir, resumed.step if resumed else 0)
        if wandb_log:
            log.start_wandb(wandb_project, wandb_run_name, settings)

    if not eval_only:
        distributed.broadcast_from_rank0(open_log)

    # -----------------------------------------------------------------------------
    # model and optimizer
    with explain_out_of_memory():
        torch.manual_seed(seed)
        if source and weights_only:
            print0(
                adapt_weights(source, config, settings)
                or f"starting with the weights of {source.path}"
            )
        model = (
            source.build_model() if source else build_model(config)
        )  # on the CPU: the same weights for every device
        model.train()
        compiled = not debug_nans and choose_compile(compile, where)
        if compiled:
            model.compile_parts()
        train_model = distributed.parallelize(model, parallel, where, compute_dtype)
        optimizer = model.configure_optimizers(
            weight_decay, learning_rate, (beta1, beta2), where.type
        )
        scaler = torch.amp.GradScaler(where.type, enabled=compute_dtype == "float16")
        guard = StepGuard(spike_guard, max_bad_steps, where)
        first_step, best_val_loss = 0, None
        if resumed:
            resumed.restore_training_state(optimizer, scaler, guard)
            first_step, best_val_loss = resumed.step, resumed.best_val_loss
            print0(f"resuming from {resumed.path} after step {first_step}")
        if source:
            source.weights = None  # their memory
        non_finite = watch_for_non_finite(model) if debug_nans else []

    # -----------------------------------------------------------------------------
    # what is going to happen
    sequences_per_step = gradient_accumulation_steps * batch_size
    tokens_per_step, flops = sequences_per_step * block_size, model.flops_per_token()
    peak = peak_flops(where)
    state_gb, activation_gb = (
        size / 1e9 for size in estimate_memory(model, batch_size, compute_dtype)
    )
    state_gb /= world_size if parallel == "fsdp" else 1
    print0(
        f"{type(model).__name__}: {model.num_params():,} parameters, {model.num_active_params():,} of them "
        f"active per token; {flops / 1e6:,.1f} MFLOPs per token\n"
        f"{tokens_per_step:,} tokens per step = {gradient_accumulation_steps} micro-batches x {batch_size} sequences x "
        f"{block_size} tokens; {max_iters:,} steps = {max_iters * sequences_per_step / data.windows_per_epoch:.2f} epochs\n"
        f"on {world_size} x {device_name(where)}, {compute_dtype}, compile {'on' if compiled else 'off'}; estimated memory of a "
        f"process: {state_gb:.2f} GB weights, gradients and moments, {activation_gb:.2f} GB activations"
    )
    for line in model.remarks(where.type, getattr(torch, compute_dtype), compiled):
        print0(line)
    if not eval_only:
        distributed.broadcast_from_rank0(lambda: check_disk_space(out_dir, model))
    if log:
        log.write(
            start=time.strftime("%Y-%m-%d %H:%M:%S"),
            first_step=first_step,
            launchers=launchers,
            torch=torch.__version__,
            dtype=compute_dtype,
            params=model.num_params(),
            active_params=model.num_active_params(),
            flops_per_token=flops,
            tokens_per_step=tokens_per_step,
            settings=settings,
        )

    stop = []  # the signals that asked this process to stop, and when

    def request_stop(number, _):
        stop.append((number, time.monotonic()))
        # a second Ctrl-C stops at once; torchrun's forwarding of the first one is no second one
        if (
            number == signal.SIGINT
            and len(stop) > 1
            and (not launchers or stop[-1][1] - stop[0][1] > 1)
        ):
            os._exit(130)

    def validate(done, trained):
        """Evaluate, tell, and return the loss and the seconds that it took."""
        begin = synchronized_time(where)
        val_loss = evaluate(model, data, where, compute_dtype)
        bpb = data.bits_per_byte(val_loss)
        if log:
            log.write(step=done, seconds=trained, val_loss=val_loss, val_bits_per_byte=bpb)
        print0(
            f"step {done}/{max_iters} | validation loss {val_loss:.4f}"
            + (f" | {bpb:.4f} bits per byte" if bpb else "")
        )
        return val_loss, synchronized_time(where) - begin

    def read(index):
        return data.read_windows("train", data.train_offsets(index * batch_size, batch_size))

    # -----------------------------------------------------------------------------
    # the loop
    background = async_save is True or (async_save == "auto" and where.type == "cuda")
    # the reader reads one micro-batch ahead
    with (
        explain_out_of_memory(settings),
        ThreadPoolExecutor(1) as reader,
        Saver(out_dir, keep_last, background) as saver,
    ):
        handlers = {}
        trained = trained_before = resumed.seconds if resumed else 0.0  # seconds
        nothing_to_do = eval_only or first_step >= max_iters or 0 < max_seconds <= trained
        if nothing_to_do:
            best_val_loss, _ = validate(first_step, trained)
        done, eval_seconds, collapsed, stopped_by = first_step, 0.0, False, 0
        if not nothing_to_do:
            handlers = {
                number: signal.signal(number, request_stop)
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
            }
            upcoming = reader.submit(read, first_step * gradient_accumulation_steps + rank)
            # Python's garbage collector would halt this process, and with it all others, at its own times
            gc.collect()
            gc.freeze()
            gc.disable()
        clock = lap = synchronized_time(
            where
        )  # starts of the times that `trained` and the next log line account for
        for step in range(first_step, max_iters if not nothing_to_do else 0):
            for group in optimizer.param_groups:
                group["lr"] = lr = get_lr(step, trained)
            done = step + 1
            stats = {}  # the model's, summed over micro-batches on the device, which nothing here waits for
            micro_steps = gradient_accumulation_steps // world_size
            for micro_step in range(micro_steps):
                # the global batch's micro-batches go round the processes, so who computes which one changes nothing
                index = step * gradient_accumulation_steps + micro_step * world_size + rank
                x, y = move(upcoming.result(), where)
                upcoming = reader.submit(read, index + world_size)
                # dropout, too, depends on nothing but the seed and which micro-batch this is
                torch.manual_seed(
                    int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])
                )
                last = micro_step == micro_steps - 1
                with (
                    contextlib.nullcontext()
                    if last or not hasattr(train_model, "no_sync")
                    else train_model.no_sync()
                ):
                    with autocast(where, compute_dtype):
                        loss = train_model(x, y)[1]  # the logits are not kept
                    scaler.scale(loss / micro_steps).backward()
                if non_finite:
                    raise FloatingPointError(
                        f"step {done}: the first activation that is not finite is the output of "
                        f"{non_finite[0]}"
                    )
                for name, value in model.stats.items():
                    stats[name] = stats.get(name, 0) + value
            stats = distributed.all_reduce_sum(stats)
            scaler.unscale_(optimizer)
            # loss and norm are those of all processes, so all skip the same steps; they stay on the device, where the fused
            # optimizer looks at found_inf
            norm = distributed.full_tensor(
                torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
            )
            bad = guard.check(stats["cross_entropy"] / gradient_accumulation_steps, norm)
            if not optimizer.defaults["fused"]:
                if bad:
                    optimizer.zero_grad(set_to_none=True)  # without gradients a step does nothing
            elif not scaler.is_enabled():  # which does the same
                optimizer.found_inf = bad.float()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            model.update_balance(stats, bad)
            if done % 100 == 0:  # all processes at the same step
                gc.collect()

            if done == first_step + 1:
                clock = synchronized_time(where)  # the first step compiles
            stopped_by, trained = distributed.sync_stop_and_time(
                stop[0][0] if stop else 0, trained_before + time.perf_counter() - clock
            )
            finished = done == max_iters or (max_seconds and trained >= max_seconds)
            if done % log_interval == 0 or done == first_step + 1 or finished:
                entry = {
                    "step": done,
                    "seconds": trained,
                    "lr": lr,
                    **summarize(stats, gradient_accumulation_steps),
                }
                seconds = (synchronized_time(where) - lap) / len(guard.bad)
                rate = tokens_per_step / seconds
                mfu = (
                    rate * flops / (peak * world_size)
                    if peak and compute_dtype != "float32"
                    else None
                )
                entry |= {"ms": seconds * 1e3, "tokens_per_s": rate, "mfu": mfu}
                if log and (
                    done % log_interval == 0 or done == 1 or finished
                ):  # the same steps wherever a run resumed
                    log.write(**entry)
                left = (max_iters - done) * seconds + (
                    max_iters - done
                ) // eval_interval * eval_seconds
                if max_seconds:
                    left = max(0.0, max_seconds - trained)
                print0(console_line(entry, max_iters, left))
                if entry.get("collapsed_layers") and not collapsed:
                    print0(
                        f"warning: routing has collapsed in MoE layers {entry['collapsed_layers']}: almost all tokens go to "
                        "the same experts; a larger expert_load_balance_loss_coef or a lower learning_rate helps"
                    )
                collapsed = bool(entry.get("collapsed_layers"))
                guard.report_skipped(done, scaler, print0)
                lap = synchronized_time(where)

            saver.poll()
            to_evaluate = done % eval_interval == 0 or finished
            if not to_evaluate and not stopped_by:
                continue
            pause, val_loss, best = synchronized_time(where), None, False
            if to_evaluate:
                val_loss, eval_seconds = validate(done, trained)
                best = math.isfinite(val_loss) and (
                    best_val_loss is None or val_loss < best_val_loss
                )
                best_val_loss = val_loss if best else best_val_loss
            if stopped_by or best or always_save_checkpoint or finished:
                saver.save(
                    done,
                    model,
                    {"optimizer": optimizer, "scaler": scaler, "guard": guard},
                    run=settings,
                    val_loss=val_loss,
                    best_val_loss=best_val_loss,
                    seconds=trained,
                    device=where.type,
                    dtype=compute_dtype,
                )
            if finished:
                stopped_by = 0
            if stopped_by or finished:
                break
            pause = synchronized_time(where) - pause
            lap, clock = lap + pause, clock + pause  # evaluating and saving is not training

    # -----------------------------------------------------------------------------
    # the end
    gc.enable()
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    if log and not stopped_by:
        log.write(end=time.strftime("%Y-%m-%d %H:%M:%S"), steps=done)
    if not stopped_by and not eval_only and sample_tokens:
        print_sample(model, data, where, compute_dtype)
    if log and log.wandb:
        log.wandb.finish()
    if stopped_by:
        print0(f"stopped by {signal.Signals(stopped_by).name}; go on with --init_from=auto")
    distributed.shutdown(128 + stopped_by if stopped_by else 0)


if __name__ == "__main__":
    run_main(main)
