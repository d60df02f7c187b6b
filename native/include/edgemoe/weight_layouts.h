// How weights lie in memory, and in files.
//
// A matrix [rows, cols] is stored in blocks of kRowBlock rows, and within a block column by column (or group by group
// of columns), the rows side by side: one row for each lane of a product. A product with a single token reads it from
// beginning to end.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace edgemoe {

inline constexpr int kRowBlock = 16;  // rows interleaved in a weight block
inline constexpr int kGroup = 64;     // columns that share one scale and offset

// docs/format.md describes the bytes of the first five, and of nested. The ggml_* layouts hold the blocks of a GGUF
// file, permuted by interleave() below.
enum class Layout : uint8_t {
    f32,
    bf16,
    f16,
    q8g64,
    q4g64,
    ggml_q4_0,
    ggml_q4_1,
    ggml_q5_0,
    ggml_q5_1,
    ggml_q8_0,
    ggml_q2_k,
    ggml_q3_k,
    ggml_q4_k,
    ggml_q5_k,
    ggml_q6_k,
    ggml_iq4_nl,
    ggml_iq4_xs,
    ggml_mxfp4,
    nested,  // levels that lie apart: Matrix::levels instead of Matrix::data
};

inline constexpr int kMaxLevels = 8;

bool is_ggml(Layout layout);

// Whether products with this layout read the int8 codes of the activations; otherwise they read the float values.
bool reads_codes(Layout layout);

// The levels of a nested matrix that a product works with, coarse to fine: at most 8 bits in all.
struct NestedLevels {
    int count = 0;
    int later = 0;                                    // that level 0 has parameters of: count - 1 or more
    std::array<uint8_t, kMaxLevels> bits{};           // that each level adds
    std::array<const std::byte*, kMaxLevels> data{};  // 64-byte aligned
};

// A weight matrix [rows, cols] in memory, 64-byte aligned.
struct Matrix {
    Layout layout;
    int rows;
    int cols;
    const std::byte* data;
    NestedLevels levels{};  // of the nested layout
};

// Bytes of one row block of a layout, and of a whole matrix. Throws std::invalid_argument if cols is not a multiple of
// the layout's block (32 or 256 columns of the ggml layouts).
size_t block_bytes(Layout layout, int cols);
size_t block_bytes(const Matrix& matrix);  // of a nested one: of all its levels
size_t matrix_bytes(Layout layout, int rows, int cols);

Layout layout_from_name(std::string_view name);  // throws std::invalid_argument
std::string_view layout_name(Layout layout);

// Matrices as files store them: the layouts above as they are, or row after row as in GGUF (`row_major`), which must be
// interleaved once they are in memory. Names of row-major ones are "ggml.f32", "ggml.f16", "ggml.bf16" (their layouts
// are f32, f16, bf16) and "ggml.q4_0" ... "ggml.mxfp4". One level of a nested matrix: "base2r3" is level 0 of 2 bits,
// followed by 3 later levels, "refine1" a later level that adds one bit.
struct StoredLayout {
    Layout layout;
    bool row_major;
    int level_bits = 0;
    bool refines = false;
    int later = 0;  // levels that follow, of a level 0
};
StoredLayout stored_layout(std::string_view name);  // throws std::invalid_argument
std::string stored_name(StoredLayout stored);
// Bytes of the file: rows beyond the last are not stored in row-major matrices, so that this may be less than
// matrix_bytes; it is the same if rows is a multiple of kRowBlock.
size_t stored_bytes(StoredLayout stored, int rows, int cols);

// Permutes a row-major matrix: source [stored_bytes] -> target [matrix_bytes, 64-byte aligned]. The two may overlap in
// any way or be the same; source needs no alignment. Rows that fill up the last block become zeros. scratch:
// block_bytes(layout, cols), of its own, for every thread that interleaves.
//
// A row block of a ggml layout: as many blocks at a time as fill 64 bytes with parameters (one, two or four; of q8_0
// all; the last time as many as there are), first their 32-bit words [block][word][16 rows], those of q6_k in another
// order, then their remaining parameters [block][parameter][16 rows], which are float16 numbers (iq4_xs: the second is
// scales_h; mxfp4: one byte, the exponent).
void interleave(Layout layout, int rows, int cols, const std::byte* source, std::byte* target, std::byte* scratch);

// Row `row` of the matrix as float32 [cols] (embedding lookup): scale * code + offset, each rounded; ggml layouts with
// ggml's own products and their order.
void dequantize_row(const Matrix& matrix, int row, float* out);

}  // namespace edgemoe
