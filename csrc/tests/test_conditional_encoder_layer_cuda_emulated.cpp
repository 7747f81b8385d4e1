#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/encoder/cuda/layer.cuh"
#include "tests/check.h"
#include "tests/cuda_emulation/device_buffer.h"

using namespace dynplan::kernels::cuda;
using cuda_emulation::DeviceBuffer;
using dynplan::kernels::narrow, dynplan::kernels::widen;

namespace {

template <class T>
constexpr double kRounding = sizeof(T) == 4            ? 1.2e-7
                             : std::is_same_v<T, Half> ? 9.8e-4
                                                       : 7.9e-3;

template <class T>
std::vector<T> draw(std::mt19937& random, int64_t size, float scale = 1, float mean = 0) {
  std::normal_distribution<float> normal(mean, scale);
  std::vector<T> values(size);
  for (T& value : values) value = narrow<T>(normal(random));
  return values;
}

template <class T>
std::vector<double> widened(const std::vector<T>& values) {
  std::vector<double> wide;
  for (const T& value : values) wide.push_back(widen(value));
  return wide;
}

template <class T>
bool same_bits(const T* a, const T* b, int64_t size) {
  return size == 0 || std::memcmp(a, b, size * sizeof(T)) == 0;
}

double naive_activation(double x, Activation activation) {
  switch (activation) {
    case Activation::gelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (x + 0.044715 * x * x * x)));
    case Activation::relu:
      return std::max(x, 0.0);
    case Activation::silu:
      return x / (1 + std::exp(-x));
    default:
      return x;
  }
}

// Rows i of `a` against weight (n, k).
std::vector<double> naive_product(const std::vector<double>& a, const double* weight, const double* bias,
                                  int64_t rows, int64_t n, int64_t k) {
  std::vector<double> out(rows * n);
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < n; ++j) {
      double sum = bias[j];
      for (int64_t e = 0; e < k; ++e) sum += a[i * k + e] * weight[j * k + e];
      out[i * n + j] = sum;
    }
  return out;
}

// One tile shape, or the one that the kernel chooses: gathered rows, a count below the capacity, edges in
// every direction, more tiles than blocks. Returns out.
template <class T>
std::vector<T> product(int32_t tile, int64_t capacity, int32_t count, int32_t n, int32_t k,
                       Activation activation, bool gather, unsigned seed) {
  std::mt19937 random(seed);
  const std::vector<T> a = draw<T>(random, capacity * k), weight = draw<T>(random, n * k, 1 / std::sqrt(k)),
                       bias = draw<T>(random, n);
  std::vector<int32_t> rows(capacity, -1);
  for (int32_t i = 0; i < count; ++i) rows[i] = static_cast<int32_t>((i * 7 + 3) % capacity);
  const std::vector<int32_t> counts{1, count};
  DeviceBuffer<T> device_a(a), device_weight(weight), device_bias(bias), out(capacity * n);
  DeviceBuffer<int32_t> device_rows(rows), device_counts(counts);
  const ProductParams<T> params{.a = device_a.get(),
                                .rows = gather ? device_rows.get() : nullptr,
                                .weight = device_weight.get(),
                                .bias = device_bias.get(),
                                .out = out.get(),
                                .n = n,
                                .k = k,
                                .activation = activation,
                                .counts = device_counts.get(),
                                .capacity = capacity,
                                .multiprocessors = 1,
                                .tile = tile};
  EXPECT(launch_product<T>(params, nullptr) == cudaSuccess);
  if (!cuda_emulation::last_failure.empty())
    std::fprintf(stderr, "%s\n", cuda_emulation::last_failure.c_str());
  const std::vector<double> wide = widened(a), wide_weight = widened(weight), wide_bias = widened(bias);
  for (int32_t i = 0; i < count; ++i) {
    const int64_t row = gather ? rows[i] : i;
    const std::vector<double> one(wide.begin() + row * k, wide.begin() + (row + 1) * k);
    const std::vector<double> exact = naive_product(one, wide_weight.data(), wide_bias.data(), 1, n, k);
    for (int32_t j = 0; j < n; ++j) {
      const double wanted = naive_activation(exact[j], activation);
      EXPECT(std::abs(widen(out.get()[i * n + j]) - wanted) <=
             kRounding<T> * (std::abs(wanted) + 0.05) + 2e-6);
    }
  }
  const DeviceBuffer<T> poison((capacity - count) * n);
  EXPECT(same_bits(out.get() + count * n, poison.get(), (capacity - count) * n));
  return out.host();
}

