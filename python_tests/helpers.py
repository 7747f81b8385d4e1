"""Shared by the tests: devices, instruction sets, ranks, the tolerance rule."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from dynplan import _native

requires_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.cuda, requires_cuda])]

_BEST = _native.cpu_features()["best_isa"]
_NAMES = ["neon"] if _BEST == "neon" else ["baseline", "avx2", "avx512"]
# What DYNPLAN_CPU_ISA takes, the narrowest first.
INSTRUCTION_SETS = [
    pytest.param(isa, marks=pytest.mark.skipif(missing, reason=f"needs a CPU with {isa}"))
    for isa in _NAMES
    for missing in [_NAMES.index(isa) > _NAMES.index(_BEST)]
]

# What one rounding of the result itself costs, measured over the test suite: added to the relative rule so
# that a rival that happens to be exact does not set a bar of zero.
ATOL = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


def on_threads(counts: Sequence[int], call: Callable) -> list:
    """What ``call`` returns with each number of intra-op threads; the number is restored."""
    threads, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(call())
    finally:
        torch.set_num_threads(threads)
    return results


def on_ranks(world_size: int, work: Callable, folder: Path) -> list:
    """What ``work(rank)`` returns on each rank of a gloo group of processes, in their order.

    ``work`` is a function of a module, since processes import it; what it returns is made of tensors and of
    Python's containers and numbers. ``folder`` is an empty one.
    """
    mp.spawn(_work_and_exit, (world_size, work, folder), nprocs=world_size)
    return [torch.load(folder / f"{rank}.pt") for rank in range(world_size)]


def _work_and_exit(rank: int, world_size: int, work: Callable, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world_size
    )
    torch.save(work(rank), folder / f"{rank}.pt")
    dist.barrier()  # no rank leaves while another still waits for it
    dist.destroy_process_group()
    # Gloo's threads take the interpreter's lock to let go of their last tensors, and one that does so while
    # the interpreter shuts down aborts the process (pytorch/pytorch#179291). DistributedDataParallel keeps
    # them alive past the group's end, so there is nothing to wait for: leave without shutting down.
    os._exit(0)


def assert_same_but_for_order(ours: Tensor, expected: Tensor) -> None:
    """Equal where sums of the same numbers may be taken in another order."""
    largest = expected.abs().max().item()
    torch.testing.assert_close(ours, expected, rtol=0, atol=4 * torch.finfo(expected.dtype).eps * largest)


def assert_close_to_exact(ours: Tensor, theirs: Tensor, exact: Tensor, atol: float | None = None) -> None:
    """The tolerance rule: our error against ``exact`` (fp64) is at most twice PyTorch's in the same dtype.

    Args:
        ours: result under test.
        theirs: plain PyTorch's result in the dtype of ``ours``.
        exact: the same computed in fp64.
        atol: replaces the dtype's measured absolute term.
    """
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape == exact.shape
    if ours.numel() == 0:
        return
    error = (ours.double() - exact).abs().max().item()
    allowed = 2 * (theirs.double() - exact).abs().max().item() + (ATOL[ours.dtype] if atol is None else atol)
    assert error <= allowed, f"error {error:.3e} exceeds {allowed:.3e}"
