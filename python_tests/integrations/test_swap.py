"""The swapped forward against the original: what is the same, what is refused."""

import copy
import pickle

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import KINDS, TASKS, batch, encoder_of, run_alone, tiny
from torch import nn

import dynplan
from dynplan.policies import FixedPath, KeepAll, Policy, RandomPath

pytestmark = pytest.mark.usefixtures("one_thread")

PATHS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)


def real(output, inputs):
    """The model's main output where it is defined: padding positions left out."""
    value = output.logits if "logits" in output else output.last_hidden_state
    return value if value.dim() == 2 else value[inputs["attention_mask"].bool()]


def check_against_original(model, inputs, swapped_inputs=None):
    theirs = real(model(**inputs), inputs)
    exact = real(copy.deepcopy(model).double()(**inputs), inputs)
    ours = real(dynplan.swap(model)(**(inputs if swapped_inputs is None else swapped_inputs)), inputs)
    assert_close_to_exact(ours, theirs, exact)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_keep_all_equals_the_original(kind, task):
    model = tiny(kind, task)
    check_against_original(model, batch())
    assert model.dynplan.last_plan.all() and model.dynplan.last_plan.shape == (5, 4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fixed_path_equals_each_sample_alone(kind, task):
    model, inputs = tiny(kind, task), batch()
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = list(zip(inputs["input_ids"], lengths, PATHS, strict=True))

    def alone(oracle):
        outputs = (run_alone(oracle, ids[:length], path) for ids, length, path in rows)
        values = (output.logits if "logits" in output else output.last_hidden_state for output in outputs)
        return torch.cat([value if value.dim() == 2 else value.flatten(0, 1) for value in values])

    theirs, exact = alone(model), alone(copy.deepcopy(model).double())
    swapped = dynplan.swap(model, policy=FixedPath(PATHS))
    assert_close_to_exact(real(swapped(**inputs), inputs), theirs, exact)
    assert torch.equal(model.dynplan.last_plan, PATHS)


@torch.no_grad()
def test_one_path_for_all_samples():
    model, inputs = dynplan.swap(tiny()), batch()
    model.dynplan.policy = FixedPath([True, False, False, True])
    short = model(**inputs).logits
    model.dynplan.policy = FixedPath(torch.tensor([[True, False, False, True]]).repeat(5, 1))
    assert torch.equal(short, model(**inputs).logits)


@pytest.mark.parametrize("activation", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu"])
@torch.no_grad()
def test_activations(activation):
    check_against_original(tiny(hidden_act=activation), batch())


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@torch.no_grad()
def test_bfloat16(kind):
    model, inputs = tiny(kind), batch()
    exact = copy.deepcopy(model).bfloat16().double()(**inputs).logits
    model = model.bfloat16()
    theirs = model(**inputs).logits
    assert_close_to_exact(dynplan.swap(model)(**inputs).logits, theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
@torch.no_grad()
def test_dtypes_the_kernels_lack_take_the_differentiable_way(dtype):
    model, inputs = tiny(), batch()
    exact = copy.deepcopy(model).to(dtype).double()(**inputs).logits
    model = model.to(dtype)
    theirs = model(**inputs).logits
    assert_close_to_exact(dynplan.swap(model)(**inputs).logits, theirs, exact)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_left_padding_where_no_summary_is_read_from_the_first_position(kind):
    check_against_original(tiny(kind, "ForTokenClassification"), batch(side="left"))


@pytest.mark.parametrize("mask", ["bool", "int32", "float32", "absent"])
@torch.no_grad()
def test_mask_kinds(mask):
    lengths = (6, 6) if mask == "absent" else (6, 4)
    inputs = batch(lengths)
    given = dict(inputs)
    if mask == "absent":
        del given["attention_mask"]
    else:
        given["attention_mask"] = given["attention_mask"].to(getattr(torch, mask))
    check_against_original(tiny("roberta"), inputs, given)


@torch.no_grad()
def test_holes_in_the_mask():
    inputs = batch((9, 9, 9))
    inputs["attention_mask"][0, 3:5] = 0
    inputs["attention_mask"][2, 1::2] = 0
    check_against_original(tiny(task="ForTokenClassification"), inputs)


@pytest.mark.parametrize("kind", ["bert", "roberta", "electra"])
@torch.no_grad()
def test_optional_inputs(kind):
    model, inputs = tiny(kind, type_vocab_size=2), batch()
    shape = inputs["input_ids"].shape
    inputs["token_type_ids"] = torch.arange(shape[1]).remainder(2).expand(shape)
    inputs["position_ids"] = torch.arange(shape[1]).flip(0).expand(shape) + 2
    inputs["inputs_embeds"] = encoder_of(model).embeddings.word_embeddings(inputs.pop("input_ids"))
    check_against_original(model, inputs)


@pytest.mark.parametrize("policy", ["upfront", "stepwise"])
@pytest.mark.parametrize("kind", ["bert", "electra"])
@torch.no_grad()
def test_hidden_states(kind, policy):
    class Stepwise(KeepAll):
        stepwise = True

        def keep(self, layer, request, hidden, plan):
            return torch.ones(request.batch_size, dtype=torch.bool)

    model, inputs = tiny(kind), batch()
    mask = inputs["attention_mask"].bool()
    theirs = copy.deepcopy(model)(**inputs, output_hidden_states=True)
    exact = copy.deepcopy(model).double()(**inputs, output_hidden_states=True)
    dynplan.swap(model, Stepwise() if policy == "stepwise" else KeepAll())
    ours = model(**inputs, output_hidden_states=True)
    assert len(ours.hidden_states) == 5
    # The embeddings come whole, padding included, in bits that do not depend on who asks.
    assert_close_to_exact(ours.hidden_states[0], theirs.hidden_states[0], exact.hidden_states[0])
    assert torch.equal(ours.logits, model(**inputs).logits)
    for mine, their, right in zip(ours.hidden_states, theirs.hidden_states, exact.hidden_states, strict=True):
        assert_close_to_exact(mine[mask], their[mask], right[mask])
    assert all(not state[~mask].any() for state in ours.hidden_states[1:])
    model.dynplan.policy = FixedPath(PATHS)
    states = model(**inputs, output_hidden_states=True).hidden_states
    for layer, (before, after) in enumerate(zip(states, states[1:], strict=False)):
        same = [torch.equal(b[m], a[m]) for b, a, m in zip(before, after, mask, strict=True)]
        assert same == (~PATHS[:, layer]).tolist()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", ["bert", "electra"])
@torch.no_grad()
def test_outputs_have_the_original_form(kind, task):
    model, inputs = tiny(kind, task), batch()
    options = [dict(), dict(return_dict=False), dict(return_dict=False, output_hidden_states=True)]
    original = copy.deepcopy(model)
    dynplan.swap(model)
    for option in options:
        theirs, ours = original(**inputs, **option), model(**inputs, **option)
        assert type(ours) is type(theirs) and len(ours) == len(theirs)
        if not option:
            assert list(ours) == list(theirs)


@torch.no_grad()
def test_empty_batch_and_samples_without_tokens():
    model = dynplan.swap(tiny())
    empty = {name: value[:0] for name, value in batch().items()}
    assert model(**empty).logits.shape == (0, 3)
    assert model.dynplan.last_plan.shape == (0, 4)
    inputs = batch((4, 0, 2))
    assert model(**inputs).logits.isfinite().all()
    full, part = model(**inputs).logits, model(**batch((4, 0, 2, 5))).logits
    assert full.shape == (3, 3) and part.shape == (4, 3)
    bare = dynplan.swap(tiny(task="Model"))
    assert not bare(**inputs).last_hidden_state[1].any()


@torch.no_grad()
def test_batch_companions_change_nothing():
    model, inputs = dynplan.swap(tiny(), FixedPath(PATHS)), batch()
    together = model(**inputs).logits
    order = torch.tensor([3, 0, 4, 2, 1])
    model.dynplan.policy = FixedPath(PATHS[order])
    shuffled = model(**{name: value[order] for name, value in inputs.items()}).logits
    torch.testing.assert_close(shuffled, together[order], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_unswap_gives_back_the_original(kind):
    model, inputs = tiny(kind), batch()
    before = {id(module): dict(vars(module)) for module in model.modules()}
    bits = {name: value.clone() for name, value in model.state_dict().items()}
    theirs = model(**inputs).logits
    swapped = dynplan.swap(model)
    assert swapped is model and list(model.state_dict()) == list(bits)
    assert not any("dynplan" in name for name, _ in (*model.named_parameters(), *model.named_modules()))
    swapped(**inputs)
    assert dynplan.unswap(model) is model
    assert torch.equal(model(**inputs).logits, theirs)
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())
    assert {id(module): list(vars(module)) for module in model.modules()} == {
        key: list(value) for key, value in before.items()
    }
    assert not hasattr(model, "dynplan")


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification"])
@torch.no_grad()
def test_copies_are_swapped_and_their_own(clone, task):
    model, inputs = tiny(task=task), batch()
    dynplan.swap(model, RandomPath(0.5, seed=3)).dynplan.budget = 0.75
    ours = real(model(**inputs), inputs)
    model.dynplan.policy = RandomPath(0.5, seed=3)
    other = clone(model)
    assert other.dynplan is not model.dynplan and other.dynplan.budget == 0.75
    assert torch.equal(real(other(**inputs), inputs), ours)
    for parameter in other.parameters():
        parameter.zero_()
    other(**inputs)
    model.dynplan.policy = RandomPath(0.5, seed=3)
    assert torch.equal(real(model(**inputs), inputs), ours)
    assert dynplan.unswap(other) is other and hasattr(model, "dynplan")


def test_swap_twice_is_refused():
    model = dynplan.swap(tiny())
    for target in (model, model.bert):
        with pytest.raises(ValueError, match="swap: expected a model that is not swapped, got one that is"):
            dynplan.swap(target)
    with pytest.raises(ValueError, match="expected the model that was swapped, got one .* its encoder is"):
        dynplan.unswap(model.bert)
    with pytest.raises(ValueError, match="unswap: expected the model that was swapped"):
        dynplan.unswap(tiny())
    dynplan.swap(dynplan.unswap(model))


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        (dict(is_decoder=True), NotImplementedError, "expected config.is_decoder to be False, got True"),
        (dict(is_decoder=True, add_cross_attention=True), NotImplementedError, "got True; a causal mask"),
    ],
)
def test_unsupported_architectures_are_refused(options, error, text):
    model = tiny(**options)
    with pytest.raises(error, match=text):
        dynplan.swap(model)
    assert "forward" not in vars(model.bert) and not hasattr(model, "dynplan")


def test_unknown_models_are_refused():
    from transformers import FNetConfig, FNetModel

    small = dict(vocab_size=9, hidden_size=8, num_hidden_layers=1, intermediate_size=8)
    with pytest.raises(TypeError, match="expected one of BertModel, .*, got Linear"):
        dynplan.swap(nn.Linear(2, 2))
    with pytest.raises(TypeError, match="got FNetModel"):
        dynplan.swap(FNetModel(FNetConfig(**small)))
    with pytest.raises(TypeError, match="expected policy to be a dynplan.policies.Policy, got str"):
        dynplan.swap(tiny(), "keep all")


@pytest.mark.parametrize("task", ["LMHeadModel", "ForCausalLM"])
def test_what_generates_text_is_refused(task):
    model = tiny("bert" if task == "LMHeadModel" else "roberta", task)
    with pytest.raises(NotImplementedError, match="which generates text: a causal mask"):
        dynplan.swap(model)


def test_subclasses_are_known_by_their_base():
    from transformers import BertConfig, BertForSequenceClassification

    class Mine(BertForSequenceClassification):
        pass

    torch.manual_seed(0)
    model = Mine(BertConfig(vocab_size=97, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    assert dynplan.swap(model).dynplan.num_layers == 1


REFUSED = [
    (dict(output_attentions=True), NotImplementedError, "expected output_attentions=False, got True"),
    (dict(output_hidden_states=[1]), NotImplementedError, r"expected output_hidden_states to be a bool"),
    (
        dict(encoder_hidden_states=torch.zeros(5, 2, 32)),
        NotImplementedError,
        "no argument encoder_hidden_states",
    ),
    (dict(past_key_values=()), NotImplementedError, "no argument past_key_values"),
    (dict(is_causal=True), NotImplementedError, "no argument is_causal"),
    (dict(attention_mask=torch.ones(5, 9, 9)), NotImplementedError, r"\(B, S\) = \(5, 9\), got \(5, 9, 9\)"),
    (dict(attention_mask=torch.ones(5, 1, 9, 9)), NotImplementedError, "a mask per query or head cannot be"),
    (dict(attention_mask=torch.ones(5, 8)), ValueError, r"\(B, S\) = \(5, 9\), got \(5, 8\)"),
    (dict(attention_mask=torch.full((5, 9), -1e4)), ValueError, "attention_mask .*0.*1.*got -10000"),
    (dict(attention_mask=torch.full((5, 9), 2)), ValueError, "attention_mask .*0.*1.*got 2"),
    (
        dict(attention_mask=batch(side="left")["attention_mask"]),
        NotImplementedError,
        "got padding in sample 1",
    ),
    (dict(inputs_embeds=torch.zeros(5, 9, 32)), ValueError, "exactly one of input_ids and inputs_embeds"),
    (dict(input_ids=torch.full((5, 9), 97)), IndexError, r"expected input_ids within 0..96, got 97"),
    (dict(input_ids=torch.full((5, 9), -3)), IndexError, r"expected input_ids within 0..96, got -3"),
    (dict(token_type_ids=torch.full((5, 9), 2)), IndexError, "expected token_type_ids within 0..1, got 2"),
    (dict(position_ids=torch.full((5, 9), 40)), IndexError, "expected position_ids within 0..39, got 40"),
    (dict(input_ids=torch.zeros(5, 9)), TypeError, "expected input_ids to be integer, got torch.float32"),
    (dict(token_type_ids=torch.zeros(5, 8).long()), ValueError, r"expected token_type_ids of shape"),
    (
        dict(input_ids=torch.zeros(5, 41).long(), attention_mask=None),
        ValueError,
        "expected input_ids of at most 40 tokens per sample, got 41",
    ),
]


@pytest.mark.parametrize(("change", "error", "text"), REFUSED)
@torch.no_grad()
def test_calls_that_would_be_wrong_are_refused(change, error, text):
    model = dynplan.swap(tiny())
    inputs = batch()
    expected = model(**inputs).logits
    with pytest.raises(error, match=text):
        model(**{**inputs, **change})
    assert torch.equal(model(**inputs).logits, expected)


@pytest.mark.parametrize("kind", ["roberta", "xlm-roberta"])
@torch.no_grad()
def test_too_long_for_position_ids_that_start_after_the_padding_index(kind):
    model = dynplan.swap(tiny(kind))
    assert model(torch.full((1, 38), 5)).logits.shape == (1, 3)
    with pytest.raises(ValueError, match="expected input_ids of at most 38 tokens per sample, got 39"):
        model(torch.full((1, 39), 5))


@torch.no_grad()
def test_plans_that_do_not_fit_are_refused():
    class Wrong(Policy):
        def plan(self, request):
            return self.answer

    model, inputs = dynplan.swap(tiny(), FixedPath(PATHS[:4])), batch()
    with pytest.raises(
        ValueError, match=r"FixedPath: expected keep of shape \(4,\) or \(5, 4\), got \(4, 4\)"
    ):
        model(**inputs)
    model.dynplan.policy = Wrong()
    for answer, text in (
        (None, "NoneType"),
        (torch.ones(5, 4), "torch.float32 of shape"),
        (torch.ones(5, 3, dtype=torch.bool), r"\(5, 3\)"),
    ):
        model.dynplan.policy.answer = answer
        with pytest.raises(
            ValueError, match=r"Wrong.plan: expected a bool tensor of shape \(5, 4\).*got .*" + text
        ):
            model(**inputs)


@torch.no_grad()
def test_budget_is_checked():
    model, inputs = dynplan.swap(tiny()), batch()
    for value, error in (
        (1.5, ValueError),
        (float("nan"), ValueError),
        ("half", TypeError),
        (True, TypeError),
    ):
        with pytest.raises(error, match="dynplan: expected budget"):
            model.dynplan.budget = value
    assert model.dynplan.budget is None
    model.dynplan.budget = 0.5
    with pytest.raises(ValueError, match="expected a policy that takes a budget at budget 0.5, got KeepAll"):
        model(**inputs)
    model.dynplan.budget = 1
    model(**inputs)


def test_signature_is_the_original_one():
    import inspect

    model = tiny(task="Model")
    before = list(inspect.signature(model.forward).parameters)
    assert list(inspect.signature(dynplan.swap(model).forward).parameters) == before
