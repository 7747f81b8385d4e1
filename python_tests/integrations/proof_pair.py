"""Two models that undergo the same: a swapped one, and its twin that never was.

Every inference is compared. Where a plan leaves layers out, the twin runs the samples of each path through
that path's layers alone.
"""

import copy
import random
import re
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from helpers import ATOL
from integrations.models import encoder_of, tiny
from torch import Tensor, nn

import dynplan
from dynplan.policies import FixedPath

# Refusals by the swapped model alone that are right. Each is a promise of the documentation; a longer list
# would be a weaker proof.
ACCEPTED = {
    "padding in first place": r"expected attention_mask to keep the first token of every sample",
    "a mask per query": r"a mask per query or head cannot be packed",
    "forward not for weights=": r"the model was swapped with weights=",
    "swap not for weights=": r"swap: expected weights=None for a model",
    "policy without budget": r"expected a policy that takes a budget at budget",
    "hash of embeddings": r"HashPath: expected input_ids, got inputs_embeds",
    "plan of another shape": r"FixedPath: expected keep of shape",
    "layers that are not there": r"StaticPath: expected layers 0\.\.",
    "code of one's own": r"^(dynplan|swap): .*\b(own|hooks?|class|classes|replaced|patched)\b",
}
_REFUSED = (RuntimeError, NotImplementedError, TypeError, ValueError)


class Mismatch(AssertionError):
    """The swapped model did what its twin did not."""


class Ended(Exception):
    """The numbers have left the range where they can be compared; the sequence ends here."""


@dataclass
class Counts:
    """What a run has seen.

    Attributes:
        operations: by kind.
        refusals: by the swapped model alone, by reason.
        raised: by both models, by type.
        comparisons: of inferences and of gradients.
        planned: comparisons under a plan that left layers out.
        worst: largest difference in float32, as a share of the largest value.
    """

    operations: Counter = field(default_factory=Counter)
    refusals: Counter = field(default_factory=Counter)
    raised: Counter = field(default_factory=Counter)
    comparisons: int = 0
    planned: int = 0
    worst: float = 0.0


