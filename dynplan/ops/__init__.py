"""The ops: one file each, the public function with its docstring, fake and autograd."""

from dynplan import (
    _library as _library,
)  # registers the compiled ops before any op file refers to them
from dynplan.ops.build_dispatch import Dispatch, build_dispatch
from dynplan.ops.pack import Packed, pack, unpack
from dynplan.ops.region_cross_entropy import RegionStats, region_cross_entropy, region_cross_entropy_stats
from dynplan.ops.region_minkowski import MinkowskiAccumulator

__all__ = [
    "Dispatch",
    "MinkowskiAccumulator",
    "Packed",
    "RegionStats",
    "build_dispatch",
    "pack",
    "region_cross_entropy",
    "region_cross_entropy_stats",
    "unpack",
]
