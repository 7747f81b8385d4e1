"""encode_until_sure: its states are encode_tokens' along the plan that it decides; the answers decide it.

The policies in PyTorch are its reference too: python_tests/integrations/test_exits_native.py.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from ops.test_encode_tokens import HEADS, draw

from dynplan.nn.planner import pool
from dynplan.ops import Rungs, embed_tokens, encode_tokens, encode_until_sure, pack, pack_encoder_weights

OPTIONS = (HEADS, "gelu", 1e-6, False)
CLASSES = 3


def linear(inputs, outputs, generator):
    return torch.randn(outputs, inputs, generator=generator) * 0.5, torch.randn(outputs, generator=generator)


def arguments(batch_size=3, length=7, width=16, layers=4, chain=(1, 3, 4), seed=0, **changes):
    """Of encode_until_sure, ready to be spread."""
    batch, embeddings, _, weights = draw(batch_size, length, width, layers, seed)
    generator = torch.Generator().manual_seed(seed)
    rungs = sum(depth < layers for depth in chain)
    exits = [tensor for _ in range(rungs) for tensor in linear(width, width, generator)]
    head = [*linear(width, width, generator), *linear(width, CLASSES, generator)]
    given = {
        "rungs": Rungs(chain, exits, "confidence", (), [1.5] * rungs, [0.6] * 5, 1.0),
        "head": head,
        "head_activation": "tanh",
        **changes,
    }
    packed = [pack_encoder_weights(layer) for layer in weights]
    return [*batch, *embeddings, packed, *OPTIONS], given


@given(
    batch_size=st.integers(0, 5),
    length=st.integers(0, 9),
    width=st.sampled_from([4, 16, 34]),
    chain=st.sampled_from([(), (2,), (4,), (1, 4), (1, 3), (1, 2, 3, 4)]),
    seed=st.integers(0, 2**16),
    budget=st.sampled_from([1.0, 0.6]),
)
@torch.no_grad()
def test_states_and_decisions(batch_size, length, width, chain, seed, budget):
    positional, named = arguments(batch_size, length, width, 4, chain, seed)
    rungs = named["rungs"] = named["rungs"]._replace(budget=budget)
    hidden, keep = encode_until_sure(*positional, **named)
    ids, mask = positional[:2]
    embeddings, packed = positional[3:10], positional[10]
    own = encode_tokens(*positional[:3], *embeddings, keep, packed, *OPTIONS)
    lengths = mask.bool().sum(1)
    assert not keep[lengths == 0].any()
    if len(chain) > 1 and budget < 1:
        assert keep.sum() <= max(budget * 4 * (lengths > 0).sum(), chain[0] * (lengths > 0).sum())
    sums = keep.sum(1)
    assert set(sums.tolist()) <= {0, *chain}
    _, _, offsets = embed_tokens(*positional[:3], *embeddings)
    for rung, depth in enumerate(depth for depth in chain if depth < 4):
        so_far = torch.arange(4) < depth
        states = encode_tokens(*positional[:3], *embeddings, keep & so_far, packed, *OPTIONS)
        pooled = pool(pack(states, mask).hidden, offsets, "mean")
        read = F.linear(pooled, *rungs.exits[2 * rung : 2 * rung + 2])
        left = sums == depth
        if length == 0:
            continue
        torch.testing.assert_close(hidden[left, 0], read[left], rtol=1e-4, atol=1e-4)
        hidden[left, 0] = own[left, 0]
        if budget < 1 or rung + 2 >= len(chain):
            continue  # the contract decides, or nobody is asked
        inside = torch.tanh(F.linear(read.double(), *(t.double() for t in named["head"][:2])))
        answers = F.linear(inside, *(t.double() for t in named["head"][2:]))
        sure = (answers / 1.5).softmax(1).amax(1)
        clear = (sure - 0.6).abs() > 1e-3
        asked = clear & (sums >= depth)
        assert torch.equal(sums[asked] == depth, sure[asked] >= 0.6)
    assert torch.equal(hidden, own), "the states beside those that exits read"


@torch.no_grad()
def test_one_sample_has_the_same_bits_in_any_batch():
    positional, named = arguments(6, 9, 32, seed=3)
    hidden, keep = encode_until_sure(*positional, **named)
    assert len(set(keep.sum(1).tolist())) > 1
    for b in range(6):
        alone = [tensor[b : b + 1] for tensor in positional[:3]]
        states, plan = encode_until_sure(*alone, *positional[3:], **named)
        assert torch.equal(plan[0], keep[b]) and torch.equal(states[0], hidden[b])


REFUSED = {
    "chain falls": ({"chain": (3, 1)}, ValueError, r"expected chain to rise within 1..4, got \[3, 1\]"),
    "chain too deep": ({"chain": (1, 5)}, ValueError, "expected chain to rise within 1..4"),
    "chain from 0": ({"chain": (0, 4)}, ValueError, "expected chain to rise within 1..4"),
    "an exit less": ({"exits": []}, ValueError, "expected exits to be weight and bias of 2 exits, got 0"),
    "narrow exits": (
        {"exits": [torch.zeros(3, 3), torch.zeros(3)] * 2},
        ValueError,
        "expected exits to map 16",
    ),
    "double exits": (
        {"exits": [torch.zeros(16, 16).double(), torch.zeros(16)] * 2},
        TypeError,
        "expected exits to be dense float32 on the CPU, got Double",
    ),
    "strided exits": (
        {"exits": [torch.zeros(16, 32)[:, ::2], torch.zeros(16)] * 2},
        TypeError,
        "expected exits to be dense float32",
    ),
    "word": ({"sureness": "hope"}, ValueError, "expected sureness to be confidence, .*, got hope"),
    "no temperatures": ({"temperatures": []}, ValueError, "expected temperatures of 2 exits, got 0"),
    "measures": ({"sureness": "learned"}, ValueError, "expected measures to be 4 tensors for learned"),
    "measures too many": ({"measures": [torch.zeros(1)]}, ValueError, "expected measures to be 0 tensors"),
    "thresholds": ({"thresholds": []}, ValueError, "expected a threshold at least, got none"),
    "budget": ({"budget": 1.5}, ValueError, "expected budget to be within 0..1, got 1.5"),
    "burst": ({"burst": -1.0}, ValueError, "expected burst and sway to be within 0..2.31, got -1"),
    "endless burst": ({"burst": float("inf")}, ValueError, "expected burst and sway to be within"),
    "temperature": ({"temperatures": [1.0, -1.0]}, ValueError, "expected temperatures to be above 0, got -1"),
    "counts": ({"stream": torch.zeros(4).long()}, ValueError, r"expected counts to be int64 of shape \[5\]"),
    "float counts": ({"stream": torch.zeros(5)}, ValueError, "expected counts to be int64"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    change, error, text = REFUSED[case]
    positional, named = arguments()
    named["rungs"] = named["rungs"]._replace(**change)
    with pytest.raises(error, match=text):
        encode_until_sure(*positional, **named)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"head": []}, "expected head to be weight and bias of one linear map or two, got 0 tensors"),
        ({"head": [torch.zeros(3, 5), torch.zeros(3)]}, "expected head to map 16 numbers, got weight"),
        ({"head_activation": "sine"}, "expected head_activation to be none, tanh, gelu or relu, got sine"),
    ],
)
def test_refused_heads(change, text):
    positional, named = arguments(**change)
    with pytest.raises(ValueError, match=text):
        encode_until_sure(*positional, **named)


COUNTS, OFFSETS = torch.zeros(5, dtype=torch.int64), torch.tensor([0, 2, 5], dtype=torch.int32)
ASKED = torch.zeros(2), torch.ones(2, dtype=torch.bool)


@pytest.mark.parametrize(
    ("op", "given", "text"),
    [
        ("arrive", (COUNTS[:4], OFFSETS), "expected counts to be int64"),
        ("arrive", (COUNTS, OFFSETS.long()), "expected cu_seqlens to be int32, got Long"),
        ("arrive", (COUNTS, OFFSETS[:0]), "expected cu_seqlens to have shape"),
        (
            "take",
            (COUNTS, torch.zeros(3), ASKED[1], OFFSETS, 1, 4, 0.5, 1.0),
            "expected priority to be float32",
        ),
        (
            "take",
            (COUNTS, ASKED[0], ASKED[0], OFFSETS, 1, 4, 0.5, 1.0),
            "expected wanted to be bool of shape",
        ),
        ("take", (COUNTS, *ASKED, OFFSETS, -5, 4, 0.5, 1.0), "expected steps within 0..layers"),
        ("take", (COUNTS, *ASKED, OFFSETS, 2**62, 2**62, 0.5, 1.0), "expected steps within 0..layers"),
        ("take", (COUNTS, *ASKED, OFFSETS, 1, 4, 0.5, float("inf")), "expected share within 0..1 and burst"),
        ("add", (COUNTS, [1, 2]), "expected 5 values, got 2"),
        ("write", (COUNTS, [1] * 6), "expected 5 values, got 6"),
        ("read", (COUNTS.float(),), "expected counts to be int64"),
    ],
)
def test_counts_are_checked(op, given, text):
    with pytest.raises((ValueError, TypeError), match=f"_stream_{op}: {text}"):
        getattr(torch.ops.dynplan, f"_stream_{op}")(*given)
