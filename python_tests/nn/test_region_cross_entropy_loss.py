"""RegionCrossEntropyLoss, and the adapters that give it other libraries' conventions."""

import re
import sys
import types

import pytest
import torch
import torch.nn.functional as F

from dynplan.integrations.segmentation import mmsegmentation, monai, segmentation_models_pytorch
from dynplan.nn import RegionCrossEntropyLoss
from dynplan.ops import region_cross_entropy, region_cross_entropy_upsampled

INPUT = torch.randn(2, 3, 9, 12)
TARGET = torch.randint(3, (2, 9, 12))


def test_module_is_the_function():
    options = {"kernel_size": 3, "p": 2.0, "stride": 2, "label_smoothing": 0.1}
    loss = RegionCrossEntropyLoss(weight=[1.0, 2.0, 3.0], **options)
    expected = region_cross_entropy(INPUT, TARGET, weight=torch.tensor([1.0, 2.0, 3.0]), **options)
    assert torch.equal(loss(INPUT, TARGET), expected)
    stats = loss.stats(INPUT, TARGET)
    assert torch.equal(stats.loss, expected) and stats.agreement.shape == stats.losses.shape == (2, 5, 6)
    assert loss.state_dict() == {} and "p=2.0" in repr(loss) and "weighted" in repr(loss)
    tenths = torch.tensor([0.1, 0.2, 0.3], dtype=torch.float64)  # keep their digits
    exact = region_cross_entropy(INPUT.double(), TARGET, weight=tenths)
    assert torch.equal(RegionCrossEntropyLoss(weight=tenths)(INPUT.double(), TARGET), exact)
    assert loss.to(torch.bfloat16).weight.dtype == torch.bfloat16
    torch.testing.assert_close(loss(INPUT, TARGET), expected)


def test_module_with_low_resolution_logits():
    low = INPUT[:, :, ::2, ::2]
    expected = region_cross_entropy_upsampled(low, TARGET, align_corners=True)
    loss = RegionCrossEntropyLoss(align_corners=True)
    assert torch.equal(loss(low, TARGET), expected) and torch.equal(loss.stats(low, TARGET).loss, expected)
    with pytest.raises(ValueError, match="expected target to have shape"):
        RegionCrossEntropyLoss()(low, TARGET)


def test_segmentation_models_pytorch():
    loss = segmentation_models_pytorch.RegionLoss("multiclass", kernel_size=3)
    assert torch.equal(loss(INPUT, TARGET), region_cross_entropy(INPUT, TARGET, kernel_size=3))
    ignoring = segmentation_models_pytorch.RegionLoss("multiclass", ignore_index=2)
    assert torch.equal(ignoring(INPUT, TARGET[:, None]), region_cross_entropy(INPUT, TARGET, ignore_index=2))
    binary = segmentation_models_pytorch.RegionLoss("binary", kernel_size=1, p=1.0)
    truth = (TARGET > 0).float()[:, None]
    expected = F.binary_cross_entropy_with_logits(INPUT[:, :1], truth)
    torch.testing.assert_close(binary(INPUT[:, :1], truth), expected)
    torch.testing.assert_close(binary(INPUT[:, :1], truth.bool()), expected)
    assert torch.equal(loss(INPUT, TARGET.to(torch.uint8)), loss(INPUT, TARGET))
    with pytest.raises(ValueError, match="'binary' or 'multiclass', got 'multilabel'"):
        segmentation_models_pytorch.RegionLoss("multilabel")


def test_monai():
    loss = monai.RegionLoss(kernel_size=3)
    expected = region_cross_entropy(INPUT, TARGET, kernel_size=3)
    assert torch.equal(loss(INPUT, TARGET[:, None].float()), expected)
    assert torch.equal(loss(INPUT, F.one_hot(TARGET, 3).movedim(-1, 1)), expected)
    expected = region_cross_entropy(INPUT, TARGET, ignore_index=0)
    for ignored in (255, (-100, 255)):
        foreground = monai.RegionLoss(include_background=False, ignore_index=ignored)
        for labels in (TARGET, TARGET.to(torch.uint8), TARGET.float()):
            assert torch.equal(foreground(INPUT, labels[:, None]), expected)
    binary, truth = monai.RegionLoss(kernel_size=1, p=1.0), (TARGET > 0).float()[:, None]
    expected = F.binary_cross_entropy_with_logits(INPUT[:, :1], truth)
    torch.testing.assert_close(binary(INPUT[:, :1], truth), expected)
    volume = torch.randn(1, 2, 4, 5, 6)
    assert monai.RegionLoss(spacing=(3.0, 1.0, 1.0))(volume, torch.zeros(1, 1, 4, 5, 6)).isfinite()


