// How many rows, columns and tokens the kernels work on at a time. They are data, so that a table, the
// machine's caches, a tuner and tests can choose them. The tile that is held in registers is not among
// them: it is fixed when the kernels are compiled.
#pragma once

#include <cstdint>

#include "../../common/params.h"

namespace fastlora {

struct TileSizeField {
  const char* name;
  int64_t TileSizes::* value;
  int64_t least, most;
  int64_t multiple;  // what the kernels need it to be a multiple of
};

constexpr TileSizeField kTileSizeFields[] = {
    {"decode_tokens", &TileSizes::decode_tokens, 0, 8, 1},
    {"decode_rows", &TileSizes::decode_rows, 1, 4096, 1},
    {"fwd_pack_bytes", &TileSizes::fwd_pack_bytes, 1, int64_t{1} << 30, 1},
    {"fwd_shrink_columns", &TileSizes::fwd_shrink_columns, 128, 8192, 128},
    {"fwd_strip_rows", &TileSizes::fwd_strip_rows, 1, 4096, 1},
    {"fwd_strip_bytes", &TileSizes::fwd_strip_bytes, 128, 65536, 128},
    {"fwd_few_rows", &TileSizes::fwd_few_rows, 0, 4096, 1},
    {"bwd_token_block", &TileSizes::bwd_token_block, 1, 4096, 1},
    {"bwd_shrink_columns", &TileSizes::bwd_shrink_columns, 32, 8192, 32},
    {"bwd_strip_columns", &TileSizes::bwd_strip_columns, 128, 4096, 128},
    {"bwd_tokens", &TileSizes::bwd_tokens, 1, 8192, 1},
    {"bwd_panel_units", &TileSizes::bwd_panel_units, 8, 8192, 8},
    {"bwd_few_tokens", &TileSizes::bwd_few_tokens, 0, 4096, 1},
    {"bwd_grad_tokens", &TileSizes::bwd_grad_tokens, 1, 8192, 1},
};

// Bytes of a core's second-level and of the shared third-level cache; 0: not known.
struct CacheSizes {
  int64_t l2, l3;
};

// Of this machine, as Linux tells them; zeros elsewhere.
CacheSizes cache_sizes();

// The sizes in an instruction set's row of kLevels, fitted to the caches.
// Throws std::invalid_argument for an instruction set that was not compiled.
TileSizes default_tile_sizes(const char* isa, CacheSizes caches);

// The sizes in use: those of kernels().isa on this machine, until others are set. A call takes a copy
// when it starts, so that setting them never disturbs one that runs.
TileSizes tile_sizes();

// Throws std::invalid_argument with the field's name and bounds for a value that no kernel can use.
void set_tile_sizes(const TileSizes& sizes);

}  // namespace fastlora
