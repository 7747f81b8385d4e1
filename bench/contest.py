"""Who takes part in a comparison, whether their results are right, and whose turn it is."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from engines import Engine, engine_class
from engines.worker import PEAK, Run, Worker, WorkerError, convert
from workloads import Batch, Model, batches, slices, tokenize

# Relative error (Frobenius) of the real tokens' hidden states against Hugging Face in fp32.
TOLERANCE = {"fp32": 1e-4, "bf16": 0.05, "int8": 0.35}

# A slice is measured again when other processes had more of the processors than this.
DISTURBED = 0.05


@dataclass(frozen=True)
class Case:
    """What is compared: one model, one kind of sentences, one batch size."""

    model: Model
    lengths: str | int
    batch_size: int
    orders: dict[str, list[list[Batch]]]  # order of the sentences -> slices -> batches

    @property
    def _lengths(self) -> np.ndarray:
        return np.concatenate([batch.lengths for part in next(iter(self.orders.values())) for batch in part])

    @property
    def sentences(self) -> int:
        return len(self._lengths)

    @property
    def tokens(self) -> int:
        return int(self._lengths.sum())


@dataclass
class Contestant:
    """One engine at one share of layers on one order of the sentences."""

    engine: str
    share: float
    order: str
    precision: str
    error: float
    slices: int
    runs: list[list[Run]] = field(default_factory=list)  # per round, per slice
    memory: int | None = None

    def seconds(self, quantile: float) -> float:
        """Of a pass over all sentences: for each slice the quantile over the rounds, summed."""
        return float(
            np.quantile([[run.seconds for run in turn] for turn in self.runs], quantile, axis=0).sum()
        )

    @property
    def operations(self) -> float:
        """Useful ones of a pass; plans differ between rounds, hence the mean."""
        return float(np.mean([sum(run.operations for run in turn) for turn in self.runs]))

    @property
    def kept(self) -> float:
        """Share of token-layers taken."""
        return float(np.mean([run.kept for turn in self.runs for run in turn]))

    @property
    def foreign(self) -> float:
        """Share of the processors that other processes had."""
        return float(np.mean([run.foreign for turn in self.runs for run in turn]))


class Referee:
    """Hugging Face's layers in fp32, one by one, under any plan."""

    def __init__(self, model: Model) -> None:
        import torch
        import transformers

        self.encoder = transformers.AutoModel.from_pretrained(
            model.folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
        ).eval()

    def hidden(self, batch: Batch, plan: np.ndarray | None) -> np.ndarray:
        """Last hidden states of the real tokens (T, H); bypassed samples keep theirs through a layer."""
        import torch

        ids, mask = torch.from_numpy(batch.ids), torch.from_numpy(batch.mask)
        blocked = (1.0 - mask[:, None, None, :].float()) * torch.finfo(torch.float32).min
        with torch.inference_mode():
            state = self.encoder.embeddings(input_ids=ids)
            for index, layer in enumerate(self.encoder.encoder.layer):
                after = layer(state, blocked)
                after = after[0] if isinstance(after, tuple) else after
                if plan is not None:
                    after = torch.where(torch.from_numpy(plan[:, index])[:, None, None], after, state)
                state = after
        return state[mask.bool()].numpy()


def build_case(model: Model, texts: list[str], lengths: str | int, batch_size: int, parts: int) -> Case:
    """The work of a case.

    Args:
        lengths: ``sentences``, which come both as given and sorted by length; or the tokens of every sample.
        parts: slices of a pass.
    """
    uniform = None if lengths == "sentences" else lengths
    # Uniform lengths cost much more per sample than sentences do; 8,192 tokens are enough to time.
    count = len(texts) if uniform is None else max(batch_size, min(len(texts), 8192 // uniform))
    samples = tokenize(model, texts[:count], uniform)
    orders = {"as given": slices(batches(samples, batch_size), parts)}
    if batch_size > 1 and uniform is None:
        orders["sorted"] = slices(batches(samples, batch_size, by_length=True), parts)
    return Case(model, lengths, batch_size, orders)


def enter(
    engine: str, case: Case, referee: Referee, cache: Path, threads: int
) -> tuple[Worker, list[Contestant]]:
    """Start an engine and let it through if its results are right.

    Raises:
        WorkerError: it cannot run the model, or gives something else than Hugging Face does.
    """
    cls = engine_class(engine)
    folder = cache / f"{case.model.folder.name}.{engine}"
    convert(engine, case.model, folder)
    worker = Worker(engine, case.model, folder, threads)
    try:
        # dynplan and CTranslate2 compute no padding, so the order of sentences is nothing to them.
        orders = list(case.orders)[:1] if cls.padding_free else list(case.orders)
        contestants = [
            Contestant(
                engine,
                share,
                order,
                cls.precision,
                _compare(worker, share, case, referee, cls),
                len(case.orders[order]),
            )
            for order in orders
            for share in cls.variants
        ]
        for order in orders:
            worker.call("accept", order, case.orders[order])
    except WorkerError:
        worker.close()
        raise
    return worker, contestants


def _compare(worker: Worker, share: float, case: Case, referee: Referee, cls: type[Engine]) -> float:
    """Relative error on the first batch of each order."""
    checked = [parts[0][0] for parts in case.orders.values()]
    results = worker.call("check", share, checked)
    ours = np.concatenate([hidden for hidden, _ in results])
    right = np.concatenate(
        [referee.hidden(batch, plan) for batch, (_, plan) in zip(checked, results, strict=True)]
    )
    error = float(np.linalg.norm(ours - right) / np.linalg.norm(right))
    if not error <= TOLERANCE[cls.precision]:
        raise WorkerError(f"wrong result: relative error {error:.1e} against Hugging Face in fp32")
    return error


def play(
    workers: dict[str, Worker],
    contestants: list[Contestant],
    rounds: int,
    patience: int,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, float]:
    """Time everything in turns: slice by slice, and within a slice one contestant after the other.

    Args:
        workers: by engine; with :data:`PEAK` among them the machine's product peak is measured along.
        contestants: get their runs and their memory.
        rounds: passes over all the work.
        patience: how often a slice is measured again when it was disturbed; the least disturbed run counts.
        progress: called after each slice.

    Returns:
        Operations per second of each product of the peak, 80th percentile of its samples.
    """
    for contestant in contestants:
        workers[contestant.engine].call("warm", contestant.share, contestant.order)
    for engine in {contestant.engine for contestant in contestants}:
        workers[engine].call("reset_memory")
    rates: dict[str, list[float]] = {}
    for turn in range(rounds):
        for contestant in contestants:
            contestant.runs.append([])
        for index in range(max(contestant.slices for contestant in contestants)):
            if PEAK in workers:
                for name, rate in workers[PEAK].call("measure").items():
                    rates.setdefault(name, []).append(rate)
            # There and back, so that nobody always follows the same neighbour.
            for contestant in contestants if turn % 2 == 0 else reversed(contestants):
                if index < contestant.slices:
                    contestant.runs[-1].append(
                        _measure(workers[contestant.engine], contestant, index, patience)
                    )
                    progress()
    for contestant in contestants:
        contestant.memory = workers[contestant.engine].call("memory")
    return {name: float(np.quantile(values, 0.8)) for name, values in rates.items()}


def _measure(worker: Worker, contestant: Contestant, index: int, patience: int) -> Run:
    best = None
    for _ in range(1 + patience):
        run = worker.call("run", contestant.share, contestant.order, index)
        if best is None or run.foreign < best.foreign:
            best = run
        if run.foreign <= DISTURBED:
            break
    return best
