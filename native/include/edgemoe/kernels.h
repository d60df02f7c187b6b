// The arithmetic of a pass, to the bit: what the operations of every backend promise.
//
// A table of these functions exists for every instruction set, and is chosen at run time. The scalar one is the
// reference: the others, and the kernels of a device, give the same bytes. Nor does a result depend on its company:
// however a batch is cut into tokens, a matrix into rows or a text into chunks, each number comes out as if it were
// computed alone. What that takes:
//
//  * Every operation that rounds is written down below, and in which order it comes. fma(a, b, c) rounds once,
//    everything else after each operation, to the nearest number and to the even one of two. Compilers must not fuse
//    or reorder anything (-ffp-contract=off, and no -ffast-math).
//  * A product has one accumulator for each of its outputs. Columns, or groups of columns, are added in ascending
//    order. What is summed within a group are integers, exact in any order.
//  * A reduction over a vector (norms, softmax) has kLanes accumulators: element i goes to accumulator i % kLanes,
//    ascending, and they are folded by halves (i takes in i + 8, then i + 4, i + 2, i + 1), whatever the width of a
//    register.
//  * Attention goes through positions in blocks of kKvBlock that begin at absolute multiples of it, ascending.
//  * Functions are our own, since two C libraries may differ in a last bit: exp and log(1 + e) are polynomials in
//    float32 (function_constants.h), cosine and sine of rotary angles are computed once for all backends, in double
//    precision, by rotary() below. Otherwise there are only operations which IEEE 754 defines to the bit: sums,
//    products, fma, quotients, square roots, conversions.
//  * No operation makes a subnormal number of numbers that are not near them: exp is 0 below -87.33654 and infinity
//    above 87.33654, so that neither it nor its inverse is one; shares of a softmax and activations that could lead to
//    one count as zeros; and what shrinks below them on its way into a sum, such as an accumulator of attend when the
//    maximum grows, is too small to change it. So hardware that flushes subnormal numbers computes the same logits.
//  * What is not a number stays visible: a NaN or an infinity in an input reaches the outputs that depend on it. A
//    result that is NaN is always the same quiet one, 0x7FC00000, because which operand's an instruction passes on
//    depends on the order a compiler puts the operands in. max(a, b) and min(a, b) are b where the two are unordered.
//
// Sizes need not be multiples of anything unless it says so, and nothing beyond them is written. Unless it says so,
// outputs do not overlap inputs.
#pragma once

#include <bit>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "edgemoe/weight_layouts.h"

namespace edgemoe {

inline constexpr int kLanes = 16;    // accumulators of a reduction
inline constexpr int kKvBlock = 64;  // positions of a block of keys and values
inline constexpr int kKvGroup = 32;  // elements of a q8_0 key or value that share a scale

inline constexpr float kNan = std::bit_cast<float>(0x7FC00000u);  // the one that is ever written
inline float canonical(float x) { return x == x ? x : kNan; }

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

// Bytes of the keys, or values, of a block.
size_t kv_block_bytes(KvType type, int dim);

// Groups of kGroup columns.
inline size_t column_groups(int cols) { return (static_cast<size_t>(cols) + kGroup - 1) / kGroup; }

struct Kernels {
    std::string_view name;

    // --- products ---------------------------------------------------------------------------------------------------

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

    // --- vectors ----------------------------------------------------------------------------------------------------

    // out = (x * (1 / sqrt(mean(x^2) + epsilon))) * weight, with the squares summed as fma(x, x, sum). out may be x.
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

    // out[i] = x[i] * (1 / (1 + exp(-gate[i]))). out may be x.
    void (*sigmoid_multiply)(std::span<const float> gate, const float* x, float* out);

    // In place: x[i] = cap * tanh(x[i] / cap), with tanh(t) = 1 - 2 / (1 + exp(2 t)).
    void (*softcap)(float cap, std::span<float> x);

    // In place: x[i] = exp(rate[i] * softplus(x[i] + bias[i])), with softplus(t) = max(0, t) + log(1 + exp(-|t|)): by
    // how much a recurrence's state decays. Softplus is exact to 2.2 units in its last place, so the result's relative
    // error is at most (2 + 3 |log x|) 2^-23.
    void (*softplus_decay)(std::span<float> x, const float* bias, const float* rate);

    // In place: x[i] = exp(x[i] - max) / sum of these; exp counts as 0 where x[i] - max < -64.
    void (*softmax)(std::span<float> x);

    // y[i] = fma(a, x[i], y[i]).
    void (*add_scaled)(float a, const float* x, std::span<float> y);

    // --- positions, keys and values ---------------------------------------------------------------------------------

    // Turns pairs (i, i + pairs) of one head in place by cosine[i], sine[i], which rotary() makes; elements beyond
    // 2 * pairs stay. out[i] = fma(x[i], c, -(x[i+p] * s)); out[i+p] = fma(x[i+p], c, x[i] * s).
    void (*rope)(float* head, const float* cosine, const float* sine, int pairs);

    // Stores one position's key (or value) vector of `dim` elements. In its block,
    // keys lie transposed, [dim][kKvBlock] (q8_0: codes [dim][kKvBlock], then float16 scales [dim/kKvGroup][kKvBlock]),
    // so that attention has one position per lane. Values lie [kKvBlock][dim] (q8_0: codes, then float16 scales
    // [kKvBlock][dim/kKvGroup]). f16 rounds half to even. q8_0 needs dim % kKvGroup == 0; per group, scale =
    // float16(max|x| / 127) and code = round-half-even(x / scale) limited to +-127, with the scale as it is stored. A
    // group whose scale rounds to zero has codes 0; one with a NaN or infinity, or whose scale overflows, has scale NaN
    // and codes 0.
    void (*store_key)(KvType type, std::span<const float> key, int position, const KvBlocks& blocks);
    void (*store_value)(KvType type, std::span<const float> value, int position, const KvBlocks& blocks);

    // The online softmax for `heads` query heads that share a key/value head, over positions [begin, end) of a
    // sequence, one step for each block that holds some of them, in ascending order.
    // State per head: maximum[h], sum[h], accumulator[h * dim .. ] (not yet divided by sum).
    // Start: maximum = -infinity, sum = 0, accumulator = 0. Scores are scale * (q . k), d ascending, one lane each.
    // With m the new maximum: p = exp(score - m), c = exp(old maximum - m) (0 at the start), sum = fma(sum, c,
    // reduction of p over all kKvBlock places of the block, 0 outside [begin, end)), accumulator = accumulator * c,
    // then fma(p, value, accumulator) with positions ascending. An element of a q8_0 key or value is the rounded
    // product code * scale. Places of a block outside [begin, end) may hold anything.
    void (*attend)(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                   const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);

    // As attend, with values that are the first value_dim elements of the keys (a latent that is stored once):
    // queries [heads, dim], accumulator [heads, value_dim].
    void (*attend_latent)(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                          const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);

    // --- convolutions and recurrences -------------------------------------------------------------------------------

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

// The tables this build has and this processor can run, best last; scalar is always first.
std::vector<std::string_view> available_isas();

// The table called `name`; empty: EDGEMOE_ISA if set, otherwise the best. Throws std::invalid_argument naming those
// that are available.
const Kernels& select_kernels(std::string_view name = {});

}  // namespace edgemoe
