"""Exits: small heads that let the model's own head read a sample before its last layer.

An exit after a path of layers gives, from the mean of a sample's rows, the state that the model's own head
reads in first position. So every exit answers in the model's own terms, whatever its head is, with a matrix
``(H, H)`` of its own. Heads on the way are those of deeply supervised nets (Lee et al., arXiv 1409.5185) and
of BranchyNet (arXiv 1709.01686), trained against the full path's answer as in FastBERT (arXiv 2004.02178).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dynplan.nn.planner import PLANNERS, check_sizes, pool


class Exits(nn.Module):
    """Heads after some of the layers, and what is known of how sure their answers are.

    Args:
        hidden_size: ``H`` of the encoder.
        num_layers: ``L`` of the encoder.
        depths: layers run before each exit, rising, each within ``1..L-1``.
        regression: whether answers are numbers, which have no confidence of their own: then a small network
            predicts the error of each exit's answer.

    Attributes:
        heads: a linear map ``H -> H`` for each exit.
        temperatures: ``(R + 1,)``, of the answers at each exit and at the end, see :meth:`sureness`.
        certainty: a linear map ``H -> 1`` for each exit: the logit that its answer is right, learned as in
            BERxiT (Xin et al., EACL 2021).
        errors: for regression, a network ``H + 1 -> 1`` for each exit: the logarithm of its squared error.

    Trained beside the full path (deep supervision, arXiv 1409.5185).

    Raises:
        ValueError: sizes that are not positive, depths that do not rise within ``1..L-1``.
    """

    stepwise = True

    def __init__(
        self, hidden_size: int, num_layers: int, depths: Sequence[int], regression: bool = False
    ) -> None:
        super().__init__()
        check_sizes("Exits", hidden_size=hidden_size, num_layers=num_layers)
        self.depths = tuple(_whole(depth) for depth in depths)
        inside = all(1 <= depth < num_layers for depth in self.depths)
        if not self.depths or not inside or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"Exits: expected depths to rise within 1..{num_layers - 1}, got {list(depths)}")
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.regression = bool(regression)
        count = len(self.depths)
        self.heads = nn.ModuleList(nn.Linear(hidden_size, hidden_size) for _ in self.depths)
        self.certainty = nn.ModuleList(nn.Linear(hidden_size, 1) for _ in self.depths)
        self.register_buffer("temperatures", torch.ones(count + 1))
        self.errors = None
        if self.regression:
            self.errors = nn.ModuleList(
                nn.Sequential(nn.Linear(hidden_size + 1, 16), nn.GELU(), nn.Linear(16, 1))
                for _ in self.depths
            )
        for head in self.heads:  # the start: the model's own head reads the mean of the rows
            nn.init.eye_(head.weight)
            nn.init.zeros_(head.bias)

    def forward(self, index: int, pooled: Tensor) -> Tensor:
        """What the model's own head reads at exit ``index``.

        Args:
            index: of the exit, 0-based.
            pooled: :func:`~dynplan.nn.planner.pool` of the states after ``depths[index]`` layers, ``(B, H)``.

        Returns:
            ``(B, H)``.
        """
        return self.heads[index](pooled)

    def read(self, index: int, hidden: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
        """Pooled states ``(B, H)`` of packed ones ``(T, H)``, and what the model's head reads of them."""
        pooled = pool(hidden.to(self.temperatures.dtype), cu_seqlens, "mean")
        return pooled, self(index, pooled)

    def sureness(self, index: int, answers: Tensor, pooled: Tensor) -> Tensor:
        """How likely each answer is right: for classes the largest probability at the exit's temperature, for
        regression minus the logarithm of the squared error that is expected.

        Args:
            index: of the exit; ``len(depths)`` for the full path, classes only.
            answers: float ``(B, C)``, of the model's head.
            pooled: ``(B, H)``; read for regression only.

        Returns:
            ``(B,)``, higher is surer.
        """
        if self.errors is not None:
            return -self.errors[index](torch.cat((pooled, answers[:, :1].to(pooled)), 1)).squeeze(1)
        return (answers.float() / self.temperatures[index]).softmax(1).amax(1)

    def to_config(self) -> dict[str, Any]:
        """Constructor arguments as JSON values; the weights travel apart."""
        return {
            "type": "Exits",
            "hidden_size": self.hidden_size,
            "num_layers": self.num_layers,
            "depths": list(self.depths),
            "regression": self.regression,
        }


PLANNERS["Exits"] = Exits


def _whole(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"Exits: expected depths to be integers, got {value!r}")
    return value
