"""Folders from anywhere: whatever config.json and model.safetensors hold, loading them is one clear error."""

import json
import random
import struct

import pytest
from inference.conftest import plain  # noqa: F401
from safetensors.torch import load_file, save_file

from dynplan.errors import InputError
from dynplan.inference import ModelSettings
from dynplan.loading import quiet

NUMBERS = (-1, 0, 1.5, 10**12, 2**62, 10**30, "16", None, [16], {}, True, float("nan"))
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size")


@pytest.fixture
def folder(plain, tmp_path):  # noqa: F811
    quiet()
    for path in plain.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def refused(folder) -> bool:
    """Whether loading ends with the one error there is for it."""
    try:
        ModelSettings(folder).load()
    except InputError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return True
    return False


def test_weights_cut_short(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for length in (0, 7, 8, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert refused(folder)


def test_weights_whose_header_lies(folder):
    path, draw = folder / "model.safetensors", random.Random(0)
    whole = path.read_bytes()
    for size in (0, 1, 2**31, 2**63, 2**64 - 1, len(whole) - 8):
        path.write_bytes(struct.pack("<Q", size) + whole[8:])
        assert refused(folder)
    (length,) = struct.unpack("<Q", whole[:8])
    header = json.loads(whole[8 : 8 + length])
    for _ in range(20):
        changed = json.loads(json.dumps(header))
        entry = changed[draw.choice([name for name in changed if name != "__metadata__"])]
        entry[draw.choice(["shape", "data_offsets"])] = draw.choice(
            [[2**62], [2**40, 2**40], [0, 2**63], [-1], 3]
        )
        text = json.dumps(changed).encode()
        path.write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + length :])
        assert refused(folder)


def test_tensors_of_other_shapes_and_types(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if name.endswith("intermediate.dense.weight"))
    for change in (tensors[name][:1], tensors[name].flatten(), tensors[name].unsqueeze(0)):
        save_file({**tensors, name: change.contiguous()}, path, {"format": "pt"})
        assert refused(folder)
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    assert refused(folder)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_in_the_config(folder, size):
    """What is no size is refused, and one that no machine can hold before memory or time is spent on it."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for number in NUMBERS:
        if number is True and config[size] == 1:
            continue
        path.write_text(json.dumps({**config, size: number}))
        assert refused(folder), f"{size}: {number!r}"


def test_a_config_that_is_none(folder):
    path = folder / "config.json"
    text = path.read_text()
    for change in ("", "[]", "null", text[:-20], "[" * 100_000, '{"model_type": "bert"', '{"model_type": 3}'):
        path.write_text(change)
        assert refused(folder)
