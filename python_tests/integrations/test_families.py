"""Every family: what its own forward gives, along any path, with gradients, saved, loaded and copied."""

import copy
import warnings
from pathlib import Path

import pytest
import torch
from helpers import ATOL, assert_close_to_exact
from integrations.families import (
    BY_NAME,
    PATHS,
    TINY,
    alone,
    build,
    has_forward,
    has_kernels,
    heads_of,
    table,
    with_layers,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

import dynplan
from dynplan.integrations.huggingface.families import READS
from dynplan.policies import FixedPath

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:dynplan. runs the model's own modules"),
]
HEADS = [(name, head) for name in BY_NAME for head in heads_of(name)]
PER_SAMPLE = [pytest.param(*pair, id=pair[1]) for pair in HEADS]


def real(value, inputs):
    mask = inputs.get("attention_mask")
    return value if mask is None or value.shape[:2] != mask.shape else value[mask.bool()]


class Products(TorchDispatchMode):
    """Counts the work of products, as ``FlopCounterMode`` does but without its hooks on all modules."""

    flops = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        output = function(*args, **(kwargs or {}))
        count = flop_registry.get(function._overloadpacket)
        self.flops += 0 if count is None else count(*args, **(kwargs or {}), out_val=output)
        return output


def last(model, inputs):
    return model(**inputs).last_hidden_state


def test_the_table_is_whole():
    assert list(BY_NAME) == list(TINY)
    docs = Path(__file__).parents[2] / "docs" / "families.md"
    assert table() in docs.read_text(encoding="utf-8"), "run python python_tests/integrations/families.py"


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_keep_all_equals_the_original(name):
    model, inputs = build(name), TINY[name].inputs()
    theirs = last(model, inputs)
    exact = last(copy.deepcopy(model).double(), as_double(inputs))
    ours = last(dynplan.swap(model), inputs)
    assert_close_to_exact(*(real(value, inputs) for value in (ours, theirs, exact)))
    assert model.dynplan.last_plan.all() and model.dynplan.last_plan.shape == (5, 4)
    if BY_NAME[name].parts is None:
        assert torch.equal(ours, theirs), "padding too"


def as_double(inputs):
    return {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}


def each_alone(name, model, inputs):
    """The last states of each sample by itself, through the layers of its path and no other."""
    outputs = [
        last(with_layers(name, model, path), alone(name, inputs, sample)) for sample, path in enumerate(PATHS)
    ]
    return torch.cat([output.flatten(0, 1) for output in outputs])


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_a_path_equals_each_sample_alone(name):
    model, inputs = build(name), TINY[name].inputs()
    theirs = each_alone(name, model, inputs)
    exact = each_alone(name, copy.deepcopy(model).double(), as_double(inputs))
    every = last(model, inputs)
    ours = last(dynplan.swap(model, FixedPath(PATHS)), inputs)
    assert_close_to_exact(real(ours, inputs).reshape(theirs.shape), theirs, exact)
    assert torch.equal(model.dynplan.last_plan, PATHS)
    assert not torch.allclose(real(ours, inputs), real(every, inputs), atol=1e-2)


@pytest.mark.parametrize("name", [name for name in BY_NAME if has_kernels(name)])
@torch.no_grad()
def test_kernels(name):
    model, inputs = build(name), TINY[name].inputs()
    exact = real(last(copy.deepcopy(model).double(), inputs), inputs)
    for weights in (None, "bfloat16", "int8"):
        ours = real(last(dynplan.swap(copy.deepcopy(model), weights=weights), inputs), inputs)
        assert (ours - exact).norm() < {None: 1e-4, "bfloat16": 0.05, "int8": 0.25}[weights] * exact.norm()
    model = model.bfloat16()
    exact, theirs = last(copy.deepcopy(model).double(), inputs), last(model, inputs)
    ours = last(dynplan.swap(model), inputs)
    assert model.dynplan.why_not_fused is None
    assert_close_to_exact(*(real(value, inputs) for value in (ours, theirs, exact)))


