// The reference of products with nested weights.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "half.h"
#include "nested_format.h"

namespace edgemoe {
namespace {

// One group of a level's row block.
struct Group {
    const std::byte* codes;
    const std::byte* first;   // the parameters of 16 rows: float16, or a byte of two times 4 bits
    const std::byte* second;  // int8, of level 0 only
    int bits;
};

Group group_of(const Matrix& matrix, int level, int block, int g) {
    const int bits = matrix.levels.bits[level];
    const bool base = level == 0;
    const int groups = (matrix.cols + kGroup - 1) / kGroup, begin = g / kNestedChunk * kNestedChunk;
    const int together = groups - begin < kNestedChunk ? groups - begin : kNestedChunk;
    const std::byte* chunk = matrix.levels.data[level] + block * nested_block_bytes(bits, base, matrix.cols) +
                             g / kNestedChunk * nested_chunk_bytes(bits, base, kNestedChunk);
    const std::byte* parameters = chunk + together * nested_codes(bits);
    const size_t size = base ? sizeof(uint16_t) : 1;
    const std::byte* second = base ? parameters + together * kRowBlock * size + (g - begin) * kRowBlock : nullptr;
    return {chunk + (g - begin) * nested_codes(bits), parameters + (g - begin) * kRowBlock * size, second, bits};
}

int code_of(const Group& group, int row, int column) {
    const int quad = column / 4, byte = row * 4 + column % 4;
    const std::byte* plane = group.codes;
    int code = 0, bits = group.bits;
    for (; bits >= 2; bits -= 2, plane += 256)
        code = code << 2 | (std::to_integer<int>(plane[quad / 4 * 64 + byte]) >> (quad % 4 * 2) & 3);
    if (bits)
        code = code << 1 | (std::to_integer<int>(plane[quad / 8 * 64 + byte]) >> (quad % 4 * 2 + quad / 4 % 2) & 1);
    return code;
}

float signed_byte(std::byte x) { return static_cast<float>(static_cast<int8_t>(x)); }

// The high and the low four bits.
float ratio_of(std::byte x) { return signed_byte(x & std::byte{0xF0}) / 16; }
float shift_of(std::byte x) { return signed_byte(x << 4) / 16; }

}  // namespace

void nested_matmul_scalar(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                          int first_block, int last_block, float* out, ptrdiff_t out_stride) {
    const int groups = (matrix.cols + kGroup - 1) / kGroup;
    for (int block = first_block; block < last_block; ++block)
        for (int i = 0; i < count; ++i) {
            const size_t token = static_cast<size_t>(tokens.empty() ? i : tokens[i]) * static_cast<size_t>(groups);
            std::array<float, kRowBlock> sums{};
            for (int g = 0; g < groups; ++g) {
                std::array<Group, kMaxLevels> levels;
                for (int level = 0; level < matrix.levels.count; ++level)
                    levels[level] = group_of(matrix, level, block, g);
                const int8_t* codes = x.codes + (token + g) * kGroup;
                for (int row = 0; row < kRowBlock; ++row) {
                    uint16_t half;
                    std::memcpy(&half, levels[0].first + row * sizeof half, sizeof half);
                    float scale = float_from_half(half);
                    const float middle = static_cast<float>((1 << levels[0].bits) - 1) / 2;
                    float offset = scale * (signed_byte(levels[0].second[row]) / 32 - middle);
                    int below = levels[0].bits;
                    for (int level = 1; level < matrix.levels.count; ++level) {
                        const Group& fine = levels[level];
                        const float ratio = ratio_of(fine.first[row]), shift = shift_of(fine.first[row]);
                        const float parts = static_cast<float>(1 << fine.bits);
                        scale = scale / parts * (1 + ratio / static_cast<float>(8 << below));
                        offset = std::fma(scale, parts * (shift / 32 - ratio / 16 - 0.5f) + 0.5f, offset);
                        below += fine.bits;
                    }
                    int32_t dot = 0;
                    for (int column = 0; column < kGroup; ++column) {
                        int code = 0;
                        for (int level = 0; level < matrix.levels.count; ++level)
                            code = code << levels[level].bits | code_of(levels[level], row, column);
                        dot += code * codes[column];
                    }
                    sums[row] = std::fma(scale * x.scales[token + g], static_cast<float>(dot), sums[row]);
                    sums[row] = std::fma(offset, x.sums[token + g], sums[row]);
                }
            }
            for (int row = 0; row < kRowBlock && block * kRowBlock + row < matrix.rows; ++row) {
                const float sum = sums[row];
                out[i * out_stride + block * kRowBlock + row] = sum == sum ? sum : std::bit_cast<float>(0x7FC00000u);
            }
        }
}

}  // namespace edgemoe
