// Products with the layouts of packs that are not nested.
#include "half.h"
#include "pack_format.h"
#include "scalar.h"

namespace edgemoe::scalar {
namespace {

float float_weight(Layout layout, const std::byte* data, size_t index) {
    if (layout == Layout::f32) return load_f32(data, index);
    const uint16_t bits = load_u16(data, index);
    return layout == Layout::bf16 ? float_from_bf16(bits) : float_from_half(bits);
}

void float_product(const Matrix& matrix, const std::byte* block, const float* x, Lanes& sums) {
    for (int column = 0; column < matrix.cols; ++column)
        for (int row = 0; row < kRowBlock; ++row) {
            const float weight = float_weight(matrix.layout, block, static_cast<size_t>(column) * kRowBlock + row);
            sums[row] = std::fma(weight, x[column], sums[row]);
        }
}

int code_of(Layout layout, const std::byte* group, int row, int column) {
    const auto* codes = reinterpret_cast<const uint8_t*>(group);
    if (layout == Layout::q8g64) return codes[column / 4 * 64 + 4 * row + column % 4];
    const int byte = codes[column / 8 * 64 + 4 * row + column % 4];
    return column % 8 < 4 ? byte & 15 : byte >> 4;
}

void quantized_product(const Matrix& matrix, const std::byte* block, const int8_t* codes, const float* scales,
                       const float* x_sums, Lanes& sums) {
    const int groups = (matrix.cols + kGroup - 1) / kGroup;
    const size_t code_bytes = matrix.layout == Layout::q8g64 ? kQ8Codes : kQ4Codes;
    for (int g = 0; g < groups; ++g) {
        const std::byte* group = block + static_cast<size_t>(g) * (code_bytes + kGroupParameters);
        for (int row = 0; row < kRowBlock; ++row) {
            int32_t dot = 0;
            for (int column = 0; column < kGroup; ++column)
                dot += code_of(matrix.layout, group, row, column) * codes[g * kGroup + column];
            const float scale = float_from_half(load_u16(group + code_bytes, row));
            const float offset = float_from_half(load_u16(group + code_bytes, kRowBlock + row));
            sums[row] = std::fma(scale * scales[g], static_cast<float>(dot), sums[row]);
            sums[row] = std::fma(offset, x_sums[g], sums[row]);
        }
    }
}

}  // namespace

void matmul_packs(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                  int first_block, int last_block, float* out, ptrdiff_t out_stride) {
    const size_t groups = (static_cast<size_t>(matrix.cols) + kGroup - 1) / kGroup;
    const size_t bytes = block_bytes(matrix.layout, matrix.cols);
    const bool quantized = matrix.layout == Layout::q8g64 || matrix.layout == Layout::q4g64;
    for (int block = first_block; block < last_block; ++block) {
        const std::byte* data = matrix.data + block * bytes;
        for (int i = 0; i < count; ++i) {
            const auto token = static_cast<size_t>(tokens.empty() ? i : tokens[i]);
            Lanes sums{};
            if (quantized)
                quantized_product(matrix, data, x.codes + token * groups * kGroup, x.scales + token * groups,
                                  x.sums + token * groups, sums);
            else
                float_product(matrix, data, x.values + static_cast<ptrdiff_t>(token) * x.value_stride, sums);
            for (int row = 0; row < kRowBlock && block * kRowBlock + row < matrix.rows; ++row)
                out[i * out_stride + block * kRowBlock + row] = canonical(sums[row]);
        }
    }
}

}  // namespace edgemoe::scalar
