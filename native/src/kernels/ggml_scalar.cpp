// ggml's formats in plain C++: what a code, a scale and a minimum are, single rows, and the reference of the products.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>

#include "ggml_formats.h"
#include "half.h"

namespace edgemoe {
namespace {

// One row of one block within the interleaved layout.
struct Block {
    Layout layout;
    const std::byte* words;       // [word][16 rows], see ggml_word
    const std::byte* parameters;  // [parameter][16 rows]
    int row;

    int byte(int index) const {
        const int word = ggml_word(layout, index / 4);
        return std::to_integer<int>(words[word * (4 * kRowBlock) + row * 4 + index % 4]);
    }
    int nibble(int index, bool high) const { return high ? byte(index) >> 4 : byte(index) & 15; }
    int bit(int first_byte, int index) const { return byte(first_byte + index / 8) >> (index % 8) & 1; }
    uint16_t parameter(int index) const {
        uint16_t value;
        std::memcpy(&value, parameters + (index * kRowBlock + row) * 2, sizeof value);
        return value;
    }

    float scale() const {
        if (layout != Layout::ggml_mxfp4) return float_from_half(parameter(0));
        // 2^(e - 128): half of the format's 2^(e - 127), because the codes are doubled.
        const auto exponent = std::to_integer<uint32_t>(parameters[row]);
        return std::bit_cast<float>(exponent < 2 ? 0x00200000u << exponent : (exponent - 1) << 23);
    }
    // m, or dmin of the blocks of 256, which is subtracted.
    float minimum() const { return float_from_half(parameter(1)); }

    // The signed integer that the scales multiply.
    int code(int column) const {
        const int place = column % 32;
        const int half = column % 128;  // of q2_k, q3_k and q6_k
        const bool upper = place >= 16;
        switch (layout) {
            case Layout::ggml_q4_0:
                return nibble(place % 16, upper) - 8;
            case Layout::ggml_q4_1:
                return nibble(place % 16, upper);
            case Layout::ggml_q5_0:
                return (nibble(4 + place % 16, upper) | bit(0, place) << 4) - 16;
            case Layout::ggml_q5_1:
                return nibble(4 + place % 16, upper) | bit(0, place) << 4;
            case Layout::ggml_q8_0:
                return static_cast<int8_t>(byte(place));
            case Layout::ggml_q2_k:
                return byte(16 + column / 128 * 32 + place) >> (half / 32 * 2) & 3;
            case Layout::ggml_q3_k:
                return (byte(32 + column / 128 * 32 + place) >> (half / 32 * 2) & 3) +
                       (byte(place) >> (column / 32) & 1) * 4 - 4;
            case Layout::ggml_q4_k:
                return nibble(12 + column / 64 * 32 + place, column % 64 >= 32);
            case Layout::ggml_q5_k:
                return nibble(44 + column / 64 * 32 + place, column % 64 >= 32) |
                       (byte(12 + place) >> (column / 32) & 1) << 4;
            case Layout::ggml_q6_k:
                return (nibble(column / 128 * 64 + column % 64, half >= 64) |
                        (byte(128 + column / 128 * 32 + place) >> (half / 32 * 2) & 3) << 4) -
                       32;
            case Layout::ggml_iq4_nl:
                return kIq4Values[nibble(place % 16, upper)];
            case Layout::ggml_iq4_xs:
                return kIq4Values[nibble(4 + column / 32 * 16 + place % 16, upper)];
            case Layout::ggml_mxfp4:
                return kFp4Values[nibble(place % 16, upper)];
            default:
                return 0;
        }
    }

    // The integer scale of a sub-block (blocks of 256).
    int sub_scale(int sub) const {
        switch (layout) {
            case Layout::ggml_q2_k:
                return byte(sub) & 15;
            case Layout::ggml_q3_k:
                return (nibble(96 + sub % 8, sub >= 8) | (byte(104 + sub % 4) >> (sub / 4 * 2) & 3) << 4) - 32;
            case Layout::ggml_q4_k:
            case Layout::ggml_q5_k:
                return sub < 4 ? byte(sub) & 63 : (byte(4 + sub) & 15) | byte(sub - 4) >> 6 << 4;
            case Layout::ggml_q6_k:
                return static_cast<int8_t>(byte(192 + sub));
            case Layout::ggml_iq4_xs:
                return (nibble(sub / 2, sub % 2 != 0) | (parameter(1) >> (sub * 2) & 3) << 4) - 32;
            default:
                return 1;
        }
    }

