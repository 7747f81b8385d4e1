"""dynplan.profiling: the parts sum to the forward, the model is left as it was, the picture is a picture."""

import pytest
import torch
from transformers import BertConfig, BertModel

import dynplan
from dynplan import profiling
from dynplan.policies import RandomPath


@pytest.fixture
def model():
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64
    )
    return dynplan.swap(BertModel(config, add_pooling_layer=False).eval(), RandomPath(2 / 3))


def inputs():
    mask = (torch.arange(12) < torch.tensor([[12], [5], [9]])).long()
    return {"input_ids": torch.randint(1, 200, (3, 12)), "attention_mask": mask}


def test_parts_sum_to_the_forward(model):
    policy = model.dynplan.policy
    own = profiling.profile_forward(model, inputs(), rounds=3)
    assert sum(part.seconds for part in own.parts) == pytest.approx(own.seconds, rel=1e-6)
    assert sum(own.group(group) for group in profiling.GROUPS) == pytest.approx(own.seconds, rel=1e-6)
    products = own.group("products") + sum(
        p.seconds for p in own.parts if p.name.startswith("attention's product")
    )
    assert own.outside == pytest.approx(own.seconds - products) and own.outside > 0
    # Everything a forward of this kind does was seen, under its own name.
    for group in profiling.GROUPS:
        assert own.group(group) > 0, group
    assert next(part for part in own.parts if part.name == "policy, in Python").seconds > 0
    assert model.dynplan.policy is policy and not model.embeddings._forward_hooks
    assert torch.ops.dynplan._encoder_phases(False) == [0.0] * len(profiling.PHASES), "still recording"


def test_refuses_what_it_cannot_see(model):
    with pytest.raises(
        ValueError, match="profile_forward: expected a model in evaluation mode on the CPU, got tr"
    ):
        profiling.profile_forward(model.train(), inputs())
    plain = dynplan.unswap(model)
    with pytest.raises(TypeError, match="profile_forward: expected model to be swapped"):
        profiling.profile_forward(plain, inputs())


def test_table_and_picture(model, tmp_path, capsys):
    dynplan.unswap(model).save_pretrained(tmp_path / "model")
    picture = tmp_path / "new" / "profile.png"
    profiles = profiling.bench_profile(tmp_path / "model", (1, 2), 8, share=0.5, picture=picture)
    assert list(profiles) == [1, 2]
    assert picture.read_bytes().startswith(b"\x89PNG")
    printed = capsys.readouterr().out
    assert "attention" in printed and "batch 2" in printed


def test_command(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from dynplan.cli import app

    seen = {}
    monkeypatch.setattr(
        profiling, "bench_profile", lambda model, **options: seen.update(options, model=model)
    )
    picture = tmp_path / "p.png"
    arguments = [
        "bench",
        "--profile",
        "--length",
        "64",
        "--share",
        "0.5",
        "--picture",
        str(picture),
        "--exits",
    ]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert seen == {"model": None, "length": 64, "share": 0.5, "picture": picture, "exits": True}
