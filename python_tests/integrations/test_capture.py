"""``dynplan.capture``: padding, plans and refusals on CPU with a graph that reruns; real graphs on CUDA."""

import threading
import warnings

import pytest
import torch
from helpers import ATOL, requires_cuda
from integrations.models import batch, tiny
from torch import Tensor

import dynplan
from dynplan import StreamBudget
from dynplan import cuda_graph as capturing
from dynplan.nn import Exits, StepwisePlanner, UpfrontPlanner
from dynplan.policies import (
    ConfidenceExit,
    EntropyExit,
    FixedPath,
    HashPath,
    KeepAll,
    LearnedExit,
    PatienceExit,
    PlannerPolicy,
    Policy,
    RandomPath,
    StaticPath,
)

BATCHES = [(9, 3, 1, 7, 5), (4,), (12, 12, 2), (1, 1, 1, 1, 1, 1)]
ON_CUDA = [pytest.mark.cuda, requires_cuda]


class RerunGraph:
    """Stands for a CUDA graph where there is none: results lie in the same tensors at every replay."""

    def __init__(self, call, device):
        self.call, self.result = call, call()

    def replay(self):
        fresh = self.call()
        for still, new in zip(_tensors(self.result), _tensors(fresh), strict=True):
            still.copy_(new)
        return self.result


def _tensors(value):
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


@pytest.fixture(params=["rerun", pytest.param("cuda", marks=ON_CUDA)])
def device(request, monkeypatch):
    if request.param == "rerun":
        monkeypatch.setattr(capturing, "_why_not", lambda device: None)
        monkeypatch.setattr(capturing, "Graph", RerunGraph)
        return "cpu"
    return "cuda"


def swapped(device="cpu", policy=None, **options):
    return dynplan.swap(tiny(**options).to(device), policy)


def to(device, inputs):
    return {name: value.to(device) for name, value in inputs.items()}


