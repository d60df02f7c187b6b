// The bytes of nested weights (docs/format.md): what a level's row blocks consist of. In an unnamed namespace because
// files with different instruction sets include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "edgemoe/kernels.h"

namespace edgemoe {

void nested_matmul_scalar(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                          int first_block, int last_block, float* out, ptrdiff_t out_stride);

namespace {

// Groups that share a float16 of level 0, and whose codes lie together in later levels, followed by their parameters.
constexpr int kNestedChunk = 4;

// Columns that share a scale step and an offset of level 0: a quarter of a group.
constexpr int kNestedPart = 16;

// The steps that a part can have.
alignas(16) constexpr int8_t kNestedSteps[16] = {2, 4, 7, 9, 10, 11, 13, 15};

// Level 0's parameters of a group: a byte per row and part.
constexpr size_t kNestedParameters = size_t{kRowBlock} * kGroup / kNestedPart;

constexpr size_t whole_lines(size_t bytes) { return (bytes + 63) / 64 * 64; }

// Bytes of one group's codes with `bits` bits each: planes of two bits, high bits first, and one of one bit if `bits`
// is odd.
constexpr size_t nested_codes(int bits) { return size_t{kRowBlock} * kGroup / 8 * static_cast<size_t>(bits); }

// Level 0: the scales that a row block begins with, then one group after the other.
constexpr size_t nested_header(int groups) {
    return whole_lines(size_t{kRowBlock} * 2 * static_cast<size_t>((groups + kNestedChunk - 1) / kNestedChunk));
}
constexpr size_t nested_base_group(int bits) { return nested_codes(bits) + kNestedParameters; }

// Later levels: a chunk of `groups`, codes and then a byte per group and row.
constexpr size_t nested_chunk_bytes(int bits, int groups) {
    return nested_codes(bits) * static_cast<size_t>(groups) +
           whole_lines(size_t{kRowBlock} * static_cast<size_t>(groups));
}

[[maybe_unused]] constexpr size_t nested_block_bytes(int bits, bool base, int cols) {
    const int groups = (cols + kGroup - 1) / kGroup, rest = groups % kNestedChunk;
    if (base) return nested_header(groups) + nested_base_group(bits) * static_cast<size_t>(groups);
    return nested_chunk_bytes(bits, kNestedChunk) * static_cast<size_t>(groups / kNestedChunk) +
           (rest ? nested_chunk_bytes(bits, rest) : 0);
}

}  // namespace
}  // namespace edgemoe
