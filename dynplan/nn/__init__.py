"""Modules over the ops."""

from dynplan.nn.planner import StepwisePlanner, UpfrontPlanner

__all__ = ["StepwisePlanner", "UpfrontPlanner"]
