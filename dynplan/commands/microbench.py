"""Timings that need no checkout: ops beside their references, a small encoder beside Hugging Face's."""

from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table

import dynplan
from dynplan.benchmarking import environment, interleave
from dynplan.policies import KeepAll, RandomPath
from dynplan.reference import pack as reference


@torch.inference_mode()
def run_microbench(rounds: int) -> None:
    """Check, then time in turn, and print p20/p50/p80 in ms and the ratio to the first of each group."""
    where = environment()
    table = Table(title=f"{where['device']}, {where['threads']} threads, float32, torch {where['torch']}")
    for name in ("what", "contestant", "p20 ms", "p50 ms", "p80 ms", "ratio"):
        table.add_column(name, justify="left" if name in ("what", "contestant") else "right")
    for what, contestants in (_ops() | _encoder()).items():
        timings = interleave(contestants, rounds=rounds)
        base = next(iter(timings.values())).p50
        for name, timing in timings.items():
            table.add_row(what, name, *(f"{1e3 * cut:.3f}" for cut in timing[:3]), f"{timing.p50 / base:.2f}")
    Console().print(table)


def _ops() -> dict[str, dict[str, Callable[[], object]]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(32, 128, 384, generator=generator)
    lengths = torch.randint(8, 129, (32, 1), generator=generator)
    mask = torch.arange(128) < lengths
    packed, indices, _ = dynplan.ops.pack(hidden, mask)
    torch.testing.assert_close(packed, reference.pack(hidden, mask)[0])
    return {
        "pack (32, 128, 384)": {
            "reference": lambda: reference.pack(hidden, mask),
            "dynplan": lambda: dynplan.ops.pack(hidden, mask),
        },
        "unpack (32, 128, 384)": {
            "reference": lambda: reference.unpack(packed, indices, 32, 128),
            "dynplan": lambda: dynplan.ops.unpack(packed, indices, 32, 128),
        },
    }


def _encoder() -> dict[str, dict[str, Callable[[], object]]]:
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536)
    plain = BertModel(config, add_pooling_layer=False).eval()
    ours = BertModel(config, add_pooling_layer=False).eval()
    ours.load_state_dict(plain.state_dict())
    dynplan.swap(ours)
    lengths = torch.randint(8, 65, (16, 1))
    mask = (torch.arange(64) < lengths).long()
    ids = torch.randint(1000, (16, 64))
    with torch.inference_mode():
        want = plain(ids, mask).last_hidden_state
        torch.testing.assert_close(ours(ids, mask).last_hidden_state[mask.bool()], want[mask.bool()])

    def planned(policy) -> Callable[[], object]:
        def run():
            ours.dynplan.policy = policy
            return ours(ids, mask)

        return run

    return {
        "6-layer encoder, 16 sentences of 8..64 tokens": {
            "Hugging Face sdpa": lambda: plain(ids, mask),
            "dynplan keep-all": planned(KeepAll()),
            "dynplan random path, half the layers": planned(RandomPath(0.5)),
        }
    }
