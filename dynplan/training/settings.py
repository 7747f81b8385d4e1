"""Every setting of the recipe, and what each may be."""

import math
from dataclasses import dataclass, fields

from dynplan.errors import InputError
from dynplan.training.planning import OBJECTIVES

PLANNERS = ("exits", "upfront", "stepwise", "none")

_ABOVE_ZERO = math.ulp(0.0)
_RANGES = {
    "plain_epochs": (0, 1e6),
    "exit_epochs": (0, 1e6),
    "robust_epochs": (0, 1e6),
    "planner_epochs": (0, 1e6),
    "batch_size": (1, 2**20),
    "learning_rate": (_ABOVE_ZERO, 1e6),
    "exit_learning_rate": (_ABOVE_ZERO, 1e6),
    "robust_learning_rate": (_ABOVE_ZERO, 1e6),
    "planner_learning_rate": (_ABOVE_ZERO, 1e6),
    "planner_rows": (1, 2**31),
    "menu_size": (2, 2**16),
    "search_rows": (1, 2**31),
    "search_swaps": (0, 2**31),
    "distill": (0, 1e6),
    "max_length": (2, 2**20),
    "seed": (0, 2**32 - 1),  # what NumPy takes
}


@dataclass(frozen=True)
class Recipe:
    """Every setting of :func:`~dynplan.training.finetune`.

    Shares and budgets are of layer work, 0..1. Settings of exits go with ``planner="exits"``; robust epochs,
    the
    search, the menu and the planner's own settings with the others.

    Args:
        plain_epochs: of ordinary fine-tuning, first.
        exit_epochs: of training with exits.
        robust_epochs: of training on drawn paths.
        planner_epochs: of the planner alone.
        batch_size: rows of a step, of all processes together.
        learning_rate: of everything but exits and planner.
        exit_learning_rate: of the exits.
        robust_learning_rate: of the robust epochs; None: ``learning_rate``.
        planner_learning_rate: of the planner.
        planner: "exits", "upfront", "stepwise" or "none".
        planner_objective: "values", "reward" or "gates"; None: "gates" for a stepwise planner, else "values".
        planner_rows: training rows that the planner learns from, at most.
        menu_size: paths that an upfront planner with "values" chooses from.
        search_rows: held-out rows that fixed subsets are ranked on, at most.
        search_swaps: random exchanges that are tried for each size of subset.
        budgets: that checkpoints are ranked at, and the planner is compared at.
        shares: least and most layers of a drawn path.
        distill: weight of the divergence from the full path's answer.
        holdout: share of the training rows that is never trained on.
        max_length: tokens that rows are cut to.
        seed: of everything drawn, below 2**32.
        bf16: train under bfloat16 autocast.

    Raises:
        InputError: a setting out of its range, or two that do not go together.
    """

    plain_epochs: float = 0.0
    exit_epochs: float = 3.0
    robust_epochs: float = 3.0
    planner_epochs: float = 3.0
    batch_size: int = 16
    learning_rate: float = 5e-5
    exit_learning_rate: float = 1e-3
    robust_learning_rate: float | None = None
    planner_learning_rate: float = 1e-3
    planner: str = "exits"
    planner_objective: str | None = None
    planner_rows: int = 2000
    menu_size: int = 12
    search_rows: int = 256
    search_swaps: int = 16
    budgets: tuple[float, ...] = (0.75, 0.5)
    shares: tuple[float, float] = (0.4, 0.9)
    distill: float = 1.0
    holdout: float = 0.1
    max_length: int = 128
    seed: int = 0
    bf16: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _RANGES and not (value is None and field.default is None):
                self._check_range(field.name, value, whole=field.type in (int, "int"))
        for budget in self.budgets:
            if not 0 < budget <= 1:
                raise InputError(f"finetune: expected budgets within 0..1, got {budget}")
        if not 0 <= self.shares[0] <= self.shares[1] <= 1:
            raise InputError(f"finetune: expected shares to be rising within 0..1, got {self.shares}")
        if not 0 < self.holdout < 1:
            raise InputError(f"finetune: expected holdout within 0..1, got {self.holdout}")
        if self.planner not in PLANNERS:
            raise InputError(
                f"finetune: expected planner to be one of {', '.join(PLANNERS)}, got {self.planner!r}"
            )
        if self.planner == "none":
            if self.plain_epochs <= 0:
                raise InputError(
                    f"finetune: expected --plain-epochs above 0 without a planner, got {self.plain_epochs}"
                )
        elif self.planner == "exits":
            if self.exit_epochs <= 0 or self.planner_objective is not None:
                raise InputError(
                    f"finetune: expected --exit-epochs above 0 and no objective for exits, got "
                    f"{self.exit_epochs} and {self.planner_objective!r}"
                )
        elif self.objective not in OBJECTIVES:
            raise InputError(
                f"finetune: expected objective to be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.planner == "stepwise" and self.objective != "gates":
            raise InputError(
                f"finetune: expected objective gates for a stepwise planner, got {self.objective!r}"
            )

    @staticmethod
    def _check_range(name: str, value, whole: bool) -> None:
        low, high = _RANGES[name]
        kind = "a whole number" if whole else "a number"
        right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        if not right or not low <= value <= high:
            bounds = f"above 0 and up to {high:g}" if low == _ABOVE_ZERO else f"within {low:g}..{high:.12g}"
            option = "--" + name.replace("_", "-")
            raise InputError(f"finetune: expected {option} to be {kind} {bounds}, got {value}")

    @property
    def objective(self) -> str:
        """How the planner learns: ``planner_objective``, or what None stands for."""
        return self.planner_objective or ("gates" if self.planner == "stepwise" else "values")
