"""The ops: one file each, the public function with its docstring, fake and autograd."""

from dynplan import (
    _library as _library,
)  # registers the compiled ops before any op file refers to them
from dynplan.ops.build_dispatch import Dispatch, build_dispatch
from dynplan.ops.pack import Packed, pack, unpack

__all__ = ["Dispatch", "Packed", "build_dispatch", "pack", "unpack"]
