"""encode_tokens against the four ops that it stands for, one after another."""

import pytest
import torch

from dynplan import ops

SHAPES = {"one text": (1, 32, 384), "sst2": (32, 45, 384)}
LAYERS = 12


def four_ops(batch, embeddings, packed, *shape):
    hidden, indices, cu_seqlens = ops.embed_tokens(*batch, *embeddings)
    plan = torch.ones(len(batch[0]), len(packed), dtype=torch.bool)
    dispatch = ops.build_dispatch(plan, cu_seqlens, len(hidden))
    hidden = ops.conditional_encoder(hidden, dispatch, None, *shape, packed_weights=packed)
    return ops.unpack(hidden, indices, *batch[0].shape)


@pytest.mark.parametrize("impl", ["dynplan", "four ops"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_encode_tokens(measure, shape, impl):
    batch_size, length, width = SHAPES[shape]
    ids = torch.randint(30_000, (batch_size, length))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (batch_size, 1))
    tables = [torch.randn(rows, width) for rows in (30_000, 2, 512)]
    embeddings = (*tables, torch.ones(width), torch.zeros(width), 1e-12, None)
    sizes = [(3, 1), (1, 1), None, (4, 1), (1, 4), None]
    packed = []
    for _ in range(LAYERS):
        weights = []
        for size in sizes:
            rows = size[0] * width if size else width
            if size:
                weights += [torch.randn(rows, size[1] * width) * width**-0.5, torch.zeros(rows)]
            else:
                weights += [torch.ones(rows), torch.zeros(rows)]
        packed.append(ops.pack_encoder_weights(ops.EncoderLayerWeights(*weights)))
    batch, options = (ids, mask, None), (12, "gelu", 1e-12)
    run = {
        "dynplan": lambda: ops.encode_tokens(*batch, *embeddings, None, packed, *options),
        "four ops": lambda: four_ops(batch, embeddings, packed, *options),
    }
    assert torch.equal(run[impl](), run["four ops"]())
    measure(
        run[impl],
        op="encode_tokens",
        impl=impl,
        shape=shape,
        dtype=tables[0].dtype,
        baseline="four ops",
    )
