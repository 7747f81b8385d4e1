"""Policies: what decides, for every sample of a batch, which layers are included.

A policy turns a :class:`PlanRequest` into a plan, bool ``(B, L)``. Those that know a budget treat it as a
contract: over the batch, kept sample-layers are at most ``budget * B * L`` and kept token-layers at most
``budget * T * L``, whatever the inputs; below a budget of 1 samples without tokens keep nothing and do not
count in B. Nothing here reads a device value back to the host.
"""

from dynplan.budget import check_budget
from dynplan.policies.base import PlanRequest, Policy, policy_from_config
from dynplan.policies.exits import ConfidenceExit, EntropyExit, LearnedExit, PatienceExit
from dynplan.policies.mixtures import HashExit, RandomExit
from dynplan.policies.paths import FixedPath, HashPath, KeepAll, RandomPath, StaticPath
from dynplan.policies.planner import PlannerPolicy

__all__ = [
    "ConfidenceExit",
    "EntropyExit",
    "FixedPath",
    "HashExit",
    "HashPath",
    "KeepAll",
    "LearnedExit",
    "PatienceExit",
    "PlanRequest",
    "PlannerPolicy",
    "Policy",
    "RandomExit",
    "RandomPath",
    "StaticPath",
    "check_budget",
    "policy_from_config",
]
