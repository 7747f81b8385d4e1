"""The region loss in the conventions of mmsegmentation, and in its registry where it is installed.

In a config: ``custom_imports = dict(imports=["dynplan.integrations.segmentation.mmsegmentation"])`` and
``loss_decode=dict(type="RegionLoss", kernel_size=5, loss_weight=1.0)``.
"""

from typing import Any

from torch import Tensor, nn

from dynplan.nn.labels import held_loss


class RegionLoss(nn.Module):
    """Called as a decode head calls its losses: ``loss(seg_logit, seg_label, weight=None,
    ignore_index=255)``.

    Args:
        loss_weight: factor of the loss.
        loss_name: key in the head's losses; those that start with ``loss_`` are trained on.
        class_weight: weight of each class.
        **options: those of :class:`dynplan.nn.RegionCrossEntropyLoss`. A decode head's ``ignore_index`` goes
            before the one given here.

    Raises:
        TypeError: an option that :class:`dynplan.nn.RegionCrossEntropyLoss` does not have.
        ValueError: on call, with pixel weights, ``avg_factor`` or ``reduction_override``, which a Minkowski
            mean has no place for.
    """

    def __init__(
        self,
        loss_weight: float = 1.0,
        loss_name: str = "loss_region",
        class_weight: list[float] | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        self.loss_weight = loss_weight
        self._loss_name = loss_name
        self.loss = held_loss({"weight": class_weight, **options})

    @property
    def loss_name(self) -> str:
        return self._loss_name

    def forward(
        self,
        cls_score: Tensor,
        label: Tensor,
        weight: Tensor | None = None,
        avg_factor: float | None = None,
        reduction_override: str | None = None,
        ignore_index: int | None = None,
    ) -> Tensor:
        for name, value in (
            ("weight", weight), ("avg_factor", avg_factor), ("reduction_override", reduction_override)
        ):  # fmt: skip
            if value is not None:
                raise ValueError(f"RegionLoss: expected {name} to be None, got {type(value).__name__}")
        if ignore_index is not None:
            self.loss.options["ignore_index"] = ignore_index
        return self.loss_weight * self.loss(cls_score, label)


def register() -> bool:
    """Puts the loss into mmsegmentation's registry; False where mmsegmentation is not installed."""
    try:
        from mmseg.registry import MODELS
    except ImportError:
        return False
    MODELS.register_module(name="RegionLoss", module=RegionLoss, force=True)
    return True


register()
