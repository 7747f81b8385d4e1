"""The ops: one file each, the public function with its docstring, fake and autograd."""

from dynplan import (
    _library as _library,
)  # registers the compiled ops before any op file refers to them
from dynplan.ops.build_dispatch import Dispatch, build_dispatch
from dynplan.ops.conditional_encoder_layer import (
    EncoderLayerWeights,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
)
from dynplan.ops.embed_tokens import embed_tokens
from dynplan.ops.encode_tokens import encode_tokens
from dynplan.ops.encode_until_sure import Rungs, encode_until_sure
from dynplan.ops.pack import Packed, pack, unpack
from dynplan.ops.planned_encoder import planned_encoder
from dynplan.ops.reduced_encoder import pack_reduced_encoder_weights
from dynplan.ops.region_cross_entropy import RegionStats, region_cross_entropy, region_cross_entropy_stats
from dynplan.ops.region_cross_entropy_upsampled import region_cross_entropy_upsampled
from dynplan.ops.region_minkowski import MinkowskiAccumulator

__all__ = [
    "Dispatch",
    "EncoderLayerWeights",
    "MinkowskiAccumulator",
    "Packed",
    "RegionStats",
    "Rungs",
    "build_dispatch",
    "conditional_encoder",
    "conditional_encoder_layer",
    "embed_tokens",
    "encode_tokens",
    "encode_until_sure",
    "pack",
    "pack_encoder_weights",
    "pack_reduced_encoder_weights",
    "planned_encoder",
    "region_cross_entropy",
    "region_cross_entropy_stats",
    "region_cross_entropy_upsampled",
    "unpack",
]
