// The bytes of nested weights (docs/format.md): what a level's row blocks consist of. In an unnamed namespace because
// files with different instruction sets include it.
#pragma once

#include <cstddef>

#include "edgemoe/kernels.h"

namespace edgemoe {

void nested_matmul_scalar(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                          int first_block, int last_block, float* out, ptrdiff_t out_stride);

namespace {

// Groups whose codes lie together, followed by their parameters: whole cache lines, whatever the level.
constexpr int kNestedChunk = 4;

// Bytes of one group's codes with `bits` bits each: planes of two bits, high bits first, and one of one bit if `bits`
// is odd.
constexpr size_t nested_codes(int bits) { return size_t{kRowBlock} * kGroup / 8 * static_cast<size_t>(bits); }

// Bytes of the parameters of a chunk of `groups`: float16 and int8 of each row, or a byte of two times 4 bits.
constexpr size_t nested_parameters(bool base, int groups) {
    const size_t bytes = size_t{kRowBlock} * (base ? 3 : 1) * static_cast<size_t>(groups);
    return (bytes + 63) / 64 * 64;
}

constexpr size_t nested_chunk_bytes(int bits, bool base, int groups) {
    return nested_codes(bits) * static_cast<size_t>(groups) + nested_parameters(base, groups);
}

[[maybe_unused]] constexpr size_t nested_block_bytes(int bits, bool base, int cols) {
    const int groups = (cols + kGroup - 1) / kGroup, rest = groups % kNestedChunk;
    return nested_chunk_bytes(bits, base, kNestedChunk) * static_cast<size_t>(groups / kNestedChunk) +
           (rest ? nested_chunk_bytes(bits, base, rest) : 0);
}

}  // namespace
}  // namespace edgemoe
