"""The torch-free kernels over NumPy buffers, single-threaded: for tests and microbenchmarks."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

def cpu_features() -> dict[str, Any]: ...
def build_info() -> dict[str, Any]: ...
def pack(
    hidden: NDArray[np.float32], mask: NDArray[np.bool_]
) -> tuple[NDArray[np.float32], NDArray[np.int32], NDArray[np.int32]]: ...
def build_dispatch(
    keep: NDArray[np.bool_], cu_seqlens: NDArray[np.int32]
) -> tuple[NDArray[np.int32], NDArray[np.int32], NDArray[np.int32]]: ...
def embed_tokens(
    input_ids: NDArray[np.int64],
    mask: NDArray[np.bool_],
    token_type_ids: NDArray[np.int64],
    word: NDArray[np.float32],
    type: NDArray[np.float32],
    position: NDArray[np.float32],
    norm_weight: ArrayLike,
    norm_bias: ArrayLike,
    eps: float,
    padding_idx: int = -1,
) -> NDArray[np.float32]: ...
def pack_encoder_weights(weights: Sequence[ArrayLike], dtype: str = "float32") -> NDArray[np.uint8]: ...
def conditional_encoder(
    hidden: NDArray[np.float32],
    rows: NDArray[np.int32],
    cu_seqlens: NDArray[np.int32],
    counts: NDArray[np.int32],
    packed_weights: Sequence[ArrayLike],
    num_heads: int,
    activation: str = "gelu",
    eps: float = 1e-12,
    isa: str = "",
) -> NDArray[np.float32]: ...
def region_cross_entropy(
    input: NDArray[np.float32],
    target: NDArray[np.int64],
    kernel_size: int = 5,
    sigma: float = 1.0,
    p: float = 5.0,
    ignore_index: int = -100,
) -> tuple[float, NDArray[np.float32], NDArray[np.float32]]: ...
