import pytest
import torch
from helpers import assert_close_to_exact
from hypothesis import given
from hypothesis import strategies as st

from dynplan.ops import (
    EncoderLayerWeights,
    build_dispatch,
    conditional_encoder,
    conditional_encoder_layer,
    pack_encoder_weights,
)
from dynplan.reference import conditional_encoder_layer as reference

ACTIVATIONS = ["gelu", "gelu_new", "gelu_pytorch_tanh", "relu", "silu"]


def draw_weights(width, intermediate, generator, dtype=torch.float32):
    shapes = {
        "qkv_weight": (3 * width, width),
        "qkv_bias": (3 * width,),
        "output_weight": (width, width),
        "output_bias": (width,),
        "norm1_weight": (width,),
        "norm1_bias": (width,),
        "up_weight": (intermediate, width),
        "up_bias": (intermediate,),
        "down_weight": (width, intermediate),
        "down_bias": (width,),
        "norm2_weight": (width,),
        "norm2_bias": (width,),
    }
    tensors = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return EncoderLayerWeights(
        **{
            name: (tensor * tensor.shape[-1] ** -0.5 if tensor.dim() == 2 else tensor).to(dtype)
            for name, tensor in tensors.items()
        }
    )


def draw_inputs(lengths, width, intermediate, layers, seed, share=0.6, dtype=torch.float32):
    """Packed rows of the given lengths, a random plan, and the weights of the layers."""
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int()
    hidden = torch.randn(sum(lengths), width, generator=generator).to(dtype)
    keep = torch.rand(len(lengths), layers, generator=generator) < share
    weights = [draw_weights(width, intermediate, generator, dtype) for _ in range(layers)]
    return hidden, keep, build_dispatch(keep, cu_seqlens, len(hidden)), weights


def cast(weights, dtype):
    return [EncoderLayerWeights(*(w.to(dtype) for w in layer)) for layer in weights]


def check_against_reference(hidden, dispatch, weights, heads, activation, **options):
    exact = reference.conditional_encoder(
        hidden.double(), dispatch, cast(weights, torch.float64), heads, activation
    )
    theirs = reference.conditional_encoder(hidden, dispatch, weights, heads, activation)
    ours = conditional_encoder(hidden, dispatch, weights, heads, activation, **options)
    assert_close_to_exact(ours, theirs, exact)
    return ours


@given(
    lengths=st.lists(st.integers(0, 20), max_size=6),
    heads=st.integers(1, 4),
    head_width=st.sampled_from([1, 3, 8, 16, 20]),
    intermediate=st.integers(1, 70),
    layers=st.integers(1, 3),
    activation=st.sampled_from(ACTIVATIONS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    seed=st.integers(0, 2**16),
)
def test_equals_reference(lengths, heads, head_width, intermediate, layers, activation, dtype, seed):
    hidden, keep, dispatch, weights = draw_inputs(
        lengths, heads * head_width, intermediate, layers, seed, dtype=dtype
    )
    ours = check_against_reference(hidden, dispatch, weights, heads, activation)
    bypassed = ~keep.any(1).repeat_interleave(torch.tensor(lengths, dtype=torch.long))
    assert torch.equal(ours[bypassed], hidden[bypassed])


def test_gradients():
    hidden, _, dispatch, weights = draw_inputs([2, 0, 1, 3], 4, 3, 2, 0, dtype=torch.float64)
    inputs = [hidden, *weights[0], *weights[1], torch.rand(2, len(hidden), dtype=torch.float64)]

    def run(hidden, *tensors):
        layers = [EncoderLayerWeights(*tensors[:12]), EncoderLayerWeights(*tensors[12:24])]
        return conditional_encoder(hidden, dispatch, layers, 2, gates=tensors[24])

    assert torch.autograd.gradcheck(run, [x.requires_grad_() for x in inputs], fast_mode=True)


def test_bypassed_rows_pass_the_gradient_through():
    hidden, _, _, weights = draw_inputs([3, 4], 8, 16, 1, 0)
    dispatch = build_dispatch(torch.tensor([False, True]), torch.tensor([0, 3, 7]).int(), 7)
    hidden.requires_grad_()
    conditional_encoder_layer(hidden, dispatch, weights[0], 2).sum().backward()
    assert torch.equal(hidden.grad[:3], torch.ones(3, 8)) and not torch.equal(
        hidden.grad[3:], torch.ones(4, 8)
    )


def test_training_and_inference_agree():
    hidden, _, dispatch, weights = draw_inputs([5, 1, 9], 32, 64, 3, 4)
    packed = [pack_encoder_weights(w) for w in weights]
    inference = conditional_encoder(hidden, dispatch, None, 4, packed_weights=packed)
    training = conditional_encoder(hidden.requires_grad_(), dispatch, weights, 4)
    torch.testing.assert_close(inference, training.detach(), rtol=1e-5, atol=1e-5)


def test_dropout_touches_active_rows_only():
    torch.manual_seed(0)
    hidden, keep, dispatch, weights = draw_inputs([5, 6], 8, 16, 1, 1, share=0)
    keep[1] = True
    dispatch = build_dispatch(keep, torch.tensor([0, 5, 11]).int(), 11)
    dropped = conditional_encoder(hidden, dispatch, weights, 2, dropout=0.5, attention_dropout=0.5)
    plain = conditional_encoder(hidden, dispatch, weights, 2)
    assert torch.equal(dropped[:5], hidden[:5]) and not torch.allclose(dropped[5:], plain[5:])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"hidden": torch.zeros(3)}, r"hidden to have shape \(T, H\), got \[3\]"),
        ({"num_heads": 3}, "num_heads to divide the width 8, got 3"),
        ({"activation": "mish"}, "activation to be one of gelu, .*, got mish"),
    ],
)
def test_errors(change, text):
    hidden, _, dispatch, weights = draw_inputs([2, 1], 8, 4, 1, 0)
    arguments = {"hidden": hidden, "num_heads": 2, "activation": "gelu"} | change
    with pytest.raises(ValueError, match="conditional_encoder: expected " + text):
        conditional_encoder(dispatch=dispatch, weights=weights, **arguments)
