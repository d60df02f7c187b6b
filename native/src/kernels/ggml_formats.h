// What the blocks of ggml's formats consist of. In an unnamed namespace because files with different instruction sets
// include it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "edgemoe/kernels.h"

namespace edgemoe {

// At least `size` bytes of this thread, 64-byte aligned, for the activations that a matmul call packs.
std::byte* packed_scratch(size_t size);

size_t ggml_block_bytes(Layout layout, int cols);
void ggml_dequantize_row(const Matrix& matrix, int row, float* out);
void ggml_matmul_scalar(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                        int first_block, int last_block, float* out, ptrdiff_t out_stride);

namespace {

// A block in a file: `words` 32-bit words from byte `words_at` on, and parameters that are no words.
struct GgmlFormat {
    int cols;
    int words;
    int words_at;
    int parameters;
    int parameter_bytes;  // of one
    int parameters_at;

    constexpr int bytes() const { return words * 4 + parameters * parameter_bytes; }

    // Of a block's words and of its parameters in the memory of 16 rows.
    constexpr size_t word_bytes() const { return size_t{4} * kRowBlock * static_cast<size_t>(words); }
    constexpr size_t parameters_bytes() const {
        return size_t{kRowBlock} * static_cast<size_t>(parameters) * static_cast<size_t>(parameter_bytes);
    }

    // Whether a weight is a byte (q8_0). So little is computed with a line then that the processor's own prefetching,
    // of several row blocks at once, does better than asking for lines.
    constexpr bool plain() const { return words * 4 == cols; }

    // Blocks whose words lie together, followed by their parameters: as many as fill a cache line with parameters.
    // Memory is then read from its beginning to its end, which is what processors fetch ahead best. All blocks of q8_0.
    constexpr int chunk() const {
        if (plain()) return 1 << 30;
        return parameters_bytes() < 64 ? static_cast<int>(64 / parameters_bytes()) : 1;
    }
};

// Where q6_k's words lie in memory, four at a time: scales first, then for each half of the block the nibbles and high
// crumbs of its columns in the order in which they are multiplied.
constexpr int kQ6KPlaces[13] = {1, 3, 5, 6, 7, 9, 11, 12, 2, 4, 8, 10, 0};

// The place in memory of a block's word.
[[maybe_unused]] constexpr int ggml_word(Layout layout, int word) {
    return layout == Layout::ggml_q6_k ? kQ6KPlaces[word / 4] * 4 + word % 4 : word;
}

// Where a block lies within 16 rows of `blocks` blocks.
struct GgmlPlace {
    size_t words;       // [word][16 rows]
    size_t parameters;  // [parameter][16 rows]
};

[[maybe_unused]] constexpr GgmlPlace ggml_place(const GgmlFormat& format, int blocks, int block) {
    const int inside = block % format.chunk(), first = block - inside;
    const int count = blocks - first < format.chunk() ? blocks - first : format.chunk();
    const size_t begin = static_cast<size_t>(first) * (format.word_bytes() + format.parameters_bytes());
    return {begin + static_cast<size_t>(inside) * format.word_bytes(),
            begin + static_cast<size_t>(count) * format.word_bytes() +
                static_cast<size_t>(inside) * format.parameters_bytes()};
}

[[maybe_unused]] constexpr GgmlFormat ggml_format(Layout layout) {
    switch (layout) {
        case Layout::ggml_q4_0:  // d | nibbles
        case Layout::ggml_iq4_nl:
            return {32, 4, 2, 1, 2, 0};
        case Layout::ggml_q4_1:  // d m | nibbles
            return {32, 4, 4, 2, 2, 0};
        case Layout::ggml_q5_0:  // d | high bits, nibbles
            return {32, 5, 2, 1, 2, 0};
        case Layout::ggml_q5_1:  // d m | high bits, nibbles
            return {32, 5, 4, 2, 2, 0};
        case Layout::ggml_q8_0:  // d | codes
            return {32, 8, 2, 1, 2, 0};
        case Layout::ggml_q2_k:  // scales 4, crumbs 16 | d dmin
            return {256, 20, 0, 2, 2, 80};
        case Layout::ggml_q3_k:  // high bits 8, crumbs 16, scales 3 | d
            return {256, 27, 0, 1, 2, 108};
        case Layout::ggml_q4_k:  // d dmin | scales 3, nibbles 32
            return {256, 35, 4, 2, 2, 0};
        case Layout::ggml_q5_k:  // d dmin | scales 3, high bits 8, nibbles 32
            return {256, 43, 4, 2, 2, 0};
        case Layout::ggml_q6_k:  // nibbles 32, high crumbs 16, scales 4 | d
            return {256, 52, 0, 1, 2, 208};
        case Layout::ggml_iq4_xs:  // d scales_h | scales_l 1, nibbles 32
            return {256, 33, 4, 2, 2, 0};
        case Layout::ggml_mxfp4:  // exponent | nibbles
            return {32, 4, 1, 1, 1, 0};
        default:
            return {};
    }
}

[[maybe_unused]] constexpr bool ggml_has_minimum(Layout layout) {
    return layout == Layout::ggml_q4_1 || layout == Layout::ggml_q5_1 || layout == Layout::ggml_q2_k ||
           layout == Layout::ggml_q4_k || layout == Layout::ggml_q5_k;
}

// Columns that share an integer scale, in blocks of 256.
[[maybe_unused]] constexpr int ggml_sub_block(Layout layout) {
    return layout == Layout::ggml_q2_k || layout == Layout::ggml_q3_k || layout == Layout::ggml_q6_k ? 16 : 32;
}

constexpr int8_t kIq4Values[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr int8_t kFp4Values[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};  // doubled

}  // namespace
}  // namespace edgemoe
