"""Where the time of a swapped model's forward goes: products, attention, norms, dispatch, Python.

The encoder's kernels keep the time of each of their phases while they are asked to; a clock is read round
each op and round the policy; what is left of the forward is Python and the framework.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dynplan._library import find_op
from dynplan.benchmarking import interleave
from dynplan.integrations.huggingface import fast_path, forward, fused

_encoder_phases = find_op("_encoder_phases")

# In the order of dynplan::_encoder_phases; the name of each phase -> the group it is drawn in.
PHASES = {
    "embeddings": "embeddings",
    "schedule of all layers": "dispatch",
    "gather active rows": "dispatch",
    "product: query, key, value": "products",
    "softmax, keys transposed": "attention",
    "attention's product: scores": "attention",
    "attention's product: context": "attention",
    "product: output, residual": "products",
    "first norm": "norms",
    "product: up, activation": "products",
    "product: down, residual": "products",
    "second norm, scatter": "norms",
    "padding restored": "dispatch",
    "answers on the way": "planning",
}
GROUPS = (
    "products",
    "attention",
    "norms",
    "waiting",
    "dispatch",
    "planning",
    "embeddings",
    "output",
    "Python",
)
_ENCODER_OPS = ("encode_tokens", "encode_until_sure", "conditional_encoder")
_DISPATCH_OPS = ("pack_padded", "build_dispatch", "unpack")
# Methods of the forward, and of its controller.
_METHODS = ("embed", "_output")
_CONTROLLERS = ("state", "head")
_POLICY = ("plan_upfront", "decide", "rungs_of", "head")
# Where the forward looks the others up.
_PLACES = {
    fast_path: (*_ENCODER_OPS[:2], "plan_upfront", "rungs_of"),
    fused: ("conditional_encoder", "build_dispatch", "plan_upfront", "decide"),
    forward: ("pack_padded", "unpack"),
}


@dataclass(frozen=True)
class Part:
    """A line of the profile: ``seconds`` of wall time per forward, within ``group``."""

    name: str
    group: str
    seconds: float


@dataclass(frozen=True)
class ForwardProfile:
    """One forward: the mean of the middle half of those that were profiled, by their time.

    Attributes:
        parts: sum to ``seconds``.
        seconds: of a forward while the clock is read.
        undisturbed: median seconds of a forward with nobody watching.
        threads: the encoder's phases are thread time divided by it.
    """

    parts: list[Part]
    seconds: float
    undisturbed: float
    threads: int

    def group(self, name: str) -> float:
        """Seconds of all parts of a group."""
        return sum(part.seconds for part in self.parts if part.group == name)

    @property
    def outside(self) -> float:
        """Seconds outside every matrix product: those with the weights, and attention's own two."""
        return self.seconds - sum(part.seconds for part in self.parts if "product: " in part.name)


