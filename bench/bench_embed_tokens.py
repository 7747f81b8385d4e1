"""embed_tokens against the same embeddings composed from eager PyTorch, then packed."""

import pytest
import torch

from dynplan import ops
from dynplan.reference import embed_tokens as reference

SHAPES = {"one text": (1, 32, 384), "sst2": (32, 45, 384), "long": (32, 384, 768)}


@pytest.mark.parametrize("impl", ["dynplan", "reference"])
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_embed_tokens(measure, shape, impl):
    batch_size, length, width = SHAPES[shape]
    ids = torch.randint(30_000, (batch_size, length))
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (batch_size, 1))
    tables = [torch.randn(rows, width) for rows in (30_000, 2, 512)]
    arguments = (ids, mask, None, *tables, torch.ones(width), torch.zeros(width), 1e-12, None)
    module = {"dynplan": ops, "reference": reference}[impl]
    torch.testing.assert_close(module.embed_tokens(*arguments)[0], reference.embed_tokens(*arguments)[0])
    measure(
        lambda: module.embed_tokens(*arguments),
        op="embed_tokens",
        impl=impl,
        shape=shape,
        dtype=tables[0].dtype,
        baseline="reference",
    )
