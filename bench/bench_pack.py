"""pack and unpack against boolean indexing and index_copy in eager PyTorch."""

import pytest
import torch

from dynplan import ops
from dynplan.reference import pack as reference

SHAPES = {"sst2": (32, 45, 384), "long": (32, 384, 768)}


@pytest.mark.parametrize("impl", ["dynplan", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pack(measure, shape, impl):
    batch_size, length, width = SHAPES[shape]
    hidden = torch.randn(batch_size, length, width)
    mask = torch.arange(length) < torch.randint(1, length + 1, (batch_size, 1))
    module = {"dynplan": ops, "reference": reference}[impl]
    packed, indices, _ = module.pack(hidden, mask)
    assert torch.equal(module.unpack(packed, indices, batch_size, length), hidden * mask[..., None])

    def round_trip():
        packed, indices, _ = module.pack(hidden, mask)
        module.unpack(packed, indices, batch_size, length)

    measure(round_trip, op="pack+unpack", impl=impl, shape=shape, dtype=hidden.dtype, baseline="reference")