    int sub_minimum(int sub) const {
        if (layout == Layout::ggml_q2_k) return byte(sub) >> 4;
        return sub < 4 ? byte(4 + sub) & 63 : byte(4 + sub) >> 4 | byte(sub) >> 6 << 4;
    }
};

Block block_at(const Matrix& matrix, const GgmlFormat& format, int row, int block) {
    const std::byte* rows = matrix.data + row / kRowBlock * ggml_block_bytes(matrix.layout, matrix.cols);
    const GgmlPlace place = ggml_place(format, matrix.cols / format.cols, block);
    return {matrix.layout, rows + place.words, rows + place.parameters, row % kRowBlock};
}

// Adds the product of a block with the codes at its first column.
float add_block(const Block& block, const GgmlFormat& format, const int8_t* codes, const float* scales, float sum) {
    const bool has_minimum = ggml_has_minimum(block.layout);
    const float scale = block.scale();
    const float minimum = has_minimum ? block.minimum() : 0.0f;
    if (format.cols == 32) {
        int32_t dot = 0;
        int32_t total = 0;
        for (int column = 0; column < 32; ++column) {
            dot += block.code(column) * codes[column];
            total += codes[column];
        }
        sum = std::fma(scale * scales[0], static_cast<float>(dot), sum);
        if (has_minimum) sum = std::fma(minimum * scales[0], static_cast<float>(total), sum);
        return sum;
    }
    const int width = ggml_sub_block(block.layout);
    for (int group = 0; group < 256 / kGroup; ++group) {
        int32_t dots = 0;
        int32_t totals = 0;
        for (int first = group * kGroup; first < (group + 1) * kGroup; first += width) {
            int32_t dot = 0;
            int32_t total = 0;
            for (int column = first; column < first + width; ++column) {
                dot += block.code(column) * codes[column];
                total += codes[column];
            }
            dots += block.sub_scale(first / width) * dot;
            if (has_minimum) totals += block.sub_minimum(first / width) * total;
        }
        sum = std::fma(scale * scales[group], static_cast<float>(dots), sum);
        if (has_minimum) sum = std::fma(-(minimum * scales[group]), static_cast<float>(totals), sum);
    }
    return sum;
}

}  // namespace

void ggml_matmul_scalar(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                        int first_block, int last_block, float* out, ptrdiff_t out_stride) {
    const GgmlFormat format = ggml_format(matrix.layout);
    const size_t groups = (static_cast<size_t>(matrix.cols) + kGroup - 1) / kGroup;
    const int end = last_block * kRowBlock < matrix.rows ? last_block * kRowBlock : matrix.rows;
    for (int row = first_block * kRowBlock; row < end; ++row)
        for (int i = 0; i < count; ++i) {
            const auto token = static_cast<size_t>(tokens.empty() ? i : tokens[i]);
            const int8_t* codes = x.codes + token * groups * kGroup;
            const float* scales = x.scales + token * groups;
            float sum = 0.0f;
            for (int column = 0; column < matrix.cols; column += format.cols)
                sum = add_block(block_at(matrix, format, row, column / format.cols), format, codes + column,
                                scales + column / kGroup, sum);
            out[i * out_stride + row] = sum == sum ? sum : std::bit_cast<float>(0x7FC00000u);
        }
}

void ggml_dequantize_row(const Matrix& matrix, int row, float* out) {
    const GgmlFormat format = ggml_format(matrix.layout);
    const bool has_minimum = ggml_has_minimum(matrix.layout);
    const int width = ggml_sub_block(matrix.layout);
    for (int first = 0; first < matrix.cols; first += format.cols) {
        const Block block = block_at(matrix, format, row, first / format.cols);
        const float scale = block.scale();
        const float minimum = has_minimum ? block.minimum() : 0.0f;
        for (int column = 0; column < format.cols; ++column) {
            const auto code = static_cast<float>(block.code(column));
            if (format.cols == 32) {
                out[first + column] = has_minimum ? scale * code + minimum : scale * code;
                continue;
            }
            const float value = scale * static_cast<float>(block.sub_scale(column / width)) * code;
            out[first + column] =
                has_minimum ? value - minimum * static_cast<float>(block.sub_minimum(column / width)) : value;
        }
    }
}

}  // namespace edgemoe
