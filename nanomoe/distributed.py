"""
Many processes: which one this is, what they tell each other, and how a model is spread over them.

torchrun starts them, or anything else that sets torch.distributed's environment (RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR,
MASTER_PORT). In a single process all of this works, too, and does next to nothing.
"""

import contextlib
import os
import re
import socket
import sys
import time
import uuid
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import InputError

rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def print0(*words):
    if rank == 0:
        print(*words, flush=True)


def init_distributed(backend, device):
    """Meet the other processes. backend: 'nccl', 'gloo', or 'auto' for what the device needs."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size > 1:
        # gloo beside nccl, for the small things that processes tell each other from the CPU
        gpu = backend == "nccl" or (backend == "auto" and device.type == "cuda")
        kinds = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            dist.init_process_group(
                kinds, store=fresh_rendezvous_store(), rank=rank, world_size=world_size
            )
        else:
            dist.init_process_group(kinds)


def fresh_rendezvous_store():
    """A store for these processes alone. torchrun's own outlives a restart, with the addresses of dead processes in it, at
    which the new ones would wait (pytorch issue 135712); nor do torchruns on several machines count restarts alike. So the
    first process gives the meeting a name, and leaves it for each of the others under a name that that one has made up."""
    store, name = (
        dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False),
        uuid.uuid4().hex,
    )
    if rank > 0:
        store.set(f"process {rank}", name)
        name = store.get(name).decode()  # waits
        store.set(f"{name} {rank}", "here")
    missing = set(range(1, world_size)) if rank == 0 else ()
    while missing:
        for other in sorted(missing):
            if store.check(
                [f"process {other}"]
            ):  # perhaps still that of a dead one, until the new one comes
                store.set(store.get(f"process {other}").decode(), name)
            if store.check([f"{name} {other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return dist.PrefixStore(name, store)


def shutdown(code):
    """End this process, with all others: taking down DDP and gloo in good order was seen to deadlock on torch 2.13, its
    destructor waiting for threads that wait for Python."""
    if world_size > 1:
        dist.all_reduce(torch.zeros(1))
        sys.stdout.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def broadcast_from_rank0(make):
    """Rank 0's make(), for all of them. What it raises, all raise: InputError or OSError."""
    result = [None, None]
    if rank == 0:
        try:
            result[0] = make()
        except (InputError, OSError) as error:
            result[1] = error
    if world_size > 1:
        dist.broadcast_object_list(result)
    if result[1]:
        raise result[1]
    return result[0]


def torchrun_ids():
    """The torchruns that started these processes, one a machine: host, process id and start. None if they were started in
    another way. Processes that torchrun has started again, because one of them died, find the same ones."""
    name = None
    if "TORCHELASTIC_RUN_ID" in os.environ:
        stat = Path(f"/proc/{os.getppid()}/stat")
        since = stat.read_text().rpartition(")")[2].split()[19] if stat.exists() else ""
        name = f"{socket.gethostname()} {os.getppid()} {since}"
    names = [name] * world_size
    if world_size > 1:
        dist.all_gather_object(names, name)
    return sorted({name for name in names if name})


@contextlib.contextmanager
def one_line_comm_errors():
    """Turn what gloo and NCCL say, as when another process has gone, into an OSError of one line."""
    try:
        yield
    except RuntimeError as error:
        if world_size == 1 or not re.search("gloo|nccl", str(error), re.IGNORECASE):
            raise
        raise OSError(f"the processes have lost each other: {str(error).splitlines()[0]}") from None


def sync_stop_and_time(signal, seconds):
    """The signal that any process got (0: none), and the seconds of training on one clock: all must leave the loop together."""
    both = torch.tensor([signal, seconds], dtype=torch.float64)
    if world_size > 1:
        dist.all_reduce(both, dist.ReduceOp.MAX)
    return int(both[0]), both[1].item()


def all_reduce_sum(stats):
    """A tensor, or a dict of them, each summed over all processes, in one message that the host does not wait for."""
    if world_size == 1:
        return stats
    if torch.is_tensor(stats):
        dist.all_reduce(stats)
        return stats
    flat = torch.cat([value.flatten().float() for value in stats.values()])
    dist.all_reduce(flat)
    parts = flat.split([value.numel() for value in stats.values()])
    return {
        name: part.view_as(value) for (name, value), part in zip(stats.items(), parts, strict=True)
    }


def parallelize(model, parallel, device, dtype):
    """A model, the same one on the CPU of each process, brought to the devices. parallel: 'ddp', a whole copy on each
    (DistributedDataParallel); 'fsdp', each keeps a share of every weight, gradient and moment and fetches the weights of a
    part when its turn comes (FSDP2, Zhao et al. 2023, arXiv 2304.11277), as bfloat16 if dtype is that. Returns what to train
    with; the model itself stays usable and keeps its names."""
    if world_size == 1 or parallel == "ddp":
        model.to(device)
    if world_size == 1:
        return model
    if parallel == "ddp":
        warnings.filterwarnings(
            "ignore", message=".*broadcast_buffers"
        )  # 2.13 renames it, 2.10 has only this name
        return DistributedDataParallel(
            model,
            device_ids=[device.index] if device.type == "cuda" else None,
            gradient_as_bucket_view=True,
            broadcast_buffers=False,
        )

    from torch.distributed.device_mesh import init_device_mesh  # late: only for those who use it
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    warnings.filterwarnings(
        "ignore", message=".*FSDP2-wrapped module"
    )  # nothing here changes a part's output in place

    def place(
        p,
    ):  # evenly where a dimension allows it: 4 experts on 8 GPUs are cut across, not handed to half of them
        return Shard(next((i for i, size in enumerate(p.shape) if size % world_size == 0), 0))

    mesh = init_device_mesh(device.type, (world_size,))
    low = MixedPrecisionPolicy(
        torch.bfloat16 if dtype == "bfloat16" else None, torch.float32, cast_forward_inputs=False
    )
    for block in model.transformer.h:
        # what is no part of these (embeddings, norms but QK-norm, head) and the routers stay float32, as under autocast alone
        if hasattr(block.mlp, "router"):
            fully_shard(block.mlp.router, mesh=mesh, shard_placement_fn=place)
        for part in (block.attn, block.mlp):
            fully_shard(part, mesh=mesh, mp_policy=low, shard_placement_fn=place)
    return fully_shard(model, mesh=mesh, shard_placement_fn=place)


def full_tensor(tensor):
    """A tensor of which each process may hold a share, whole. All of them call it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def load_optimizer_state(optimizer, state):
    """Load an optimizer's state_dict, of whole tensors, each process keeping what its parameters need of it. What a run
    sets, like betas and weight decay, stays. Raises ValueError, LookupError or TypeError for one that does not fit."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [
        saved | {k: v for k, v in group.items() if k != "params"}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    if hasattr(params[0], "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        for number, entry in state["state"].items():
            p = params[number]
            # a clone, lest the share keep the whole tensor alive
            entry |= {
                name: distribute_tensor(
                    value.to(p.device), p.device_mesh, p.placements, src_data_rank=None
                ).clone()
                for name, value in entry.items()
                if value.dim()
            }
    optimizer.load_state_dict(state | {"param_groups": groups})
