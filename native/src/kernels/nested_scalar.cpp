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
    const std::byte* parameters;  // a byte: of level 0 [16 rows][4 parts], of later ones [16 rows]
    const std::byte* scales;      // float16 [16 rows], of level 0 only
    int bits;
};

Group group_of(const Matrix& matrix, int level, int block, int g) {
    const int bits = matrix.levels.bits[level];
    const int groups = (matrix.cols + kGroup - 1) / kGroup, chunk = g / kNestedChunk;
    const std::byte* data = matrix.levels.data[level] + block * nested_block_bytes(bits, level == 0, matrix.cols);
    if (level == 0) {
        const std::byte* codes = data + nested_header(groups) + g * nested_base_group(bits);
        return {codes, codes + nested_codes(bits), data + chunk * kRowBlock * sizeof(uint16_t), bits};
    }
    const int begin = chunk * kNestedChunk;
    const int together = groups - begin < kNestedChunk ? groups - begin : kNestedChunk;
    data += chunk * nested_chunk_bytes(bits, kNestedChunk);
    return {data + (g - begin) * nested_codes(bits),
            data + together * nested_codes(bits) + static_cast<ptrdiff_t>(g - begin) * kRowBlock, nullptr, bits};
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
                    std::memcpy(&half, levels[0].scales + row * sizeof half, sizeof half);
                    float scale = float_from_half(half);
                    const float unit = scale * (static_cast<float>(1 << levels[0].bits) / 64);
                    float center = scale * (static_cast<float>((1 << levels[0].bits) - 1) / -2);
                    int below = levels[0].bits;
                    for (int level = 1; level < matrix.levels.count; ++level) {
                        const Group& fine = levels[level];
                        const float ratio = ratio_of(fine.parameters[row]), shift = shift_of(fine.parameters[row]);
                        const float parts = static_cast<float>(1 << fine.bits);
                        scale = scale / parts * (1 + ratio / static_cast<float>(8 << below));
                        center = std::fma(scale, parts * (shift / 32 - ratio / 16 - 0.5f) + 0.5f, center);
                        below += fine.bits;
                    }
                    int32_t dots = 0, moved = 0, total = 0;
                    for (int part = 0; part < kGroup / kNestedPart; ++part) {
                        const int packed = static_cast<int8_t>(levels[0].parameters[4 * row + part]);
                        const int step = kNestedSteps[packed & 7], own = (packed >> 3) & 1;
                        int offset = (packed >> 4) * 2;
                        if (matrix.levels.count == 1) offset += own ? 1 : -1;
                        int32_t dot = 0, sum = 0;
                        for (int column = part * kNestedPart; column < (part + 1) * kNestedPart; ++column) {
                            int code = 0;
                            for (int level = 0; level < matrix.levels.count; ++level)
                                code = code << levels[level].bits | code_of(levels[level], row, column);
                            dot += code * codes[column];
                            sum += codes[column];
                        }
                        dots += step * dot;
                        moved += step * offset * sum;
                        total += step * sum;
                    }
                    float sum = scale * static_cast<float>(dots);
                    sum = std::fma(unit, static_cast<float>(moved), sum);
                    sum = std::fma(center, static_cast<float>(total), sum);
                    sums[row] = std::fma(sum, x.scales[token + g], sums[row]);
                }
            }
            for (int row = 0; row < kRowBlock && block * kRowBlock + row < matrix.rows; ++row) {
                const float sum = sums[row];
                out[i * out_stride + block * kRowBlock + row] = sum == sum ? sum : std::bit_cast<float>(0x7FC00000u);
            }
        }
}

}  // namespace edgemoe