class Side:
    """One of the two models.

    Attributes:
        model: Hugging Face's.
        called: what is called: the model, or PEFT's wrapper of it.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = self.called = model

    @property
    def encoder(self) -> nn.Module:
        return encoder_of(self.model)

    @property
    def layers(self) -> nn.ModuleList:
        return self.encoder.encoder.layer

    @property
    def controller(self):
        return getattr(self.model, "dynplan", None)

    def replace(self, copy_of: Callable) -> None:
        """Go on with a copy of what is called."""
        self.called = copy_of(self.called)
        self.model = self.called.get_base_model() if hasattr(self.called, "get_base_model") else self.called


class Pair:
    """The two sides, and the sequence of what was done to them.

    Args:
        seed: of every choice, so that it replays the sequence.
        counts: to be added to.
    """

    def __init__(self, seed: int, counts: Counts) -> None:
        self.seed = seed
        self.random = random.Random(seed)
        self.counts = counts
        self.log: list[str] = []
        self.weights: str | None = None
        self.adapter = False
        self.copies: dict[str, tuple] = {}
        kind = self.random.choice(KINDS_DRAWN)
        task = self.random.choice(("Model", "ForSequenceClassification", "ForTokenClassification"))
        depth = self.random.choice((2, 2, 2, 3, 4))
        self.log.append(f"{kind} {task} of {depth} layers")
        self.kind, self.task = kind, task
        self.twin = Side(fresh(kind, task, depth))
        self.ours = Side(fresh(kind, task, depth))
        # Hugging Face hangs hooks on all layers once hidden states are asked for; such a model cannot be
        # pickled. They come before any layer is left out, or never.
        self.states = self.random.random() < 0.6
        if self.states:
            with torch.no_grad():
                self.twin.model(torch.full((1, 2), 5), output_hidden_states=True)

    @property
    def swapped(self) -> bool:
        return self.ours.controller is not None

    def both(self, text: str, action: Callable[[Side], object]) -> bool:
        """Do the same to both; whether it was done. What raises on one has to raise on the other."""
        self.log.append(text)
        self.changed()
        seed = self.random.randrange(1 << 30)
        theirs = attempt(action, self.twin, seed)
        mine = attempt(action, self.ours, seed)
        if not isinstance(theirs, Exception) and not isinstance(mine, Exception):
            return True
        self.judge(theirs, mine)
        return False

    def changed(self) -> None:
        """The twin is not what it was; copies of it are out of date."""
        self.copies.clear()

    def copy_of_twin(self, purpose: str, make: Callable[[Side], None]) -> Side:
        """A copy of the twin, made once and kept until something changes."""
        kept = self.copies.get(purpose)
        if kept is None or kept[0] is not self.twin.called:
            side = Side(self.twin.called)
            with torch.inference_mode(False):
                side.replace(copy.deepcopy)
                make(side)
            self.copies[purpose] = kept = (self.twin.called, side)
        return kept[1]

    def judge(self, theirs: object, mine: object) -> None:
        """Count what was raised by both, or refused by ours with an accepted reason; else Mismatch."""
        for raised in (theirs, mine):
            # A table that was cut while autograd remembers its shape: whether that raises is chance.
            if "returned an invalid gradient" in str(raised):
                raise Ended
        if isinstance(theirs, Exception) and isinstance(mine, Exception):
            self.counts.raised[type(theirs).__name__] += 1
            self.log[-1] += f" -> both raise {type(theirs).__name__}"
            return
        if isinstance(theirs, Exception):
            if "graph leaves" in str(theirs):  # a copy: weight_norm's weight is what the last forward left
                raise Ended
            raise Mismatch(f"the twin raises {theirs!r}, the swapped model does not") from theirs
        reason = accepted(mine)
        if reason is None:
            raise Mismatch(f"the swapped model alone raises {type(mine).__name__}: {mine}") from mine
        self.counts.refusals[reason] += 1
        self.log[-1] += f" -> refused: {reason}"
        # PEFT unmerges an adapter within a forward: one that was refused has left it merged.
        theirs, mine = (dict(side.model.named_parameters()) for side in (self.twin, self.ours))
        if any(not torch.equal(tensor, mine[name]) for name, tensor in theirs.items() if name in mine):
            raise Ended

    def compare(self, text: str, inputs: dict, prepare: Callable[[Side], None] | None = None) -> None:
        """One inference by both."""
        self.log.append(text)
        seed = self.random.randrange(1 << 30)
        mine = attempt(lambda side: answer(side.called, inputs), self.ours, seed)
        plan = self.ours.controller.last_plan if self.swapped and not isinstance(mine, Exception) else None
        if plan is not None:
            self.check_plan(plan, inputs)
        theirs = attempt(lambda side: planned_answer(side, inputs, plan), self.twin, seed)
        if isinstance(mine, Exception) or isinstance(theirs, Exception):
            self.judge(theirs, mine)
            return
        self.counts.comparisons += 1
        self.counts.planned += plan is not None and not bool(plan.all())
        self.assert_same(mine, theirs, inputs, plan)

    def check_plan(self, plan: Tensor, inputs: dict) -> None:
        """The plan's form, and the contract of the budget."""
        lengths = token_mask(inputs).sum(1)
        depth = len(self.twin.layers)
        if plan.dtype != torch.bool or plan.shape != (len(lengths), depth):
            raise Mismatch(f"last_plan is {plan.dtype} of shape {tuple(plan.shape)}, with {depth} layers")
        budget, policy = self.ours.controller.budget, self.ours.controller.policy
        if not policy.takes_budget:
            return
        budget = policy.budget if budget is None else budget
        if not isinstance(budget, float | int) or budget >= 1:
            return
        busy, tokens = int((lengths > 0).sum()), int(lengths.sum())
        spent, spent_tokens = int(plan.sum()), int((plan * lengths.unsqueeze(1)).sum())
        if spent > budget * busy * depth + 1e-6 or spent_tokens > budget * tokens * depth + 1e-6:
            raise Mismatch(
                f"budget {budget}: {spent} sample-layers and {spent_tokens} token-layers were kept"
            )

    def assert_same(self, mine: list[Tensor], theirs: list[Tensor], inputs: dict, plan) -> None:
        forms = [[(tuple(x.shape), x.dtype) for x in values] for values in (mine, theirs)]
        if forms[0] != forms[1]:
            raise Mismatch(f"outputs {forms[0]}, the twin's {forms[1]}")
        scale = max((x.abs().max().item() for x in theirs if x.numel()), default=0.0)
        if not scale < 1e6:
            raise Ended
        error, scale = difference(mine, theirs), max(scale, 1.0)
        dtype = theirs[0].dtype
        if dtype == torch.float32 and error <= 1e-5 * scale:
            self.counts.worst = max(self.counts.worst, error / scale)
            return
        if self.weights is not None and self.is_as_swapped_anew(mine, inputs, plan, scale):
            return
        # A badly conditioned model loses more, in PyTorch too: how much, float64 tells.
        try:
            twin = self.copy_of_twin("exact", lambda side: side.called.double())
        except RuntimeError as reason:  # a parameter computed from others, not to be copied
            raise Ended from reason
        exact = planned_answer(twin, {k: doubled(v) for k, v in inputs.items()}, plan)
        error, lost = difference(mine, exact), difference(theirs, exact)
        allowed = 4 * lost + 2 * ATOL[dtype] * scale
        if not error <= allowed:
            raise Mismatch(
                f"{error:.2e} off the exact result, the twin {lost:.2e}, at a scale of {scale:.1e}"
            )

    def is_as_swapped_anew(self, mine: list[Tensor], inputs: dict, plan: Tensor, scale: float) -> bool:
        """Whether a model that is swapped anew with the same ``weights=`` gives this for the same plan."""
        try:
            anew = self.copy_of_twin("anew", lambda side: dynplan.swap(side.model, weights=self.weights))
            anew.controller.policy = FixedPath(plan)
            again = answer(anew.called, inputs)
        except _REFUSED:
            return False  # nothing but the exact result can be right then
        return difference(mine, again) <= 2e-5 * scale

    def story(self) -> str:
        """Everything that was done, for a report."""
        lines = "\n".join(f"  {number:3}. {text}" for number, text in enumerate(self.log))
        return f"seed {self.seed}\n{lines}"


