// The reference of products with nested weights.
#include <array>
#include <bit>
#include <cmath>

#include "half.h"
#include "nested_format.h"

namespace edgemoe {
namespace {

// One group of a level's row block.
struct Group {
    const std::byte* codes;
    int bits;
};

// The parameters of the chunk that a group lies in.
const std::byte* parameters_of(const Matrix& matrix, int block, int g) {
    const NestedLevels& levels = matrix.levels;
    const size_t chunk = nested_parameters(levels.later) + kNestedChunk * nested_codes(levels.bits[0]);
    return levels.data[0] + block * nested_block_bytes(levels, 0, matrix.cols) + g / kNestedChunk * chunk;
}

Group group_of(const Matrix& matrix, int level, int block, int g) {
    const NestedLevels& levels = matrix.levels;
    const int bits = levels.bits[level];
    if (level == 0)
        return {
            parameters_of(matrix, block, g) + nested_parameters(levels.later) + g % kNestedChunk * nested_codes(bits),
            bits};
    return {levels.data[level] + block * nested_block_bytes(levels, level, matrix.cols) + g * nested_codes(bits), bits};
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

// Of the four bytes that a row has in the parameters of a chunk's groups, two bits in each, the k-th.
std::byte row_byte(const std::byte* parameters, int row, int k) {
    std::byte value{};
    for (int j = 0; j < kNestedChunk; ++j) value |= parameters[j * kNestedLine + 4 * row + k] >> 6 << 2 * j;
    return value;
}

float scale_of(const std::byte* parameters, int row) {
    return float_from_half(static_cast<uint16_t>(std::to_integer<int>(row_byte(parameters, row, 0)) |
                                                 std::to_integer<int>(row_byte(parameters, row, 1)) << 8));
}

// Ratio and shift of a later level.
std::byte later_byte(const std::byte* parameters, int row, int level) {
    if (level <= kNestedLaterInGroups) return row_byte(parameters, row, 4 - level);
    const int index = level - kNestedLaterInGroups - 1;
    const std::byte* line = parameters + (kNestedChunk + index / kNestedLaterInLine) * kNestedLine;
    return line[4 * row + 3 - index % kNestedLaterInLine];
}

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
                const std::byte* parameters = parameters_of(matrix, block, g);
                const int8_t* codes = x.codes + (token + g) * kGroup;
                for (int row = 0; row < kRowBlock; ++row) {
                    float scale = scale_of(parameters, row);
                    const float unit = scale * (static_cast<float>(1 << levels[0].bits) / 128);
                    float center = scale * (static_cast<float>((1 << levels[0].bits) - 1) / -2);
                    int below = levels[0].bits;
                    for (int level = 1; level < matrix.levels.count; ++level) {
                        const std::byte packed = later_byte(parameters, row, level);
                        const float ratio = ratio_of(packed), shift = shift_of(packed);
                        const float parts = static_cast<float>(1 << levels[level].bits);
                        scale = scale / parts * (1 + ratio / static_cast<float>(8 << below));
                        center = std::fma(scale, parts * (shift / 32 - ratio / 16 - 0.5f) + 0.5f, center);
                        below += levels[level].bits;
                    }
                    int32_t dots = 0, moved = 0, total = 0;
                    for (int part = 0; part < kGroup / kNestedPart; ++part) {
                        const int packed =
                            std::to_integer<int>(parameters[g % kNestedChunk * kNestedLine + 4 * row + part]);
                        const int step = kNestedSteps[packed & 3];
                        const int offset = nested_offset(packed >> 2 & 15, matrix.levels.count == 1);
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