// Layer norm of each row of y (., width), in place.
void naive_norm(std::vector<double>& y, const double* weight, const double* bias, int64_t width, double eps) {
  for (double* row = y.data(); row < y.data() + y.size(); row += width) {
    double mean = 0, squares = 0;
    for (int64_t j = 0; j < width; ++j) mean += row[j] / width;
    for (int64_t j = 0; j < width; ++j) squares += std::pow(row[j] - mean, 2) / width;
    for (int64_t j = 0; j < width; ++j)
      row[j] = (row[j] - mean) / std::sqrt(squares + eps) * weight[j] + bias[j];
  }
}

// Widths that have kernels of their own: rows scattered, a count below the capacity.
template <class T>
void norm(int32_t width, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t capacity = 7, count = 6;
  const std::vector<T> branch = draw<T>(random, capacity * width),
                       residual = draw<T>(random, capacity * width), bias = draw<T>(random, width),
                       weight = draw<T>(random, width), shift = draw<T>(random, width);
  const std::vector<int32_t> rows{6, 0, 2, 5, 3, 1, -1};
  DeviceBuffer<T> device_branch(branch), device_residual(residual), device_bias(bias), device_weight(weight),
      device_shift(shift), out(capacity * width);
  DeviceBuffer<int32_t> device_rows(rows), counts(std::vector<int32_t>{1, static_cast<int32_t>(count)});
  EXPECT(launch_residual_norm<T>({.product = device_branch.get(),
                                  .bias = device_bias.get(),
                                  .residual = device_residual.get(),
                                  .residual_rows = device_rows.get(),
                                  .norm_weight = device_weight.get(),
                                  .norm_bias = device_shift.get(),
                                  .out = out.get(),
                                  .out_rows = device_rows.get(),
                                  .counts = counts.get(),
                                  .capacity = capacity,
                                  .width = width,
                                  .eps = 1e-5f},
                                 /*multiprocessors=*/1, nullptr) == cudaSuccess);
  for (int64_t i = 0; i < count; ++i) {
    std::vector<double> x(width);
    for (int64_t j = 0; j < width; ++j)
      x[j] = static_cast<double>(widen(branch[i * width + j])) + widen(bias[j]) +
             widen(residual[rows[i] * width + j]);
    naive_norm(x, widened(weight).data(), widened(shift).data(), width, 1e-5);
    for (int64_t j = 0; j < width; ++j)
      EXPECT(std::abs(widen(out.get()[rows[i] * width + j]) - x[j]) <=
             kRounding<T> * (std::abs(x[j]) + 0.05) + 1e-5);
  }
  EXPECT(same_bits(out.get() + 4 * width, DeviceBuffer<T>(width).get(), width));  // the row of nobody
}

struct Shape {
  int32_t width, intermediate, num_heads;
};

