"""ONNX Runtime and OpenVINO, from one export to ONNX."""

from pathlib import Path
from typing import Any

import numpy as np
from workloads import Batch, Model

from engines import Engine

PLAIN, OPTIMIZED, INT8 = "model.onnx", "optimized.onnx", "int8.onnx"


def export(model: Model, path: Path) -> None:
    """Write the encoder as ONNX with free batch size and length.

    Attention is written out and the exporter is the TorchScript one: that is the form whose patterns ONNX
    Runtime's transformers optimizer knows. Of the newer exporter's graph it fuses no attention (1.31).
    """
    import torch
    import transformers

    class LastHiddenState(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = transformers.AutoModel.from_pretrained(
                model.folder, dtype=torch.float32, attn_implementation="eager", add_pooling_layer=False
            )

        def forward(self, input_ids, attention_mask):
            return self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    ids = torch.randint(5, 1000, (2, 16))
    mask = (torch.arange(16) < torch.tensor([[16], [9]])).long()
    names = ("input_ids", "attention_mask", "last_hidden_state")
    torch.onnx.export(
        LastHiddenState().eval(),
        (ids, mask),
        str(path),
        input_names=list(names[:2]),
        output_names=list(names[2:]),
        dynamic_axes={name: {0: "batch", 1: "length"} for name in names},
        opset_version=17,
        dynamo=False,
    )


class OnnxRuntime(Engine):
    """fp32, graph fused by onnxruntime.transformers.optimizer."""

    modules = ("onnxruntime",)
    converters = ("onnx", "onnxscript")
    file = OPTIMIZED

    @classmethod
    def convert(cls, model: Model, folder: Path) -> None:
        from onnxruntime.transformers import optimizer

        export(model, folder / PLAIN)
        fused = optimizer.optimize_model(
            str(folder / PLAIN), "bert", num_heads=model.heads, hidden_size=model.hidden, opt_level=1
        )
        found = fused.get_fused_operator_statistics()["Attention"]
        if found != model.layers:  # a rival that is not at its best would make the comparison worthless
            raise RuntimeError(f"onnxruntime: expected {model.layers} fused attentions, got {found}")
        fused.save_model_to_file(str(folder / OPTIMIZED))
        (folder / PLAIN).unlink()

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        path = str(folder / self.file)
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def prepare(self, batch: Batch) -> Any:
        return {"input_ids": batch.ids, "attention_mask": batch.mask}

    def forward(self, inputs: Any) -> Any:
        return self.session.run(None, inputs)[0]


class OnnxRuntimeInt8(OnnxRuntime):
    """Dynamic int8 of the fused graph: weights per column, activations per tensor."""

    precision = "int8"
    file = INT8

    @classmethod
    def convert(cls, model: Model, folder: Path) -> None:
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        super().convert(model, folder)
        quantize_dynamic(
            folder / OPTIMIZED,
            folder / INT8,
            weight_type=QuantType.QInt8,
            per_channel=True,
            # Shape inference does not know the fused operators, so it cannot tell that they give floats.
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        (folder / OPTIMIZED).unlink()


class OpenVino(Engine):
    """fp32, latency hint with one stream, the setting for one request at a time."""

    modules = ("openvino",)
    converters = ("onnx", "onnxscript")
    specialises = True

    @classmethod
    def convert(cls, model: Model, folder: Path) -> None:
        export(model, folder / PLAIN)

    def __init__(self, model: Model, folder: Path, threads: int) -> None:
        import openvino

        core = openvino.Core()
        settings = {
            "INFERENCE_NUM_THREADS": threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # where the CPU has bf16 instructions that is not the default
        }
        self.request = core.compile_model(folder / PLAIN, "CPU", settings).create_infer_request()

    def prepare(self, batch: Batch) -> Any:
        return {"input_ids": batch.ids, "attention_mask": batch.mask}

    def forward(self, inputs: Any) -> Any:
        return self.request.infer(inputs, share_inputs=True, share_outputs=True)[0]

    def hidden(self, output: Any, batch: Batch) -> np.ndarray:
        return np.array(output)  # the next inference writes into the same memory
