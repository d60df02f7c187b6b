// The arithmetic of the engine: one table of function pointers per instruction set, chosen at run time.
//
// Every function gives the same bits on every instruction set and for every way of cutting its work into tokens or
// rows:
//  * a product has one float accumulator per output row (one row per lane); columns, or groups of columns, are added in
//    ascending order with fused multiply-adds, whether one token is multiplied or a tile of them;
//  * a reduction over a vector (norms, sums) runs in kLanes interleaved partial sums, folded by halves (8, 4, 2, 1);
//  * functions are our own polynomials, never the C library's, of which two may differ in a last bit: exp, log(1 + e),
//    and the cosine and sine of rotary angles. What IEEE 754 asks to be exact, or rounded once, is what is left: sums,
//    products, fused multiply-adds, quotients, square roots;
//  * no operation gives a subnormal number where it is not given numbers near them: exp is 0 below -87.33654 and
//    infinity above 87.33654, so neither it nor its inverse is one, and shares of a softmax and activations that could
//    lead to one count as zeros. So hardware that flushes subnormal numbers to zero computes the same bits of a model;
//  * a result that is NaN is the one quiet NaN 0x7FC00000, because which operand's NaN an instruction passes on depends
//    on the order a compiler puts the operands in.
// The scalar table is the reference that the others are compared with, byte by byte.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace edgemoe {

inline constexpr int kRowBlock = 16;  // rows interleaved in a weight block
inline constexpr int kGroup = 64;     // columns that share one scale and offset
inline constexpr int kLanes = 16;     // partial sums of a reduction
inline constexpr int kKvBlock = 64;   // positions per attention block; blocks start at absolute multiples of it
inline constexpr int kKvGroup = 32;   // elements of a q8_0 key or value that share a scale

// Weight layouts in memory; docs/format.md describes the bytes of the first five. The ggml_* layouts hold the blocks of
// a GGUF file, permuted by interleave() below.
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

// The inputs of a product, for up to `tokens` tokens. Float layouts read `values`; quantized layouts read the rest.
struct Activations {
    const float* values;  // [tokens, cols], row stride value_stride
    ptrdiff_t value_stride;
    const int8_t* codes;  // [tokens, groups * kGroup], zero-padded, 64-byte aligned rows
    const float* scales;  // [tokens, groups]
    const float* sums;    // [tokens, groups]: scale * (sum of the group's codes)
};

enum class KvType : uint8_t { f32, f16, q8_0 };

// One sequence's keys and values of one layer and key/value head. They lie in blocks of kKvBlock positions, block n of
// the sequence being that of positions n * kKvBlock to (n + 1) * kKvBlock - 1, and all sequences share a pool of such
// blocks (see StatePool). Only the table's entries of positions that a kernel is asked for are read.
struct KvBlocks {
    std::byte* pool;       // the keys of the pool's first block
    size_t stride;         // bytes from one block of the pool to the next
    size_t values;         // bytes from the keys of a block to its values
    const int32_t* table;  // [blocks of the sequence] where in the pool each of them is
};

struct Kernels {
    std::string_view name;

    // out[i * out_stride + row] = matrix[row, :] . x[tokens[i], :] for all i and the rows of blocks [first, last).
    // An empty `tokens` means tokens 0 .. count-1 in order; otherwise count == tokens.size().
    // Rows beyond matrix.rows (padding of the last block) are not written. Float layouts: acc = fma(weight, x, acc).
    // Quantized layouts, per group, with the exact integer dot product of the codes:
    //     acc = fma(scale * x_scale, float(dot), acc); acc = fma(offset, x_sum, acc)
    // ggml layouts, with signed codes (offsets subtracted, tables looked up) and exact integers; float() rounds half to
    // even, which only q6_k and iq4_xs with extreme scales need (beyond 2^24):
    //     blocks of 32 columns, one after the other:
    //         acc = fma(d * x_scale, float(dot), acc); with minimum: acc = fma(m * x_scale, float(x_code_sum), acc)
    //     blocks of 256 columns, per group of 64, with the integer scales and minimums of its sub-blocks:
    //         acc = fma(d * x_scale, float(sum of scale * dot), acc); with minimums:
    //         acc = fma(-(dmin * x_scale), float(sum of minimum * x_code_sum), acc)
    // Nested layouts, with the concatenated bits of their levels as codes, per group of 64 with the steps and offsets
    // of its parts of 16 columns, and with the scale, unit and center of 256 columns; integers are exact, float()
    // rounds half to even:
    //     sum = scale * float(sum of step * dot)
    //     sum = fma(unit, float(sum of step * offset * x_code_sum), sum)
    //     sum = fma(center, float(sum of step * x_code_sum), sum)
    //     acc = fma(sum, x_scale, acc)
    // Of level 0 of b bits: scale = s, unit = s * 2^b / 128, center = s * -(2^b - 1) / 2, and offset is 3 more or less
    // if the product is with level 0 alone (docs/format.md); of each later level of d bits, in ascending order, with b
    // the bits of all before it:
    //     scale = (scale / 2^d) * (1 + ratio / 2^(b + 3))
    //     center = fma(scale, 2^d * (shift / 32 - ratio / 16 - 1/2) + 1/2, center)
    void (*matmul)(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                   int first_block, int last_block, float* out, ptrdiff_t out_stride);