@pytest.mark.parametrize("name", [name for name in BY_NAME if not has_kernels(name)])
def test_own_modules(name):
    model = build(name)
    with pytest.raises(ValueError, match="expected weights=None for .* whose layers the kernels do not know"):
        dynplan.swap(model, weights="int8")
    with pytest.warns(UserWarning, match="are none that the kernels know"), torch.no_grad():
        last(dynplan.swap(model), TINY[name].inputs())
    assert "are none that the kernels know" in model.dynplan.why_not_fused


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("kind", ["holes", "left", "per-query", "argument"])
@pytest.mark.parametrize("name", ["MPNet", "Ernie"])
def test_what_cannot_be_packed(name, kind, grad):
    """Rows that are packed lose how far apart they were; a mask for each query is more than lengths."""
    model, inputs = build(name), TINY[name].inputs()
    mask = inputs["attention_mask"]
    if kind == "holes":
        mask[0, 2:4] = mask[3, 1] = 0
    elif kind == "left":
        inputs = {key: value.flip(1) for key, value in inputs.items()}
        mask = inputs["attention_mask"]
    elif kind == "per-query":
        inputs["attention_mask"] = torch.ones(5, 1, 9, 9).tril().bool()
    else:
        inputs["sliding_window"] = 3
    rows = mask.bool() if kind != "per-query" else torch.ones_like(mask).bool()
    with torch.set_grad_enabled(grad):
        theirs = last(model, inputs)
        ours = last(dynplan.swap(model), inputs)
        torch.testing.assert_close(ours[rows], theirs[rows], rtol=1e-3, atol=1e-3)
        if kind != "holes" or name == "MPNet":
            assert torch.equal(ours, theirs), "by the model's own modules, padding too"


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_compile(name):
    torch._dynamo.reset()
    model, inputs = dynplan.swap(build(name), FixedPath(PATHS)), TINY[name].inputs()
    ours = last(model, inputs)
    compiled = torch.compile(model, fullgraph=has_forward(name), backend="eager")
    assert torch.equal(last(compiled, inputs), ours)


def test_a_family_without_a_forward_of_ours_is_not_captured():
    with pytest.raises(NotImplementedError, match="expected a model with a forward of ours, got ViTModel"):
        dynplan.capture(dynplan.swap(build("ViT")), batch_size=2, max_length=4)


@torch.no_grad()
def test_shared_layers_are_counted_anew():
    model, inputs = dynplan.swap(build("Albert")), TINY["Albert"].inputs()
    last(model, inputs)
    model.config.num_hidden_layers = 2
    ours = last(model, inputs)
    assert model.dynplan.last_plan.shape == (5, 2)
    assert torch.equal(ours, last(dynplan.unswap(model), inputs))
    with pytest.raises(NotImplementedError, match="whose layers share theirs"):
        dynplan.export_onnx(model, "never.onnx")


@torch.no_grad()
def test_loops_that_cannot_be_planned_are_refused():
    model, inputs = dynplan.swap(build("Dinov2")), TINY["Dinov2"].inputs()
    model.encoder.forward = model.encoder.forward  # bound to the encoder, past the planned layers
    with pytest.raises(NotImplementedError, match="call each of its 4 layers once, got 0 calls"):
        last(model, inputs)
    del model.encoder.forward
    model.encoder.layer[1] = model.encoder.layer[0]  # one module, called twice
    theirs = last(dynplan.unswap(copy.deepcopy(model)), inputs)
    assert torch.equal(last(model, inputs), theirs)
    model = dynplan.swap(build("Wav2Vec2")).train()
    model.config.layerdrop = 1.0
    with pytest.raises(NotImplementedError, match="drops layers .layerdrop."):
        last(model, TINY["Wav2Vec2"].inputs())


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_export(name):
    model, inputs = dynplan.swap(build(name), FixedPath(PATHS)), TINY[name].inputs()
    if not has_forward(name):
        with pytest.raises(NotImplementedError, match="a program cannot hold the planned layers"):
            torch.export.export(model, (), inputs, strict=False)
        return
    ours = real(last(model, inputs), inputs)
    program = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(real(last(program, inputs), inputs), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_hidden_states(name):
    model, inputs = build(name), TINY[name].inputs()
    theirs = model(**inputs, output_hidden_states=True).hidden_states
    dynplan.swap(model)
    for _ in range(2):
        ours = model(**inputs, output_hidden_states=True).hidden_states
        assert len(ours) == len(theirs) == 5
        for mine, their in zip(ours, theirs, strict=True):
            torch.testing.assert_close(real(mine, inputs), real(their, inputs), rtol=1e-3, atol=1e-3)
    model.dynplan.policy = FixedPath(PATHS)
    states = model(**inputs, output_hidden_states=True).hidden_states
    for layer in range(3):  # a norm may follow the last
        mask = inputs.get("attention_mask", torch.ones(states[0].shape[:2])).bool()
        pairs = zip(states[layer], states[layer + 1], mask, strict=True)
        assert [torch.equal(a[m], b[m]) for a, b, m in pairs] == (~PATHS[:, layer]).tolist()


@pytest.mark.parametrize("name", BY_NAME)
def test_gradients(name):
    model, inputs = build(name).double(), as_double(TINY[name].inputs())
    weights = torch.randn(32, generator=torch.Generator().manual_seed(2)).double()
    expected = {}
    for sample, path in enumerate(PATHS):
        oracle = with_layers(name, model, path)
        (last(oracle, alone(name, inputs, sample)) * weights).sin().sum().backward()
        kept = [index for index, wanted in enumerate(path.tolist()) if wanted]
        stem = BY_NAME[name].layers + "."
        for key, parameter in oracle.named_parameters():
            if parameter.grad is None:
                continue
            if key.startswith(stem) and not BY_NAME[name].shared:
                index, _, rest = key.removeprefix(stem).partition(".")
                key = f"{stem}{kept[int(index)]}.{rest}"
            if not BY_NAME[name].shared:
                expected[key] = expected.get(key, 0) + parameter.grad
    dynplan.swap(model, FixedPath(PATHS))
    (real(last(model, inputs), inputs) * weights).sin().sum().backward()
    found = {key: p.grad for key, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert len(found) > 10
    for key, gradient in expected.items():
        if gradient.any():
            torch.testing.assert_close(found[key], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_saved_loaded_copied_and_given_back(name, tmp_path):
    model, inputs = build(name), TINY[name].inputs()
    theirs = last(model, inputs)
    dynplan.swap(model, FixedPath(PATHS))
    ours = last(model, inputs)
    assert torch.equal(last(copy.deepcopy(model), inputs), ours)
    model.save_pretrained(tmp_path)
    loaded = dynplan.from_pretrained(tmp_path, attn_implementation=model.config._attn_implementation)
    assert torch.equal(last(loaded, inputs), ours)
    assert torch.equal(last(dynplan.unswap(model), inputs), theirs)


@pytest.mark.parametrize("name", BY_NAME)
@torch.no_grad()
def test_half_of_the_layers_is_half_of_their_work(name):
    model, inputs = build(name), TINY[name].inputs()
    dynplan.swap(model)
    half = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1], [1, 1, 0, 0], [0, 0, 1, 1], [0, 1, 1, 0]]).bool()
    spent = []
    for path in (torch.zeros(5, 4).bool(), half, torch.ones(5, 4).bool()):
        model.dynplan.policy = FixedPath(path)
        # Counted where PyTorch sees it: with a gradient the kernels stand back.
        with torch.enable_grad(), Products() as products:
            last(model, inputs)
        spent.append(products.flops)
    none, some, every = spent
    assert every > none
    assert (some - none) / (every - none) < 0.6


