"""Programs that leave a swapped model behind: ``torch.export``, ``torch.jit.trace``, ONNX."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from integrations.models import batch, encoder_of, tiny
from torch import nn

import dynplan
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.policies import FixedPath, HashPath, KeepAll, PlannerPolicy, RandomPath, StaticPath

BATCH, LENGTH = torch.export.Dim("batch"), torch.export.Dim("length", max=40)
POLICIES = {
    "all": KeepAll,
    "fixed": lambda: FixedPath([True, False, True]),
    "static": lambda: StaticPath({1: [2]}, 0.5),
    "hash": lambda: HashPath(0.5),
    "layers": lambda: planner(None),
    "paths": lambda: planner([[0], [0, 2], [0, 1, 2]]),
}


@pytest.fixture(autouse=True)
def threads(one_thread):
    pass


def planner(paths):
    torch.manual_seed(3)
    module = UpfrontPlanner(32, 3, paths=paths)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    if paths:
        module.calibrate(torch.randn(50, len(module.paths)))
    return PlannerPolicy(module, 0.5)


def swapped(policy="all", kind="bert", task="ForSequenceClassification", weights=None, **options):
    return dynplan.swap(tiny(kind, task, num_hidden_layers=3, **options), POLICIES[policy](), weights=weights)


def export(model, strict=False):
    inputs = batch()
    shapes = {name: {0: BATCH, 1: LENGTH} for name in inputs}
    return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=strict)


@torch.no_grad()
def check(program, model, **tolerance):
    for lengths in ((9, 3, 1, 7, 5), (4, 11), (6,), (3, 0, 8)):
        ours, theirs = program(**batch(lengths)), model(**batch(lengths))
        for name in theirs:
            torch.testing.assert_close(ours[name], theirs[name], **(tolerance or dict(rtol=1e-4, atol=1e-4)))


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy(policy):
    model = swapped(policy)
    check(export(model).module(), model)


@pytest.mark.parametrize("kind", ["roberta", "electra"])
def test_hidden_states(kind):
    model = swapped("fixed", kind, "Model", output_hidden_states=True)
    check(export(model).module(), model)


def test_strict():
    model = swapped("fixed")
    check(export(model, strict=True).module(), model)


def test_a_fresh_process(tmp_path):
    """It imports dynplan; transformers only for outputs of a class of its own."""
    for name, model in {
        "all": swapped("all", return_dict=False),
        "paths": swapped("paths", return_dict=False),
        "int8": swapped("fixed", weights="int8", return_dict=False),
    }.items():
        torch.export.save(export(model), tmp_path / f"{name}.pt2")
        with torch.no_grad():
            torch.save((batch((4, 11)), model(**batch((4, 11)))[0]), tmp_path / f"{name}.pt")
    code = f"""
import pathlib, sys, torch, dynplan
for program in sorted(pathlib.Path({str(tmp_path)!r}).glob("*.pt2")):
    inputs, theirs = torch.load(program.with_suffix(".pt"))
    ours = torch.export.load(program).module()(**inputs)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
assert "transformers" not in sys.modules
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "done", done.stderr


def test_weights_of_its_own_may_change():
    model = swapped("fixed")
    program = export(model).module()
    check(program, model)
    with torch.no_grad():
        for changed in (program, model):
            for parameter in changed.parameters():
                parameter.mul_(1.1)
    check(program, model)


def test_layers_that_the_kernels_do_not_know():
    model = swapped("fixed")
    output = encoder_of(model).encoder.layer[2].output
    output.dense = nn.Sequential(output.dense)
    output.register_forward_hook(lambda module, given, made: made * 2)
    with pytest.warns(UserWarning, match="runs the model's own modules"):
        check(export(model).module(), model)


def test_what_a_program_checks():
    program = export(swapped()).module()
    with pytest.raises(NotImplementedError, match="the first token of every sample"):
        program(**batch((3, 7), side="left"))
    with pytest.raises(ValueError, match="to hold only 0 and 1"):
        program(**(batch() | {"attention_mask": batch()["attention_mask"] * 2}))


def test_refused():
    model = swapped()
    for policy in (RandomPath(0.5), PlannerPolicy(StepwisePlanner(32, 3), 0.5)):
        model.dynplan.policy = policy
        with pytest.raises(NotImplementedError, match="expected a policy that a program can hold"):
            export(model)
    model.dynplan.policy, model.dynplan.budget = KeepAll(), 0.5
    with pytest.raises(ValueError, match="expected a policy that takes a budget"):
        export(model)
    model.dynplan.budget, model.dynplan.gates = None, torch.ones(5, 3)
    with pytest.raises(NotImplementedError, match="expected no gates"):
        export(model)
    model.dynplan.gates = None
    encoder_of(model).encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(NotImplementedError, match="BertEncoder has hooks.*dynplan.unswap"):
        export(model)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("policy", ["all", "fixed"])
@torch.no_grad()
def test_traces(policy):
    model = swapped(policy, task="Model")
    inputs = tuple(batch().values())
    model(*inputs)
    model(*inputs)
    traced = torch.jit.trace(model, inputs, strict=False)
    for parameter in model.parameters():
        parameter.mul_(1.1)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    for program in (traced, torch.jit.load(file)):
        for lengths in ((9, 3, 1, 7, 5), (4, 11)):
            given = tuple(batch(lengths).values())
            ours, theirs = program(*given)["last_hidden_state"], model(*given)[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    model.dynplan.policy = planner(None)
    with pytest.raises(NotImplementedError, match="expected torch.export"):
        torch.jit.trace(model, inputs, strict=False)


def test_onnx(tmp_path):
    import onnxruntime as runtime

    model = swapped("fixed")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(Exception, match=r"dynplan\.export_onnx"):
        torch.onnx.export(model, (), tmp_path / "x.onnx", kwargs=batch(), dynamo=True, verbose=False)
    dynplan.export_onnx(model, tmp_path / "model.onnx", verbose=False)
    session = runtime.InferenceSession(tmp_path / "model.onnx")
    for lengths in ((9, 3, 1, 7, 5), (4, 11), (6,)):
        given = batch(lengths)
        (ours,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
        with torch.no_grad():
            theirs = model(**given).logits
        torch.testing.assert_close(torch.from_numpy(ours), theirs, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_onnx_refuses(tmp_path, monkeypatch):
    path = tmp_path / "model.onnx"
    for policy in (RandomPath(0.5), FixedPath(torch.ones(5, 3, dtype=torch.bool)), planner(None)):
        model = swapped()
        model.dynplan.policy = policy
        with pytest.raises(NotImplementedError, match="expected one path for all samples"):
            dynplan.export_onnx(model, path)
    with pytest.raises(ValueError, match="expected keep of shape"):
        dynplan.export_onnx(tiny(), path, keep=[True, False])
    with pytest.raises(TypeError, match="export_onnx: expected one of BertModel"):
        dynplan.export_onnx(nn.Linear(2, 2), path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install dynplan\[onnx\]"):
        dynplan.export_onnx(tiny(), path)
    assert not path.exists()
