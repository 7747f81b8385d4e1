"""Changes to what surrounds the layers' insides: which layers there are, embeddings, pooler and head."""

import copy

import torch
from integrations.change import change, encoder_of, layers, other, part, small
from torch import nn


@change("encoder-cut-to-one-layer")
def _(model):
    encoder_of(model).encoder.layer = layers(model)[:1]


@change("encoder-cut-by-a-new-list")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList([layers(model)[1]])


@change("encoder-without-layers")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList()


@change("layer-deleted")
def _(model):
    del layers(model)[1]


@change("layers-reversed")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList(reversed(layers(model)))


@change("layers-exchanged")
def _(model):
    stack = layers(model)
    stack[0], stack[1] = stack[1], stack[0]


@change("layer-repeated")
def _(model):
    encoder_of(model).encoder.layer = nn.ModuleList([layers(model)[i] for i in (0, 1, 1, 0)])


@change("layer-appended")
def _(model):
    layers(model).append(layers(other(model))[0])


@change("layer-inserted")
def _(model):
    layers(model).insert(1, layers(other(model))[0])


@change("layer-replaced")
def _(model):
    layers(model)[1] = layers(other(model))[1]


@change("layer-that-gives-back-its-input", may_refuse=True)
def _(model):
    class Skip(nn.Module):
        def forward(self, hidden_states, *args, **kwargs):
            return hidden_states

    layers(model)[1] = Skip()


@change("layer-of-another-model-type")
def _(model):
    layers(model)[1] = layers(small("roberta", seed=1))[1]


@change("encoder-replaced")
def _(model):
    encoder_of(model).encoder = encoder_of(other(model)).encoder


@change("embeddings-replaced")
def _(model):
    encoder_of(model).embeddings = encoder_of(other(model)).embeddings


@change("bare-encoder-replaced")
def _(model):
    setattr(model, model.base_model_prefix, encoder_of(other(model)))


@change("head-replaced")
def _(model):
    model.classifier = nn.Linear(32, 3)


@change("head-of-two-layers")
def _(model):
    model.classifier = nn.Sequential(nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 3))


@change("pooler-replaced", task="ForSequenceClassification")
def _(model):
    encoder_of(model).pooler = copy.deepcopy(encoder_of(other(model)).pooler)


@change("pooler-removed", task="Model", visible=False)
def _(model):
    encoder_of(model).pooler = None


@change("pooler-that-means", task="ForSequenceClassification", may_refuse=True)
def _(model):
    """Reads padding positions, whose states a swapped model does not compute."""

    class Mean(nn.Module):
        def forward(self, hidden_states):
            return hidden_states.mean(1)

    encoder_of(model).pooler = Mean()


@change("position-ids-replaced")
def _(model):
    encoder_of(model).embeddings.position_ids = torch.arange(40).flip(0).unsqueeze(0)


@change("position-ids-written")
def _(model):
    encoder_of(model).embeddings.position_ids.copy_(torch.arange(40).flip(0))


@change("token-type-ids-replaced")
def _(model):
    encoder_of(model).embeddings.token_type_ids = torch.ones(1, 40, dtype=torch.long)


@change("token-type-ids-written")
def _(model):
    encoder_of(model).embeddings.token_type_ids.fill_(1)


@change("token-type-ids-deleted", visible=False)
def _(model):
    del encoder_of(model).embeddings.token_type_ids


@change("token-type-ids-replaced-in-roberta", kind="roberta")
def _(model):
    encoder_of(model).embeddings.token_type_ids = torch.ones(1, 40, dtype=torch.long)


@change("padding-index-of-roberta", kind="roberta")
def _(model):
    encoder_of(model).embeddings.padding_idx = 5


@change("max-norm-of-word-embeddings", may_refuse=True)
def _(model):
    part(model, "embeddings.word_embeddings").max_norm = 0.5
