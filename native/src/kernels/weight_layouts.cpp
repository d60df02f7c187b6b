// Sizes and names of layouts, and single rows of them.
#include "edgemoe/weight_layouts.h"

#include <cstring>
#include <stdexcept>
#include <string>

#include "ggml_formats.h"
#include "half.h"
#include "nested_format.h"
#include "pack_format.h"

namespace edgemoe {
namespace {

constexpr std::string_view kLayoutNames[] = {"f32",         "bf16",        "f16",        "q8g64",     "q4g64",
                                             "ggml.q4_0",   "ggml.q4_1",   "ggml.q5_0",  "ggml.q5_1", "ggml.q8_0",
                                             "ggml.q2_k",   "ggml.q3_k",   "ggml.q4_k",  "ggml.q5_k", "ggml.q6_k",
                                             "ggml.iq4_nl", "ggml.iq4_xs", "ggml.mxfp4", "nested"};

}  // namespace

bool is_ggml(Layout layout) { return layout >= Layout::ggml_q4_0 && layout != Layout::nested; }

bool reads_codes(Layout layout) { return layout >= Layout::q8g64; }

size_t block_bytes(Layout layout, int cols) {
    const auto columns = static_cast<size_t>(cols);
    const size_t groups = (columns + kGroup - 1) / kGroup;
    switch (layout) {
        case Layout::f32:
            return columns * kRowBlock * sizeof(float);
        case Layout::bf16:
        case Layout::f16:
            return columns * kRowBlock * sizeof(uint16_t);
        case Layout::q8g64:
            return groups * (kQ8Codes + kGroupParameters);
        case Layout::q4g64:
            return groups * (kQ4Codes + kGroupParameters);
        default:
            return ggml_block_bytes(layout, cols);
    }
}

size_t block_bytes(const Matrix& matrix) {
    if (matrix.layout != Layout::nested) return block_bytes(matrix.layout, matrix.cols);
    size_t bytes = 0;
    for (int level = 0; level < matrix.levels.count; ++level)
        bytes += nested_block_bytes(matrix.levels, level, matrix.cols);
    return bytes;
}

size_t matrix_bytes(Layout layout, int rows, int cols) {
    return (static_cast<size_t>(rows) + kRowBlock - 1) / kRowBlock * block_bytes(layout, cols);
}

void dequantize_row(const Matrix& matrix, int row, float* out) {
    if (is_ggml(matrix.layout)) return ggml_dequantize_row(matrix, row, out);
    const std::byte* block = matrix.data + row / kRowBlock * block_bytes(matrix.layout, matrix.cols);
    const int lane = row % kRowBlock;
    const auto half_at = [](const std::byte* data, size_t index) {
        uint16_t value;
        std::memcpy(&value, data + index * sizeof value, sizeof value);
        return value;
    };
    const size_t code_bytes = matrix.layout == Layout::q8g64 ? kQ8Codes : kQ4Codes;
    for (int column = 0; column < matrix.cols; ++column) {
        const size_t index = static_cast<size_t>(column) * kRowBlock + lane;
        switch (matrix.layout) {
            case Layout::f32:
                std::memcpy(out + column, block + index * sizeof(float), sizeof(float));
                break;
            case Layout::bf16:
                out[column] = float_from_bf16(half_at(block, index));
                break;
            case Layout::f16:
                out[column] = float_from_half(half_at(block, index));
                break;
            case Layout::q8g64:
            case Layout::q4g64: {
                const std::byte* group = block + column / kGroup * (code_bytes + kGroupParameters);
                const int place = column % kGroup;
                int code;
                if (matrix.layout == Layout::q8g64) {
                    code = std::to_integer<int>(group[place / 4 * 64 + 4 * lane + place % 4]);
                } else {
                    const int byte = std::to_integer<int>(group[place / 8 * 64 + 4 * lane + place % 4]);
                    code = place % 8 < 4 ? byte & 15 : byte >> 4;
                }
                const float scale = float_from_half(half_at(group + code_bytes, lane));
                const float offset = float_from_half(half_at(group + code_bytes, kRowBlock + lane));
                out[column] = scale * static_cast<float>(code) + offset;  // the product is exact
                break;
            }
            default:
                break;
        }
    }
}

Layout layout_from_name(std::string_view name) {
    for (size_t i = 0; i < std::size(kLayoutNames); ++i)
        if (kLayoutNames[i] == name) return static_cast<Layout>(i);
    throw std::invalid_argument("unknown weight layout '" + std::string(name) + "'");
}

std::string_view layout_name(Layout layout) { return kLayoutNames[static_cast<size_t>(layout)]; }

}  // namespace edgemoe
