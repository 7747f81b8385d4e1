"""dynplan: fused per-sample layer dispatch for BERT-family encoders, and a fused region loss."""

from dynplan import _library, ops

__version__ = _library.build_info()["version"]
__all__ = ["ops"]