@torch.inference_mode()
def profile_forward(model: nn.Module, inputs: Mapping[str, Tensor], rounds: int = 40) -> ForwardProfile:
    """Profile the forward of a swapped model on the CPU.

    Args:
        model: swapped (:func:`dynplan.swap`), in evaluation mode, on the CPU, float32 or bfloat16.
        inputs: keyword arguments of its forward.
        rounds: forwards measured.

    Raises:
        TypeError: the model is not swapped.
        ValueError: it is in training mode or not on the CPU, where the phases cannot be seen.
    """
    controller = getattr(model, "dynplan", None)
    if controller is None:
        raise TypeError("profile_forward: expected model to be swapped (dynplan.swap), got one that is not")
    device = next(model.parameters()).device
    if model.training or device.type != "cpu":
        state = "training mode" if model.training else str(device)
        raise ValueError(f"profile_forward: expected a model in evaluation mode on the CPU, got {state}")
    undisturbed = interleave({"": lambda: model(**inputs)}, rounds)[""].p50
    threads = torch.get_num_threads()
    seen = []
    with _clock(model) as spent:
        try:
            for _ in range(rounds):
                spent.clear()
                _encoder_phases(True)
                start = time.perf_counter()
                model(**inputs)
                total = time.perf_counter() - start
                seen.append((total, dict(spent), [own / threads for own in _encoder_phases(True)]))
        finally:
            _encoder_phases(False)
    # Whatever else the machine did met a few of them.
    seen.sort(key=lambda one: one[0])
    seen = seen[len(seen) // 4 : len(seen) - len(seen) // 4]
    every = [_parts(*one) for one in seen]
    parts = [
        Part(same[0].name, same[0].group, sum(part.seconds for part in same) / len(seen))
        for same in zip(*every, strict=True)
    ]
    return ForwardProfile(parts, sum(total for total, _, _ in seen) / len(seen), undisturbed, threads)


def _parts(total: float, spent: Mapping[str, float], phases: Sequence[float]) -> list[Part]:
    encoder = sum(spent.get(op, 0.0) for op in _ENCODER_OPS)
    parts = [Part("embeddings, op by op", "embeddings", spent.get("embed", 0.0))]
    parts.append(Part("policy, in Python", "planning", sum(spent.get(name, 0.0) for name in _POLICY)))
    parts += [Part(op, "dispatch", spent.get(op, 0.0)) for op in _DISPATCH_OPS]
    parts += [Part(name, group, own) for (name, group), own in zip(PHASES.items(), phases, strict=True)]
    # Threads that have finished before the others, and what the op does before and after its phases.
    parts.append(Part("waiting for threads, op's start and end", "waiting", max(0.0, encoder - sum(phases))))
    parts.append(Part("pooler and output", "output", spent.get("_output", 0.0)))
    parts.append(Part("whether the model is as it was", "Python", spent.get("state", 0.0)))
    rest = total - sum(part.seconds for part in parts)
    parts.append(Part("Python, framework", "Python", max(0.0, rest)))
    return parts


@contextmanager
def _clock(model: nn.Module) -> Iterator[dict[str, float]]:
    """Seconds spent in the embeddings, the policy and each op, added up for as long as the context lasts.

    A clock rather than PyTorch's profiler, whose records cost a short text's forward a twentieth of its time.
    """
    spent: dict[str, float] = {}
    swapped = next(vars(module)["forward"] for module in model.modules() if "forward" in vars(module))
    places = [(place, name) for place, names in _PLACES.items() for name in names]
    places += [(swapped, name) for name in _METHODS] + [(swapped.controller, name) for name in _CONTROLLERS]
    originals = [getattr(place, name) for place, name in places]

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = call(*arguments, **options)
            spent[name] = spent.get(name, 0.0) + time.perf_counter() - start
            return result

        return run

    for (place, name), original in zip(places, originals, strict=True):
        setattr(place, name, timed(name, original))
    try:
        yield spent
    finally:
        for (place, name), original in zip(places, originals, strict=True):
            setattr(place, name, original)
        for name in _METHODS:
            delattr(swapped, name)
        for name in _CONTROLLERS:
            delattr(swapped.controller, name)


def bench_profile(
    folder: Path | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    length: int = 32,
    share: float = 1.0,
    picture: Path | None = None,
    exits: bool = False,
) -> dict[int, ForwardProfile]:
    """``dynplan bench --profile``: profile forwards on random tokens, print a table, draw a picture.

    Args:
        folder: a Hugging Face encoder; None: a 12-layer BERT of width 384 with random weights.
        batch_sizes: one profile each.
        length: tokens of the longest sample; the others have between half of that and all of it.
        share: of layers kept, on a random path for each sample; 1 keeps all.
        picture: where to write a PNG; None: nowhere. Needs matplotlib.
        exits: ask every sample for its answer after a third and two thirds of the layers, under a stream's
            budget that lets all go on: what planning costs beside keep-all.

    Returns:
        Batch size -> profile.
    """
    model = _with_exits(folder) if exits else _encoder(folder, share)
    generator = torch.Generator().manual_seed(0)
    profiles = {}
    for size in batch_sizes:
        lengths = torch.randint((length + 1) // 2, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        ids = torch.randint(5, model.config.vocab_size, (size, length), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        profiles[size] = profile_forward(model, {"input_ids": ids, "attention_mask": mask})
    asked = ", answers asked twice" if exits else ""
    print_profiles(profiles, f"{length} tokens at most, {share:g} of the layers{asked}")
    if picture is not None:
        draw_profiles(profiles, picture)
    return profiles


def _encoder(folder: Path | None, share: float, head: bool = False) -> nn.Module:
    """A swapped encoder, of a folder or with random weights; with a random head of two classes."""
    import transformers

    import dynplan
    from dynplan.policies import KeepAll, RandomPath

    torch.manual_seed(0)
    kind = transformers.AutoModelForSequenceClassification if head else transformers.AutoModel
    if folder is None:
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
        )
        model = kind.from_config(config, **({} if head else {"add_pooling_layer": False}))
    else:
        model = kind.from_pretrained(folder, dtype=torch.float32)
    return dynplan.swap(model.eval(), KeepAll() if share == 1 else RandomPath(share))


def _with_exits(folder: Path | None) -> nn.Module:
    from dynplan.nn import Exits
    from dynplan.policies import ConfidenceExit
    from dynplan.stream_budget import StreamBudget

    model = _encoder(folder, 1.0, head=True)
    layers = model.dynplan.num_layers
    exits = Exits(model.config.hidden_size, layers, [max(1, layers // 3), max(2, 2 * layers // 3)])
    chain = [*exits.depths, layers]
    model.dynplan.policy = ConfidenceExit(exits, 1.0, [chain], [0], [[float("inf")]])
    model.dynplan.budget = StreamBudget(1.0)
    return model


def print_profiles(profiles: Mapping[int, ForwardProfile], title: str) -> None:
    """A table: milliseconds and share of the forward for each part, a pair of columns per batch size."""
    from rich.console import Console
    from rich.table import Table

    first = next(iter(profiles.values()))
    table = Table(title=f"{title}, {first.threads} threads")
    table.add_column("part")
    for size in profiles:
        table.add_column(f"batch {size}: ms", justify="right")
        table.add_column("share", justify="right")

    def line(name: str, seconds: Sequence[float]) -> None:
        cells = []
        for spent, own in zip(seconds, profiles.values(), strict=True):
            cells += [f"{1e3 * spent:.3f}", f"{spent / own.seconds:.1%}"]
        table.add_row(name, *cells)

    for group in GROUPS:
        line(f"[bold]{group}[/bold]", [own.group(group) for own in profiles.values()])
        for index, part in enumerate(first.parts):
            if part.group == group and part.name != group:
                line(f"  {part.name}", [own.parts[index].seconds for own in profiles.values()])
    line("[bold]outside every product[/bold]", [own.outside for own in profiles.values()])
    line("[bold]forward, profiled[/bold]", [own.seconds for own in profiles.values()])
    line("[bold]forward, undisturbed[/bold]", [own.undisturbed for own in profiles.values()])
    Console().print(table)


def draw_profiles(profiles: Mapping[int, ForwardProfile], path: Path) -> None:
    """One bar per batch size, cut into the groups' shares of the forward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 0.8 + 0.6 * len(profiles)), layout="constrained")
    axes = figure.subplots()
    names = [f"batch {size}\n{1e3 * own.undisturbed:.2f} ms" for size, own in profiles.items()]
    left = [0.0] * len(profiles)
    for group in GROUPS:
        widths = [own.group(group) / own.seconds for own in profiles.values()]
        bars = axes.barh(names, widths, left=left, label=group)
        axes.bar_label(
            bars, [f"{width:.0%}" if width > 0.04 else "" for width in widths], label_type="center"
        )
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_xlabel("share of a forward")
    axes.set_xlim(0, 1)
    axes.invert_yaxis()
    axes.legend(
        ncols=len(GROUPS), loc="lower center", bbox_to_anchor=(0.5, 1), fontsize="small", frameon=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
