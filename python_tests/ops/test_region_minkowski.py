"""The Minkowski mean over ranks and micro-batches equals the one-process, one-batch one."""

import pytest
import torch
import torch.distributed as dist
from helpers import on_ranks
from test_region_cross_entropy import case
from torch.nn.parallel import DistributedDataParallel

from dynplan.ops import MinkowskiAccumulator, region_cross_entropy, region_cross_entropy_stats

EXPONENTS = (1.0, 2.0, 5.0)


def problem():
    """A batch of 4 with very different numbers of valid anchors per image, and a model."""
    input, target = case(10, 12, batch=4)
    target[0, 3:] = -100
    target[2, :, 2:] = -100
    torch.manual_seed(0)
    return input, target, torch.nn.Conv2d(4, 4, 1, dtype=torch.float64)


def whole_batch(p, weight=None):
    input, target, model = problem()
    loss = region_cross_entropy(model(input), target, p=p, weight=weight)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("p", [*EXPONENTS, 2.7])
@pytest.mark.parametrize("weighted", [False, True])
def test_accumulated_micro_batches_equal_one_batch(p, weighted):
    weight = torch.tensor([0.5, 1.0, 2.0, 4.0], dtype=torch.float64) if weighted else None
    expected_loss, expected = whole_batch(p, weight)
    input, target, model = problem()
    accumulator = MinkowskiAccumulator(p)
    for part in (slice(0, 1), slice(1, 3), slice(3, 4)):
        stats = region_cross_entropy_stats(model(input[part]), target[part], p=p, weight=weight)
        accumulator.add(stats.loss, stats.normalizer).backward()
    loss = accumulator.finish(model.parameters())
    torch.testing.assert_close(loss, expected_loss)
    torch.testing.assert_close([parameter.grad for parameter in model.parameters()], expected)


def test_accumulated_gradients_of_fp16_logits_fit():
    # At the weight of a micro-batch's 4,800 anchors instead of 1, a loss scale of 2^16 would overflow them.
    input, target = case(60, 80, dtype=torch.float16)
    input.requires_grad_()
    accumulator = MinkowskiAccumulator(p=5.0)
    for _ in range(2):
        stats = region_cross_entropy_stats(input, target)
        (2.0**16 * accumulator.add(stats.loss, stats.normalizer)).backward()
    accumulator.finish([input])
    assert input.grad.isfinite().all() and input.grad.abs().max() > 0


def test_accumulator_with_nothing_valid():
    input, target, model = problem()
    accumulator = MinkowskiAccumulator(5.0)
    for _ in range(2):
        stats = region_cross_entropy_stats(model(input), torch.full_like(target, -100))
        accumulator.add(stats.loss, stats.normalizer).backward()
    assert accumulator.finish(model.parameters()) == 0
    assert all((parameter.grad == 0).all() for parameter in model.parameters())
    with pytest.raises(RuntimeError, match="expected add before finish"):
        accumulator.finish(model.parameters())


def work(rank):
    group = dist.group.WORLD
    mine = slice(0, 1) if rank == 0 else slice(1, 4)
    results = {}
    for p in EXPONENTS:
        input, target, model = problem()
        parallel = DistributedDataParallel(model)
        loss = region_cross_entropy(parallel(input[mine]), target[mine], p=p, process_group=group)
        loss.backward()
        results["ranks", p] = loss.detach(), [parameter.grad.clone() for parameter in model.parameters()]

        model.zero_grad()
        accumulator = MinkowskiAccumulator(p, group)
        # Rank 0 has one image, seen with labels only once.
        for image in range(4)[mine] if rank else (0, 0, 0):
            labels = target[image : image + 1]
            if rank == 0 and accumulator.started:
                labels = torch.full_like(labels, -100)
            stats = region_cross_entropy_stats(parallel(input[image : image + 1]), labels, p=p)
            accumulator.add(stats.loss, stats.normalizer).backward()
        loss = accumulator.finish(model.parameters())
        results["both", p] = loss, [parameter.grad.clone() for parameter in model.parameters()]
    return results


def test_two_processes_equal_one(tmp_path):
    for results in on_ranks(2, work, tmp_path):
        for p in EXPONENTS:
            expected_loss, expected = whole_batch(p)
            for way in ("ranks", "both"):
                loss, gradients = results[way, p]
                torch.testing.assert_close(loss, expected_loss)
                torch.testing.assert_close(gradients, expected)


def test_process_group_needs_a_mean():
    with pytest.raises(ValueError, match="expected reduction to be 'mean' with process_group, got 'none'"):
        region_cross_entropy(*case(4, 5), reduction="none", process_group=object())
