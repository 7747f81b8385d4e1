"""``torch.compile`` of a swapped model: one graph for every plan, policy and weight, and the same numbers."""

import copy

import pytest
import torch
from integrations.models import batch, encoder_of, tiny

import dynplan
from dynplan.nn import StepwisePlanner, UpfrontPlanner
from dynplan.policies import FixedPath, HashPath, KeepAll, PlannerPolicy, RandomPath

TASK = "ForTokenClassification"
POLICIES = {
    "all": KeepAll,
    "fixed": lambda: FixedPath([True, False, True]),
    "random": lambda: RandomPath(0.5, seed=3),
    "hash": lambda: HashPath(0.5),
    "upfront": lambda: PlannerPolicy(random_planner(UpfrontPlanner), 0.5),
    "stepwise": lambda: PlannerPolicy(random_planner(StepwisePlanner).calibrate(torch.randn(50)), 0.5),
}

pytestmark = pytest.mark.filterwarnings("ignore:dynplan. runs the model's own modules")


@pytest.fixture(autouse=True)
def clean(one_thread):
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        yield
    torch._dynamo.reset()


def random_planner(kind):
    torch.manual_seed(5)
    planner = kind(32, 3)
    for parameter in planner.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return planner


def swapped(task=TASK, layers=3):
    return dynplan.swap(tiny(task=task, num_hidden_layers=layers))


def compiled_of(model, backend="eager"):
    return torch.compile(model, fullgraph=True, dynamic=True, backend=backend)


@torch.no_grad()
def test_one_graph_for_everything():
    model = swapped()
    compiled = compiled_of(model)
    encoder = encoder_of(model)

    def check():
        for lengths in ((9, 3, 1, 7, 5), (4, 11), (6, 0, 2)):
            inputs = batch(lengths)
            model.dynplan.policy = copy.deepcopy(model.dynplan.policy)  # which begins its draws anew
            theirs, plan = model(**inputs).logits, model.dynplan.last_plan
            model.dynplan.policy = copy.deepcopy(model.dynplan.policy)
            assert torch.equal(compiled(**inputs).logits, theirs)
            assert torch.equal(model.dynplan.last_plan, plan)
        return theirs

    for make in POLICIES.values():
        model.dynplan.policy = make()
        check()
    for budget in (0.4, None):
        model.dynplan.policy, model.dynplan.budget = HashPath(1.0), budget
        check()
    before = check()
    encoder.encoder.layer[1].output.dense.weight.mul_(1.5)
    after = check()
    assert not torch.equal(after, before)
    model.load_state_dict(tiny(task=TASK, num_hidden_layers=3, seed=1).state_dict())
    assert not torch.equal(check(), after)
    hook = encoder.encoder.layer[1].register_forward_hook(lambda module, given, made: made * 2)
    hooked = check()
    assert "hook" in model.dynplan.why_not_fused
    hook.remove()
    assert not torch.equal(check(), hooked) and model.dynplan.why_not_fused is None
    model.dynplan.gates = torch.rand(3, 3)
    compiled(**batch((4, 2, 5)))
    assert model.dynplan.gates is None and model.dynplan.why_not_fused == "gates are set"
    with pytest.raises(IndexError, match="dynplan: expected input_ids within 0..96"):
        compiled(**(batch() | {"input_ids": batch()["input_ids"] + 100}))


@pytest.mark.parametrize("kind", ["roberta", "electra"])
@torch.no_grad()
def test_hidden_states_and_no_mask(kind):
    model = dynplan.swap(tiny(kind, "Model", num_hidden_layers=3), FixedPath([True, False, True]))
    ids = batch()["input_ids"]
    compiled = compiled_of(model, "aot_eager")(input_ids=ids, output_hidden_states=True)
    theirs = model(input_ids=ids, output_hidden_states=True)
    assert len(compiled.hidden_states) == 4
    for one, two in zip(compiled.hidden_states, theirs.hidden_states, strict=True):
        assert torch.equal(one, two)
    torch._dynamo.reset()
    with torch.autocast("cpu"):
        one, two = compiled_of(model, "aot_eager")(ids)[0], model(ids)[0]
    assert one.dtype == two.dtype and torch.equal(one, two)


