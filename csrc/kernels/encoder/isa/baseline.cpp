// SSE2 on x86-64, NEON on aarch64: what every CPU of its kind has.
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

#define DYNPLAN_ISA baseline
#define DYNPLAN_VECTOR_BYTES 16
#include "kernels/encoder/embed_rows.h"
#include "kernels/encoder/reduced_layer.h"
#include "kernels/encoder/schedule.h"
