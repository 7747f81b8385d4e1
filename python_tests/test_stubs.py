"""``dynplan/_native.pyi`` says what the compiled module takes and returns, function by function."""

import ast
import re
from pathlib import Path

import numpy as np
import pytest

import dynplan
from dynplan import _native

PACKAGE = Path(dynplan.__file__).parent
STUBS = {
    node.name: node
    for node in ast.parse((PACKAGE / "_native.pyi").read_text(encoding="utf-8")).body
    if isinstance(node, ast.FunctionDef)
}
# pybind11 writes wider types than a caller needs to know.
_WORDS = {
    "numpy.typing.": "",
    "collections.abc.": "",
    "numpy.bool]": "np.bool_]",
    "numpy.": "np.",
    "typing.SupportsInt | typing.SupportsIndex": "int",
    "typing.SupportsFloat | typing.SupportsIndex": "float",
}


def of_module(name: str) -> ast.FunctionDef:
    """The signature that pybind11 makes of the C++ types, in the first line of the docstring."""
    line = getattr(_native, name).__doc__.splitlines()[0]
    for theirs, ours in _WORDS.items():
        line = line.replace(theirs, ours)
    while "typing.Annotated[" in line:
        line = re.sub(r"typing\.Annotated\[((?:[^\[\],]|\[[^\[\]]*\])+), [^\[\]]*\]", r"\1", line)
    return ast.parse(f"def {line}: ...").body[0]


def described(function: ast.FunctionDef) -> list[tuple]:
    arguments = function.args.args
    defaults = [None] * (len(arguments) - len(function.args.defaults)) + function.args.defaults
    return [
        (argument.arg, ast.unparse(argument.annotation), _value(default))
        for argument, default in zip(arguments, defaults, strict=True)
    ]


def _value(default: ast.expr | None):
    value = default and ast.literal_eval(default)
    return float(np.float32(value)) if isinstance(value, float) else value


def test_every_function_has_a_stub():
    assert set(STUBS) == {name for name in dir(_native) if not name.startswith("_")}


@pytest.mark.parametrize("name", STUBS)
def test_stub_and_module_agree(name):
    stub, module = STUBS[name], of_module(name)
    assert described(stub) == described(module)
    returned, wider = ast.unparse(stub.returns), ast.unparse(module.returns)
    assert returned == wider or returned.startswith(f"{wider}[") and wider in ("tuple", "dict")


def test_tuples_hold_what_the_stub_says():
    mask = np.array([[True, True]])
    packed = _native.pack(np.zeros((1, 2, 3), np.float32), mask)
    dispatch = _native.build_dispatch(np.array([[True]]), packed[2])
    loss = _native.region_cross_entropy(np.zeros((1, 2, 1, 1), np.float32), np.zeros((1, 1, 1), np.int64))
    for name, made in (("pack", packed), ("build_dispatch", dispatch), ("region_cross_entropy", loss)):
        kinds = [
            f"NDArray[np.{value.dtype}]" if isinstance(value, np.ndarray) else type(value).__name__
            for value in made
        ]
        assert ast.unparse(STUBS[name].returns) == f"tuple[{', '.join(kinds)}]"


def test_the_package_says_that_it_is_typed():
    assert (PACKAGE / "py.typed").is_file()
