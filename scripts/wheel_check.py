"""README's first example and the region loss with an installed dynplan: what wheel_check.sh runs."""

import shutil

import torch
from transformers import BertConfig, BertForSequenceClassification

import dynplan
from dynplan.policies import FixedPath, RandomPath

for name in ("g++", "cc", "nvcc", "ninja"):
    assert shutil.which(name) is None, f"expected no compiler here, found {name}"

torch.manual_seed(0)
config = BertConfig(
    vocab_size=100, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=128
)
model = BertForSequenceClassification(config).eval()
ids = torch.randint(100, (8, 12))
mask = (torch.arange(12) < torch.randint(3, 13, (8, 1))).long()
inputs = {"input_ids": ids, "attention_mask": mask}
with torch.inference_mode():
    wanted = model(**inputs).logits
    model = dynplan.swap(model)
    torch.testing.assert_close(model(**inputs).logits, wanted, atol=1e-5, rtol=1e-5)
    assert model.dynplan.why_not_fused is None
    model.dynplan.policy = RandomPath(0.5)
    model(**inputs)
    plan = model.dynplan.last_plan
    assert plan.shape == (8, 4) and plan.sum() <= 16
    model.dynplan.policy = FixedPath(torch.tensor([True, False, True, True]))
    model(**inputs)
    assert torch.equal(dynplan.unswap(model)(**inputs).logits, wanted)

logits, labels = torch.randn(2, 5, 16, 16, requires_grad=True), torch.randint(5, (2, 16, 16))
plain = torch.nn.functional.cross_entropy(logits, labels)
loss = dynplan.ops.region_cross_entropy(logits, labels, kernel_size=1, p=1.0)
torch.testing.assert_close(loss, plain)
dynplan.nn.RegionCrossEntropyLoss(kernel_size=5)(logits, labels).backward()
assert logits.grad.isfinite().all()
print(f"dynplan {dynplan.__version__} with torch {torch.__version__}: README's first example runs")
