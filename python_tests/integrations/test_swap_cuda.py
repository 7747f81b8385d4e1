"""The swapped model on a GPU without a graph: types, autocast, training, streams, misplaced input."""

import copy
import threading

import pytest
import torch
import torch.distributed as dist
from helpers import DEVICES, requires_cuda
from integrations.models import batch, tiny
from integrations.test_training import LABELS, PATHS, gradients
from torch.nn.parallel import DistributedDataParallel

import dynplan
from dynplan.integrations.huggingface import fused
from dynplan.integrations.huggingface.encoder_state import EncoderState
from dynplan.ops import build_dispatch
from dynplan.policies import FixedPath, Policy

ON_CUDA = [pytest.mark.cuda, requires_cuda]
NO_DROPOUT = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def on_cuda(inputs):
    return {name: value.cuda() for name, value in inputs.items()}


def flat(model):
    return torch.cat([grad.flatten().float() for _, grad in sorted(gradients(model).items())])


def test_rows_take_the_type_of_the_weights(monkeypatch):
    """Autocast's float32 embeddings before bf16 weights; CUDA's packed weights have the type of the rows."""
    model, seen = dynplan.swap(tiny(), FixedPath(PATHS)), []

    def encode(hidden, *_, packed_weights, **__):
        seen.append(hidden.dtype)
        return hidden

    monkeypatch.setattr(fused, "conditional_encoder", encode)
    monkeypatch.setattr(EncoderState, "packed", lambda self: [torch.zeros(1, dtype=torch.bfloat16)])
    with torch.no_grad():
        embeds = torch.zeros(5, 9, 32)
        assert model(None, batch()["attention_mask"], inputs_embeds=embeds).logits.dtype == torch.float32
    assert seen == [torch.bfloat16]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_amp_trains_past_bypassed_samples(dtype, device):
    model = dynplan.swap(tiny(**NO_DROPOUT).to(device), FixedPath(PATHS)).train()
    inputs, labels = {name: value.to(device) for name, value in batch().items()}, LABELS.to(device)
    exact = copy.deepcopy(model)
    exact(**inputs, labels=labels).loss.backward()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, enabled=dtype == torch.float16)
    with torch.autocast(device, dtype):
        loss = model(**inputs, labels=labels).loss
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    ours, wanted = flat(model), flat(exact)
    assert ours.isfinite().all()
    assert torch.cosine_similarity(ours, wanted, dim=0) > 0.99
    before = copy.deepcopy(model.state_dict())
    scaler.step(optimizer)
    assert any(not torch.equal(before[name], value) for name, value in model.state_dict().items())


class OnTheCPU(Policy):
    def plan(self, request):
        return torch.ones(request.batch_size, request.num_layers, dtype=torch.bool)


class TestOnCuda:
    pytestmark = ON_CUDA

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_autocast_infers_in_the_weights_type(self, dtype):
        model, inputs = dynplan.swap(tiny().cuda().to(dtype), FixedPath(PATHS)), on_cuda(batch())
        with torch.no_grad():
            wanted = model(**inputs).logits
            with torch.autocast("cuda", dtype):
                ours = model(**inputs).logits
        torch.testing.assert_close(ours.float(), wanted.float(), rtol=0.05, atol=0.1)

    def test_training_equals_that_on_the_cpu(self):
        model = dynplan.swap(tiny(**NO_DROPOUT), FixedPath(PATHS)).double()
        on_gpu = copy.deepcopy(model).cuda()
        model(**batch(), labels=LABELS).loss.backward()
        on_gpu(**on_cuda(batch()), labels=LABELS.cuda()).loss.backward()
        theirs, ours = gradients(model), gradients(on_gpu)
        assert theirs.keys() == ours.keys()
        for name, grad in theirs.items():
            torch.testing.assert_close(ours[name].cpu(), grad, rtol=1e-9, atol=1e-11)

    def test_ddp(self, tmp_path):
        inputs, labels = on_cuda(batch()), LABELS.cuda()
        model = dynplan.swap(tiny(**NO_DROPOUT).cuda(), FixedPath(PATHS))
        alone = copy.deepcopy(model)
        alone(**inputs, labels=labels).loss.backward()
        dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
        try:
            parallel = DistributedDataParallel(model, device_ids=[0], find_unused_parameters=True)
            parallel(**inputs, labels=labels).loss.backward()
        finally:
            dist.destroy_process_group()
        theirs, ours = gradients(alone), gradients(model)
        for name, grad in theirs.items():
            torch.testing.assert_close(ours[name], grad, rtol=1e-4, atol=1e-5)

    def test_two_threads_on_two_streams(self):
        model = dynplan.swap(tiny().cuda(), FixedPath(PATHS))
        inputs = [on_cuda(batch(seed=seed)) for seed in range(2)]
        with torch.no_grad():
            wanted = [model(**one).logits for one in inputs]
        torch.cuda.synchronize()
        got = [[], []]

        def work(which):
            with torch.no_grad(), torch.cuda.stream(torch.cuda.Stream()):
                got[which] += [model(**inputs[which]).logits for _ in range(20)]
                torch.cuda.current_stream().synchronize()

        threads = [threading.Thread(target=work, args=(which,)) for which in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for logits, one in zip(got, wanted, strict=True):
            assert len(logits) == 20 and all(torch.equal(each, one) for each in logits)

    def test_misplaced_input_is_named(self):
        model, inputs = dynplan.swap(tiny().cuda()), on_cuda(batch())
        with torch.no_grad():
            with pytest.raises(ValueError, match="dynplan: expected input_ids on cuda:0, got cpu"):
                model(**inputs | {"input_ids": inputs["input_ids"].cpu()})
            with pytest.raises(ValueError, match="pack: expected attention_mask on cuda:0, got cpu"):
                model(**inputs | {"attention_mask": inputs["attention_mask"].cpu()})
            model.dynplan.policy = OnTheCPU()
            with pytest.raises(ValueError, match="OnTheCPU.plan: expected a bool tensor .* on cuda:0, got"):
                model(**inputs)

    def test_a_dispatch_beyond_its_capacity_is_cut(self):
        offsets = torch.tensor([0, 5, 99], dtype=torch.int32, device="cuda")
        rows, ends, counts = build_dispatch(torch.ones(2, 3, dtype=torch.bool, device="cuda"), offsets, 8)
        assert counts.tolist() == [[2, 8]] * 3
        assert rows.tolist() == [list(range(8))] * 3 and ends.tolist() == [[0, 5, 8]] * 3

    @pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 0),
        reason="needs a GPU older than sm_80",
    )
    def test_older_gpus_are_refused(self):
        with pytest.raises(NotImplementedError, match="expected a CUDA device of compute capability 8.0"):
            build_dispatch(
                torch.ones(1, dtype=torch.bool, device="cuda"),
                torch.zeros(2, dtype=torch.int32, device="cuda"),
                0,
            )
