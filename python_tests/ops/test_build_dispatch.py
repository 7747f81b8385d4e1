import pytest
import torch
from helpers import DEVICES
from hypothesis import given
from hypothesis import strategies as st

from dynplan import _native
from dynplan.ops import build_dispatch
from dynplan.reference import build_dispatch as reference


def draw_plan(lengths, layers, share, seed):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(len(lengths), layers, generator=generator) < share
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    return keep, cu_seqlens


@given(
    lengths=st.lists(st.integers(0, 7), max_size=8),
    layers=st.integers(0, 5),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    spare=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(lengths, layers, share, spare, seed):
    keep, cu_seqlens = draw_plan(lengths, layers, share, seed)
    capacity = sum(lengths) + spare
    together = build_dispatch(keep, cu_seqlens, capacity)
    transposed = build_dispatch(keep.t().contiguous().t(), cu_seqlens, capacity)
    assert together.rows.shape == (layers, capacity) and together.counts.shape == (layers, 2)
    for layer in range(layers):
        want = reference.build_dispatch(keep[:, layer], cu_seqlens, capacity)
        alone = build_dispatch(keep[:, layer], cu_seqlens, capacity)
        for got in (together.layer(layer), transposed.layer(layer), alone):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("lengths", [[], [3, 0, 2, 4]])
def test_opcheck(device, lengths):
    keep, cu_seqlens = draw_plan(lengths, 3, 0.5, 1)
    for plan in (keep, keep[:, 0], keep.t().contiguous().t()):
        arguments = (plan.to(device), cu_seqlens.to(device), sum(lengths))
        torch.library.opcheck(torch.ops.dynplan.build_dispatch.default, arguments)


def test_native_equals_op():
    keep, cu_seqlens = draw_plan([2, 5, 0, 1], 4, 0.5, 5)
    ours = build_dispatch(keep, cu_seqlens, 8)
    for a, b in zip(ours, _native.build_dispatch(keep.numpy(), cu_seqlens.numpy()), strict=True):
        assert torch.equal(a, torch.from_numpy(b))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"keep": torch.ones(2)}, TypeError, "keep to be bool, got Float"),
        (
            {"keep": torch.ones(2, 1, 1).bool()},
            ValueError,
            r"keep to have shape \(B,\) or \(B, L\), got \[2, 1, 1\]",
        ),
        ({"cu_seqlens": torch.tensor([0, 1, 2])}, TypeError, "cu_seqlens to be int32, got Long"),
        (
            {"cu_seqlens": torch.tensor([0, 1]).int()},
            ValueError,
            r"cu_seqlens to have shape \[3\], got \[2\]",
        ),
        (
            {"cu_seqlens": torch.tensor([1, 2, 3]).int()},
            ValueError,
            "cu_seqlens to start at 0, got 1",
        ),
        (
            {"cu_seqlens": torch.tensor([0, 3, 2]).int()},
            ValueError,
            "cu_seqlens to ascend, got 3 then 2 at 1",
        ),
        ({"capacity": 4}, ValueError, "within the capacity of 4, got 5"),
        ({"capacity": -1}, ValueError, r"capacity in \[0, 2\^31\), got -1"),
    ],
)
def test_errors(change, error, text):
    inputs = {
        "keep": torch.ones(2).bool(),
        "cu_seqlens": torch.tensor([0, 2, 5]).int(),
        "capacity": 5,
    }
    with pytest.raises(error, match="build_dispatch: expected .*" + text):
        build_dispatch(**(inputs | change))
