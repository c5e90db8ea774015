"""
One model on many processes: how they connect, and how DDP or FSDP spreads a model over them.
"""

import os
import time
import uuid
import warnings

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from nanomoe.distributed import TIMEOUT, rank, world_size

# -----------------------------------------------------------------------------
# connecting


def connect(device: torch.device) -> None:
    """Connect to the other processes: NCCL for tensors on CUDA, gloo for those on the CPU. Raises
    OSError."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    options = {"rank": rank, "world_size": world_size, "timeout": TIMEOUT}
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            options["store"] = fresh_rendezvous_store()
        dist.init_process_group(backend, **options)
    except RuntimeError as error:
        raise OSError(
            f"could not connect to the other processes: {str(error).splitlines()[0]}; on a machine "
            "with several networks name the one to use in GLOO_SOCKET_IFNAME, and for GPUs in "
            "NCCL_SOCKET_IFNAME"
        ) from None


def fresh_rendezvous_store():
    """A store for these processes alone.

    torchrun's own store survives a restart and still holds the addresses of dead processes, at
    which new ones would hang (pytorch#135712); and torchruns on several machines do not count
    restarts alike. So rank 0 makes up a prefix, and hands it to each rank under a key that this
    rank has made up."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)
    own_key = uuid.uuid4().hex
    if rank > 0:
        store.set(f"process {rank}", own_key)
        prefix = store.get(own_key).decode()  # waits
        store.set(f"{prefix} {rank}", "here")
        return dist.PrefixStore(prefix, store)
    prefix = own_key
    missing = set(range(1, world_size))
    while missing:
        for other in sorted(missing):
            if store.check([f"process {other}"]):  # a dead process's key, until the new one comes
                store.set(store.get(f"process {other}").decode(), prefix)
            if store.check([f"{prefix} {other}"]):
                missing.remove(other)
        time.sleep(0.02)
    return dist.PrefixStore(prefix, store)


# -----------------------------------------------------------------------------
# DDP and FSDP


def parallelize(
    model: torch.nn.Module, parallel: str, device: torch.device, dtype: str
) -> torch.nn.Module:
    """Bring a model, built alike on the CPU of each rank, to the devices. Returns what to train
    with; the model itself stays usable and keeps its parameter names.

    parallel: 'ddp', a whole copy on each device (DistributedDataParallel); or 'fsdp', on each
    device a shard of every weight, gradient and moment, from which a part's weights are gathered
    when its turn comes (FSDP2, Zhao et al. 2023, arXiv 2304.11277), as bfloat16 if dtype is."""
    return shard(model, device, dtype) if parallel == "fsdp" else replicate(model, device)


def replicate(model, device):
    model.to(device)
    # torch 2.13 renames this option, torch 2.10 has only this name
    warnings.filterwarnings("ignore", message=".*broadcast_buffers")
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type == "cuda" else None,
        gradient_as_bucket_view=True,
        broadcast_buffers=False,
    )


def shard(model, device, dtype):
    # late: only for those who use it
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    # nothing here changes a part's output in place
    warnings.filterwarnings("ignore", message=".*FSDP2-wrapped module")

    def placement(p):
        """The first dimension that divides evenly: 4 experts on 8 GPUs are cut across, and not
        handed to half of them."""
        for dim, size in enumerate(p.shape):
            if size % world_size == 0:
                return Shard(dim)
        return Shard(0)

    mesh = init_device_mesh(device.type, (world_size,))
    low_precision = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if dtype == "bfloat16" else None,
        reduce_dtype=torch.float32,
        cast_forward_inputs=False,
    )
    for block in model.transformer.h:
        # the routers, embeddings, norms (but QK-norm) and head stay float32, as under autocast
        if hasattr(block.mlp, "router"):
            fully_shard(block.mlp.router, mesh=mesh, shard_placement_fn=placement)
        for part in (block.attn, block.mlp):
            fully_shard(part, mesh=mesh, mp_policy=low_precision, shard_placement_fn=placement)
    return fully_shard(model, mesh=mesh, shard_placement_fn=placement)
