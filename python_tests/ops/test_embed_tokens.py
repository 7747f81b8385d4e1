import pytest
import torch
from helpers import DEVICES, assert_close_to_exact, on_threads
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from dynplan import _native
from dynplan.ops import embed_tokens
from dynplan.reference import embed_tokens as reference

OP = torch.ops.dynplan.embed_tokens.default
WORDS, TYPES = 13, 3


def draw_inputs(batch_size=4, length=6, width=8, seed=0, ids=torch.int64, dtype=torch.float32, device="cpu"):
    """ids, mask with holes and an empty row, types, three tables and the norm."""
    generator = torch.Generator().manual_seed(seed)

    def floats(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    mask = torch.rand(batch_size, length, generator=generator) < 0.7
    mask[batch_size // 2 : batch_size // 2 + 1] = False
    shape = (batch_size, length)
    return [
        torch.randint(WORDS, shape, generator=generator).to(device, ids),
        mask.to(device),
        torch.randint(TYPES, shape, generator=generator).to(device, ids),
        *(floats(rows, width) for rows in (WORDS, TYPES, length + 4)),
        floats(width),
        floats(width),
    ]


@given(
    batch_size=st.integers(0, 5),
    length=st.integers(0, 9),
    width=st.integers(2, 40),
    seed=st.integers(0, 2**16),
    ids=st.sampled_from([torch.int32, torch.int64]),
    mask=st.sampled_from([None, torch.bool, torch.int32, torch.int64]),
    typed=st.booleans(),
    padding_idx=st.sampled_from([None, 0, 3]),
    grad=st.booleans(),
)
def test_equals_reference(batch_size, length, width, seed, ids, mask, typed, padding_idx, grad):
    inputs = draw_inputs(batch_size, length, width, seed, ids)
    inputs[1] = None if mask is None else inputs[1].to(mask)
    if not typed:
        inputs[2] = None
    with torch.set_grad_enabled(grad):  # with: composed; without: the op
        got = embed_tokens(*inputs, 1e-5, padding_idx)
    theirs = reference.embed_tokens(*inputs, 1e-5, padding_idx)
    doubles = [x.double() if x is not None and x.is_floating_point() else x for x in inputs]
    exact = reference.embed_tokens(*doubles, 1e-5, padding_idx)
    assert_close_to_exact(got.hidden, theirs[0], exact[0])
    for ours, right in zip(got[1:], theirs[1:], strict=True):
        assert torch.equal(ours, right) and ours.dtype == right.dtype


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_other_dtypes_and_devices(device, dtype):
    inputs = draw_inputs(dtype=dtype, device=device)
    got = embed_tokens(*inputs, 1e-5)
    theirs = reference.embed_tokens(*inputs, 1e-5, None)
    tokens = int(inputs[1].sum())
    torch.testing.assert_close(got.hidden[:tokens], theirs[0], rtol=2e-2, atol=2e-2)
    assert torch.equal(got.indices[:tokens], theirs[1]) and torch.equal(got.cu_seqlens, theirs[2])


@torch.no_grad()
def test_bits_depend_on_the_token_alone():
    inputs = draw_inputs(40, 30, 72)
    one, two = on_threads((1, 2), lambda: embed_tokens(*inputs).hidden)
    assert torch.equal(one, two)
    whole = embed_tokens(inputs[0], None, *inputs[2:]).hidden
    assert torch.equal(whole[inputs[1].flatten()], one)
    alone = embed_tokens(inputs[0][7:8], None, inputs[2][7:8], *inputs[3:]).hidden
    assert torch.equal(alone, whole.view(40, 30, 72)[7])
    strided = [x.repeat_interleave(2, 1)[:, ::2] if x.dim() == 2 else x for x in inputs]
    assert torch.equal(embed_tokens(*strided).hidden, one)


def test_gradients():
    ids, mask, types, *floats = draw_inputs(dtype=torch.float64)
    floats = [x.requires_grad_() for x in floats]
    for padding_idx in (None, 1):
        assert torch.autograd.gradcheck(
            lambda *x, idx=padding_idx: embed_tokens(ids, mask, types, *x, 1e-3, idx).hidden, floats
        )


@pytest.mark.parametrize("batch_size", [0, 3])
def test_opcheck(batch_size):
    inputs = draw_inputs(batch_size)
    torch.library.opcheck(OP, (*inputs, 1e-5, None))
    inputs[1] = inputs[2] = None
    inputs[3] = inputs[3].t().contiguous().t()
    torch.library.opcheck(OP, (*inputs, 1e-5, 1))


@torch.no_grad()
def test_native_equals_op():
    inputs = draw_inputs(width=37)
    for padding_idx in (None, 2):
        native = _native.embed_tokens(
            *(x.numpy() for x in inputs), eps=1e-5, padding_idx=-1 if padding_idx is None else padding_idx
        )
        assert torch.equal(torch.from_numpy(native), embed_tokens(*inputs, 1e-5, padding_idx).hidden)
    inputs[0][0, 0] = WORDS
    with pytest.raises(IndexError, match="embed_tokens: expected ids and positions within their tables"):
        _native.embed_tokens(*(x.numpy() for x in inputs), eps=1e-5)


@pytest.mark.parametrize(
    ("place", "value", "error", "text"),
    [
        (0, torch.zeros(3).long(), ValueError, r"input_ids to have shape \(B, S\), got \[3\]"),
        (0, torch.zeros(4, 6), TypeError, "input_ids to be int64 or int32, got Float"),
        (0, torch.full((4, 6), WORDS), IndexError, f"input_ids within 0..{WORDS - 1}, got {WORDS}"),
        (0, torch.full((4, 6), -1), IndexError, "input_ids within 0..12, got -1"),
        (1, torch.ones(4, 5).bool(), ValueError, r"attention_mask to have shape \[4, 6\], got \[4, 5\]"),
        (1, torch.ones(4, 6), TypeError, "attention_mask to be bool or integer, got Float"),
        (1, torch.full((4, 6), 2), ValueError, r"attention_mask to hold only 0 and 1, got 2 at \[0, 0\]"),
        (2, torch.zeros(4, 5).long(), ValueError, r"token_type_ids to have shape \[4, 6\], got \[4, 5\]"),
        (2, torch.full((4, 6), TYPES), IndexError, "token_type_ids within 0..2, got 3"),
        (3, torch.zeros(8), ValueError, r"word to have shape \(V, E\), got \[8\]"),
        (4, torch.zeros(3, 7), ValueError, r"type to have rows of width 8, got \[3, 7\]"),
        (5, torch.zeros(3, 8), IndexError, r"positions within 0..2, got"),
        (5, torch.zeros(9, 8).double(), TypeError, "position to be float32, got Double"),
        (6, torch.zeros(9), ValueError, r"norm_weight to have shape \[8\], got \[9\]"),
    ],
)
@torch.no_grad()
def test_errors(place, value, error, text):
    inputs = draw_inputs()
    inputs[place] = value
    with pytest.raises(error, match="embed_tokens: expected " + text):
        embed_tokens(*inputs)


@pytest.mark.parametrize("padding_idx", [-1, 9, 2**31 - 1, 2**31, 2**32 - 5, 2**63 - 1])
@pytest.mark.parametrize("wanted", [False, True], ids=["kernel", "composed"])
def test_padding_idx_is_a_row_of_position(padding_idx, wanted):
    inputs = draw_inputs()
    inputs[5] = inputs[5][:9]
    text = f"embed_tokens: expected padding_idx to be within 0..8, got {padding_idx}"
    with torch.set_grad_enabled(wanted), pytest.raises(ValueError, match=text):
        embed_tokens(*inputs, 1e-5, padding_idx)
    with FakeTensorMode() as mode, torch.no_grad(), pytest.raises(ValueError, match=text):
        OP(*(mode.from_tensor(x) for x in inputs), 1e-5, padding_idx)
    if padding_idx >= 0:
        with pytest.raises(ValueError, match="expected padding_idx to be a row of position or below 0, got"):
            _native.embed_tokens(*(x.numpy() for x in inputs), eps=1e-5, padding_idx=padding_idx)


def test_native_errors():
    inputs = [x.numpy() for x in draw_inputs()]
    for place in (1, 2):
        with pytest.raises(ValueError, match="embed_tokens: expected ids, mask and types"):
            _native.embed_tokens(*inputs[:place], inputs[place].T.copy(), *inputs[place + 1 :], eps=1e-5)
