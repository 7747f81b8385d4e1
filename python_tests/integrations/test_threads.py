"""Threads: models of their own, and one model together."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from integrations.models import batch, tiny

import dynplan
from dynplan.policies import HashPath, RandomPath

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def test_two_threads_two_models():
    models = [dynplan.swap(tiny(seed=seed), HashPath(0.5, seed)) for seed in range(2)]
    inputs = [batch((9, 3, 7)), batch((2, 8, 4, 5, 6))]
    alone = [model(**given).logits for model, given in zip(models, inputs, strict=True)]

    def work(index):
        with torch.no_grad():
            return [models[index](**inputs[index]).logits for _ in range(30)]

    with ThreadPoolExecutor(2) as pool:
        for index, outputs in enumerate(pool.map(work, range(2))):
            assert all(torch.equal(output, alone[index]) for output in outputs)


@torch.no_grad()
def test_two_threads_one_model_each_with_its_own_last_plan():
    model = dynplan.swap(tiny(), HashPath(0.5))
    inputs = [batch((9, 3, 7), seed=1), batch((2, 8, 4, 5, 6), seed=2)]
    alone = [(model(**given).logits, model.dynplan.last_plan) for given in inputs]

    def work(index):
        seen = []
        with torch.no_grad():
            for _ in range(30):
                logits = model(**inputs[index]).logits
                seen.append((logits, model.dynplan.last_plan))
        return seen

    with ThreadPoolExecutor(2) as pool:
        for index, outputs in enumerate(pool.map(work, range(2))):
            logits, plan = alone[index]
            assert all(torch.equal(a, logits) and torch.equal(b, plan) for a, b in outputs)


@torch.no_grad()
def test_a_thread_that_ran_nothing_sees_the_latest_plan():
    model = dynplan.swap(tiny(), RandomPath(0.5))
    assert model.dynplan.last_plan is None
    with ThreadPoolExecutor(1) as pool:
        pool.submit(torch.no_grad()(lambda: model(**batch()))).result()
    assert model.dynplan.last_plan.shape == (5, 4)


def test_gates_belong_to_the_thread_that_set_them():
    model = dynplan.swap(tiny())
    model.dynplan.gates = torch.zeros(5, 4)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(lambda: model.dynplan.gates).result() is None