def assert_same(captured, direct):
    assert type(captured) is type(direct) and captured.keys() == direct.keys()
    for ours, theirs in zip(_tensors(captured), _tensors(direct), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def policies():
    torch.manual_seed(0)
    planners = [
        UpfrontPlanner(32, 4, 8),
        UpfrontPlanner(32, 4, 8, paths=[(0, 1), (1, 2, 3)]),
        StepwisePlanner(32, 4),
    ]
    for planner in planners:
        for parameter in planner.parameters():
            torch.nn.init.normal_(parameter)
    planners[1].calibrate(torch.rand(50, 3))
    return [
        KeepAll(),
        FixedPath(torch.tensor([True, False, True, True])),
        StaticPath({1: (2,), 3: (0, 1, 3)}, budget=0.8),
        HashPath(0.5),
        *(PlannerPolicy(planner, budget=0.6) for planner in planners),
    ]


def exit_policies():
    torch.manual_seed(0)
    exits = Exits(32, 4, (1, 2, 3))
    for parameter in exits.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    kinds = {ConfidenceExit: 0.6, EntropyExit: -0.8, PatienceExit: 1, LearnedExit: 1.0}
    return [kind(exits, 0.8, [[1, 2, 4]], [0] * 3, [[threshold] * 3]) for kind, threshold in kinds.items()]


def test_captured_exits(device):
    """Under a budget per batch, and under a stream's, whose counts are those of direct calls."""
    model = swapped(device)
    captured = dynplan.capture(model, batch_size=6, max_length=12)
    for policy in exit_policies():
        model.dynplan.policy = policy
        for budget in (None, 0.6, 1.0, "stream"):
            streams = [StreamBudget(0.7, burst=1) for _ in range(2)]
            # One text alone gets the deepest exit that is paid for; in a graph's batch it is one of many.
            for lengths in BATCHES if budget == "stream" else [lengths for lengths in BATCHES if lengths[1:]]:
                inputs = to(device, batch(lengths))
                model.dynplan.budget = streams[0] if budget == "stream" else budget
                with torch.no_grad():
                    direct = model(**inputs)
                plan = model.dynplan.last_plan
                model.dynplan.budget = streams[1] if budget == "stream" else budget
                assert_same(captured(**inputs), direct)
                assert torch.equal(model.dynplan.last_plan, plan)
            assert streams[0].state == streams[1].state
            assert (streams[0].state["samples"] > 0) == (budget == "stream")


def test_streams_are_counted_in_graphs_of_other_policies(device):
    model = swapped(device, RandomPath())
    captured = dynplan.capture(model, batch_size=6, max_length=12)
    stream = model.dynplan.budget = StreamBudget(0.5)
    for _ in range(3):
        captured(**to(device, batch()))
    assert stream.state["samples"] == 15
    assert stream.state["sample_layers"] == 3 * model.dynplan.last_plan.sum() <= 0.5 * 15 * 4


@pytest.mark.parametrize("task", ["Model", "ForSequenceClassification", "ForTokenClassification"])
def test_captured_equals_direct(device, task):
    model = swapped(device, task=task)
    captured = dynplan.capture(model, batch_size=6, max_length=12)
    assert captured.reason is None
    for policy in policies():
        model.dynplan.policy = policy
        for lengths in BATCHES:
            for side in ("right",) if task != "ForTokenClassification" else ("right", "left"):
                inputs = to(device, batch(lengths, side=side))
                with torch.no_grad():
                    direct = model(**inputs)
                plan = model.dynplan.last_plan
                assert_same(captured(**inputs), direct)
                assert torch.equal(model.dynplan.last_plan, plan)


def test_arguments_may_be_left_out(device):
    model = swapped(device)
    captured = dynplan.capture(model, 6, 12)
    inputs = to(device, batch((8, 8, 8)))
    with torch.no_grad():
        assert_same(captured(inputs["input_ids"]), model(inputs["input_ids"]))
        types = torch.randint(0, 2, (3, 8), device=device)
        assert_same(captured(**inputs, token_type_ids=types), model(**inputs, token_type_ids=types))
        assert_same(captured(**inputs), model(**inputs))  # the types of the call before are gone


def test_plans_change_between_replays(device):
    model = swapped(device)
    captured = dynplan.capture(model, 6, 12)
    one_sample, one_layer = torch.zeros(5, 4), torch.zeros(5, 4)
    one_sample[2], one_layer[:, 1] = 1, 1
    plans = [
        torch.ones(5, 4),
        torch.zeros(5, 4),
        torch.eye(5, 4),
        one_sample,
        torch.rand(5, 4) < 0.5,
        one_layer,
    ]
    lengths = [
        (9, 3, 1, 7, 5),
        (12, 1, 12, 1, 12),
        (2, 2, 2, 2, 2),
        (5, 9, 1, 3, 7),
        (1, 12, 4, 6, 8),
        (3,) * 5,
    ]
    for plan, of in zip(plans, lengths, strict=True):
        model.dynplan.policy = FixedPath(plan.bool())
        inputs = to(device, batch(of))
        with torch.no_grad():
            assert_same(captured(**inputs), model(**inputs))
        assert torch.equal(model.dynplan.last_plan.cpu(), plan.bool())
    assert len(captured._graphs) == 1


def test_random_plans_are_those_without_a_graph(device):
    model = swapped(device)
    captured = dynplan.capture(model, 6, 12)
    plans = []
    for run in (model, captured):
        model.dynplan.policy = RandomPath(0.5, seed=3)
        for lengths in BATCHES:
            with torch.no_grad():
                run(**to(device, batch(lengths)))
            plans.append(model.dynplan.last_plan)
    for direct, replayed in zip(plans[:4], plans[4:], strict=True):
        assert torch.equal(direct, replayed)


def test_padding_samples_do_not_add_to_the_budget(device):
    model = swapped(device, PlannerPolicy(UpfrontPlanner(32, 4, 8)))
    captured = dynplan.capture(model, 40, 12)
    model.dynplan.budget = 0.5
    captured(**to(device, batch((6, 6, 6))))
    assert model.dynplan.last_plan.shape == (3, 4)
    assert model.dynplan.last_plan.sum() <= 6


def test_budget_and_weights_are_taken_up(device):
    model = swapped(device, PlannerPolicy(UpfrontPlanner(32, 4, 8)))
    captured = dynplan.capture(model, 6, 12)
    inputs = to(device, batch())
    for budget in (1.0, 0.5, 0.25, 0.5):
        model.dynplan.budget = budget
        with torch.no_grad():
            assert_same(captured(**inputs), model(**inputs))
    assert len(captured._graphs) == 4  # that of capture() itself was at no budget
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.weight.mul_(2)
        model.classifier.weight.mul_(2)
        assert_same(captured(**inputs), model(**inputs))


def test_graphs_do_not_pile_up(device):
    model = swapped(device, PlannerPolicy(UpfrontPlanner(32, 4, 8)))
    captured = dynplan.capture(model, 2, 12)
    for step in range(20):
        model.dynplan.budget = step / 20
        captured(**to(device, batch((3,))))
    assert len(captured._graphs) == capturing._MAX_GRAPHS


def test_autocast_changes_nothing(device):
    model = swapped(device)
    captured = dynplan.capture(model, 6, 12)
    inputs = to(device, batch())
    wanted = captured(**inputs).logits
    with torch.autocast(device, torch.bfloat16):
        model.dynplan.policy = PlannerPolicy(UpfrontPlanner(32, 4, 8))  # a graph of its own
        ours = captured(**inputs).logits
    assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


def test_results_are_copies(device):
    captured = dynplan.capture(swapped(device), 6, 12)
    first = captured(**to(device, batch())).logits
    before = first.clone()
    captured(**to(device, batch(seed=5)))
    assert torch.equal(first, before)


def test_replay_repeats_the_latest_call(device):
    captured = dynplan.capture(swapped(device), 6, 12)
    logits = captured(**to(device, batch())).logits
    assert torch.equal(captured.replay().logits[: len(logits)], logits)


def test_cpu_calls_the_model_and_says_so_once():
    model = swapped(policy=RandomPath(0.5))
    with pytest.warns(
        UserWarning, match="capture: calls the model directly: CUDA graphs need a CUDA device, got a "
    ):
        captured = dynplan.capture(model, 6, 12)
    assert "CUDA device" in captured.reason
    with pytest.raises(RuntimeError, match="capture: expected a graph to replay, got none: CUDA graphs need"):
        captured.replay()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.dynplan.policy = KeepAll()
        inputs = batch()
        with torch.no_grad():
            assert_same(captured(**inputs), model(**inputs))


def test_refusals(device):
    with pytest.raises(
        TypeError, match="capture: expected a swapped model, got BertForSequenceClassification"
    ):
        dynplan.capture(tiny(), 2, 8)
    model = swapped(device)
    for sizes in ((0, 8), (2, -1), (2, 8.0), (True, 8)):
        with pytest.raises(
            ValueError, match="capture: expected (batch_size|max_length) to be a positive integer"
        ):
            dynplan.capture(model, *sizes)
    with pytest.raises(ValueError, match="capture: expected max_length to be at most the model's 40, got 41"):
        dynplan.capture(model, 2, 41)
    captured = dynplan.capture(model, 2, 8)
    ids = torch.ones(2, 8, dtype=torch.long, device=device)
    with pytest.raises(ValueError, match="capture: expected at most 2 samples, as captured, got 3"):
        captured(ids.new_ones(3, 8))
    with pytest.raises(ValueError, match="capture: expected at most 8 tokens a sample, as captured, got 9"):
        captured(ids.new_ones(2, 9))
    with pytest.raises(ValueError, match=r"capture: expected attention_mask of shape \(2, 8\), got \(2, 7\)"):
        captured(ids, ids.new_ones(2, 7))
    with pytest.raises(ValueError, match=r"capture: expected input_ids of shape \(B, S\), got \(8,\)"):
        captured(ids[0])
    model.dynplan.gates = torch.ones(2, 4)
    with pytest.raises(RuntimeError, match="capture: expected no gates"):
        captured(ids)
    model.dynplan.gates = None
    model.to("meta")
    with pytest.raises(
        RuntimeError, match=f"capture: expected the model on {device}.*, as captured, got meta"
    ):
        captured(ids)
    captured = dynplan.capture(swapped(device), 2, 8)
    captured.model.train()
    with pytest.raises(RuntimeError, match="capture: expected the model in evaluation mode"):
        captured(ids)


def test_adapters_are_refused(device):
    model = swapped(device)
    model.bert.encoder.layer[2].output.dense.register_forward_hook(lambda module, inputs, output: None)
    with pytest.raises(NotImplementedError, match="layers for the kernels, .* layer 2: output.dense"):
        dynplan.capture(model, 2, 8)


@pytest.mark.cuda
@requires_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_never_waits_for_the_device(dtype):
    model = swapped("cuda").to(dtype)
    inputs = to("cuda", batch())
    for policy in policies() + exit_policies() + [RandomPath(0.5)]:
        model.dynplan.policy = policy
        with torch.no_grad():
            model(**inputs)  # moves the planner, packs the weights
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                model(**inputs)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@requires_cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_equals_cpu(dtype):
    keep = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)) < 0.6
    inputs = batch((12, 3, 1, 7, 5))
    with torch.no_grad():
        exact = swapped(policy=FixedPath(keep)).double()(**inputs).logits
        on_cpu = swapped(policy=FixedPath(keep)).to(dtype)(**inputs).logits.double()
        on_cuda = swapped("cuda", FixedPath(keep)).to(dtype)(**to("cuda", inputs)).logits.double().cpu()
    assert (on_cuda - exact).abs().max() <= 2 * (on_cpu - exact).abs().max() + 4 * ATOL[dtype]


