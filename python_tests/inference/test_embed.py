"""`dynplan embed` beside sentence-transformers, over folders that it saved."""

import json

import numpy as np
import pytest
from inference.conftest import make_records, write_lines
from pyarrow import parquet
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer import modules as models
from training.conftest import save_tiny_model

from dynplan.errors import InputError
from dynplan.inference import InputColumns, ModelSettings, RunSettings, run

RECORDS = [*make_records(30), {"id": "long", "sentence1": "w1 w2 w3 " * 20}]


def saved(folder, pooling, normalize):
    """A sentence-transformers model that cuts rows to 12 tokens."""
    transformer = models.Transformer(str(save_tiny_model(folder / "encoder")), max_seq_length=12)
    modules = [transformer, models.Pooling(16, pooling_mode=pooling)]
    SentenceTransformer(modules=modules + [models.Normalize()] * normalize).save(str(folder / "saved"))
    return folder / "saved"


def embed(model, folder, **settings):
    source, output = write_lines(folder / "in.jsonl", RECORDS), folder / "out.parquet"
    output.unlink(missing_ok=True)
    job = RunSettings(
        ModelSettings(model, "embed", **settings), (source,), output, InputColumns(key="id"), workers=0
    )
    run(job, progress=False)
    table = parquet.read_table(output)
    assert table["id"].to_pylist() == [row["id"] for row in RECORDS]
    return np.array(table["embedding"].to_pylist(), np.float32)


@pytest.mark.parametrize(("pooling", "normalize"), [("mean", True), ("cls", False), ("max", True)])
def test_as_sentence_transformers_saved_it(tmp_path, pooling, normalize):
    folder = saved(tmp_path, pooling, normalize)
    want = SentenceTransformer(str(folder), device="cpu").encode([row["sentence1"] for row in RECORDS])
    np.testing.assert_allclose(embed(folder, tmp_path), want, rtol=1e-4, atol=1e-5)


def test_options_come_before_what_is_saved(tmp_path):
    folder = saved(tmp_path, "mean", True)
    vectors = embed(folder, tmp_path, pooling="max", normalize=False)
    texts = [row["sentence1"] for row in RECORDS]
    model = SentenceTransformer(
        modules=[models.Transformer(str(folder), max_seq_length=12), models.Pooling(16, "max")]
    )
    np.testing.assert_allclose(vectors, model.encode(texts), rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match="--pooling: expected one of mean, cls, max, got 'sum'"):
        embed(folder, tmp_path, pooling="sum")


def test_what_a_folder_asks_for_beyond_that_is_refused(tmp_path):
    folder = saved(tmp_path, "weightedmean", False)
    with pytest.raises(InputError, match="--pooling: expected one of mean, cls, max, got 'weightedmean'"):
        embed(folder, tmp_path)
    config = json.loads((folder / "config_sentence_transformers.json").read_text())
    config |= {"prompts": {"query": "query: "}, "default_prompt_name": "query"}
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="model: expected no default prompt"):
        embed(folder, tmp_path)
    modules = json.loads((folder / "modules.json").read_text())
    modules[1]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(
        InputError, match="expected modules Transformer, Pooling, Normalize .* got Transformer, Dense"
    ):
        embed(folder, tmp_path)
