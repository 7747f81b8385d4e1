#include "kernels/encoder/conditional_encoder_layer.h"

#include <pybind11/numpy.h>
#include <pybind11/stl.h>

#include <array>
#include <string>
#include <utility>
#include <vector>

#include "kernels/encoder/checks.h"
#include "kernels/encoder/reduced_encoder.h"
#include "native/bindings.h"

namespace py = pybind11;

namespace dynplan {
namespace {

template <class T>
using Dense = py::array_t<T, py::array::c_style>;

Dense<uint8_t> pack_encoder_weights(const std::array<Dense<float>, 12>& w, const std::string& dtype) {
  using kernels::WeightType;
  const int64_t h = w[3].size(), i = w[7].size();
  if (h == 0 || i == 0)
    throw py::value_error("pack_encoder_weights: expected sizes to be positive, got H = " +
                          std::to_string(h) + ", I = " + std::to_string(i));
  const std::array<int64_t, 12> sizes = {3 * h * h, 3 * h, h * h, h, h, h, i * h, i, h * i, h, h, h};
  for (size_t t = 0; t < sizes.size(); ++t)
    if (w[t].size() != sizes[t])
      throw py::value_error("pack_encoder_weights: expected tensor " + std::to_string(t) + " to hold " +
                            std::to_string(sizes[t]) + " numbers, got " + std::to_string(w[t].size()));
  const kernels::EncoderLayerTensors<float> tensors = {w[0].data(), w[1].data(), w[2].data(),  w[3].data(),
                                                       w[4].data(), w[5].data(), w[6].data(),  w[7].data(),
                                                       w[8].data(), w[9].data(), w[10].data(), w[11].data()};
  for (const WeightType type : {WeightType::float32, WeightType::bfloat16}) {
    if (dtype != kernels::name(type)) continue;
    Dense<uint8_t> blob(kernels::PackedLayout(type, h, i).bytes());
    kernels::pack_encoder_weights(type, tensors, h, i, blob.mutable_data());
    return blob;
  }
  if (dtype != kernels::name(WeightType::int8))
    throw py::value_error("pack_encoder_weights: expected dtype to be float32, bfloat16 or int8, got " +
                          dtype);
  Dense<uint8_t> blob(kernels::ReducedLayout(h, i).bytes);
  kernels::pack_reduced_weights(tensors, h, i, kernels::kRowLevels, blob.mutable_data());
  return blob;
}

kernels::Activation parse_activation(const std::string& name) {
  const std::optional<kernels::Activation> found = kernels::activation_of(name);
  if (found) return *found;
  throw py::value_error(std::string("conditional_encoder: expected activation to be one of ") +
                        kernels::kActivationNames + ", got " + name);
}

kernels::CpuIsa parse_isa(const std::string& name) {
  if (name.empty()) return kernels::cpu_isa();
  for (auto isa : {kernels::CpuIsa::baseline, kernels::CpuIsa::avx2, kernels::CpuIsa::avx512})
    if (name == kernels::name(isa) && isa <= kernels::best_cpu_isa()) return isa;
  throw py::value_error(
      std::string("conditional_encoder: expected isa to be ") + kernels::kIsaNames + " and on this CPU, got " +
      name);
}

Dense<float> conditional_encoder(const Dense<float>& hidden, const Dense<int32_t>& rows,
                                 const Dense<int32_t>& cu_seqlens, const Dense<int32_t>& counts,
                                 const std::vector<Dense<uint8_t>>& packed, int64_t heads,
                                 const std::string& activation, float eps, const std::string& isa) {
  const int64_t layers = static_cast<int64_t>(packed.size());
  if (hidden.ndim() != 2 || rows.ndim() != 2 || cu_seqlens.ndim() != 2 || counts.ndim() != 2 ||
      rows.shape(0) != layers || rows.shape(1) != hidden.shape(0) || cu_seqlens.shape(0) != layers ||
      cu_seqlens.shape(1) < 1 || counts.shape(0) != layers || counts.shape(1) != 2)
    throw py::value_error(
        "conditional_encoder: expected hidden (T, H), rows (L, T), cu_seqlens (L, B+1), counts (L, 2) and "
        "L packed weights");
  const int64_t tokens = hidden.shape(0), width = hidden.shape(1), samples = cu_seqlens.shape(1) - 1;
  if (heads < 1 || width % heads != 0)
    throw py::value_error("conditional_encoder: expected heads to divide the width " + std::to_string(width) +
                          ", got " + std::to_string(heads));
  std::string problem;
  const int64_t most = kernels::check_dispatch(
      {rows.data(), cu_seqlens.data(), counts.data(), layers, tokens, samples}, problem);
  std::vector<std::pair<const void*, int64_t>> checked;
  std::vector<const void*> blobs;
  for (const Dense<uint8_t>& blob : packed) {
    checked.emplace_back(blob.data(), blob.size());
    blobs.push_back(blob.data());
  }
  const auto shape = most < 0 ? std::nullopt : kernels::check_all_packed(checked, width, problem);
  if (!shape) throw py::value_error("conditional_encoder: expected " + problem);
  const int64_t intermediate = shape->intermediate_size;
  const bool int8 = shape->type == kernels::WeightType::int8;

  Dense<float> out({tokens, width});
  std::memcpy(out.mutable_data(), hidden.data(), hidden.nbytes());
  std::vector<float> workspace(int8 ? kernels::reduced_workspace_floats(most, width, intermediate)
                                    : kernels::encoder_workspace_floats(most, width, intermediate));
  const kernels::ConditionalEncoderParams params = {.hidden = out.mutable_data(),
                                                    .row_type = kernels::RowType::float32,
                                                    .rows = rows.data(),
                                                    .cu_seqlens = cu_seqlens.data(),
                                                    .counts = counts.data(),
                                                    .packed = blobs.data(),
                                                    .layers = layers,
                                                    .capacity = tokens,
                                                    .samples = samples,
                                                    .hidden_size = width,
                                                    .intermediate_size = intermediate,
                                                    .heads = heads,
                                                    .activation = parse_activation(activation),
                                                    .eps = eps,
                                                    .workers = 1,
                                                    .workspace = workspace.data()};
  if (int8)
    kernels::reduced_encoder(params, kernels::plain_product, kernels::serial, parse_isa(isa));
  else
    kernels::conditional_encoder(params, kernels::serial, parse_isa(isa));
  return out;
}

}  // namespace

void bind_conditional_encoder_layer(py::module_& m) {
  m.def("pack_encoder_weights", &pack_encoder_weights, py::arg("weights"), py::arg("dtype") = "float32",
        "12 float32 arrays in the order of EncoderLayerWeights -> uint8 (bytes,); dtype: float32, bfloat16 "
        "or int8");
  m.def("conditional_encoder", &conditional_encoder, py::arg("hidden").noconvert(),
        py::arg("rows").noconvert(), py::arg("cu_seqlens").noconvert(), py::arg("counts").noconvert(),
        py::arg("packed_weights"), py::arg("num_heads"), py::arg("activation") = "gelu",
        py::arg("eps") = 1e-12f, py::arg("isa") = "",
        "hidden float32 (T, H), rows (L, T), cu_seqlens (L, B+1), counts (L, 2), L packed weights -> (T, H); "
        "isa: baseline, avx2 or avx512, empty for what cpu_features() names");
}

}  // namespace dynplan