KINDS_DRAWN = ("bert", "bert", "roberta", "xlm-roberta", "electra", "electra-unprojected")
_FRESH: dict[tuple, nn.Module] = {}


def fresh(kind: str, task: str, depth: int) -> nn.Module:
    """A copy of a random model; dropout is off even in training mode, so that nothing is left to chance."""
    if (kind, task, depth) not in _FRESH:
        off = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        _FRESH[kind, task, depth] = tiny(kind, task, num_hidden_layers=depth, **off)
    return copy.deepcopy(_FRESH[kind, task, depth])


def attempt(action: Callable, side: Side, seed: int) -> object:
    """What the action gives, or the exception it raises."""
    torch.default_generator.manual_seed(seed)  # the CPU's alone: torch.manual_seed takes a millisecond
    try:
        return action(side)
    except Exception as error:
        return error


def accepted(error: Exception) -> str | None:
    """The reason's name, if a swapped model may refuse so."""
    if not isinstance(error, _REFUSED):
        return None
    return next((name for name, text in ACCEPTED.items() if re.search(text, str(error), re.DOTALL)), None)


def token_mask(inputs: dict) -> Tensor:
    given = inputs["inputs_embeds"] if inputs.get("input_ids") is None else inputs["input_ids"]
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() == 4:
        return torch.ones(given.shape[:2], dtype=torch.bool)
    return mask.bool().expand(given.shape[:2])


def doubled(value):
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def answer(called: Callable, inputs: dict) -> list[Tensor]:
    """All tensors that the model gives, at tokens and for samples that have any."""
    return at_tokens(called(**inputs), token_mask(inputs))


def at_tokens(output, mask: Tensor) -> list[Tensor]:
    busy = mask.any(1)
    found = []

    def gather(value):
        if isinstance(value, tuple | list):
            for part in value:
                gather(part)
        elif isinstance(value, Tensor):
            if value.dim() >= 2 and value.shape[:2] == mask.shape and value.dim() == 3:
                value = value[mask]
            elif value.dim() == 2:
                value = value[busy]
            found.append(value)

    gather(tuple(output.values()) if hasattr(output, "values") else output)
    return found


def planned_answer(side: Side, inputs: dict, plan: Tensor | None) -> list[Tensor]:
    """As :func:`answer`, each sample through the layers of its path; None: through all."""
    if plan is None or plan.all():
        return answer(side.called, inputs)
    mask = token_mask(inputs)
    batch_size, depth = plan.shape
    alone: list[list[Tensor]] = [[] for _ in range(batch_size)]
    for path in sorted({tuple(row) for row in plan.tolist()}):
        rows = [row for row in range(batch_size) if tuple(plan[row].tolist()) == path]
        part = {name: rows_of(value, rows, batch_size) for name, value in inputs.items()}
        part["return_dict"] = True
        with through(side, path):
            output = side.called(**part)
            states = getattr(output, "hidden_states", None)
            if states == ():  # nobody saw the embeddings
                states = (side.encoder(**part).last_hidden_state,)
        if states is not None:
            output["hidden_states"] = repeated(states, path)
        for place, row in enumerate(rows):
            alone[row] = at_tokens(one_row(output, place, len(rows)), mask[row : row + 1])
    return [torch.cat(parts) for parts in zip(*alone, strict=True)]


@contextmanager
def through(side: Side, path: tuple[bool, ...]):
    """Only the layers of a path."""
    stack = side.encoder.encoder
    every = stack.layer
    try:
        stack.layer = nn.ModuleList(layer for layer, kept in zip(every, path, strict=True) if kept)
        yield
    finally:
        stack.layer = every


def repeated(states: tuple[Tensor, ...], path: tuple[bool, ...]) -> tuple[Tensor, ...]:
    """A bypassed sample's state goes on as it is."""
    taken, found = 0, [states[0]]
    for kept in path:
        taken += kept
        found.append(states[taken])
    return tuple(found)


def rows_of(value, rows: list[int], batch_size: int):
    if isinstance(value, Tensor) and value.dim() and value.shape[0] == batch_size:
        return value[rows]
    return value


def one_row(output, place: int, count: int):
    if isinstance(output, Tensor):
        return output[place : place + 1] if output.dim() and output.shape[0] == count else output
    if isinstance(output, tuple | list):
        return tuple(one_row(part, place, count) for part in output)
    return tuple(one_row(part, place, count) for part in output.values())


def difference(one: list[Tensor], two: list[Tensor]) -> float:
    pairs = [(a, b) for a, b in zip(one, two, strict=True) if a.numel()]
    return max(
        ((a.detach().double() - b.detach().double()).abs().max().item() for a, b in pairs), default=0.0
    )