def test_soft_labels_are_refused():
    """A loss over windows of one label would have to make hard ones of them."""
    binary, multiclass = (segmentation_models_pytorch.RegionLoss(m) for m in ("binary", "multiclass"))
    truth = (TARGET > 0).float()[:, None]
    for soft, text in ((0.9, "0.9"), (1.5, "1.5"), (float("nan"), "nan")):
        changed = truth.clone()
        changed[1, 0, 2, 3] = soft
        with pytest.raises(ValueError, match=f"RegionLoss: expected y_true to hold whole labels, got {text}"):
            binary(INPUT[:, :1], changed)
        with pytest.raises(ValueError, match=f"RegionLoss: expected y_true to hold whole labels, got {text}"):
            multiclass(INPUT, changed)
        with pytest.raises(ValueError, match=f"RegionLoss: expected target to hold whole labels, got {text}"):
            monai.RegionLoss()(INPUT, changed)
    one_hot = F.one_hot(TARGET, 3).movedim(-1, 1)
    for column, shown in (
        ([0.2, 0.8, 0.0], "0.2.*0.8"),
        ([0.0] * 3, "0.0, 0.0, 0.0"),
        ([1.0, 1.0, 0.0], "1.0, 1.0"),
    ):
        changed = one_hot.float()
        changed[0, :, 4, 5] = torch.tensor(column)
        with pytest.raises(ValueError, match=rf"RegionLoss: expected target to be one-hot .*, got \[{shown}"):
            monai.RegionLoss()(INPUT, changed)
    for kind in (torch.bool, torch.uint8, torch.float16, torch.float32):
        assert torch.equal(monai.RegionLoss()(INPUT, one_hot.to(kind)), region_cross_entropy(INPUT, TARGET))
    with pytest.raises(ValueError, match="RegionLoss: expected target to have 1 or 3 channels, got 2"):
        monai.RegionLoss()(INPUT, one_hot[:, :2])


def test_adapters_in_a_compiled_graph():
    binary = segmentation_models_pytorch.RegionLoss("binary")
    truth = (TARGET > 0).float()[:, None]
    compiled = torch.compile(lambda x, y: binary(x, y), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(INPUT[:, :1], truth), binary(INPUT[:, :1], truth))
    with pytest.raises(RuntimeError, match="RegionLoss: expected y_true to hold whole labels"):
        compiled(INPUT[:, :1], truth + 0.25)


@pytest.mark.parametrize("shape", [(2, 2, 9, 12), (2, 9, 12), (2, 12)])
def test_binary_logits_have_one_channel(shape):
    loss, truth = segmentation_models_pytorch.RegionLoss("binary"), (TARGET > 0).float()
    shown = re.escape(str(list(shape)))
    with pytest.raises(
        ValueError, match=rf"y_pred to have shape \(N, 1, H, W\) with mode 'binary', got {shown}"
    ):
        loss(torch.randn(shape), truth)


def test_adapters_name_themselves_and_the_argument():
    smp, mmseg = segmentation_models_pytorch.RegionLoss, mmsegmentation.RegionLoss
    for make in (lambda: smp("binary", from_logits=True), lambda: smp("multiclass", classes=[1]),
                 lambda: monai.RegionLoss(softmax=True), lambda: monai.RegionLoss(to_onehot_y=True),
                 lambda: mmseg(use_sigmoid=False)):  # fmt: skip
        with pytest.raises(
            TypeError, match="^RegionLoss: expected options among kernel_size, .*, got [a-z_]+$"
        ):
            make()
    with pytest.raises(TypeError, match="RegionLoss: expected y_true to be a tensor, got ndarray"):
        smp("multiclass")(INPUT, TARGET.numpy())
    with pytest.raises(TypeError, match="RegionLoss: expected y_pred to be a tensor, got ndarray"):
        smp("binary")(INPUT[:, :1].numpy(), TARGET)
    with pytest.raises(TypeError, match="RegionLoss: expected target to be a tensor, got ndarray"):
        monai.RegionLoss()(INPUT, TARGET.numpy())
    with pytest.raises(TypeError, match="region_cross_entropy: expected target to be a tensor, got ndarray"):
        mmseg()(INPUT, TARGET.numpy())


def test_mmsegmentation(monkeypatch):
    loss = mmsegmentation.RegionLoss(loss_weight=0.5, class_weight=[1.0, 1.0, 2.0])
    expected = region_cross_entropy(INPUT, TARGET, weight=torch.tensor([1.0, 1.0, 2.0]), ignore_index=1)
    torch.testing.assert_close(loss(INPUT, TARGET, ignore_index=1), 0.5 * expected)
    assert loss.loss_name == "loss_region"
    ignoring = mmsegmentation.RegionLoss(class_weight=[1.0, 1.0, 2.0], ignore_index=1)
    torch.testing.assert_close(ignoring(INPUT, TARGET), expected)
    with pytest.raises(ValueError, match="expected weight to be None, got Tensor"):
        loss(INPUT, TARGET, weight=torch.ones(2, 9, 12))

    registered = {}
    registry = types.ModuleType("mmseg.registry")
    registry.MODELS = types.SimpleNamespace(register_module=lambda **kw: registered.update(kw))
    monkeypatch.setitem(sys.modules, "mmseg", types.ModuleType("mmseg"))
    monkeypatch.setitem(sys.modules, "mmseg.registry", registry)
    assert mmsegmentation.register() and registered["module"] is mmsegmentation.RegionLoss