// The layer in double precision on sample rows `x` (rows, width).
std::vector<double> naive_layer(std::vector<double> x, const EncoderLayerWeights<double>& w,
                                const Shape& shape, Activation activation, double eps) {
  const int64_t h = shape.width, d = h / shape.num_heads, rows = static_cast<int64_t>(x.size()) / h;
  const std::vector<double> qkv = naive_product(x, w.qkv_weight, w.qkv_bias, rows, 3 * h, h);
  std::vector<double> context(rows * h, 0.0);
  for (int64_t head = 0; head < shape.num_heads; ++head)
    for (int64_t i = 0; i < rows; ++i) {
      std::vector<double> share(rows);
      double most = -INFINITY, total = 0;
      for (int64_t j = 0; j < rows; ++j) {
        for (int64_t e = 0; e < d; ++e)
          share[j] += qkv[i * 3 * h + head * d + e] * qkv[j * 3 * h + h + head * d + e] / std::sqrt(d);
        most = std::max(most, share[j]);
      }
      for (double& s : share) total += s = std::exp(s - most);
      for (int64_t j = 0; j < rows; ++j)
        for (int64_t e = 0; e < d; ++e)
          context[i * h + head * d + e] += share[j] / total * qkv[j * 3 * h + 2 * h + head * d + e];
    }
  std::vector<double> branch = naive_product(context, w.output_weight, w.output_bias, rows, h, h);
  for (size_t e = 0; e < x.size(); ++e) x[e] += branch[e];
  naive_norm(x, w.norm1_weight, w.norm1_bias, h, eps);
  std::vector<double> up = naive_product(x, w.up_weight, w.up_bias, rows, shape.intermediate, h);
  for (double& value : up) value = naive_activation(value, activation);
  branch = naive_product(up, w.down_weight, w.down_bias, rows, h, shape.intermediate);
  for (size_t e = 0; e < x.size(); ++e) x[e] += branch[e];
  naive_norm(x, w.norm2_weight, w.norm2_bias, h, eps);
  return x;
}

// One layer for samples of `lengths`, those of `keep` active, with rows of padding at the end of the
// capacity. Weights and the first samples' rows depend on the seed alone. Returns all rows.
template <class T>
std::vector<T> layer(const Shape& shape, const std::vector<int32_t>& lengths, const std::vector<bool>& keep,
                     Activation activation, unsigned seed) {
  std::mt19937 random(seed);
  const int64_t h = shape.width, i = shape.intermediate, samples = static_cast<int64_t>(lengths.size());
  const double eps = 1e-5;
  std::vector<T> packed;
  const auto add = [&](int64_t size, float scale, float mean = 0) {
    const std::vector<T> values = draw<T>(random, size, scale, mean);
    packed.insert(packed.end(), values.begin(), values.end());
  };
  add(3 * h * h, 2 / std::sqrt(h)), add(3 * h, 0.3f), add(h * h, 1 / std::sqrt(h)), add(h, 0.3f),
      add(h, 0.2f, 1), add(h, 0.2f), add(i * h, 1 / std::sqrt(h)), add(i, 0.3f), add(h * i, 1 / std::sqrt(i)),
      add(h, 0.3f), add(h, 0.2f, 1), add(h, 0.2f);
  const std::vector<double> wide_packed = widened(packed);
  const EncoderLayerWeights<double> weights(wide_packed.data(), h, i);

  std::vector<int32_t> rows, offsets{0}, starts;
  int32_t row = 0;
  for (int64_t b = 0; b < samples; ++b) {
    starts.push_back(row);
    if (keep[b]) {
      for (int32_t s = 0; s < lengths[b]; ++s) rows.push_back(row + s);
      offsets.push_back(static_cast<int32_t>(rows.size()));
    }
    row += lengths[b];
  }
  const int32_t active = static_cast<int32_t>(offsets.size()) - 1,
                active_rows = static_cast<int32_t>(rows.size());
  const int64_t capacity = row + 5;
  rows.resize(capacity, -1);
  offsets.resize(samples + 1, active_rows);
  std::vector<T> hidden = draw<T>(random, capacity * h);
  // A bypassed sample's NaN stays where it is.
  for (int64_t b = 0; b < samples; ++b)
    if (!keep[b] && lengths[b] > 0)
      std::memset(hidden.data() + starts[b] * h, 0xFF, lengths[b] * h * sizeof(T));

  DeviceBuffer<T> device_hidden(hidden), device_packed(packed),
      workspace(encoder_workspace_size(capacity, h, i));
  DeviceBuffer<int32_t> device_rows(rows), device_offsets(offsets),
      counts(std::vector<int32_t>{active, active_rows});
  EXPECT(conditional_encoder_layer<T>({.hidden = device_hidden.get(),
                                       .rows = device_rows.get(),
                                       .cu_seqlens = device_offsets.get(),
                                       .counts = counts.get(),
                                       .capacity = capacity,
                                       .samples = samples,
                                       .weights = device_packed.get(),
                                       .width = shape.width,
                                       .intermediate = shape.intermediate,
                                       .num_heads = shape.num_heads,
                                       .activation = activation,
                                       .eps = static_cast<float>(eps),
                                       .workspace = workspace.get(),
                                       .multiprocessors = 3},
                                      nullptr) == cudaSuccess);
  if (!cuda_emulation::last_failure.empty())
    std::fprintf(stderr, "%s\n", cuda_emulation::last_failure.c_str());

  const std::vector<double> wide = widened(hidden);
  for (int64_t b = 0; b < samples; ++b) {
    const int64_t begin = starts[b] * h, size = lengths[b] * h;
    const T* const out = device_hidden.get() + begin;
    if (!keep[b]) {
      EXPECT(same_bits(out, hidden.data() + begin, size));
      continue;
    }
    const std::vector<double> exact =
        naive_layer({wide.begin() + begin, wide.begin() + begin + size}, weights, shape, activation, eps);
    // Normalised outputs are of order 1; the roundings to T on the way add up, in fp32 those of the sums.
    for (int64_t e = 0; e < size; ++e)
      EXPECT(std::abs(widen(out[e]) - exact[e]) <= (sizeof(T) == 4 ? 200 : 12) * kRounding<T>);
  }
  EXPECT(same_bits(device_hidden.get() + row * h, hidden.data() + row * h, 5 * h));
  return device_hidden.host();
}

