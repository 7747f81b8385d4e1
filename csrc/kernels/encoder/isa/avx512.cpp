#if defined(__x86_64__)
#include <immintrin.h>

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
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,prefer-vector-width=512")
#define DYNPLAN_ISA avx512
#define DYNPLAN_VECTOR_BYTES 64
#define DYNPLAN_PAIR_INSTRUCTIONS
#include "kernels/encoder/embed_rows.h"
#include "kernels/encoder/reduced_layer.h"
#include "kernels/encoder/schedule.h"
#endif
