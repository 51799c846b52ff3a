"""What runs in each process of the tests of several processes; they import this module by its name."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from tests_support import randomise_deltas, tiny_llama
from torch import distributed

IDS = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16], [17, 18, 19, 20]])
W = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.2, 0.8], [0.6, 0.4]])
GREEDY = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}


def condition(dtype=torch.float32):
    import clp_engine as clp

    model = clp.get_clp_model(tiny_llama().to(dtype), clp.CLPConfig(rewards=["long", "short"]))
    randomise_deltas(model, 0.3)
    return model.train()


def train_one_step(model, rows, parameters):
    """A step of plain gradient descent on the given rows of the batch; `model` may be a wrapper."""
    optimizer = torch.optim.SGD(parameters, lr=0.5)
    model(input_ids=IDS[rows], labels=IDS[rows], reward_weights=W[rows]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def deltas_of(model):
    from clp_engine.layers import conditioned_layers

    return {name: whole(layer.deltas) for name, layer in conditioned_layers(model).items()}


def ddp_step(rank):
    model = condition()
    wrapped = torch.nn.parallel.DistributedDataParallel(model)
    train_one_step(wrapped, slice(2 * rank, 2 * rank + 2), [p for p in model.parameters() if p.requires_grad])
    return deltas_of(model)


def sharded(dtype=torch.float32):
    """Blocks sharded, and the rest with the root, as accelerate does it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = condition(dtype)
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    for module in (*model.model.layers, model):
        fully_shard(module, mesh=mesh)
    return model


def fsdp2_step(rank):
    """A step, then tokens from the sharded model."""
    model, rows = sharded(), slice(2 * rank, 2 * rank + 2)
    local = {tuple(p.to_local().shape) for name, p in model.named_parameters() if name.endswith("q_proj.deltas")}
    train_one_step(model, rows, [p for p in model.parameters() if p.requires_grad])
    tokens = model.eval().generate(IDS[rows], reward_weights=W[rows], **GREEDY)
    return {"local": local, "tokens": tokens, "class": type(model).__name__, "deltas": deltas_of(model)}


def fsdp2_bfloat16_step(rank):
    """A step of float32 deltas over a bfloat16 base."""
    model = sharded(torch.bfloat16)
    train_one_step(model, slice(2 * rank, 2 * rank + 2), [p for p in model.parameters() if p.requires_grad])
    return deltas_of(model)


def _enter(rank, world_size, folder, workers):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=world_size)
    try:
        results = {worker.__name__: worker(rank) for worker in workers}
        torch.save(results, f"{folder}/{rank}.pt")
    finally:
        distributed.destroy_process_group()


def run(*workers, world_size=2):
    """Run `workers` one after the other in `world_size` processes; their results by worker's name, for each rank."""
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(_enter, (world_size, folder, workers), nprocs=world_size)
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]
