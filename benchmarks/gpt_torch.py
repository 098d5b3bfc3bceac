"""PyTorch beside tfzero: the benchmark's GPT with DistributedDataParallel, ZeroRedundancyOptimizer or FSDP2, over gloo.

PyTorch is no dependency; the benchmark calls this module only if it is installed.
"""

import json
import os
import time

from gpt_worker import HEADS, LENGTH, VOCABULARY, WARM_UP_STEPS, Work, received_bytes

PEERS = ("ddp", "zero1", "fsdp2")


def make_torch_model(work: Work):
    """The same GPT as `gpt_worker.make_model`, in PyTorch."""
    import torch
    from torch import nn

    dim = work.dim

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norms = nn.ModuleList([nn.LayerNorm(dim) for _ in range(2)])
            self.query_key_value = nn.Linear(dim, 3 * dim)
            self.output_projection = nn.Linear(dim, dim)
            self.up = nn.Linear(dim, 4 * dim)
            self.down = nn.Linear(4 * dim, dim)

        def forward(self, x):
            projected = self.query_key_value(self.norms[0](x)).view(-1, LENGTH, 3, HEADS, dim // HEADS)
            query, key, value = projected.permute(2, 0, 3, 1, 4)
            attended = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
            x = x + self.output_projection(attended.transpose(1, 2).reshape(-1, LENGTH, dim))
            return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))

    class Gpt(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(VOCABULARY, dim)
            self.position = nn.Parameter(torch.zeros(LENGTH, dim))
            self.blocks = nn.ModuleList([Block() for _ in range(work.layers)])
            self.norm = nn.LayerNorm(dim)
            self.head = nn.Linear(dim, VOCABULARY)

        def forward(self, tokens):
            x = self.embedding(tokens) + self.position
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Gpt()


def join_gloo(threads: int) -> int:
    """Makes the worker that `TF_CONFIG` describes one of a group over gloo, with so many threads; its rank."""
    import torch

    torch.set_num_threads(threads)
    cluster = json.loads(os.environ["TF_CONFIG"])
    addresses, rank = cluster["cluster"]["worker"], cluster["task"]["index"]
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://{addresses[0]}", rank=rank, world_size=len(addresses)
    )
    return rank


def measure_peer(work: Work, kind: str) -> dict:
    """One worker's run, as `gpt_worker.measure`; PyTorch does not tell the bytes of its CPU tensors."""
    import torch

    rank = join_gloo(work.threads)
    torch.manual_seed(0)
    model = make_torch_model(work)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained, optimizer = _shard(model, kind)
    figures: dict = {"seconds": [], "parameters": parameters}
    generator = torch.Generator().manual_seed(rank)
    for step in range(WARM_UP_STEPS + work.steps):
        tokens = torch.randint(VOCABULARY, (work.batch, LENGTH + 1), generator=generator)
        if step == WARM_UP_STEPS:
            received = received_bytes()
        start = time.perf_counter()
        optimizer.zero_grad()
        logits = trained(tokens[:, :-1])
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCABULARY), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        loss.item()
        if step >= WARM_UP_STEPS:
            figures["seconds"].append(time.perf_counter() - start)
            figures["wire"] = (received_bytes() - received) / len(figures["seconds"])
    torch.distributed.destroy_process_group()
    return figures


def _shard(model, kind: str) -> tuple:
    """The model as PyTorch trains it in parallel, and its optimizer."""
    import torch

    if kind == "fsdp2":
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),))
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        return model, torch.optim.Adam(model.parameters(), lr=1e-4)
    parallel = torch.nn.parallel.DistributedDataParallel(model)
    if kind == "zero1":
        from torch.distributed.optim import ZeroRedundancyOptimizer

        return parallel, ZeroRedundancyOptimizer(parallel.parameters(), torch.optim.Adam, lr=1e-4)
    return parallel, torch.optim.Adam(parallel.parameters(), lr=1e-4)
