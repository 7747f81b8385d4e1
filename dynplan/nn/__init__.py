"""Modules over the ops."""

from dynplan.nn.planner import StepwisePlanner, UpfrontPlanner
from dynplan.nn.region_cross_entropy import RegionCrossEntropyLoss

__all__ = ["RegionCrossEntropyLoss", "StepwisePlanner", "UpfrontPlanner"]