    // x [cols] -> codes [groups * kGroup], scales [groups], sums [groups]. scale = max|x| / 127,
    // code = round-half-even(x * (127 / max|x|)); a group of zeros, or of values so small that the scale would be
    // subnormal, has scale 0 and codes 0. A group with a NaN or infinity gets scale NaN and codes 0, so that it stays
    // visible in the output. Padding columns count as 0.
    void (*quantize)(std::span<const float> x, int8_t* codes, float* scales, float* sums);

    // out = (x * (1 / sqrt(mean(x^2) + epsilon))) * weight. out may be x.
    void (*rms_norm)(std::span<const float> x, const float* weight, float epsilon, float* out);

    // mean = sum(x) / n; variance = sum((x - mean)^2) / n; out = fma((x - mean) * (1 / sqrt(variance + epsilon)),
    // weight, bias). out may be x.
    void (*layer_norm)(std::span<const float> x, const float* weight, const float* bias, float epsilon, float* out);

    // out[i] = gate[i] / (1 + exp(-gate[i])) * up[i]. out may be gate.
    void (*silu_multiply)(std::span<const float> gate, const float* up, float* out);

    // The tanh form of GELU, as gate / (1 + exp(-2 u)) * up with u = sqrt(2 / pi) * fma(0.044715 * gate, gate^2, gate).
    // out may be gate.
    void (*gelu_multiply)(std::span<const float> gate, const float* up, float* out);

    // g = min(gate, limit), u = up limited to +-limit: out = g / (1 + exp(-(alpha * g))) * (u + 1). out may be gate.
    void (*clamped_swiglu)(std::span<const float> gate, const float* up, float alpha, float limit, float* out);

    // In place: x[i] = 1 / (1 + exp(-x[i])).
    void (*sigmoid)(std::span<float> x);

    // In place: x[i] = cap * tanh(x[i] / cap), with tanh(t) = 1 - 2 / (1 + exp(2 t)).
    void (*softcap)(float cap, std::span<float> x);

    // In place: x[i] = exp(rate[i] * softplus(x[i] + bias[i])), with softplus(t) = max(0, t) + log(1 + exp(-|t|)): by
    // how much a recurrence's state decays. Softplus is exact to 2.2 units in its last place, so the result's relative
    // error is at most (2 + 3 |log x|) 2^-23.
    void (*softplus_decay)(std::span<float> x, const float* bias, const float* rate);

    // In place: x[i] = exp(x[i] - max) / sum of these; exp counts as 0 where x[i] - max < -64.
    void (*softmax)(std::span<float> x);

    // y[i] += a * x[i] (one fused multiply-add each).
    void (*add_scaled)(float a, const float* x, std::span<float> y);

    // Rotates pairs (i, i + pairs) of one head in place by cosine[i], sine[i]; elements beyond 2 * pairs stay.
    // out[i] = x[i] c - x[i+p] s ; out[i+p] = x[i+p] c + x[i] s, each as the rounded product with s and one fused
    // multiply-add.
    void (*rope)(float* head, const float* cosine, const float* sine, int pairs);