@pytest.mark.parametrize(("name", "head"), PER_SAMPLE)
@torch.no_grad()
def test_heads(name, head):
    model, inputs = build(name, head), TINY[name].inputs()
    if head.endswith("ForMultipleChoice"):
        inputs = {key: torch.stack((value, value.flip(0)), 1) for key, value in inputs.items()}
    theirs, exact = model(**inputs), copy.deepcopy(model).double()(**as_double(inputs))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        ours = dynplan.swap(model)(**inputs)
    assert type(ours) is type(theirs) and list(ours) == list(theirs)
    suffix = head.removeprefix(BY_NAME[name].prefix)
    for key, value in theirs.items():
        if not isinstance(value, torch.Tensor):
            continue
        triple = ours[key], value, exact[key]
        if READS.get(suffix) is not None:
            triple = tuple(real(one, inputs) for one in triple)
        assert_close_to_exact(*triple, atol=10 * ATOL[torch.float32])


@pytest.mark.parametrize("name", [name for name, head in HEADS if head.endswith("ForQuestionAnswering")])
def test_answers_are_never_padding(name):
    """The softmax of a head for questions is over all positions: its loss is the original's."""
    model, inputs = build(name, f"{BY_NAME[name].prefix}ForQuestionAnswering"), TINY[name].inputs()
    where = dict(start_positions=torch.zeros(5).long(), end_positions=torch.tensor([3, 1, 0, 2, 4]))
    theirs = model(**inputs, **where)
    swapped = dynplan.swap(copy.deepcopy(model))
    for grad in (False, True):
        with torch.set_grad_enabled(grad):
            ours = swapped(**inputs, **where)
        torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-4, atol=1e-4)
        assert torch.equal(ours.start_logits.argmax(1), theirs.start_logits.argmax(1))


@torch.no_grad()
def test_an_exported_head_that_reads_padding():
    model, inputs = build("Bert", "BertForQuestionAnswering"), TINY["Bert"].inputs()
    theirs = model(**inputs)
    program = torch.export.export(dynplan.swap(model), (), inputs, strict=False).module()
    for key in ("start_logits", "end_logits"):
        torch.testing.assert_close(program(**inputs)[key], theirs[key], rtol=1e-4, atol=1e-4)
    with pytest.raises(NotImplementedError, match="int8.* cannot be exported: the head reads padding"):
        torch.export.export(dynplan.swap(dynplan.unswap(model), weights="int8"), (), inputs, strict=False)
