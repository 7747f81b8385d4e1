#include "kernels/encoder/embed_tokens.h"

#include <pybind11/numpy.h>

#include <limits>
#include <string>
#include <vector>

#include "kernels/packing/pack.h"
#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

Dense<float> embed_tokens(const Dense<int64_t>& input_ids, const Dense<bool>& mask,
                          const Dense<int64_t>& token_type_ids, const Dense<float>& word,
                          const Dense<float>& type, const Dense<float>& position,
                          const Dense<float>& norm_weight, const Dense<float>& norm_bias, float eps,
                          int64_t padding_idx) {
  const auto like_ids = [&](const py::array& array) {
    return array.ndim() == 2 && array.shape(0) == input_ids.shape(0) && array.shape(1) == input_ids.shape(1);
  };
  if (input_ids.ndim() != 2 || !like_ids(mask) || !like_ids(token_type_ids) || word.ndim() != 2 ||
      type.ndim() != 2 || position.ndim() != 2)
    throw py::value_error("embed_tokens: expected ids, mask and types (B, S) and tables of two dimensions");
  const int64_t batch = input_ids.shape(0), length = input_ids.shape(1), width = word.shape(1);
  if (type.shape(1) != width || position.shape(1) != width || norm_weight.size() != width ||
      norm_bias.size() != width)
    throw py::value_error("embed_tokens: expected tables and norm of one width");
  if (padding_idx >= position.shape(0))
    throw py::value_error("embed_tokens: expected padding_idx to be a row of position or below 0, got " +
                          std::to_string(padding_idx));
  if (batch * length > std::numeric_limits<int32_t>::max())
    throw py::value_error("embed_tokens: expected at most 2^31 - 1 positions, got " +
                          std::to_string(batch * length));
  const kernels::Truth* const entries = kernels::truths(mask.data());
  const kernels::Ids ids = {input_ids.data(), true}, types = {token_type_ids.data(), true};
  std::vector<int32_t> cu_seqlens(batch + 1);
  const int64_t tokens = kernels::count_tokens(entries, batch, length, cu_seqlens.data());
  std::vector<int32_t> indices(tokens);
  std::vector<int64_t> positions(tokens);
  kernels::token_indices(entries, batch * length, indices.data());
  kernels::token_positions(ids, length, padding_idx, indices.data(), tokens, positions.data());
  bool inside = kernels::find_outside(ids, input_ids.size(), word.shape(0)) < 0 &&
                kernels::find_outside(types, token_type_ids.size(), type.shape(0)) < 0;
  for (const int64_t place : positions) inside &= place < position.shape(0);
  if (!inside) throw py::index_error("embed_tokens: expected ids and positions within their tables");
  Dense<float> packed({tokens, width});
  kernels::embed_tokens({.ids = ids,
                         .token_types = types,
                         .indices = indices.data(),
                         .positions = positions.data(),
                         .tokens = tokens,
                         .width = width,
                         .word = word.data(),
                         .type = type.data(),
                         .position = position.data(),
                         .norm_weight = norm_weight.data(),
                         .norm_bias = norm_bias.data(),
                         .eps = eps,
                         .packed = packed.mutable_data()},
                        kernels::serial);
  return packed;
}

}  // namespace

void bind_embed_tokens(py::module_& m) {
  m.def("embed_tokens", &embed_tokens, py::arg("input_ids").noconvert(), py::arg("mask").noconvert(),
        py::arg("token_type_ids").noconvert(), py::arg("word").noconvert(), py::arg("type").noconvert(),
        py::arg("position").noconvert(), py::arg("norm_weight"), py::arg("norm_bias"), py::arg("eps"),
        py::arg("padding_idx") = -1,
        "ids and types int64 (B, S), mask bool (B, S), float32 tables and norm -> packed (T, E); "
        "padding_idx: of "
        "RoBERTa's positions, below 0 for columns");
}

}  // namespace dynplan