    // Stores one position's key (or value) vector of `dim` elements. In its block,
    // keys lie transposed, [dim][kKvBlock] (q8_0: codes [dim][kKvBlock], then float16 scales [dim/kKvGroup][kKvBlock]),
    // so that attention has one position per lane. Values lie [kKvBlock][dim] (q8_0: codes, then float16 scales
    // [kKvBlock][dim/kKvGroup]). q8_0 needs dim % kKvGroup == 0; per group, scale = float16(max|x| / 127) and code =
    // round-half-even(x / scale) limited to +-127, with the scale as it is stored. A group whose scale rounds to zero
    // has codes 0; one with a NaN or infinity, or whose scale overflows, has scale NaN and codes 0.
    void (*store_key)(KvType type, std::span<const float> key, int position, const KvBlocks& blocks);
    void (*store_value)(KvType type, std::span<const float> value, int position, const KvBlocks& blocks);

    // The online softmax for `heads` query heads that share a key/value head, over positions [begin, end) of a
    // sequence, one step for each block that holds some of them, in ascending order.
    // State per head: maximum[h], sum[h], accumulator[h * dim .. ] (not yet divided by sum).
    // Start: maximum = -infinity, sum = 0, accumulator = 0. Scores are scale * (q . k), d ascending, one lane each.
    // With m the new maximum: p = exp(score - m), c = exp(old maximum - m) (0 at the start), sum = fma(sum, c,
    // reduction of p over all kKvBlock slots of the block, 0 outside [begin, end)), accumulator = accumulator * c, then
    // fma(p, value, accumulator) with positions ascending. An element of a q8_0 key or value is the rounded product
    // code * scale. Slots of a block outside [begin, end) may hold anything.
    void (*attend)(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                   const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);

    // As attend, with values that are the first value_dim elements of the keys (a latent that is stored once):
    // queries [heads, dim], accumulator [heads, value_dim].
    void (*attend_latent)(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                          const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);

    // out[i] = x[i] * (1 / (1 + exp(-gate[i]))). out may be x.
    void (*sigmoid_multiply)(std::span<const float> gate, const float* x, float* out);

    // One position of a causal depthwise convolution, for the channels of blocks [first, last) of `weights`, an f32
    // matrix [channels, taps]: y[c] = sum over ascending taps of fma(weights[c, tap], rows[tap][c], y[c]), from 0.
    // rows[tap] is the input at that tap, [channels], or null before the beginning of the sequence: left out. With
    // `silu`, out[c] = y[c] / (1 + exp(-y[c])), otherwise y[c].
    void (*convolve)(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu,
                     float* out);

    // One token of the gated delta rule (Yang et al. 2024, "Gated Delta Networks", equation 10) for one head, whose
    // state [key_dim, value_dim] it advances; value_dim is a multiple of kLanes. Per column v, k ascending:
    //     memory = fma(state[k, v] * decay, key[k], memory), from 0; delta = (value[v] - memory) * beta
    //     state[k, v] = fma(key[k], delta, state[k, v] * decay); out[v] = fma(state[k, v], query[k], out[v]), from 0
    void (*gated_delta)(float* state, int key_dim, int value_dim, const float* query, const float* key,
                        const float* value, float decay, float beta, float* out);
};

// Cosine and sine of the angles by which a position turns the pairs of a head (Kernels::rope), times `factor`. The
// angle is the float32 product of the position and the pair's inverse frequency; its cosine and sine are computed in
// double precision, and are the nearest float32 but for one in 10^8. Not a number for angles beyond 2^40. cosine, sine:
// [inverse_frequencies]. On the processor for all backends, the same on every one.
void rotary(std::span<const float> inverse_frequencies, int position, float factor, float* cosine, float* sine);

// Bytes of one row block of a layout, of a whole matrix, and of one key or value block. Throws std::invalid_argument if
// cols is not a multiple of the layout's block (32 or 256 columns of the ggml layouts).
size_t block_bytes(Layout layout, int cols);
size_t block_bytes(const Matrix& matrix);  // of a nested one: of all its levels
size_t matrix_bytes(Layout layout, int rows, int cols);
size_t kv_block_bytes(KvType type, int dim);

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

// Row `row` of the matrix as float32 [cols] (embedding lookup); ggml layouts with ggml's own products and their order.
void dequantize_row(const Matrix& matrix, int row, float* out);

Layout layout_from_name(std::string_view name);  // throws std::invalid_argument
std::string_view layout_name(Layout layout);
std::string stored_name(StoredLayout stored);

// The tables this build has and this processor can run, best last; scalar is always first.
std::vector<std::string_view> available_isas();

// The table called `name`; empty: EDGEMOE_ISA if set, otherwise the best. Throws std::invalid_argument naming those
// that are available.
const Kernels& select_kernels(std::string_view name = {});

}  // namespace edgemoe
