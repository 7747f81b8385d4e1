import copy

import pytest
import torch
from helpers import assert_close_to_exact
from integrations.models import KINDS, TASKS, batch, run_alone, tiny

import dynplan
from dynplan.policies import FixedPath

PATHS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 1, 0]], dtype=torch.bool)


def real(output, inputs):
    """The model's main output where it is defined: padding positions left out."""
    value = output.logits if "logits" in output else output.last_hidden_state
    return value if value.dim() == 2 else value[inputs["attention_mask"].bool()]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_keep_all_equals_the_original(kind, task):
    model, inputs = tiny(kind, task), batch()
    theirs = real(model(**inputs), inputs)
    exact = real(copy.deepcopy(model).double()(**inputs), inputs)
    ours = real(dynplan.swap(model)(**inputs), inputs)
    assert_close_to_exact(ours, theirs, exact)
    assert model.dynplan.last_plan.all() and model.dynplan.last_plan.shape == (5, 4)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_fixed_path_equals_each_sample_alone(kind, task):
    model, inputs = tiny(kind, task), batch()
    lengths = inputs["attention_mask"].sum(1).tolist()
    rows = list(zip(inputs["input_ids"], lengths, PATHS, strict=True))

    def alone(oracle):
        outputs = [oracle_output(run_alone(oracle, ids[:length], path)) for ids, length, path in rows]
        return torch.cat(outputs)

    def oracle_output(output):
        value = output.logits if "logits" in output else output.last_hidden_state
        return value if value.dim() == 2 else value.flatten(0, 1)

    theirs, exact = alone(model), alone(copy.deepcopy(model).double())
    swapped = dynplan.swap(model, policy=FixedPath(PATHS))
    assert_close_to_exact(real(swapped(**inputs), inputs), theirs, exact)
    assert torch.equal(model.dynplan.last_plan, PATHS)
