"""Where the time of a swapped model's forward goes: products, attention, norms, dispatch, Python.

The encoder's kernels keep the time of each of their phases while they are asked to; PyTorch's profiler tells
how long each op and each named range took; what is left of the forward is Python and the framework.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from dynplan._library import find_op
from dynplan.benchmarking import interleave
from dynplan.policies import PlanRequest, Policy

_encoder_phases = find_op("_encoder_phases")

# In the order of dynplan::_encoder_phases; the name of each phase -> the group it is drawn in.
PHASES = {
    "gather active rows": "dispatch",
    "product: query, key, value": "products",
    "attention": "attention",
    "product: output, residual": "products",
    "first norm": "norms",
    "product: up, activation": "products",
    "product: down, residual": "products",
    "second norm, scatter": "norms",
}
GROUPS = ("products", "attention", "norms", "waiting", "dispatch", "embeddings", "Python")
_FORWARD, _EMBEDDINGS, _PLAN = "dynplan.forward", "dynplan.embeddings", "dynplan.plan"
_ENCODER_OPS = ("dynplan::conditional_encoder", "dynplan::conditional_encoder_layer")
_DISPATCH_OPS = ("dynplan::pack", "dynplan::build_dispatch", "dynplan::unpack")


@dataclass(frozen=True)
class Part:
    """A line of the profile: ``seconds`` of wall time per forward, within ``group``."""

    name: str
    group: str
    seconds: float


@dataclass(frozen=True)
class ForwardProfile:
    """One forward, on average.

    Attributes:
        parts: sum to ``seconds``.
        seconds: of a forward while it is profiled.
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


@torch.inference_mode()
def profile_forward(model: nn.Module, inputs: Mapping[str, Tensor], rounds: int = 20) -> ForwardProfile:
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
    with _ranges(model), profile(activities=[ProfilerActivity.CPU]) as trace:
        _encoder_phases(True)
        try:
            for _ in range(rounds):
                with record_function(_FORWARD):
                    model(**inputs)
        finally:
            phases = _encoder_phases(False)
    totals = {event.key: event.cpu_time_total * 1e-6 / rounds for event in trace.key_averages()}
    threads = torch.get_num_threads()
    parts = _parts(totals, [spent / rounds / threads for spent in phases])
    return ForwardProfile(parts, totals[_FORWARD], undisturbed, threads)


def _parts(totals: Mapping[str, float], phases: Sequence[float]) -> list[Part]:
    encoder = sum(totals.get(op, 0.0) for op in _ENCODER_OPS)
    parts = [Part("embeddings", "embeddings", totals.get(_EMBEDDINGS, 0.0))]
    parts.append(Part("policy's plan", "dispatch", totals.get(_PLAN, 0.0)))
    parts += [Part(op.removeprefix("dynplan::"), "dispatch", totals.get(op, 0.0)) for op in _DISPATCH_OPS]
    parts += [Part(name, group, spent) for (name, group), spent in zip(PHASES.items(), phases, strict=True)]
    # Threads that have finished before the others, and what the op does before and after its phases.
    parts.append(Part("waiting for threads, checks, copy", "waiting", max(0.0, encoder - sum(phases))))
    rest = totals[_FORWARD] - sum(part.seconds for part in parts)
    parts.append(Part("Python and framework", "Python", max(0.0, rest)))
    return parts


class _RangedPolicy(Policy):
    """Another policy, its decisions in a named range."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def __getattribute__(self, name: str) -> Any:
        if name in ("policy", "plan", "keep"):
            return object.__getattribute__(self, name)
        return getattr(object.__getattribute__(self, "policy"), name)

    def plan(self, request: PlanRequest) -> Tensor:
        with record_function(_PLAN):
            return self.policy.plan(request)

    def keep(self, layer: int, request: PlanRequest, hidden: Tensor, plan: Tensor) -> Tensor:
        with record_function(_PLAN):
            return self.policy.keep(layer, request, hidden, plan)


@contextmanager
def _ranges(model: nn.Module):
    """Named ranges round the embeddings and the policy, for as long as the context lasts."""
    forward = next(vars(module)["forward"] for module in model.modules() if "forward" in vars(module))
    embed = forward._embed

    def ranged(*arguments: Any) -> Tensor:
        with record_function(_EMBEDDINGS):
            return embed(*arguments)

    forward._embed = ranged
    policy = model.dynplan.policy
    model.dynplan.policy = _RangedPolicy(policy)
    try:
        yield
    finally:
        model.dynplan.policy = policy
        del forward._embed


def bench_profile(
    folder: Path | None = None,
    batch_sizes: Sequence[int] = (1, 32),
    length: int = 32,
    share: float = 1.0,
    picture: Path | None = None,
) -> dict[int, ForwardProfile]:
    """``dynplan bench --profile``: profile forwards on random tokens, print a table, draw a picture.

    Args:
        folder: a Hugging Face encoder; None: a 12-layer BERT of width 384 with random weights.
        batch_sizes: one profile each.
        length: tokens of the longest sample; the others have between half of that and all of it.
        share: of layers kept, on a random path for each sample; 1 keeps all.
        picture: where to write a PNG; None: nowhere. Needs matplotlib.

    Returns:
        Batch size -> profile.
    """
    model = _encoder(folder, share)
    generator = torch.Generator().manual_seed(0)
    profiles = {}
    for size in batch_sizes:
        lengths = torch.randint((length + 1) // 2, length + 1, (size, 1), generator=generator)
        lengths[0] = length
        ids = torch.randint(5, model.config.vocab_size, (size, length), generator=generator)
        mask = (torch.arange(length) < lengths).long()
        profiles[size] = profile_forward(model, {"input_ids": ids, "attention_mask": mask})
    print_profiles(profiles, f"{length} tokens at most, {share:g} of the layers")
    if picture is not None:
        draw_profiles(profiles, picture)
    return profiles


def _encoder(folder: Path | None, share: float) -> nn.Module:
    import transformers

    import dynplan
    from dynplan.policies import KeepAll, RandomPath

    if folder is None:
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=384, num_hidden_layers=12, num_attention_heads=12, intermediate_size=1536
        )
        model = transformers.BertModel(config, add_pooling_layer=False)
    else:
        model = transformers.AutoModel.from_pretrained(folder, dtype=torch.float32)
    return dynplan.swap(model.eval(), KeepAll() if share == 1 else RandomPath(share))


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