@pytest.mark.cuda
@requires_cuda
def test_two_threads_on_two_streams_share_a_graph():
    model = swapped("cuda")
    captured = dynplan.capture(model, 6, 12)
    inputs = [to("cuda", batch(seed=seed)) for seed in range(2)]
    with torch.no_grad():
        wanted = [model(**one) for one in inputs]
    got = [[], []]

    def work(which):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.default_stream())
        with torch.cuda.stream(stream):
            for _ in range(20):
                got[which].append(captured(**inputs[which]))
        stream.synchronize()

    torch.cuda.synchronize()
    threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for which in range(2):
        assert len(got[which]) == 20
        for output in got[which]:
            assert_same(output, wanted[which])


@pytest.mark.cuda
@requires_cuda
def test_a_policy_that_waits_is_refused():
    class Waits(Policy):
        def plan(self, request):
            keep = torch.ones(request.batch_size, request.num_layers, dtype=torch.bool, device=request.device)
            return keep if request.hidden.sum().item() else ~keep

    with pytest.raises(RuntimeError, match="capture: the forward cannot be recorded as a CUDA graph"):
        dynplan.capture(swapped("cuda", Waits()), 2, 8)
    torch.rand(3, device="cuda")  # the generator is out of the recording that failed
    dynplan.capture(swapped("cuda"), 2, 8)(torch.ones(2, 8, dtype=torch.long, device="cuda"))
