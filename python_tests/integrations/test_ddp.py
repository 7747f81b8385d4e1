"""Distributed data-parallel training of a swapped model: two gloo processes against one."""

import torch
from helpers import on_ranks
from integrations.models import batch, tiny
from torch.nn.parallel import DistributedDataParallel

import dynplan
from dynplan.policies import FixedPath

LENGTHS = (6, 2, 5, 9)
# Layer 2 is taken by no sample at all, layer 3 by those of the second process alone.
KEEP = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 0, 1], [0, 1, 0, 1]]).bool()


def loss_of(model, shard):
    inputs = {name: value[shard] for name, value in batch(LENGTHS).items()}
    return model(**inputs, labels=torch.arange(len(LENGTHS))[shard] % 3).loss


def work(rank):
    shard = slice(2 * rank, 2 * rank + 2)
    model = dynplan.swap(tiny(), FixedPath(KEEP[shard]))
    # A layer that nobody takes has no gradient, which DDP must be told to expect.
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    loss_of(parallel, shard).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_two_processes_equal_one(tmp_path):
    results = on_ranks(2, work, tmp_path)
    model = dynplan.swap(tiny(), FixedPath(KEEP))
    loss_of(model, slice(None)).backward()
    for got in results:
        assert any("layer.3." in name for name in got)
        for name, parameter in model.named_parameters():
            wanted = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            ours = got.get(name, torch.zeros_like(parameter))
            torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-5)
