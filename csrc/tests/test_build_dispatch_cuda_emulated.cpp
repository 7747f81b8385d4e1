#include <random>
#include <vector>

#include "kernels/packing/cuda/build_dispatch.cuh"
#include "tests/check.h"
#include "tests/cuda_emulation/device_buffer.h"
#include "tests/threads.h"

using namespace dynplan::kernels;
using cuda_emulation::DeviceBuffer;

namespace {

struct Plan {
  std::vector<int32_t> cu_seqlens;
  std::vector<uint8_t> keep;  // (samples, layers)
  int64_t layers;
  int64_t capacity;
};

struct Result {
  std::vector<int32_t> rows, offsets, counts;
  bool operator==(const Result&) const = default;
};

Result on_cuda(const Plan& plan, bool layer_major) {
  const int64_t samples = plan.cu_seqlens.size() - 1;
  std::vector<uint8_t> keep = plan.keep;
  if (layer_major)
    for (int64_t b = 0; b < samples; ++b)
      for (int64_t l = 0; l < plan.layers; ++l) keep[l * samples + b] = plan.keep[b * plan.layers + l];
  DeviceBuffer<uint8_t> device_keep(keep);
  DeviceBuffer<int32_t> cu_seqlens(plan.cu_seqlens);
  DeviceBuffer<int32_t> rows(plan.layers * plan.capacity), offsets(plan.layers * (samples + 1)),
      counts(plan.layers * 2);
  EXPECT(build_dispatch_cuda({.keep = truths(device_keep.get()),
                              .sample_stride = layer_major ? 1 : plan.layers,
                              .layer_stride = layer_major ? samples : 1,
                              .cu_seqlens = cu_seqlens.get(),
                              .samples = samples,
                              .layers = plan.layers,
                              .capacity = plan.capacity,
                              .rows = rows.get(),
                              .active_cu_seqlens = offsets.get(),
                              .counts = counts.get()},
                             nullptr) == cudaSuccess);
  return {rows.host(), offsets.host(), counts.host()};
}

Result on_cpu(const Plan& plan) {
  const int64_t samples = plan.cu_seqlens.size() - 1;
  Result want{std::vector<int32_t>(plan.layers * plan.capacity),
              std::vector<int32_t>(plan.layers * (samples + 1)), std::vector<int32_t>(plan.layers * 2)};
  build_dispatch({.keep = truths(plan.keep.data()),
                  .sample_stride = plan.layers,
                  .layer_stride = 1,
                  .cu_seqlens = plan.cu_seqlens.data(),
                  .samples = samples,
                  .layers = plan.layers,
                  .capacity = plan.capacity,
                  .rows = want.rows.data(),
                  .active_cu_seqlens = want.offsets.data(),
                  .counts = want.counts.data()},
                 dynplan::test::threads);
  return want;
}

void equals_the_cpu(int64_t samples, int64_t layers, int max_length, double share, unsigned seed) {
  std::mt19937 random(seed);
  Plan plan{std::vector<int32_t>(samples + 1, 0), std::vector<uint8_t>(samples * layers), layers, 0};
  for (int64_t b = 0; b < samples; ++b)
    plan.cu_seqlens[b + 1] = plan.cu_seqlens[b] + static_cast<int32_t>(random() % (max_length + 1));
  plan.capacity = plan.cu_seqlens[samples] + 3;
  for (uint8_t& keep : plan.keep)  // bools of any byte
    keep = std::uniform_real_distribution<>()(random) < share ? 1 + random() % 255 : 0;
  const Result want = on_cpu(plan);
  EXPECT(on_cuda(plan, false) == want);
  EXPECT(on_cuda(plan, true) == want);
}

// Offsets that the CPU refuses must not make the device read or write out of bounds.
void bad_offsets_stay_inside() {
  for (std::vector<int32_t> cu_seqlens :
       {std::vector<int32_t>{5, 90, 20, 3000}, {-7, 2, 1, 4}, {0, 9, 8, 2000000000}}) {
    const Plan plan{cu_seqlens, {1, 1, 1, 1, 1, 1}, 2, 10};
    const Result got = on_cuda(plan, false);
    for (int32_t row : got.rows) EXPECT(row >= -1 && row < plan.capacity);
    for (int32_t offset : got.offsets) EXPECT(offset >= 0 && offset <= plan.capacity);
  }
}

}  // namespace

int main() {
  cuda_emulation::for_every_schedule([] {
    unsigned seed = 0;
    for (double share : {0.0, 0.5, 1.0}) {
      for (int64_t samples : {0, 1, 9, 300}) equals_the_cpu(samples, 2, 5, share, ++seed);
      equals_the_cpu(40, 3, 120, share, ++seed);  // more rows than one chunk
    }
    equals_the_cpu(4, 0, 5, 1.0, ++seed);
    bad_offsets_stay_inside();
  });
  return dynplan::test::finish("build_dispatch on emulated CUDA");
}
