"""The driver: inputs in a child process, so that a crash is a finding and not the end.

Input ``i`` depends on the seed and ``i`` alone. Half of the inputs are valid calls, which must succeed; the
others are broken ones, which must succeed or raise an error that names the function.
"""

import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from multiprocessing import shared_memory
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .breaks import break_call
from .calls import CALLS, Draw
from .pages import PAGE, Pages

ROOM = 1 << 30  # bytes that one child may map beyond what it starts with
PATIENCE = 60  # seconds for one input
# Errors that no op can word: memory that there is not, sizes that PyTorch itself cannot count, and what it
# says of an argument before an op is reached.
NOT_OURS = (
    "can't allocate memory",
    "bad_alloc",
    "Unable to allocate",
    "size calculation overflowed",
    "Cannot access storage of SparseTensorImpl",
)


def placed(value, pages: Pages, d: Draw):
    """The same value with every tensor between pages that nobody may touch."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        spread = 1 + sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True))
        if value.is_neg() or spread * value.element_size() > 64 * PAGE:
            return value
        return pages.put(value, d.random() < 0.8)
    if isinstance(value, np.ndarray) and value.nbytes < 64 * PAGE and value.flags.c_contiguous:
        return pages.put_array(value, d.random() < 0.8)
    if isinstance(value, list):
        return [placed(each, pages, d) for each in value]
    return value


def copies(value) -> list[bytes]:
    """What memory holds, of all tensors that are arguments."""
    if isinstance(value, Tensor) and value.device.type == "cpu" and value.layout == torch.strided:
        if value.is_neg() or value.numel() > PAGE:
            return []
        dense = torch.empty(value.shape, dtype=value.dtype).copy_(value)
        return [dense.view(-1).view(torch.uint8).numpy().tobytes()]
    if isinstance(value, np.ndarray):
        return [value.tobytes()] if value.size <= PAGE else []
    return [copy for each in value for copy in copies(each)] if isinstance(value, list) else []


def read_only(function, arguments: list) -> list:
    """Those that the schema, if there is one, does not declare to be written to."""
    if not isinstance(function, torch._ops.OpOverloadPacket):
        return arguments
    declared = function.default._schema.arguments
    return [
        value
        for value, argument in zip(arguments, declared, strict=True)
        if not (argument.alias_info and argument.alias_info.is_write)
    ]


def whole(result) -> None:
    """Looks at every element of what came out."""
    for each in result if isinstance(result, (tuple, list)) else [result]:
        if isinstance(each, Tensor) and each.device.type == "cpu":
            each.double().sum() if not each.is_complex() else each.sum()
        elif isinstance(each, np.ndarray):
            each.astype(np.float64).sum()


def run_input(name: str, seed: int, index: int, pages: Pages) -> str:
    """One input: "ran" or "refused". Raises AssertionError at a finding."""
    function, draw = CALLS[name]
    d = Draw(f"{seed} {name} {index}")
    torch.manual_seed(d.getrandbits(32))
    pages.reset()
    arguments = draw(d)
    valid = d.random() < 0.5
    if not valid:
        arguments = break_call(d, arguments)
    arguments = placed(arguments, pages, d)
    before = copies(read_only(function, arguments))
    outcome = "ran"
    try:
        whole(function(*arguments))
    except (RuntimeError, ValueError, TypeError, IndexError, MemoryError) as error:
        text = str(error)
        assert not valid, f"a valid call was refused: {text}"
        public = name.removeprefix("_native.").removeprefix("_").removesuffix("_backward")
        public = public.removesuffix("_loss_and_gradient")
        named = public in text or any(words in text for words in NOT_OURS)
        assert named or isinstance(error, MemoryError), f"{type(error).__name__} names no {public}: {text}"
        outcome = "refused"
    assert before == copies(read_only(function, arguments)), "an argument was written to"
    return outcome


def work(names: Sequence[str], seed: int, first: int, last: int, until: float, report: np.ndarray) -> None:
    """Calls number ``first`` to ``last`` in turn; ``report`` is the one that runs, and how many of each name
    ran and were refused.
    """
    torch.set_num_threads(2)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * PAGE
    resource.setrlimit(resource.RLIMIT_AS, (used + ROOM, used + ROOM))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pages = Pages()
    for call in range(first, last):
        if time.monotonic() > until:
            break
        report[0] = call
        index, position = divmod(call, len(names))
        signal.alarm(PATIENCE)
        outcome = run_input(names[position], seed, index, pages)
        report[1 + 2 * position + (outcome == "refused")] += 1
    signal.alarm(0)


def drive(
    names: Sequence[str], seed: int, first: int, inputs: int, seconds: float, most: int = 20
) -> tuple[Counter, list[str]]:
    """Runs inputs ``first`` to ``first + inputs`` of each name, for some seconds.

    Returns counts by (name, "ran" or "refused"), and the findings; at the ``most``-th it stops.
    """
    memory = shared_memory.SharedMemory(create=True, size=8 * (1 + 2 * len(names)))
    report = np.frombuffer(memory.buf, np.int64)
    report[:] = 0
    findings: list[str] = []
    next_call, last = first * len(names), (first + inputs) * len(names)
    until = time.monotonic() + seconds
    while next_call < last and time.monotonic() < until and len(findings) < most:
        child = os.fork()
        if child == 0:
            try:
                work(names, seed, next_call, last, until, report)
            except BaseException:
                traceback.print_exc()
                sys.stderr.flush()
                os._exit(3)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if not status:
            break
        index, position = divmod(int(report[0]), len(names))
        how = f"signal {signal.Signals(-status).name}" if status < 0 else "an error, above"
        findings.append(f"{how}: --seed {seed} --only {names[position]} --first {index} --inputs 1")
        next_call = int(report[0]) + 1
    counts = Counter()
    for position, name in enumerate(names):
        counts[name, "ran"], counts[name, "refused"] = report[1 + 2 * position : 3 + 2 * position].tolist()
    del report
    memory.close()
    memory.unlink()
    return counts, findings
