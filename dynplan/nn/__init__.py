"""Modules over the ops."""

from dynplan.nn.exits import Exits
from dynplan.nn.planner import StepwisePlanner, UpfrontPlanner
from dynplan.nn.region_cross_entropy import RegionCrossEntropyLoss

__all__ = ["Exits", "RegionCrossEntropyLoss", "StepwisePlanner", "UpfrontPlanner"]
