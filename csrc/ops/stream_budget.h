// The counts of a dynplan.StreamBudget on the CPU, an int64 tensor (5,), and the one lock round all of them.
//
//   _stream_arrive(counts!, cu_seqlens int32 (B+1,))                     count a batch in
//   _stream_take(counts!, priority float32 (B,), wanted bool (B,), cu_seqlens, steps, layers, share, burst)
//     -> bool (B,)                                                       let samples run `steps` layers more
//   _stream_add(counts!, values int[5])                                  sums, but for the longest: the greater
//   _stream_read(counts) -> int[5],  _stream_write(counts!, values int[5])
#pragma once

#include <ATen/core/Tensor.h>

#include <mutex>

#include "kernels/planning/stream_budget.h"

namespace dynplan {

// Held for as long as counts are looked at or written, of whatever stream: that is a matter of nanoseconds.
[[nodiscard]] std::unique_lock<std::mutex> lock_streams();

// What the tensor holds, checked. Only under the lock.
kernels::StreamCounts& stream_counts(const char* op, const at::Tensor& counts);

}  // namespace dynplan
