#include <atomic>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <optional>
#include <string_view>
#include <utility>
#include <vector>

#include "kernels/conditional_encoder_layer.h"
#include "kernels/embed_tokens.h"
#include "kernels/encoder/scratch.h"
#include "kernels/reduced_encoder.h"

#define DYNPLAN_ISA baseline
#define DYNPLAN_VECTOR_BYTES 16
#include "kernels/encoder/embed_tokens.h"
#include "kernels/encoder/reduced_layer.h"
#include "kernels/encoder/schedule.h"
