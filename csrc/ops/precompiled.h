// What nearly every op includes, parsed once by setup.py. No source includes it: each names what it needs.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <torch/library.h>
