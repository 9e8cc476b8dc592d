// The wide product with vectors of sixteen. Only called where the CPU has AVX-512.
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#include "../cpu/vectors512.h"
#include "tile.h"

namespace loraplex {

void add_token_avx512(const TokenRows& rows) { add_token<Vector16>(rows); }

void add_tile_avx512(const TileRows& rows) { add_tile<Vector16>(rows); }

}  // namespace loraplex
