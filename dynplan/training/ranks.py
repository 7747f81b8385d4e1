"""Several processes that train one model: under ``torchrun`` or ``accelerate launch``, or one alone.

Every process holds all rows and takes its share of each batch. What is random and what is measured is the
same as in one process that takes the whole batches; one process writes.
"""

import os
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from dynplan.errors import InputError


def processes():
    """The processes of this run, as an ``accelerate.PartialState``; joins them at the first call.

    Raises InputError where the environment asks for several and they cannot be joined.
    """
    from accelerate import PartialState  # only training needs it

    try:
        return PartialState(cpu=not torch.cuda.is_available())
    except (ValueError, RuntimeError) as error:
        count, reason = os.environ.get("WORLD_SIZE"), " ".join(str(error).split())[:300]
        raise InputError(f"finetune: expected to join {count} processes, got {reason}") from error


def share_of_batch(batch_size: int) -> int:
    """Rows that each process takes of a batch; raises InputError where they would differ."""
    count = processes().num_processes
    if batch_size % count:
        raise InputError(
            f"finetune: expected --batch-size to be a multiple of {count} processes, got {batch_size}"
        )
    return batch_size // count


def draw_share(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's ``rows`` of what ``draw`` gives for those of all processes.

    Generators that are in one state give every process other rows, and together those that one process would
    draw for the whole batch.
    """
    state = processes()
    first = state.process_index * rows
    return draw(state.num_processes * rows)[first : first + rows]


def from_first(value: Tensor) -> Tensor:
    """``value`` as the first process has it: machines may round differently."""
    if processes().num_processes > 1:
        value = value.contiguous()
        on_device = value.to(processes().device)
        dist.broadcast(on_device, 0)
        value = on_device.to(value.device)
    return value
