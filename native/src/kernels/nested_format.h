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

// Groups whose parameters lie together in level 0, in front of their codes, and that share a scale and a center.
constexpr int kNestedChunk = 4;

// Columns that share a step and an offset: a quarter of a group.
constexpr int kNestedPart = 16;

// The steps that a part can have, ascending, by the two low bits of its byte.
alignas(16) constexpr int8_t kNestedSteps[16] = {3, 4, 5, 6};
constexpr int kNestedLargestStep = kNestedSteps[3];

// What offsets are multiples of, and what level 0 alone adds to them or takes off.
constexpr int kNestedOffsetUnit = 8;
constexpr int kNestedNudge = 3;

// An offset, by the four bits of the part's byte above the step: level 0's own, and three signed ones. alone: whether
// a product works with no other level than 0.
constexpr int nested_offset(int bits, bool alone) {
    const int offset = kNestedOffsetUnit * ((bits >> 1 ^ 4) - 4);
    return alone ? offset + (bits & 1 ? kNestedNudge : -kNestedNudge) : offset;
}

// Bytes of a group's parameters: one per row and part.
constexpr size_t kNestedLine = size_t{kRowBlock} * kGroup / kNestedPart;

// Of how many later levels the groups' parameters have the ratio and shift; of the others four at a time have a line of
// their own, one byte of every 32-bit word per level.
constexpr int kNestedLaterInGroups = 2;
constexpr int kNestedLaterInLine = 4;

// Bytes of the parameters that a chunk of level 0 begins with, which speak of `later` levels. A last chunk of fewer
// groups has them all.
constexpr size_t nested_parameters(int later) {
    const int own = later > kNestedLaterInGroups ? later - kNestedLaterInGroups : 0;
    return kNestedLine * static_cast<size_t>(kNestedChunk + (own + kNestedLaterInLine - 1) / kNestedLaterInLine);
}

// Bytes of one group's codes with `bits` bits each: planes of two bits, high bits first, and one of one bit if `bits`
// is odd.
constexpr size_t nested_codes(int bits) { return size_t{kRowBlock} * kGroup / 8 * static_cast<size_t>(bits); }

// parameters: bytes of them that each chunk begins with; later levels have none.
constexpr size_t nested_block_bytes(int bits, size_t parameters, int cols) {
    const int groups = (cols + kGroup - 1) / kGroup, chunks = (groups + kNestedChunk - 1) / kNestedChunk;
    return parameters * static_cast<size_t>(chunks) + nested_codes(bits) * static_cast<size_t>(groups);
}

[[maybe_unused]] constexpr size_t nested_block_bytes(const NestedLevels& levels, int level, int cols) {
    return nested_block_bytes(levels.bits[level], level == 0 ? nested_parameters(levels.later) : 0, cols);
}

}  // namespace
}  // namespace edgemoe
