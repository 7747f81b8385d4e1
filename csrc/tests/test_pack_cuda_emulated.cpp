#include <algorithm>
#include <random>
#include <vector>

#include "kernels/packing/cuda/pack.cuh"
#include "tests/check.h"
#include "tests/cuda_emulation/device_buffer.h"

using namespace dynplan::kernels;
using cuda_emulation::DeviceBuffer;

namespace {

// hidden (B, S, H) lies with `gap` spare elements after each row of H and rows of one sample interleaved when
// `transposed`: packed dense, then unpacked again.
template <class Mask, class Element>
void round_trip(int64_t batch, int64_t length, int64_t width, double share, int64_t gap, bool transposed,
                unsigned seed) {
  std::mt19937 random(seed);
  const int64_t positions = batch * length;
  std::vector<Mask> mask(positions);
  for (Mask& m : mask) m = std::uniform_real_distribution<>()(random) < share;
  if (batch > 1) std::fill_n(mask.begin(), length, Mask(0));  // a row with no token
  std::vector<Element> hidden(positions * (width + gap));
  for (Element& value : hidden) value = static_cast<Element>(random());
  const int64_t batch_stride = (transposed ? 1 : length) * (width + gap);
  const int64_t length_stride = (transposed ? batch : 1) * (width + gap);

  DeviceBuffer<Mask> device_mask(mask);
  DeviceBuffer<Element> device_hidden(hidden), packed(positions * width), unpacked(positions * width);
  DeviceBuffer<int32_t> counts(pack_chunks(positions)), indices(positions), cu_seqlens(batch + 1),
      slots(positions);
  EXPECT(token_indices_cuda<Mask>(
             {device_mask.get(), positions, length, counts.get(), indices.get(), cu_seqlens.get()},
             nullptr) == cudaSuccess);
  const int64_t element = sizeof(Element);
  EXPECT(gather_rows_cuda({.hidden = reinterpret_cast<const char*>(device_hidden.get()),
                           .batch_stride = batch_stride * element,
                           .length_stride = length_stride * element,
                           .row_bytes = width * element,
                           .length = length,
                           .indices = indices.get(),
                           .tokens = positions,
                           .packed = reinterpret_cast<char*>(packed.get())},
                          positions, nullptr) == cudaSuccess);
  EXPECT(invert_indices_cuda(indices.get(), positions, positions, slots.get(), nullptr) == cudaSuccess);
  EXPECT(gather_rows_cuda({.hidden = reinterpret_cast<const char*>(packed.get()),
                           .batch_stride = width * element * positions,
                           .length_stride = width * element,
                           .row_bytes = width * element,
                           .length = positions,
                           .indices = slots.get(),
                           .tokens = positions,
                           .packed = reinterpret_cast<char*>(unpacked.get())},
                          positions, nullptr) == cudaSuccess);

  int64_t slot = 0;
  EXPECT(cu_seqlens.get()[0] == 0);
  for (int64_t b = 0; b < batch; ++b) {
    for (int64_t s = 0; s < length; ++s) {
      const bool token = mask[b * length + s] != 0;
      for (int64_t h = 0; h < width; ++h) {
        const Element value = hidden[b * batch_stride + s * length_stride + h];
        if (token) EXPECT(packed.get()[slot * width + h] == value);
        EXPECT(unpacked.get()[(b * length + s) * width + h] == (token ? value : Element(0)));
      }
      if (token) EXPECT(indices.get()[slot++] == b * length + s);
    }
    EXPECT(cu_seqlens.get()[b + 1] == slot);
  }
  for (; slot < positions; ++slot) {
    EXPECT(indices.get()[slot] == -1);
    for (int64_t h = 0; h < width; ++h) EXPECT(packed.get()[slot * width + h] == Element(0));
  }
}

// On the device an index out of range is an assertion, never a stray access.
void bad_index_asserts() {
  for (int32_t bad : {-2, 6, 2000000000}) {
    DeviceBuffer<int32_t> indices(std::vector<int32_t>{0, bad}), slots(6);
    DeviceBuffer<float> packed(2 * 4), hidden(6 * 4);
    EXPECT(invert_indices_cuda(indices.get(), 2, 6, slots.get(), nullptr) == cudaErrorAssert);
    EXPECT(gather_rows_cuda({reinterpret_cast<const char*>(hidden.get()), 48, 16, 16, 3, indices.get(), 2,
                             reinterpret_cast<char*>(packed.get())},
                            6, nullptr) == cudaErrorAssert);
  }
}

}  // namespace

int main() {
  cuda_emulation::for_every_schedule([] {
    unsigned seed = 0;
    for (double share : {0.0, 0.6, 1.0}) {
      round_trip<uint8_t, uint32_t>(3, 7, 5, share, 0, false, ++seed);
      round_trip<int64_t, uint16_t>(2, 9, 8, share, 8, true, ++seed);
      round_trip<int16_t, uint8_t>(1, 33, 3, share, 1, false, ++seed);
      round_trip<int32_t, uint16_t>(5, 601, 1, share, 0, true, ++seed);  // more positions than one chunk
    }
    round_trip<uint8_t, uint64_t>(1, 1, 70, 1.0, 0, false, ++seed);
    bad_index_asserts();
  });
  return dynplan::test::finish("pack on emulated CUDA");
}