@torch.no_grad()
def test_draws_are_neither_merged_nor_dropped():
    model = swapped("Model")

    def twice(ids):
        model(ids)
        return model(ids)[0], model(ids)[0]

    ids = batch()["input_ids"]
    model.dynplan.policy = RandomPath(0.5)
    one = torch.compile(twice, fullgraph=True, backend="inductor")(ids)
    plan = model.dynplan.last_plan
    model.dynplan.policy = RandomPath(0.5)
    two = twice(ids)
    assert torch.equal(torch.stack(one), torch.stack(two)) and not torch.equal(*one)
    assert torch.equal(model.dynplan.last_plan, plan)


@torch.no_grad()
def test_copies_have_handles_of_their_own():
    model = swapped("Model")
    other = copy.deepcopy(model)
    other.dynplan.policy = FixedPath([False, True, False])
    for one in (model, other):
        torch._dynamo.reset()
        inputs = batch()
        assert torch.equal(compiled_of(one)(**inputs)[0], one(**inputs)[0])
    assert torch.equal(model.dynplan.last_plan, torch.ones(5, 3, dtype=torch.bool))


def gradients(call, model, lengths):
    model.zero_grad()
    inputs = batch(lengths)
    loss = call(**inputs).logits.mul(inputs["attention_mask"].unsqueeze(-1)).square().sum()
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_gradients_are_those_of_eager(backend):
    model = swapped(layers=3 if backend == "eager" else 1)
    compiled = compiled_of(model, backend)
    for name in POLICIES if backend == "eager" else ("random",):
        for lengths in ((9, 3, 1, 7, 5), (4, 11)):
            model.dynplan.policy = POLICIES[name]()
            ours, plan = gradients(compiled, model, lengths), model.dynplan.last_plan
            model.dynplan.policy = POLICIES[name]()
            theirs = gradients(model, model, lengths)
            assert torch.equal(model.dynplan.last_plan, plan), name
            for part, gradient in theirs.items():
                torch.testing.assert_close(ours[part], gradient, rtol=1e-3, atol=1e-4)
            assert not any(ours[part].any() for part in ours.keys() - theirs.keys())


def test_steps_are_seen_and_refusals_are_clear():
    model = swapped("ForSequenceClassification")
    compiled = compiled_of(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    untouched = tiny(num_hidden_layers=3)
    with torch._dynamo.config.patch(error_on_recompile=False):  # one graph with gradients, one without
        for _ in range(3):
            with torch.no_grad():
                untouched.load_state_dict(model.state_dict())
                ours, theirs = compiled(**batch()).logits, untouched(**batch()).logits
                torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
            optimizer.zero_grad()
            compiled(**batch()).logits.square().sum().backward()
            optimizer.step()
    model.dynplan.gates = torch.rand(5, 3)
    with pytest.raises(NotImplementedError, match="gates cannot be set for a compiled model"):
        compiled(**batch())
    with pytest.raises(NotImplementedError, match="the first token of every sample"):
        compiled(**batch(side="left"))
    with pytest.raises(ValueError, match="to hold only 0 and 1"):
        compiled(**(batch() | {"attention_mask": batch()["attention_mask"] * 2}))


def test_a_hook_round_the_layers_leaves_the_graph():
    model = swapped("Model")
    encoder_of(model).encoder.register_forward_hook(lambda *_: None)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="hooks or a forward of its own"):
        compiled_of(model)(**batch())
    torch._dynamo.reset()
    states = torch.compile(model, backend="eager")(**batch())[0]
    assert torch.equal(states, model(**batch())[0])
