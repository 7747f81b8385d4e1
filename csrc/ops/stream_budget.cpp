#include "ops/stream_budget.h"

#include <ATen/ops/empty.h>
#include <torch/library.h>

#include <vector>

#include "kernels/packing/truth.h"

namespace dynplan {
namespace {

constexpr int64_t kCounts = sizeof(kernels::StreamCounts) / sizeof(int64_t);
constexpr int64_t kMostCounted = int64_t{1} << 62;  // below it, sums do not overflow

bool is_count(int64_t value) {
  return value >= 0 && value < kMostCounted;
}

void check_offsets(const char* op, const at::Tensor& cu_seqlens) {
  TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, op, ": expected cu_seqlens to be int32, got ",
                   cu_seqlens.scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1 && cu_seqlens.is_contiguous(), op,
                    ": expected cu_seqlens to have shape (B + 1,), got ", cu_seqlens.sizes());
  const int32_t* const offset = cu_seqlens.const_data_ptr<int32_t>();
  TORCH_CHECK_VALUE(offset[0] >= 0, op, ": expected cu_seqlens to start at 0 or above, got ", offset[0]);
  for (int64_t b = 0; b + 1 < cu_seqlens.numel(); ++b)
    TORCH_CHECK_VALUE(offset[b] <= offset[b + 1], op, ": expected cu_seqlens to ascend, got ", offset[b],
                      " then ", offset[b + 1], " at ", b);
}

void stream_arrive(const at::Tensor& counts, const at::Tensor& cu_seqlens) {
  check_offsets("_stream_arrive", cu_seqlens);
  const auto lock = lock_streams();
  kernels::arrive(stream_counts("_stream_arrive", counts), cu_seqlens.const_data_ptr<int32_t>(),
                  cu_seqlens.numel() - 1);
}

at::Tensor stream_take(const at::Tensor& counts, const at::Tensor& priority, const at::Tensor& wanted,
                       const at::Tensor& cu_seqlens, int64_t steps, int64_t layers, double share,
                       double burst) {
  constexpr const char* kOp = "_stream_take";
  check_offsets(kOp, cu_seqlens);
  const int64_t samples = cu_seqlens.numel() - 1;
  TORCH_CHECK_VALUE(priority.scalar_type() == at::kFloat && priority.sizes() == samples, kOp,
                    ": expected priority to be float32 of shape (B,) = [", samples, "], got ",
                    priority.scalar_type(), " of shape ", priority.sizes());
  TORCH_CHECK_VALUE(wanted.scalar_type() == at::kBool && wanted.sizes() == samples, kOp,
                    ": expected wanted to be bool of shape (B,) = [", samples, "], got ",
                    wanted.scalar_type(), " of shape ", wanted.sizes());
  constexpr int64_t kMost = int64_t{1} << 31;
  TORCH_CHECK_VALUE(layers >= 0 && layers < kMost && steps >= 0 && steps <= layers, kOp,
                    ": expected steps within 0..layers, below 2^31, got ", steps, " of ", layers);
  TORCH_CHECK_VALUE(share >= 0 && share <= 1 && burst >= 0 && burst < static_cast<double>(kMost), kOp,
                    ": expected share within 0..1 and burst within 0..2^31, got ", share, " and ", burst);
  const at::Tensor priorities = priority.contiguous(), asking = wanted.contiguous();
  std::vector<uint8_t> taken(samples);
  for (int64_t b = 0; b < samples; ++b)
    taken[b] = kernels::is_set(kernels::truths(asking.const_data_ptr())[b]);
  const int32_t* const offsets = cu_seqlens.const_data_ptr<int32_t>();
  {
    const auto lock = lock_streams();
    kernels::StreamCounts& seen = stream_counts(kOp, counts);
    kernels::admit(priorities.const_data_ptr<float>(), offsets, steps,
                   kernels::room(seen, {share, burst, layers}), taken);
    kernels::count(seen, taken, offsets, steps);
  }
  at::Tensor out = at::empty({samples}, asking.options());
  std::copy(taken.begin(), taken.end(), static_cast<uint8_t*>(out.mutable_data_ptr()));
  return out;
}

void check_values(const char* op, at::IntArrayRef values) {
  TORCH_CHECK_VALUE(values.size() == kCounts, op, ": expected ", kCounts, " values, got ", values.size());
  for (const int64_t value : values)
    TORCH_CHECK_VALUE(is_count(value), op, ": expected values within 0..2^62, got ", value);
}

void stream_add(const at::Tensor& counts, at::IntArrayRef values) {
  check_values("_stream_add", values);
  const auto lock = lock_streams();
  kernels::StreamCounts& seen = stream_counts("_stream_add", counts);
  seen.samples += values[0], seen.tokens += values[1];
  seen.sample_layers += values[2], seen.token_layers += values[3];
  seen.longest = std::max(seen.longest, values[4]);
}

std::vector<int64_t> stream_read(const at::Tensor& counts) {
  const auto lock = lock_streams();
  const kernels::StreamCounts& seen = stream_counts("_stream_read", counts);
  return {seen.samples, seen.tokens, seen.sample_layers, seen.token_layers, seen.longest};
}

void stream_write(const at::Tensor& counts, at::IntArrayRef values) {
  check_values("_stream_write", values);
  const auto lock = lock_streams();
  stream_counts("_stream_write", counts) = {values[0], values[1], values[2], values[3], values[4]};
}

}  // namespace

std::unique_lock<std::mutex> lock_streams() {
  static std::mutex* const mutex = new std::mutex;  // never destroyed: threads may outlive the library's end
  return std::unique_lock(*mutex);
}

kernels::StreamCounts& stream_counts(const char* op, const at::Tensor& counts) {
  TORCH_CHECK_TYPE(counts.defined(), op, ": expected counts to be a tensor, got None");
  TORCH_CHECK_VALUE(counts.is_cpu() && counts.scalar_type() == at::kLong && counts.sizes() == kCounts &&
                        counts.is_contiguous(),
                    op, ": expected counts to be int64 of shape [", kCounts, "] on the CPU, got ",
                    counts.scalar_type(), " of shape ", counts.sizes(), " on ", counts.device());
  const int64_t* const values = counts.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < kCounts; ++i)
    TORCH_CHECK_VALUE(is_count(values[i]), op, ": expected counts within 0..2^62, got ", values[i]);
  return *static_cast<kernels::StreamCounts*>(counts.mutable_data_ptr());
}

TORCH_LIBRARY_FRAGMENT(dynplan, m) {
  const auto define = [&](const char* schema) { m.def(schema, {at::Tag::pt2_compliant_tag}); };
  define("_stream_arrive(Tensor(a!) counts, Tensor cu_seqlens) -> ()");
  define(
      "_stream_take(Tensor(a!) counts, Tensor priority, Tensor wanted, Tensor cu_seqlens, int steps, "
      "int layers, float share, float burst) -> Tensor");
  define("_stream_add(Tensor(a!) counts, int[] values) -> ()");
  define("_stream_read(Tensor counts) -> int[]");
  define("_stream_write(Tensor(a!) counts, int[] values) -> ()");
}

TORCH_LIBRARY_IMPL(dynplan, CPU, m) {
  m.impl("_stream_arrive", &stream_arrive);
  m.impl("_stream_take", &stream_take);
  m.impl("_stream_add", &stream_add);
  m.impl("_stream_read", &stream_read);
  m.impl("_stream_write", &stream_write);
}

}  // namespace dynplan
