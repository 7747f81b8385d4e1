"""House rules that hold for every op and every file, checked by looking."""

import ast
import inspect
import re
from pathlib import Path

import pytest
import torch

import dynplan

ROOT = Path(__file__).parents[1]
# They give no tensor.
QUERIES = (
    "dynplan::_build_info",
    "dynplan::_encoder_phases",
    "dynplan::_int8_weight_levels",
    "dynplan::_multiplies_bfloat16",
    "dynplan::_stream_read",
)
OPS = sorted(
    name
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("dynplan::") and name not in QUERIES
)
# Public function: its op, what the op takes beside the function's arguments, and what it never sees.
CONTRACTS = {
    "pack": ("pack", (), ()),
    "unpack": ("unpack", (), ()),
    "region_cross_entropy": ("region_cross_entropy", ("align_corners", "agreement"), ("process_group",)),
    "region_cross_entropy_upsampled": ("region_cross_entropy", ("agreement",), ("process_group",)),
}
# Lower layers never import higher ones; a package may import itself and anything to its right.
LAYERS = ["cli", "commands", "training", "integrations", "policies", "nn", "ops", "_library"]
SOURCES = {
    line.split()[1]: line.split()[0]
    for line in (ROOT / "csrc/sources.txt").read_text().splitlines()
    if line and not line.startswith("#")
}


@pytest.mark.parametrize("op", OPS)
def test_op_is_complete(op):
    overload = getattr(torch.ops.dynplan, op.removeprefix("dynplan::")).default
    keys = ("CPU", "CompositeExplicitAutograd")  # the latter is where Python's own are
    assert any(torch._C._dispatch_has_kernel_for_dispatch_key(op, key) for key in keys), "no CPU kernel"
    assert torch._library.utils.has_fake_kernel(overload), "no fake"
    assert torch.Tag.pt2_compliant_tag in overload.tags
    assert "*" not in str(overload._schema), "schemas are positional"


def test_ops_were_found():
    assert {"dynplan::pack", "dynplan::unpack", "dynplan::build_dispatch"} <= set(OPS)


@pytest.mark.parametrize("path", sorted(ROOT.glob("csrc/kernels/**/*")), ids=lambda path: path.name)
def test_kernels_do_not_know_torch(path):
    if path.is_file():
        assert not re.search(r'#include *[<"](torch|ATen|c10)/', path.read_text())


def test_every_source_is_listed():
    files = {str(p.relative_to(ROOT / "csrc")) for p in ROOT.glob("csrc/**/*") if p.suffix in (".cpp", ".cu")}
    assert files == set(SOURCES)


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "dynplan" and len(parts) > 1:
                yield parts[1]


@pytest.mark.parametrize("path", sorted(ROOT.glob("dynplan/**/*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows_run_one_way(path):
    package = path.relative_to(ROOT / "dynplan").parts[0].removesuffix(".py")
    imported = set(imported_packages(path))
    if package == "reference":
        assert not imported - {"reference"}, "a reference imports torch alone"
    if package in LAYERS:
        higher = set(LAYERS[: LAYERS.index(package)])
        assert not imported & higher, f"{package} imports from {imported & higher}"


def documented(function):
    """Names of the arguments that a docstring lists under Args, in order."""
    block = inspect.getdoc(function).split("Args:\n")[1].split("\n\n")[0]
    return [
        name
        for line in block.splitlines()
        if (found := re.match(r"    (\w[\w, ]*):(?: |$)", line))
        for name in found[1].replace(" ", "").split(",")
    ]


@pytest.mark.parametrize("name", sorted(CONTRACTS))
def test_docstring_and_schema_agree(name):
    """The contract of an op stands once, in the docstring of its public function: it names every argument of
    the function, and the op takes no other than ``CONTRACTS`` says."""
    function = getattr(dynplan.ops, name)
    assert documented(function) == list(inspect.signature(function).parameters)
    op, beside, never_in_schema = CONTRACTS[name]
    schema = [argument.name for argument in getattr(torch.ops.dynplan, op).default._schema.arguments]
    assert sorted(schema) == sorted({*documented(function), *beside} - {*never_in_schema})
