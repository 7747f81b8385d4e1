"""Every public name is in the reference, and its docstring says what a caller must know.

The rule, read with the parser that the site uses:

- *Args* (*Attributes* of a record) names every parameter and nothing else;
- *Returns* is there where a function returns something, *Raises* wherever there are parameters to get wrong;
- a tensor's shape and dtype are said, or what it is like;
- a published method names its source;
- public methods of classes have a docstring of their own or of a base in dynplan.
"""

import builtins
import dataclasses
import importlib
import inspect
import re
import types
from pathlib import Path

import griffe
import pytest

from scripts.docs.roles import defined, to_markdown

DOCS = Path(__file__).parents[2] / "docs"
MODULES = (
    "dynplan",
    "dynplan.ops",
    "dynplan.nn",
    "dynplan.policies",
    "dynplan.training",
    "dynplan.inference",
)
SOURCES = {
    "dynplan.nn.Exits": "arXiv 1409.5185",
    "dynplan.nn.StepwisePlanner": "arXiv 2308.00108",
    "dynplan.nn.UpfrontPlanner": "arXiv 2308.00108",
    "dynplan.ops.conditional_encoder_layer": "Vaswani et al. 2017",
    "dynplan.ops.pack_reduced_encoder_weights": "Jacob et al. 2018",
    "dynplan.ops.region_cross_entropy": "arXiv 1802.08290",
    "dynplan.policies.ConfidenceExit": "arXiv 1706.04599",
    "dynplan.policies.EntropyExit": "arXiv 2004.12993",
    "dynplan.policies.HashPath": "arXiv 2203.01670",
    "dynplan.policies.LearnedExit": "EACL 2021",
    "dynplan.policies.PatienceExit": "arXiv 2006.04152",
    "dynplan.training.finetune": "arXiv 2308.00108",
}
# () or sizes by letter, `*spatial` and the like.
_SHAPE = re.compile(r"\(\)|\(\*?\w+[^()]*,[^()]*\)|any shape|0-d")
_DTYPE = re.compile(r"\b(bool|u?int(8|16|32|64)?|integer|float(16|32|64)?|bfloat16|floating|dtype)\b")
_LIKE = re.compile(r"\b[Aa]s (for|in|there|of|by)\b|<autoref|``pack_")


def public() -> dict[str, object]:
    return {
        f"{module}.{name}": value
        for module in MODULES
        for name in importlib.import_module(module).__all__
        if not inspect.ismodule(value := getattr(importlib.import_module(module), name))
    }


PUBLIC = public()
CLASSES = [name for name, value in PUBLIC.items() if inspect.isclass(value)]


def sections(value) -> dict[str, object]:
    """Section kind -> its parsed items, and ``text`` -> all of the docstring."""
    text = inspect.cleandoc(function_of(value).__doc__ or "")
    found = griffe.Docstring(to_markdown(text, "dynplan")).parse("google", warnings=False)
    return {"text": text} | {section.kind.value: section.value for section in found}


def function_of(value):
    """The Python function, behind a custom op too."""
    return getattr(value, "_init_fn", value)


def is_record(value) -> bool:
    plain = dataclasses.is_dataclass(value) and not hasattr(value, "__post_init__")
    return inspect.isclass(value) and (plain or hasattr(value, "_fields"))


def parameters(value) -> dict[str, inspect.Parameter]:
    if inspect.isclass(value) and issubclass(value, Exception):
        return {}
    found = inspect.signature(function_of(value)).parameters.values()
    return {
        "*" * (p.kind == p.VAR_POSITIONAL) + "**"[: 2 * (p.kind == p.VAR_KEYWORD)] + p.name: p for p in found
    }


def test_reference_pages_hold_every_public_name_once():
    for module in MODULES:
        page = DOCS / "reference" / f"{module.rsplit('.')[-1]}.md"
        shown = re.findall(r"^::: (\S+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
        assert shown == [defined(name) for name in PUBLIC if name.rpartition(".")[0] == module]


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_names_every_parameter(name):
    value, found = PUBLIC[name], sections(PUBLIC[name])
    assert found["text"], "no docstring"
    said = [item.name for kind in ("parameters", "attributes") for item in found.get(kind, ())]
    if "parameters" in found or is_record(value):
        missing = [p for p in parameters(value) if p not in said]
    else:
        own = inspect.isclass(value) and "__init__" not in vars(value) and not dataclasses.is_dataclass(value)
        missing = [] if own else list(parameters(value))
    assert not missing, f"not in Args: {missing}"
    strangers = [item.name for item in found.get("parameters", ()) if item.name not in parameters(value)]
    assert not strangers, f"in Args, not in the signature: {strangers}"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_says_what_is_returned_and_raised(name):
    value, found = PUBLIC[name], sections(PUBLIC[name])
    if not inspect.isclass(value):
        returned = inspect.signature(function_of(value)).return_annotation
        assert returned is not inspect.Signature.empty, "no annotation of what is returned"
        assert "returns" in found or returned in (None, "None"), "no Returns"
    own = not inspect.isclass(value) or "__init__" in vars(value) or hasattr(value, "__post_init__")
    if own and parameters(value) and not is_record(value):
        assert "raises" in found, "no Raises"
    for item in found.get("raises", ()):
        for error in re.split(r",\s*", str(item.annotation)):
            known = getattr(builtins, error, None) or PUBLIC.get(f"dynplan.training.{error}")
            assert isinstance(known, type) and issubclass(known, BaseException), f"no error: {error}"


@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_gives_shapes_and_dtypes(name):
    value, found = PUBLIC[name], sections(PUBLIC[name])
    items = {
        item.name: item.description for kind in ("parameters", "attributes") for item in found.get(kind, ())
    }
    for parameter, declared in parameters(value).items():
        if parameter not in items or not is_tensor(declared.annotation):
            continue
        text = items[parameter]
        assert _LIKE.search(text) or (_SHAPE.search(text) and _DTYPE.search(text)), f"{parameter}: {text}"
    if not inspect.isclass(value) and is_tensor(inspect.signature(function_of(value)).return_annotation):
        text = " ".join(item.description for item in found["returns"])
        assert _LIKE.search(text) or (_SHAPE.search(text) and _DTYPE.search(text)), f"Returns: {text}"


def is_tensor(annotation) -> bool:
    text = annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
    if isinstance(annotation, types.UnionType | types.GenericAlias):
        text = str(annotation)
    return bool(re.search(r"\bTensor\b", text)) and "Callable" not in text


@pytest.mark.parametrize("name", SOURCES)
def test_published_methods_name_their_source(name):
    assert SOURCES[name] in sections(PUBLIC[name])["text"]


@pytest.mark.parametrize("name", CLASSES)
def test_public_methods_have_a_docstring(name):
    for method, value in vars(PUBLIC[name]).items():
        if method.startswith("_") or not isinstance(
            value, types.FunctionType | property | classmethod | staticmethod
        ):
            continue
        texts = [
            getattr(base.__dict__.get(method), "__doc__", None)
            for base in PUBLIC[name].__mro__
            if base.__module__.startswith("dynplan")
        ]
        assert any(texts), f"{name}.{method} has no docstring"
