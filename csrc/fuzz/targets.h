// The fuzz targets: each draws one input, runs what it is named after and checks what came out.
#pragma once

#include "fuzz/source.h"

namespace dynplan::fuzz {

void fuzz_pack(Source& random);
void fuzz_build_dispatch(Source& random);
void fuzz_embed_tokens(Source& random);
void fuzz_checks(Source& random);
void fuzz_encoder(Source& random);
void fuzz_planning(Source& random);
void fuzz_region_cross_entropy(Source& random);

struct Target {
  const char* name;
  void (*one)(Source&);
};

constexpr Target kTargets[] = {
    {"pack", &fuzz_pack},
    {"build_dispatch", &fuzz_build_dispatch},
    {"embed_tokens", &fuzz_embed_tokens},
    {"checks", &fuzz_checks},
    {"encoder", &fuzz_encoder},
    {"planning", &fuzz_planning},
    {"region_cross_entropy", &fuzz_region_cross_entropy},
};

}  // namespace dynplan::fuzz
