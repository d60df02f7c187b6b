// How the CPU divides products into items of a loop.
#pragma once

#include <cstddef>

#include "edgemoe/weight_layouts.h"

namespace edgemoe {

inline int row_blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }

// Row blocks of a matrix for each item of a product's loop, for so many rows of input.
int blocks_per_item(const Matrix& matrix, int count);

}  // namespace edgemoe
