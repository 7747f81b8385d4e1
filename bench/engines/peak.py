"""The machine's matrix-product peak at a model's product shapes: the best that a PyTorch user can get."""

import time

from workloads import Model

ROWS = (512, 1024)


class ProductPeak:
    """``F.linear`` and oneDNN's prepacked linear on every product of the model, fp32, operands warm."""

    def __init__(self, model: Model, threads: int) -> None:
        import torch
        import torch.nn.functional as F

        torch.set_num_threads(threads)
        self.cases = {}
        for rows in ROWS:
            for name, (inner, outer) in model.products().items():
                x, weight, bias = torch.randn(rows, inner), torch.randn(outer, inner), torch.randn(outer)
                work = 2 * rows * inner * outer
                self.cases[f"linear {name} {rows}x{inner}x{outer}"] = work, F.linear, (x, weight, bias)
                if torch.backends.mkldnn.is_available():
                    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)
                    call = torch.ops.mkldnn._linear_pointwise
                    arguments = (x, packed, bias, "none", [], "")
                    self.cases[f"oneDNN {name} {rows}x{inner}x{outer}"] = work, call, arguments

    def measure(self, seconds: float = 0.02) -> dict[str, float]:
        """Operations per second of each case, one sample of at least ``seconds``."""
        import torch

        rates = {}
        with torch.inference_mode():
            for name, (work, call, arguments) in self.cases.items():
                call(*arguments)
                calls, start = 0, time.perf_counter()
                while (spent := time.perf_counter() - start) < seconds:
                    call(*arguments)
                    calls += 1
                rates[name] = work * calls / spent
        return rates
