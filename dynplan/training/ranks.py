"""Several processes that train one model: under ``torchrun`` or ``accelerate launch``, or one alone.

Every process holds all rows and takes its share of each batch. What is random and what is measured is the
same as in one process that takes the whole batches; one process writes.
"""

import os
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from dynplan.errors import InputError

# One process may evaluate while the others wait; a launcher notices a dead one long before.
_PATIENCE = timedelta(hours=6)


def processes():
    """The processes of this run, as an ``accelerate.PartialState``; joins them at the first call.

    Raises InputError where the environment asks for several and they cannot be joined.
    """
    from accelerate import PartialState  # only training needs it

    try:
        return PartialState(cpu=not torch.cuda.is_available(), timeout=_PATIENCE)
    except (ValueError, RuntimeError) as error:
        count, reason = os.environ.get("WORLD_SIZE"), " ".join(str(error).split())[:300]
        raise InputError(f"training: expected to join {count} processes, got {reason}") from error


def share_of_batch(batch_size: int) -> int:
    """Rows that each process takes of a batch; raises InputError where they would differ."""
    count = processes().num_processes
    if batch_size % count:
        raise InputError(
            f"training: expected --batch-size to be a multiple of {count} processes, got {batch_size}"
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


def figures_from_first(figures: dict[str, float]) -> dict[str, float]:
    """Figures that every process has measured for itself, as the first one has them: where they decide which
    checkpoint is the best, all must take the same.
    """
    values = from_first(torch.tensor(list(figures.values()), dtype=torch.float64))
    return dict(zip(figures, values.tolist(), strict=True))


def first_finds(question: Callable[[], bool]) -> bool:
    """What the first process finds: the others' view of a shared folder may lag behind."""
    state = processes()
    found = torch.tensor(int(state.is_main_process and question()))
    return bool(from_first(found))
