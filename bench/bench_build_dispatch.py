"""build_dispatch for all layers in one call against the reference loop, layer by layer."""

import pytest
import torch

from dynplan import ops
from dynplan.reference import build_dispatch as reference


@pytest.mark.parametrize("impl", ["dynplan", "reference"])
@pytest.mark.parametrize("batch_size", [1, 32, 128])
def test_build_dispatch(measure, batch_size, impl):
    layers, length = 12, 25
    keep = torch.rand(batch_size, layers) < 0.5
    cu_seqlens = torch.arange(0, (batch_size + 1) * length, length, dtype=torch.int32)
    capacity = batch_size * length

    def all_layers():
        if impl == "dynplan":
            return ops.build_dispatch(keep, cu_seqlens, capacity)
        return [reference.build_dispatch(keep[:, layer], cu_seqlens, capacity) for layer in range(layers)]

    assert torch.equal(
        ops.build_dispatch(keep, cu_seqlens, capacity).counts,
        torch.stack([reference.build_dispatch(k, cu_seqlens, capacity)[2] for k in keep.t()]),
    )
    shape = f"{batch_size}x{length} tokens, {layers} layers"
    measure(all_layers, op="build_dispatch", impl=impl, shape=shape, dtype=torch.bool, baseline="reference")
