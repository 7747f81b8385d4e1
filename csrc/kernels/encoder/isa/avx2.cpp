#if defined(__x86_64__)
#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/encoder/conditional_encoder_layer.h"
#include "kernels/encoder/embed_tokens.h"
#include "kernels/encoder/reduced_encoder.h"
#include "kernels/encoder/scratch.h"

// After every header that other files share: their inline functions must run on any CPU.
#pragma GCC target("avx2,fma")
#define DYNPLAN_ISA avx2
#define DYNPLAN_VECTOR_BYTES 32
#include "kernels/encoder/embed_rows.h"
#include "kernels/encoder/reduced_layer.h"
#include "kernels/encoder/schedule.h"
#endif
