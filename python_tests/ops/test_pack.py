import pytest
import torch
from helpers import DEVICES
from hypothesis import given
from hypothesis import strategies as st

from dynplan import _native
from dynplan.ops import pack, unpack
from dynplan.reference import pack as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def draw_inputs(batch_size, length, width, seed, dtype=torch.float32, layout="dense", device="cpu"):
    """Hidden states of the named layout, and a mask with holes, paddings of both sides and empty rows."""
    generator = torch.Generator().manual_seed(seed)
    if layout == "permuted":
        hidden = torch.randn(length, width, batch_size, generator=generator).permute(2, 0, 1)
    elif layout == "sliced":
        hidden = torch.randn(batch_size, 2 * length, width + 3, generator=generator)[:, ::2, 3:]
    else:
        hidden = torch.randn(batch_size, length, width, generator=generator)
    mask = torch.rand(batch_size, length, generator=generator) < torch.rand(
        batch_size, 1, generator=generator
    )
    if batch_size > 1:
        mask[0] = False
        mask[1] = torch.arange(length) >= length // 2
    return hidden.to(device, dtype), mask.to(device)


@pytest.mark.parametrize("layout", ["dense", "permuted", "sliced"])
@given(
    batch_size=st.integers(0, 6),
    length=st.integers(0, 9),
    width=st.integers(0, 40),
    seed=st.integers(0, 2**16),
    dtype=st.sampled_from(DTYPES),
    mask_dtype=st.sampled_from([torch.bool, torch.uint8, torch.int32, torch.int64]),
)
def test_equals_reference(layout, batch_size, length, width, seed, dtype, mask_dtype):
    hidden, mask = draw_inputs(batch_size, length, width, seed, dtype, layout)
    got = pack(hidden, mask.to(mask_dtype))
    for ours, theirs in zip(got, reference.pack(hidden, mask), strict=True):
        assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype
    back = unpack(got.hidden, got.indices, batch_size, length)
    assert torch.equal(back, hidden * mask[..., None])
    assert torch.equal(back, reference.unpack(got.hidden, got.indices, batch_size, length))


@pytest.mark.parametrize("device", DEVICES)
def test_static_capacity_on_cuda(device):
    hidden, mask = draw_inputs(4, 7, 8, 3, device=device)
    got = pack(hidden, mask)
    tokens = int(mask.sum())
    assert got.hidden.shape[0] == (28 if device == "cuda" else tokens)
    assert (got.indices[tokens:] == -1).all() and (got.hidden[tokens:] == 0).all()
    assert torch.equal(unpack(got.hidden, got.indices, 4, 7), hidden * mask[..., None])


def test_gradients():
    hidden, mask = draw_inputs(3, 5, 4, 7, torch.float64)
    indices = pack(hidden, mask).indices
    assert torch.autograd.gradcheck(lambda x: pack(x, mask).hidden, hidden.requires_grad_())
    packed = torch.randn(len(indices), 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpack(x, indices, 3, 5), packed)
    assert torch.autograd.gradgradcheck(lambda x: unpack(x, indices, 3, 5) ** 2, packed)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize("batch_size", [0, 3])
def test_opcheck(device, layout, batch_size):
    hidden, mask = draw_inputs(batch_size, 5, 4, 1, layout=layout, device=device)
    hidden.requires_grad_()
    torch.library.opcheck(torch.ops.dynplan.pack.default, (hidden, mask))
    packed, indices, _ = pack(hidden.detach(), mask)
    torch.library.opcheck(torch.ops.dynplan.unpack.default, (packed.requires_grad_(), indices, batch_size, 5))
    torch.library.opcheck(torch.ops.dynplan._unpack_backward.default, (torch.ones_like(hidden), indices))


def test_native_equals_op():
    hidden, mask = draw_inputs(4, 6, 5, 9)
    for ours, theirs in zip(pack(hidden, mask), _native.pack(hidden.numpy(), mask.numpy()), strict=True):
        assert torch.equal(ours, torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (
            {"hidden": torch.zeros(2, 3)},
            ValueError,
            r"hidden to have shape \(B, S, H\), got \[2, 3\]",
        ),
        (
            {"mask": torch.ones(2, 4).bool()},
            ValueError,
            r"attention_mask to have shape \[2, 3\], got \[2, 4\]",
        ),
        ({"mask": torch.ones(2, 3)}, TypeError, "attention_mask to be bool or integer, got Float"),
        (
            {"mask": torch.tensor([[1, 1, 0], [1, 5, 0]])},
            ValueError,
            r"only 0 and 1, got 5 at \[1, 1\]",
        ),
    ],
)
def test_pack_errors(change, error, text):
    inputs = {"hidden": torch.zeros(2, 3, 4), "mask": torch.ones(2, 3).bool()} | change
    with pytest.raises(error, match="pack: expected.*" + text):
        pack(inputs["hidden"], inputs["mask"])


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"packed": torch.zeros(2)}, ValueError, r"packed to have shape \(T, H\), got \[2\]"),
        ({"indices": torch.zeros(3).int()}, ValueError, r"indices to have shape \[2\], got \[3\]"),
        ({"indices": torch.zeros(2).long()}, TypeError, "indices to be int32, got Long"),
        ({"indices": torch.tensor([0, 6]).int()}, IndexError, r"indices in \[-1, 6\), got 6 at 1"),
        ({"batch_size": -1}, ValueError, r"batch_size in \[0, 2\^31\), got -1"),
    ],
)
def test_unpack_errors(change, error, text):
    inputs = {
        "packed": torch.zeros(2, 4),
        "indices": torch.zeros(2).int(),
        "batch_size": 2,
        "length": 3,
    }
    with pytest.raises(error, match="unpack: expected.*" + text):
        unpack(**(inputs | change))
