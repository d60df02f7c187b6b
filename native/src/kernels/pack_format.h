// Sizes within the quantized layouts of packs that are not nested (docs/format.md).
#pragma once

#include "edgemoe/weight_layouts.h"

namespace edgemoe {

// Bytes of one group (kGroup columns) of a row block: codes, then kRowBlock scales, then kRowBlock offsets (float16).
inline constexpr size_t kQ8Codes = size_t{kRowBlock} * kGroup;
inline constexpr size_t kQ4Codes = kQ8Codes / 2;
inline constexpr size_t kGroupParameters = size_t{2} * kRowBlock * sizeof(uint16_t);

}  // namespace edgemoe
