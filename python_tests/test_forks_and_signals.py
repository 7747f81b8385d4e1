"""What a process may do to the ops: fork after use, call them from many threads, interrupt them."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from helpers import on_threads
from integrations.models import batch, tiny

import dynplan
from dynplan import StreamBudget
from dynplan.ops import pack, region_cross_entropy, unpack
from dynplan.policies import HashPath

LONG = """
import signal, torch, dynplan
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
torch.manual_seed(0)
input = torch.randn(1, 8, 900, 900, requires_grad=True)
target = torch.randint(0, 8, (1, 900, 900))
def run():
    loss = dynplan.ops.region_cross_entropy(input, target, kernel_size=15, merge="probs")
    return loss.detach(), *torch.autograd.grad(loss, input)
wanted = run()
interrupted = 0
print("ready", flush=True)
while not interrupted:
    try:
        run()
    except KeyboardInterrupt:
        interrupted += 1
assert all(torch.equal(a, b) for a, b in zip(run(), wanted))
"""


def region(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # Large enough for the memory that gradients are kept in.
    input = torch.randn(2, 8, 256, 256, generator=generator, requires_grad=True)
    target = torch.randint(0, 8, (2, 256, 256), generator=generator)
    loss = region_cross_entropy(input, target)
    return [loss.detach(), *torch.autograd.grad(loss, input)]


def packing(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(9, 50, 64, generator=generator)
    packed = pack(hidden, torch.rand(9, 50, generator=generator) < 0.6)
    return [*packed, unpack(packed.hidden, packed.indices, 9, 50)]


def test_a_fork_after_use():
    """As a loader's workers are forked: with one thread, for the pool's do not live in a fork."""
    model, inputs = dynplan.swap(tiny(), HashPath(0.5)), batch()

    def work():
        with torch.no_grad():
            logits = model(**inputs).logits
        return logits, [*region(0), *packing(0)]

    def same(found) -> bool:
        # The head is PyTorch's, whose bits depend on the number of threads.
        return torch.allclose(found[0], wanted[0], rtol=1e-4, atol=1e-5) and all(
            torch.equal(a, b) for a, b in zip(found[1], wanted[1], strict=True)
        )

    (wanted,) = on_threads([2], work)
    for _ in range(2):
        child = os.fork()
        if not child:
            status = 1
            try:
                torch.set_num_threads(1)
                status = 0 if same(work()) else 2
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert same(work())


def test_many_threads():
    for work in (region, packing):
        alone = [work(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as pool:
            for seed, found in enumerate(pool.map(lambda seed: [work(seed) for _ in range(5)], range(4))):  # noqa: B023
                for each in found:
                    assert all(torch.equal(a, b) for a, b in zip(each, alone[seed], strict=True))


def test_a_stream_that_threads_share():
    """Nothing that one of them spends is lost: the contract is that of all."""
    counts = torch.zeros(5, dtype=torch.int64)
    offsets = torch.arange(0, 33, 4, dtype=torch.int32)
    asking = torch.ones(8, dtype=torch.bool)
    ops = torch.ops.dynplan

    def work(seed: int) -> int:
        taken = 0
        for _ in range(200):
            ops._stream_arrive(counts, offsets)
            taken += int(ops._stream_take(counts, torch.rand(8), asking, offsets, 1, 4, 0.1, 2.0).sum())
        return taken

    with ThreadPoolExecutor(4) as pool:
        taken = sum(pool.map(work, range(4)))
    samples, tokens, sample_layers, token_layers, longest = ops._stream_read(counts)
    assert (samples, tokens, longest) == (4 * 200 * 8, 4 * 200 * 32, 4)
    assert sample_layers == taken and token_layers == 4 * taken
    assert 0 < taken <= StreamBudget(0.1, burst=2).share * 4 * samples + 2 * 4


def test_an_interrupt_in_the_middle_of_an_op():
    process = subprocess.Popen([sys.executable, "-c", LONG], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
    finally:
        process.kill()
        process.wait()
