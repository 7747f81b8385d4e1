"""``swap`` and ``unswap``: Hugging Face encoders under a dynplan policy, and back.

The forward of one *instance* of the bare encoder is replaced; its class, modules, parameters and
``state_dict`` stay as they are. :data:`SITES` is the whole list of what is supported.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from dynplan.integrations.checkpoint import SwappedSave
from dynplan.integrations.controller import Controller
from dynplan.integrations.encoder import FUSED_DTYPES, PlannedEncoder
from dynplan.integrations.forward import SwappedForward
from dynplan.ops.conditional_encoder_layer import ACTIVATIONS
from dynplan.ops.reduced_encoder import REDUCED_DTYPES
from dynplan.policies import KeepAll, Policy


@dataclass(frozen=True)
class Site:
    """Where the encoder of a model type is.

    Attributes:
        bare: class name of the bare encoder.
        attribute: its name inside a model with a head.
        heads: class names of the models with a head, and whether the head itself reads the first position.
    """

    bare: str
    attribute: str
    heads: dict[str, bool]


SITES = {
    "bert": Site(
        "BertModel", "bert", {"BertForSequenceClassification": False, "BertForTokenClassification": False}
    ),
    "roberta": Site(
        "RobertaModel",
        "roberta",
        {"RobertaForSequenceClassification": True, "RobertaForTokenClassification": False},
    ),
    "xlm-roberta": Site(
        "XLMRobertaModel",
        "roberta",
        {"XLMRobertaForSequenceClassification": True, "XLMRobertaForTokenClassification": False},
    ),
    "electra": Site(
        "ElectraModel",
        "electra",
        {"ElectraForSequenceClassification": True, "ElectraForTokenClassification": False},
    ),
}


def swap(model: nn.Module, policy: Policy | None = None, *, weights: str | None = None) -> nn.Module:
    """Put a Hugging Face encoder under a policy, in place.

    Args:
        model: BERT, RoBERTa, XLM-RoBERTa or ELECTRA; the bare model, sequence or token classification. For
            another model with such an encoder inside, swap the bare encoder.
        policy: decides the plans; :class:`~dynplan.policies.KeepAll` by default.
        weights: "int8" or "bfloat16": the encoder's products run on copies of its weights in that type, see
            :func:`~dynplan.ops.pack_reduced_encoder_weights`. CPU and inference only: other forwards are
            refused. The model's own weights stay, for ``state_dict`` and :func:`unswap`.

    Returns:
        ``model``; ``model.dynplan`` is its :class:`~dynplan.integrations.controller.Controller`.

    Raises:
        TypeError: an unknown model type or class.
        NotImplementedError: an architecture that is not supported, with the reason.
        ValueError: the model is swapped already; ``weights`` is unknown or not for the model's device or
            dtype.
    """
    site = _site_of(model)
    encoder, reads_first = _find_encoder(model, site)
    if isinstance(vars(encoder).get("forward"), SwappedForward):
        raise ValueError(
            "swap: expected a model that is not swapped, got one that is; "
            "set model.dynplan.policy, or call dynplan.unswap(model) first"
        )
    if "forward" in vars(encoder):
        raise ValueError(
            f"swap: expected {type(encoder).__name__} with its class's forward, got one already patched"
        )
    _check_architecture(encoder)
    if weights is not None:
        _check_weights(encoder, weights)
    config = encoder.config
    layers = PlannedEncoder(
        encoder.encoder.layer, config.num_attention_heads, config.hidden_act, config.layer_norm_eps, weights
    )
    controller = Controller(layers, KeepAll() if policy is None else policy)
    reads_first = reads_first or getattr(encoder, "pooler", None) is not None
    encoder.forward = SwappedForward(encoder, controller, reads_first)
    model.dynplan = controller
    model.save_pretrained = SwappedSave(model, controller)
    return model


def unswap(model: nn.Module) -> nn.Module:
    """Give back the original model, in place: what :func:`swap` set is removed, nothing else was changed.

    Raises:
        TypeError: an unknown model type or class.
        ValueError: the model is not swapped, or another library has wrapped its forward since.
    """
    encoder, _ = _find_encoder(model, _site_of(model))
    if "dynplan" not in vars(model):
        inside = " though its encoder is" if isinstance(vars(encoder).get("forward"), SwappedForward) else ""
        raise ValueError(f"unswap: expected the model that was swapped, got one that was not{inside}")
    if not isinstance(vars(encoder).get("forward"), SwappedForward):
        raise ValueError(
            f"unswap: expected the forward of {type(encoder).__name__} as swap left it, got one that another "
            "library has wrapped; undo that first"
        )
    del encoder.forward, model.dynplan, model.save_pretrained
    return model


def _site_of(model: nn.Module) -> Site:
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in SITES:
        raise TypeError(
            f"swap: expected a model of type {', '.join(SITES)}, got {type(model).__name__} of type {kind}"
        )
    return SITES[kind]


def _find_encoder(model: nn.Module, site: Site) -> tuple[nn.Module, bool]:
    """The bare encoder, and whether the head round it reads the first position."""
    names = [cls.__name__ for cls in type(model).__mro__]
    if site.bare in names:
        return model, False
    for name in names:
        if name in site.heads:
            return getattr(model, site.attribute), site.heads[name]
    raise TypeError(
        f"swap: expected one of {', '.join((site.bare, *site.heads))}, got {type(model).__name__}; "
        f"swap its bare encoder (model.{site.attribute}) if its head ignores padding positions"
    )


def _check_weights(encoder: nn.Module, weights: str) -> None:
    if weights not in REDUCED_DTYPES:
        raise ValueError(f"swap: expected weights to be None, bfloat16 or int8, got {weights!r}")
    parameter = next(encoder.parameters())
    if parameter.device.type != "cpu":
        raise ValueError(
            f"swap: expected weights=None for a model on {parameter.device}, got {weights!r}; "
            "the kernels there run in the model's own dtype (model.bfloat16())"
        )
    if parameter.dtype not in FUSED_DTYPES["cpu"]:
        raise ValueError(
            f"swap: expected weights=None for a model in {parameter.dtype}, got {weights!r}; "
            "convert it first (model.float())"
        )


def _check_architecture(encoder: nn.Module) -> None:
    config = encoder.config
    refused = {
        "is_decoder": "a causal mask would make each token's work depend on its place",
        "add_cross_attention": "cross-attention is not planned",
        "is_causal": "a causal mask would make each token's work depend on its place",
    }
    for name, reason in refused.items():
        if getattr(config, name, None):
            raise NotImplementedError(f"swap: expected config.{name} to be False, got True; {reason}")
    if config.hidden_act not in ACTIVATIONS:
        raise NotImplementedError(
            f"swap: expected config.hidden_act in {', '.join(ACTIVATIONS)}, got {config.hidden_act!r}"
        )
    for layer in encoder.encoder.layer:
        position = getattr(layer.attention.self, "position_embedding_type", "absolute")
        if position != "absolute":
            raise NotImplementedError(f"swap: expected absolute position embeddings, got {position!r}")
