// One of several Parallels, as the input has it.
#pragma once

#include "fuzz/source.h"
#include "tests/threads.h"

namespace dynplan::fuzz {

// f(parallel): on this thread, in shuffled ranges, or, for one input in `times`, on threads.
template <class F>
void on_some_parallel(Source& random, int64_t times, F f) {
  if (random.one_in(times)) return f(kernels::Parallel(dynplan::test::threads));
  if (random.one_in(2)) return f(kernels::Parallel(kernels::serial));
  Shuffled shuffled(random);
  f(kernels::Parallel(shuffled));
}

}  // namespace dynplan::fuzz