// A dispatch that lies: an assertion or any numbers, but no access outside of the guarded buffers.
void bad_dispatch(const std::vector<int32_t>& rows, const std::vector<int32_t>& offsets,
                  const std::vector<int32_t>& counts) {
  const int64_t capacity = 9, samples = 2, h = 32, i = 16;
  DeviceBuffer<float> hidden(capacity * h), weights(4 * h * h + 9 * h + i * (2 * h + 1)),
      workspace(encoder_workspace_size(capacity, h, i));
  DeviceBuffer<int32_t> device_rows(rows), device_offsets(offsets), device_counts(counts);
  const cudaError_t error = conditional_encoder_layer<float>({.hidden = hidden.get(),
                                                              .rows = device_rows.get(),
                                                              .cu_seqlens = device_offsets.get(),
                                                              .counts = device_counts.get(),
                                                              .capacity = capacity,
                                                              .samples = samples,
                                                              .weights = weights.get(),
                                                              .width = h,
                                                              .intermediate = i,
                                                              .num_heads = 2,
                                                              .activation = Activation::gelu,
                                                              .eps = 1e-5f,
                                                              .workspace = workspace.get(),
                                                              .multiprocessors = 3},
                                                             nullptr);
  EXPECT(error == cudaSuccess || error == cudaErrorAssert);
}

void bad_dispatches() {
  constexpr int32_t kFar = 2000000000;
  const std::vector<int32_t> rows{0, 1, 2, 3, 4, 5, 6, 7, 8};
  bad_dispatch({0, kFar, -7, 3, 4, 5, 6, 7, 8}, {0, 4, 9}, {2, 9});
  bad_dispatch(rows, {0, kFar, kFar}, {2, 9});
  bad_dispatch(rows, {-5, 4, -9}, {2, 9});
  bad_dispatch(rows, {7, 3, 9}, {2, 9});
  bad_dispatch(rows, {-640, -640, 9}, {2, 9});
  bad_dispatch(rows, {0, 4, 9}, {kFar, kFar});
  bad_dispatch(rows, {0, 4, 9}, {-1, -1});
}

template <class T>
void layers(unsigned seed) {
  // Head dimensions 16, 32, 64 and 128 (and the padded 8), samples of no row, one row, and more than a tile
  // of rows.
  layer<T>({64, 96, 4}, {3, 0, 70, 1, 9}, {true, true, true, false, true}, Activation::gelu, ++seed);
  layer<T>({32, 72, 4}, {5, 2}, {true, true}, Activation::gelu_tanh, ++seed);
  layer<T>({64, 320, 2}, {66, 130}, {false, true}, Activation::relu, ++seed);
  layer<T>({64, 64, 1}, {20, 64}, {true, true}, Activation::silu, ++seed);
  layer<T>({128, 40, 1}, {33}, {true}, Activation::gelu, ++seed);
  layer<T>({64, 96, 4}, {3, 0, 7}, {false, false, false}, Activation::gelu, ++seed);
  layer<T>({64, 96, 4}, {0, 0}, {true, true}, Activation::gelu, ++seed);

  // A sample's bits do not depend on its company, nor on the tiles that a larger capacity chooses.
  const std::vector<T> alone = layer<T>({64, 96, 4}, {11}, {true}, Activation::gelu, ++seed);
  const std::vector<T> together =
      layer<T>({64, 96, 4}, {11, 150, 80}, {true, true, true}, Activation::gelu, seed);
  EXPECT(same_bits(alone.data(), together.data(), 11 * 64));
}

enum { k32x64, k64x64, k64x128, k128x128, k128x192, k128x256 };

template <class T>
void products(unsigned seed) {
  // Every tile gives the same bits, whichever the kernel chooses, with more of them than there are blocks.
  const auto run = [&](int32_t tile) {
    return product<T>(tile, 131, 130, 264, 40, Activation::gelu, true, seed);
  };
  const std::vector<T> chosen = run(kChosenTile);
  for (int32_t tile = 0; tile < kTiles<T>; ++tile)
    EXPECT(same_bits(run(tile).data(), chosen.data(), 131 * 264));
  // More slabs than buffers, one row, none.
  product<T>(k32x64, 33, 32, 64, 328, Activation::none, false, ++seed);
  product<T>(k128x128, 9, 5, 72, 136, Activation::relu, true, ++seed);
  product<T>(kChosenTile, 7, 1, 40, 16, Activation::silu, true, ++seed);
  product<T>(kChosenTile, 3, 0, 64, 32, Activation::none, false, ++seed);
}

// On an H200: few rows take small tiles, so that no multiprocessor is idle that could help.
void tile_choice() {
  constexpr int kH200 = 132;
  EXPECT(best_tile<BFloat16>(25, 768, kH200) == k32x64);
  EXPECT(best_tile<BFloat16>(1024, 768, kH200) == k64x128);
  EXPECT(best_tile<BFloat16>(2048, 768, kH200) == k128x128);
  EXPECT(best_tile<BFloat16>(2048, 2304, kH200) == k128x192);
  EXPECT(best_tile<BFloat16>(4096, 768, kH200) == k128x256);
  EXPECT(best_tile<BFloat16>(65536, 3072, kH200) == k128x256);
  EXPECT(best_tile<float>(65536, 3072, kH200) <= k128x128);
}

}  // namespace

int main() {
  using cuda_emulation::Schedule;
  for (Schedule order : {Schedule::forward, Schedule::shuffled}) {
    cuda_emulation::schedule = order;
    cuda_emulation::buffers_at_end = order == Schedule::shuffled;
    if (order == Schedule::shuffled) {
      products<BFloat16>(0);
      products<Half>(100);
      products<float>(200);
    }
    layers<BFloat16>(300);
    layers<Half>(400);
    layers<float>(500);
    norm<BFloat16>(640, 600), norm<Half>(1032, 601), norm<float>(1000, 602), norm<float>(1032, 603);
    bad_dispatches();
  }
  tile_choice();
  return dynplan::test::finish("conditional_encoder_layer on emulated CUDA");
}
