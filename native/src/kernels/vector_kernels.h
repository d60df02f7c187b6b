// Every kernel written once for 16 float lanes. A vector instruction set gives a trait V (a struct in its own unnamed
// namespace, so that nothing instantiated here is shared between files compiled with different flags):
//
//   F, I                      16 floats, 16 int32
//   zero set1 load load_n store store_n            (_n: the first n < 16 lanes; the others read as `fill`, default 0)
//   load_half load_half_n load_bf16 load_codes     from float16, bfloat16, int8
//   set1_half                                      one float16 broadcast
//   add sub mul div fma fms max min                max, min: the second operand where unordered or equal
//   keep(x, begin, end, other)                     x in lanes begin..end-1, otherwise `other`
//   unless_below(x, bound, other) unless_above     `other` where x < bound (x > bound), otherwise x
//   canonical                                      NaN -> the one canonical NaN
//   bits floats integers_to_float magnitudes       reinterpret and convert
//   add_i sub_i max_i shift_left shift_right       shift_right keeps the sign
//   fold_sum fold_max fold_sum_i fold_max_i        over the 16 lanes, by halves (8, 4, 2, 1)
//   store_half store_codes                         16 float16; 16 int8, the low bytes of an I
//   half_of half_to_float                          single values
//   dot_group<R, T, codes>                         below
//
// The operations and their order are those of scalar.cpp, which is the reference.
#pragma once

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 warns about its own intrinsics' deliberately undefined registers (bug 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#include "exp.h"
#include "tables.h"

#define EDGEMOE_INLINE inline __attribute__((always_inline))
#define EDGEMOE_INLINE_LAMBDA __attribute__((always_inline))
#if defined(__clang__)
#define EDGEMOE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define EDGEMOE_UNROLL _Pragma("GCC unroll 16")
#endif

namespace edgemoe {
namespace {

// How far ahead a product with one token asks for weights. Less comes too late, much more is no longer in the caches
// when its turn comes; multiples of 4096 compete with the lines that are in use for the same places in the caches.
constexpr ptrdiff_t kAhead = 6400;

// Asks for the `lines` cache lines that lie kAhead behind `place`, into the second-level cache: processors let only a
// dozen or two into the first at a time, and ignore what is too much. So this is called with a few lines again and
// again, and leaves none out: a single line that is missing stops a product as long as many. Nothing is asked for from
// `end` on, which is where the rows of a call end, but for the lines of one call.
EDGEMOE_INLINE void fetch_ahead(const std::byte* place, int lines, const std::byte* end) {
    const std::byte* next = place + kAhead;
    if (next >= end) return;
    EDGEMOE_UNROLL
    for (int i = 0; i < lines; ++i) __builtin_prefetch(next + i * 64, 0, 2);
}

}  // namespace
}  // namespace edgemoe

#include "ggml_vector.h"
#include "nested_vector.h"

namespace edgemoe {

template <class V>
struct VectorKernels {
    using F = typename V::F;
    using I = typename V::I;

    static constexpr float kInfinity = __builtin_inff();

    static float nan() { return __builtin_nanf(""); }

    static EDGEMOE_INLINE F exp_of(F x) {
        using namespace exponential;
        x = V::unless_below(x, V::set1(kLow), V::set1(kZero));
        x = V::unless_above(x, V::set1(kHigh), V::set1(kInfinite));
        const F t = V::fma(x, V::set1(kInverseLn2), V::set1(kMagic));
        const F n = V::sub(t, V::set1(kMagic));
        const I integer = V::sub_i(V::bits(t), V::set1_i(kMagicBits));
        const F r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), x));
        F p = V::set1(kC5);
        p = V::fma(p, r, V::set1(kC4));
        p = V::fma(p, r, V::set1(kC3));
        p = V::fma(p, r, V::set1(kC2));
        p = V::fma(p, r, V::set1(kC1));
        p = V::fma(p, r, V::set1(kC0));
        p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));
        const I half = V::template shift_right<1>(integer);
        const I bias = V::set1_i(127);
        const F first = V::floats(V::template shift_left<23>(V::add_i(half, bias)));
        const F second = V::floats(V::template shift_left<23>(V::add_i(V::sub_i(integer, half), bias)));
        return V::mul(V::mul(p, first), second);
    }

    static EDGEMOE_INLINE float exp_of(float x) { return V::first(exp_of(V::set1(x))); }

    // log(1 + exp(x))
    static EDGEMOE_INLINE F softplus(F x) {
        using namespace logarithm;
        const F e = exp_of(V::sub(V::zero(), V::floats(V::magnitudes(x))));
        F p = V::set1(kC[kTerms - 1]);
        EDGEMOE_UNROLL
        for (int i = kTerms - 2; i >= 0; --i) p = V::fma(p, e, V::set1(kC[i]));
        return V::add(V::max(V::zero(), x), V::mul(e, V::fma(p, e, V::set1(1.0f))));
    }

    // --- products ---------------------------------------------------------------------------------------------------

    struct Product {
        const Matrix& matrix;
        const Activations& x;
        const int32_t* tokens;  // null: 0, 1, 2, ...
        float* out;
        ptrdiff_t out_stride;
        size_t bytes;  // of a row block
        int groups;

        size_t token(int i) const { return static_cast<size_t>(tokens ? tokens[i] : i); }
    };

    template <Layout L>
    static EDGEMOE_INLINE F load_weight(const std::byte* block, size_t column) {
        if constexpr (L == Layout::f32) return V::load(reinterpret_cast<const float*>(block) + column * kRowBlock);
        const auto* half = reinterpret_cast<const uint16_t*>(block) + column * kRowBlock;
        if constexpr (L == Layout::bf16) return V::load_bf16(half);
        return V::load_half(half);
    }

    // R row blocks times T tokens.
    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void float_tile(const Product& p, const std::byte* data, int first, F (&sums)[R][T]) {
        const float* x[T];
        EDGEMOE_UNROLL
        for (int t = 0; t < T; ++t) x[t] = p.x.values + static_cast<ptrdiff_t>(p.token(first + t)) * p.x.value_stride;
        const int cols = p.matrix.cols;
        for (int column = 0; column < cols; ++column) {
            F weights[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) weights[r] = load_weight<L>(data + r * p.bytes, column);
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const F value = V::set1(x[t][column]);
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) sums[r][t] = V::fma(weights[r], value, sums[r][t]);
            }
        }
    }

    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void quantized_tile(const Product& p, const std::byte* data, int first, F (&sums)[R][T]) {
        constexpr size_t code_bytes = L == Layout::q8g64 ? kQ8Codes : kQ4Codes;
        constexpr size_t group_bytes = code_bytes + kGroupParameters;
        const int8_t* codes[T];
        size_t parameters[T];
        EDGEMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            parameters[t] = p.token(first + t) * p.groups;
            codes[t] = p.x.codes + parameters[t] * kGroup;
        }
        for (int g = 0; g < p.groups; ++g) {
            const std::byte* group = data + g * group_bytes;
            I dots[R][T];
            V::template dot_group<L, R, T>(group, p.bytes, codes, g, dots);
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const auto* factors = reinterpret_cast<const uint16_t*>(group + r * p.bytes + code_bytes);
                const F scale = V::load_half(factors);
                const F offset = V::load_half(factors + kRowBlock);
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const F factor = V::mul(scale, V::set1(p.x.scales[parameters[t] + g]));
                    F sum = V::fma(factor, V::integers_to_float(dots[r][t]), sums[r][t]);
                    sums[r][t] = V::fma(offset, V::set1(p.x.sums[parameters[t] + g]), sum);
                }
            }
        }
    }

    template <Layout L, int R, int T>
    static __attribute__((noinline)) void tile(const Product& p, int block, int first) {
        const std::byte* data = p.matrix.data + block * p.bytes;
        F sums[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        if constexpr (L == Layout::q8g64 || L == Layout::q4g64)
            quantized_tile<L, R, T>(p, data, first, sums);
        else
            float_tile<L, R, T>(p, data, first, sums);
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            const int row = (block + r) * kRowBlock;
            const int rows = p.matrix.rows - row;
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                float* out = p.out + (first + t) * p.out_stride + row;
                if (rows >= kRowBlock)
                    V::store(out, V::canonical(sums[r][t]));
                else
                    V::store_n(out, V::canonical(sums[r][t]), rows);
            }
        }
    }

    // The last tokens, fewer than a full tile.
    template <Layout L, int R, int T>
    static void short_tile(const Product& p, int block, int first, int tokens) {
        if constexpr (T > 0) {
            if (tokens == T)
                tile<L, R, T>(p, block, first);
            else
                short_tile<L, R, T - 1>(p, block, first, tokens);
        }
    }

    template <Layout L, int R>
    static void row_blocks(const Product& p, int block, int count) {
        constexpr int T = L == Layout::q8g64 || L == Layout::q4g64 ? V::kQuantizedTokens : V::kFloatTokens;
        int first = 0;
        for (; first + T <= count; first += T) tile<L, R, T>(p, block, first);
        short_tile<L, R, T - 1>(p, block, first, count - first);
    }

    template <Layout L>
    static void matmul_layout(const Product& p, int count, int first_block, int last_block) {
        constexpr int wide = L == Layout::q8g64 || L == Layout::q4g64 ? V::kQuantizedBlocks : V::kFloatBlocks;
        int block = first_block;
        if (count == 1) {
            for (; block + V::kVectorBlocks <= last_block; block += V::kVectorBlocks)
                tile<L, V::kVectorBlocks, 1>(p, block, 0);
        } else {
            for (; block + wide <= last_block; block += wide) row_blocks<L, wide>(p, block, count);
        }
        for (; block < last_block; ++block) row_blocks<L, 1>(p, block, count);
    }

    static void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                       int first_block, int last_block, float* out, ptrdiff_t out_stride) {
        if (matrix.layout == Layout::nested)
            return NestedKernels<V>::matmul(matrix, x, tokens, count, first_block, last_block, out, out_stride);
        if (matrix.layout >= Layout::ggml_q4_0)
            return GgmlKernels<V>::matmul(matrix, x, tokens, count, first_block, last_block, out, out_stride);
        const Product p{matrix,
                        x,
                        tokens.size() ? tokens.data() : nullptr,
                        out,
                        out_stride,
                        block_bytes(matrix.layout, matrix.cols),
                        (matrix.cols + kGroup - 1) / kGroup};
        switch (matrix.layout) {
            case Layout::f32:
                return matmul_layout<Layout::f32>(p, count, first_block, last_block);
            case Layout::bf16:
                return matmul_layout<Layout::bf16>(p, count, first_block, last_block);
            case Layout::f16:
                return matmul_layout<Layout::f16>(p, count, first_block, last_block);
            case Layout::q8g64:
                return matmul_layout<Layout::q8g64>(p, count, first_block, last_block);
            case Layout::q4g64:
                return matmul_layout<Layout::q4g64>(p, count, first_block, last_block);
            default:
                break;
        }
    }

    // x rounded to integers, half to even, for |x| < 2^22.
    static EDGEMOE_INLINE I round(F x) {
        return V::sub_i(V::bits(V::add(x, V::set1(exponential::kMagic))), V::set1_i(exponential::kMagicBits));
    }

    static EDGEMOE_INLINE float as_float(int32_t bits) {
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }

    static void quantize(std::span<const float> x, int8_t* codes, float* scales, float* sums) {
        constexpr int chunks = kGroup / kLanes;
        const float* values = x.data();
        const int cols = static_cast<int>(x.size());
        for (int g = 0; g * kGroup < cols; ++g) {
            F parts[chunks];
            I largest = V::set1_i(0);
            EDGEMOE_UNROLL
            for (int c = 0; c < chunks; ++c) {
                const int start = g * kGroup + c * kLanes;
                const int left = cols - start;
                parts[c] = left >= kLanes ? V::load(values + start)
                           : left > 0     ? V::load_n(values + start, left)
                                          : V::zero();
                largest = V::max_i(largest, V::magnitudes(parts[c]));
            }
            const int32_t bits = V::fold_max_i(largest);
            int8_t* group = codes + g * kGroup;
            if (bits >= 0x7F800000) {
                __builtin_memset(group, 0, kGroup);
                scales[g] = sums[g] = nan();
                continue;
            }
            const float magnitude = as_float(bits);
            const float inverse = 127.0f / magnitude;
            if (magnitude < kLeastMagnitude) {
                __builtin_memset(group, 0, kGroup);
                scales[g] = sums[g] = 0.0f;
                continue;
            }
            I total = V::set1_i(0);
            EDGEMOE_UNROLL
            for (int c = 0; c < chunks; ++c) {
                const I code = round(V::mul(parts[c], V::set1(inverse)));
                V::store_codes(group + c * kLanes, code);
                total = V::add_i(total, code);
            }
            scales[g] = magnitude / 127.0f;
            sums[g] = scales[g] * static_cast<float>(V::fold_sum_i(total));
        }
    }

    // --- element-wise -----------------------------------------------------------------------------------------------

    static void rms_norm(std::span<const float> x, const float* weight, float epsilon, float* out) {
        const float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        F squares = V::zero();
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const F value = V::load(values + i);
            squares = V::fma(value, value, squares);
        }
        if (i < size) {
            const F value = V::load_n(values + i, size - i);
            squares = V::fma(value, value, squares);
        }
        const float mean = V::fold_sum(squares) / static_cast<float>(size);
        const F inverse = V::set1(1.0f / __builtin_sqrtf(mean + epsilon));
        for (i = 0; i + kLanes <= size; i += kLanes)
            V::store(out + i, V::canonical(V::mul(V::mul(V::load(values + i), inverse), V::load(weight + i))));
        if (i < size) {
            const int n = size - i;
            const F scaled = V::mul(V::load_n(values + i, n), inverse);
            V::store_n(out + i, V::canonical(V::mul(scaled, V::load_n(weight + i, n))), n);
        }
    }

    static void layer_norm(std::span<const float> x, const float* weight, const float* bias, float epsilon,
                           float* out) {
        const float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        const ptrdiff_t whole = size / kLanes * kLanes;
        const int rest = size - whole;
        F sums = V::zero();
        for (ptrdiff_t i = 0; i < whole; i += kLanes) sums = V::add(sums, V::load(values + i));
        if (rest) sums = V::add(sums, V::load_n(values + whole, rest));
        const F mean = V::set1(V::fold_sum(sums) / static_cast<float>(size));
        F squares = V::zero();
        for (ptrdiff_t i = 0; i < whole; i += kLanes) {
            const F distance = V::sub(V::load(values + i), mean);
            squares = V::fma(distance, distance, squares);
        }
        if (rest) {
            const F distance = V::keep(V::sub(V::load_n(values + whole, rest), mean), 0, rest, V::zero());
            squares = V::fma(distance, distance, squares);
        }
        const float variance = V::fold_sum(squares) / static_cast<float>(size);
        const F inverse = V::set1(1.0f / __builtin_sqrtf(variance + epsilon));
        for (ptrdiff_t i = 0; i < whole; i += kLanes) {
            const F scaled = V::mul(V::sub(V::load(values + i), mean), inverse);
            V::store(out + i, V::canonical(V::fma(scaled, V::load(weight + i), V::load(bias + i))));
        }
        if (rest) {
            const F scaled = V::mul(V::sub(V::load_n(values + whole, rest), mean), inverse);
            const F sum = V::fma(scaled, V::load_n(weight + whole, rest), V::load_n(bias + whole, rest));
            V::store_n(out + whole, V::canonical(sum), rest);
        }
    }

    // out[i] = operation(a[i], b[i]).
    template <class Operation>
    static EDGEMOE_INLINE void each(std::span<const float> a, const float* b, float* out, Operation operation) {
        const float* values = a.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(a.size());
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            V::store(out + i, V::canonical(operation(V::load(values + i), V::load(b + i))));
        if (i < size) {
            const int n = size - i;
            V::store_n(out + i, V::canonical(operation(V::load_n(values + i, n), V::load_n(b + i, n))), n);
        }
    }

    // x / (1 + exp(-z))
    static EDGEMOE_INLINE F gated(F x, F z) { return V::div(x, V::add(V::set1(1.0f), exp_of(V::sub(V::zero(), z)))); }

    static void silu_multiply(std::span<const float> gate, const float* up, float* out) {
        each(gate, up, out, [](F g, F u) EDGEMOE_INLINE_LAMBDA { return V::mul(gated(g, g), u); });
    }

    static void gelu_multiply(std::span<const float> gate, const float* up, float* out) {
        each(gate, up, out, [](F g, F u) EDGEMOE_INLINE_LAMBDA {
            const F cubic = V::fma(V::mul(V::set1(kGeluCubic), g), V::mul(g, g), g);
            return V::mul(gated(g, V::mul(cubic, V::set1(kGeluScale))), u);
        });
    }

    static void clamped_swiglu(std::span<const float> gate, const float* up, float alpha, float limit, float* out) {
        each(gate, up, out, [alpha, limit](F g, F u) EDGEMOE_INLINE_LAMBDA {
            g = V::min(V::set1(limit), g);
            u = V::max(V::set1(-limit), V::min(V::set1(limit), u));
            return V::mul(gated(g, V::mul(g, V::set1(alpha))), V::add(u, V::set1(1.0f)));
        });
    }

    static void sigmoid(std::span<float> x) {
        each(x, x.data(), x.data(), [](F value, F) EDGEMOE_INLINE_LAMBDA { return gated(V::set1(1.0f), value); });
    }

    static void softcap(float cap, std::span<float> x) {
        each(x, x.data(), x.data(), [cap](F value, F) EDGEMOE_INLINE_LAMBDA {
            const F t = V::div(value, V::set1(cap));
            const F part = V::div(V::set1(2.0f), V::add(V::set1(1.0f), exp_of(V::add(t, t))));
            return V::mul(V::sub(V::set1(1.0f), part), V::set1(cap));
        });
    }

    static void softplus_decay(std::span<float> x, const float* bias, const float* rate) {
        float* values = x.data();
        const auto decay = [](F value, F b, F r) EDGEMOE_INLINE_LAMBDA {
            return V::canonical(exp_of(V::mul(r, softplus(V::add(value, b)))));
        };
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            V::store(values + i, decay(V::load(values + i), V::load(bias + i), V::load(rate + i)));
        if (i < size) {
            const int n = size - i;
            const F result = decay(V::load_n(values + i, n), V::load_n(bias + i, n), V::load_n(rate + i, n));
            V::store_n(values + i, result, n);
        }
    }

    static EDGEMOE_INLINE F sigmoid_times(F gate, F x) {
        const F one = V::set1(1.0f);
        return V::canonical(V::mul(x, V::div(one, V::add(one, exp_of(V::sub(V::zero(), gate))))));
    }

    static void sigmoid_multiply(std::span<const float> gate, const float* x, float* out) {
        const float* values = gate.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(gate.size());
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes) V::store(out + i, sigmoid_times(V::load(values + i), V::load(x + i)));
        if (i < size) {
            const int n = size - i;
            V::store_n(out + i, sigmoid_times(V::load_n(values + i, n), V::load_n(x + i, n)), n);
        }
    }

    static void softmax(std::span<float> x) {
        float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        if (size == 0) return;
        F largest = V::set1(-kInfinity);
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes) largest = V::max(largest, V::load(values + i));
        if (i < size) largest = V::max(largest, V::load_n(values + i, size - i, -kInfinity));
        const F maximum = V::set1(V::fold_max(largest));
        F total = V::zero();
        for (i = 0; i + kLanes <= size; i += kLanes) {
            const F value = exp_of(V::sub(V::load(values + i), maximum));
            V::store(values + i, value);
            total = V::add(total, value);
        }
        if (i < size) {
            const int n = size - i;
            const F value = exp_of(V::sub(V::load_n(values + i, n), maximum));
            V::store_n(values + i, value, n);
            total = V::add(total, V::keep(value, 0, n, V::zero()));
        }
        const F sum = V::set1(V::fold_sum(total));
        for (i = 0; i + kLanes <= size; i += kLanes)
            V::store(values + i, V::canonical(V::div(V::load(values + i), sum)));
        if (i < size) {
            const int n = size - i;
            V::store_n(values + i, V::canonical(V::div(V::load_n(values + i, n), sum)), n);
        }
    }

    static void add_scaled(float a, const float* x, std::span<float> y) {
        float* values = y.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(y.size());
        const F factor = V::set1(a);
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            V::store(values + i, V::canonical(V::fma(factor, V::load(x + i), V::load(values + i))));
        if (i < size) {
            const int n = size - i;
            V::store_n(values + i, V::canonical(V::fma(factor, V::load_n(x + i, n), V::load_n(values + i, n))), n);
        }
    }

    static void rope(float* head, const float* cosine, const float* sine, int pairs) {
        int i = 0;
        for (; i + kLanes <= pairs; i += kLanes) {
            const F first = V::load(head + i);
            const F second = V::load(head + pairs + i);
            const F c = V::load(cosine + i);
            const F s = V::load(sine + i);
            V::store(head + i, V::canonical(V::fms(first, c, V::mul(second, s))));
            V::store(head + pairs + i, V::canonical(V::fma(second, c, V::mul(first, s))));
        }
        if (i < pairs) {
            const int n = pairs - i;
            const F first = V::load_n(head + i, n);
            const F second = V::load_n(head + pairs + i, n);
            const F c = V::load_n(cosine + i, n);
            const F s = V::load_n(sine + i, n);
            V::store_n(head + i, V::canonical(V::fms(first, c, V::mul(second, s))), n);
            V::store_n(head + pairs + i, V::canonical(V::fma(second, c, V::mul(first, s))), n);
        }
    }

    // --- keys and values --------------------------------------------------------------------------------------------

    // One group of kKvGroup elements as q8_0; returns the float16 scale.
    static uint16_t quantize_kv(const float* x, int8_t* codes) {
        constexpr int chunks = kKvGroup / kLanes;
        I largest = V::set1_i(0);
        EDGEMOE_UNROLL
        for (int c = 0; c < chunks; ++c) largest = V::max_i(largest, V::magnitudes(V::load(x + c * kLanes)));
        const int32_t bits = V::fold_max_i(largest);
        uint16_t half = 0x7E00;
        if (bits < 0x7F800000) {
            half = V::half_of(as_float(bits) / 127.0f);
            if (half == 0x7C00) half = 0x7E00;
        }
        if (half == 0x7E00 || half == 0) {
            __builtin_memset(codes, 0, kKvGroup);
            return half;
        }
        const F scale = V::set1(V::half_to_float(half));
        EDGEMOE_UNROLL
        for (int c = 0; c < chunks; ++c) {
            const F ratio = V::max(V::set1(-127.0f), V::div(V::load(x + c * kLanes), scale));
            V::store_codes(codes + c * kLanes, round(V::min(V::set1(127.0f), ratio)));
        }
        return half;
    }

    // Block `number` of a sequence: its keys, with its values behind them.
    static EDGEMOE_INLINE std::byte* kv_block(const KvBlocks& blocks, int number) {
        return blocks.pool + static_cast<size_t>(blocks.table[number]) * blocks.stride;
    }

    static void store_key(KvType type, std::span<const float> key, int position, const KvBlocks& blocks) {
        std::byte* block = kv_block(blocks, position / kKvBlock);
        const int slot = position % kKvBlock;
        const float* x = key.data();
        const int dim = static_cast<int>(key.size());
        if (type == KvType::f32) {
            auto* out = reinterpret_cast<float*>(block) + slot;
            for (int d = 0; d < dim; ++d) out[d * kKvBlock] = x[d];
        } else if (type == KvType::f16) {
            auto* out = reinterpret_cast<uint16_t*>(block) + slot;
            for (int d = 0; d < dim; d += kLanes) {
                uint16_t halves[kLanes];
                const int n = dim - d < kLanes ? dim - d : kLanes;
                V::store_half(halves, n == kLanes ? V::load(x + d) : V::load_n(x + d, n));
                for (int i = 0; i < n; ++i) out[(d + i) * kKvBlock] = halves[i];
            }
        } else {
            auto* out = reinterpret_cast<int8_t*>(block) + slot;
            auto* scales = reinterpret_cast<uint16_t*>(block + static_cast<ptrdiff_t>(dim) * kKvBlock) + slot;
            for (int d = 0; d < dim; d += kKvGroup) {
                int8_t codes[kKvGroup];
                scales[d / kKvGroup * kKvBlock] = quantize_kv(x + d, codes);
                for (int i = 0; i < kKvGroup; ++i) out[(d + i) * kKvBlock] = codes[i];
            }
        }
    }

    static void store_value(KvType type, std::span<const float> value, int position, const KvBlocks& blocks) {
        std::byte* block = kv_block(blocks, position / kKvBlock) + blocks.values;
        const float* x = value.data();
        const int dim = static_cast<int>(value.size());
        const ptrdiff_t start = static_cast<ptrdiff_t>(position % kKvBlock) * dim;
        if (type == KvType::f32) {
            __builtin_memcpy(reinterpret_cast<float*>(block) + start, x, static_cast<size_t>(dim) * sizeof(float));
        } else if (type == KvType::f16) {
            auto* out = reinterpret_cast<uint16_t*>(block) + start;
            int d = 0;
            for (; d + kLanes <= dim; d += kLanes) V::store_half(out + d, V::load(x + d));
            if (d < dim) {
                uint16_t halves[kLanes];
                V::store_half(halves, V::load_n(x + d, dim - d));
                for (int i = 0; d + i < dim; ++i) out[d + i] = halves[i];
            }
        } else {
            auto* scales = reinterpret_cast<uint16_t*>(block + static_cast<ptrdiff_t>(dim) * kKvBlock);
            for (int d = 0; d < dim; d += kKvGroup)
                scales[(start + d) / kKvGroup] = quantize_kv(x + d, reinterpret_cast<int8_t*>(block) + start + d);
        }
    }

    // --- attention --------------------------------------------------------------------------------------------------

    // Elements index .. index + 15 of a block that lie contiguous, with `n` of them present; q8_0 comes unscaled.
    template <KvType K, bool Whole>
    static EDGEMOE_INLINE F load_kv(const std::byte* block, ptrdiff_t index, int n) {
        if constexpr (K == KvType::f32) {
            const auto* data = reinterpret_cast<const float*>(block) + index;
            return Whole ? V::load(data) : V::load_n(data, n);
        } else if constexpr (K == KvType::f16) {
            const auto* data = reinterpret_cast<const uint16_t*>(block) + index;
            return Whole ? V::load_half(data) : V::load_half_n(data, n);
        } else {
            return V::load_codes(reinterpret_cast<const int8_t*>(block) + index);
        }
    }

    // Scores of H heads for positions begin .. end-1; the other slots of `scores` stay.
    template <KvType K, int H>
    static void score(const float* queries, int dim, float scale, const std::byte* keys, int begin, int end,
                      float (*scores)[kKvBlock]) {
        constexpr int chunks = H > 4 ? V::kScoreChunks / 2 : V::kScoreChunks;
        const auto* scales = reinterpret_cast<const uint16_t*>(keys + static_cast<ptrdiff_t>(dim) * kKvBlock);
        for (int slot = 0; slot < kKvBlock; slot += chunks * kLanes) {
            if (slot + chunks * kLanes <= begin || slot >= end) continue;
            F sums[H][chunks];
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) sums[h][c] = V::zero();
            }
            F factors[chunks] = {};
            for (int d = 0; d < dim; ++d) {
                if constexpr (K == KvType::q8_0) {
                    if (d % kKvGroup == 0) {
                        EDGEMOE_UNROLL
                        for (int c = 0; c < chunks; ++c)
                            factors[c] = V::load_half(scales + d / kKvGroup * kKvBlock + slot + c * kLanes);
                    }
                }
                F key[chunks];
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) {
                    key[c] = load_kv<K, true>(keys, static_cast<ptrdiff_t>(d) * kKvBlock + slot + c * kLanes, kLanes);
                    if constexpr (K == KvType::q8_0) key[c] = V::mul(key[c], factors[c]);
                }
                EDGEMOE_UNROLL
                for (int h = 0; h < H; ++h) {
                    const F query = V::set1(queries[static_cast<ptrdiff_t>(h) * dim + d]);
                    EDGEMOE_UNROLL
                    for (int c = 0; c < chunks; ++c) sums[h][c] = V::fma(query, key[c], sums[h][c]);
                }
            }
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                EDGEMOE_UNROLL
                for (int c = 0; c < chunks; ++c) {
                    const int start = slot + c * kLanes;
                    const F product = V::mul(sums[h][c], V::set1(scale));
                    V::store(scores[h] + start, V::keep(product, begin - start, end - start, V::set1(-kInfinity)));
                }
            }
        }
    }

    // accumulator = accumulator * correction + sum over positions of p * v, for elements d .. d + 16 * N - 1.
    template <KvType K, int H, int N, bool Whole>
    static EDGEMOE_INLINE void add_values(const std::byte* values, int dim, int d, int begin, int end,
                                          const float (*weights)[kKvBlock], const float* corrections,
                                          float* accumulator) {
        const int n = dim - d;
        const auto* scales = reinterpret_cast<const uint16_t*>(values + static_cast<ptrdiff_t>(dim) * kKvBlock);
        F sums[H][N];
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) {
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const float* old = accumulator + static_cast<ptrdiff_t>(h) * dim + d + c * kLanes;
                sums[h][c] = V::mul(Whole ? V::load(old) : V::load_n(old, n), V::set1(corrections[h]));
            }
        }
        for (int slot = begin; slot < end; ++slot) {
            F value[N];
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const ptrdiff_t index = static_cast<ptrdiff_t>(slot) * dim + d + c * kLanes;
                value[c] = load_kv<K, Whole>(values, index, n);
                if constexpr (K == KvType::q8_0) value[c] = V::mul(value[c], V::set1_half(scales + index / kKvGroup));
            }
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) {
                const F weight = V::set1(weights[h][slot]);
                EDGEMOE_UNROLL
                for (int c = 0; c < N; ++c) sums[h][c] = V::fma(weight, value[c], sums[h][c]);
            }
        }
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) {
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                float* place = accumulator + static_cast<ptrdiff_t>(h) * dim + d + c * kLanes;
                if constexpr (Whole)
                    V::store(place, V::canonical(sums[h][c]));
                else
                    V::store_n(place, V::canonical(sums[h][c]), n);
            }
        }
    }

    template <KvType K, int H>
    static void add_all_values(const std::byte* values, int dim, int begin, int end, const float (*weights)[kKvBlock],
                               const float* corrections, float* accumulator) {
        constexpr int N = H > 4 ? V::kValueChunks / 2 : V::kValueChunks;
        int d = 0;
        for (; d + N * kLanes <= dim; d += N * kLanes)
            add_values<K, H, N, true>(values, dim, d, begin, end, weights, corrections, accumulator);
        if constexpr (N > 1) {
            for (; d + kLanes <= dim; d += kLanes)
                add_values<K, H, 1, true>(values, dim, d, begin, end, weights, corrections, accumulator);
        }
        if constexpr (K != KvType::q8_0) {
            if (d < dim) add_values<K, H, 1, false>(values, dim, d, begin, end, weights, corrections, accumulator);
        }
    }

    // The weights of H heads for the positions of a block, and what they do to the state of the online softmax.
    template <int H>
    static EDGEMOE_INLINE void weigh(KvType key_type, const float* queries, int dim, float scale, const std::byte* keys,
                                     int begin, int end, float* maximum, float* sum, float (*weights)[kKvBlock],
                                     float* corrections) {
        constexpr int chunks = kKvBlock / kLanes;
        for (int h = 0; h < H; ++h)
            for (int c = 0; c < chunks; ++c) V::store(weights[h] + c * kLanes, V::set1(-kInfinity));
        switch (key_type) {
            case KvType::f32:
                score<KvType::f32, H>(queries, dim, scale, keys, begin, end, weights);
                break;
            case KvType::f16:
                score<KvType::f16, H>(queries, dim, scale, keys, begin, end, weights);
                break;
            case KvType::q8_0:
                score<KvType::q8_0, H>(queries, dim, scale, keys, begin, end, weights);
                break;
        }
        for (int h = 0; h < H; ++h) {
            F largest = V::set1(-kInfinity);
            for (int c = 0; c < chunks; ++c) largest = V::max(largest, V::load(weights[h] + c * kLanes));
            const float block_maximum = V::fold_max(largest);
            const float old_maximum = maximum[h];
            const float new_maximum = old_maximum > block_maximum ? old_maximum : block_maximum;
            corrections[h] = old_maximum == -kInfinity ? 0.0f : exp_of(old_maximum - new_maximum);
            F total = V::zero();
            for (int c = 0; c < chunks; ++c) {
                float* place = weights[h] + c * kLanes;
                F weight = exp_of(V::sub(V::load(place), V::set1(new_maximum)));
                weight = V::keep(weight, begin - c * kLanes, end - c * kLanes, V::zero());
                V::store(place, weight);
                total = V::add(total, weight);
            }
            maximum[h] = new_maximum == new_maximum ? new_maximum : nan();
            const float new_sum = __builtin_fmaf(sum[h], corrections[h], V::fold_sum(total));
            sum[h] = new_sum == new_sum ? new_sum : nan();
        }
    }

    template <int H>
    static void attend_heads(KvType key_type, KvType value_type, const float* queries, int dim, float scale,
                             const std::byte* keys, const std::byte* values, int begin, int end, float* maximum,
                             float* sum, float* accumulator) {
        alignas(64) float weights[H][kKvBlock];
        float corrections[H];
        weigh<H>(key_type, queries, dim, scale, keys, begin, end, maximum, sum, weights, corrections);
        switch (value_type) {
            case KvType::f32:
                add_all_values<KvType::f32, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
            case KvType::f16:
                add_all_values<KvType::f16, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
            case KvType::q8_0:
                add_all_values<KvType::q8_0, H>(values, dim, begin, end, weights, corrections, accumulator);
                break;
        }
    }

    // Calls step(keys, begin, end) for each block that has positions of [begin, end), with their slots in it.
    template <class Step>
    static EDGEMOE_INLINE void each_block(const KvBlocks& blocks, int begin, int end, const Step& step) {
        while (begin < end) {
            const int number = begin / kKvBlock, first = number * kKvBlock;
            step(kv_block(blocks, number), begin - first, end - first < kKvBlock ? end - first : kKvBlock);
            begin = first + kKvBlock;
        }
    }

    static void attend_block(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                             const std::byte* keys, const std::byte* values, int begin, int end, float* maximum,
                             float* sum, float* accumulator) {
        // More heads share the conversions of a compressed cache; plain floats have none, and gain from more chunks.
        const bool plain = key_type == KvType::f32 && value_type == KvType::f32;
        while (heads > 0) {
            auto* run = attend_heads<1>;
            int step = 1;
            if (V::kAttendHeads >= 8 && heads >= 8 && !plain) {
                run = attend_heads<V::kAttendHeads>;
                step = 8;
            } else if (heads >= 4) {
                run = attend_heads<4>;
                step = 4;
            } else if (heads >= 2) {
                run = attend_heads<2>;
                step = 2;
            }
            run(key_type, value_type, queries, dim, scale, keys, values, begin, end, maximum, sum, accumulator);
            queries += static_cast<ptrdiff_t>(step) * dim;
            accumulator += static_cast<ptrdiff_t>(step) * dim;
            maximum += step;
            sum += step;
            heads -= step;
        }
    }

    static void attend(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
                       const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
        each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
            attend_block(key_type, value_type, queries, heads, dim, scale, keys, keys + blocks.values, first, last,
                         maximum, sum, accumulator);
        });
    }

    // Elements d .. d + 15 of the keys of positions begin .. end-1 as rows of values; elements beyond dim are 0.
    template <KvType K>
    static EDGEMOE_INLINE void turn_keys(const std::byte* keys, int dim, int d, int begin, int end,
                                         float (*rows)[kLanes]) {
        const auto* scales = reinterpret_cast<const uint16_t*>(keys + static_cast<ptrdiff_t>(dim) * kKvBlock);
        alignas(64) float element[kLanes][kLanes];  // [element, slot]
        const int n = dim - d < kLanes ? dim - d : kLanes;
        for (int first = begin / kLanes * kLanes; first < end; first += kLanes) {
            for (int i = 0; i < n; ++i) {
                F x = load_kv<K, true>(keys, static_cast<ptrdiff_t>(d + i) * kKvBlock + first, kLanes);
                if constexpr (K == KvType::q8_0)
                    x = V::mul(x, V::load_half(scales + (d + i) / kKvGroup * kKvBlock + first));
                V::store(element[i], x);
            }
            for (int i = n; i < kLanes; ++i) V::store(element[i], V::zero());
            for (int slot = 0; slot < kLanes; ++slot) {
                EDGEMOE_UNROLL
                for (int i = 0; i < kLanes; ++i) rows[first + slot][i] = element[i][slot];
            }
        }
    }

    template <int H>
    static EDGEMOE_INLINE void add_rows(const float (*rows)[kLanes], int begin, int end,
                                        const float (*weights)[kKvBlock], const float* corrections, int n,
                                        ptrdiff_t stride, float* accumulator) {
        F sums[H];
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) sums[h] = V::mul(V::load_n(accumulator + h * stride, n), V::set1(corrections[h]));
        for (int slot = begin; slot < end; ++slot) {
            const F value = V::load(rows[slot]);
            EDGEMOE_UNROLL
            for (int h = 0; h < H; ++h) sums[h] = V::fma(V::set1(weights[h][slot]), value, sums[h]);
        }
        EDGEMOE_UNROLL
        for (int h = 0; h < H; ++h) V::store_n(accumulator + h * stride, V::canonical(sums[h]), n);
    }

    static void attend_latent_block(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                                    const std::byte* keys, int begin, int end, float* maximum, float* sum,
                                    float* accumulator) {
        constexpr int kMany = 16;  // heads that share what is turned
        alignas(64) float weights[kMany][kKvBlock];
        alignas(64) float rows[kKvBlock][kLanes];
        float corrections[kMany];
        for (int first = 0; first < heads; first += kMany) {
            const int count = heads - first < kMany ? heads - first : kMany;
            for (int h = 0; h < count;) {
                const float* query = queries + static_cast<ptrdiff_t>(first + h) * dim;
                float* largest = maximum + first + h;
                float* total = sum + first + h;
                if (count - h >= 4) {
                    weigh<4>(type, query, dim, scale, keys, begin, end, largest, total, weights + h, corrections + h);
                    h += 4;
                } else {
                    weigh<1>(type, query, dim, scale, keys, begin, end, largest, total, weights + h, corrections + h);
                    h += 1;
                }
            }
            for (int d = 0; d < value_dim; d += kLanes) {
                switch (type) {
                    case KvType::f32:
                        turn_keys<KvType::f32>(keys, dim, d, begin, end, rows);
                        break;
                    case KvType::f16:
                        turn_keys<KvType::f16>(keys, dim, d, begin, end, rows);
                        break;
                    case KvType::q8_0:
                        turn_keys<KvType::q8_0>(keys, dim, d, begin, end, rows);
                        break;
                }
                const int n = value_dim - d < kLanes ? value_dim - d : kLanes;
                for (int h = 0; h < count;) {
                    float* place = accumulator + static_cast<ptrdiff_t>(first + h) * value_dim + d;
                    if (count - h >= 4) {
                        add_rows<4>(rows, begin, end, weights + h, corrections + h, n, value_dim, place);
                        h += 4;
                    } else {
                        add_rows<1>(rows, begin, end, weights + h, corrections + h, n, value_dim, place);
                        h += 1;
                    }
                }
            }
        }
    }

    static void attend_latent(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                              const KvBlocks& blocks, int begin, int end, float* maximum, float* sum,
                              float* accumulator) {
        each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
            attend_latent_block(type, queries, heads, dim, value_dim, scale, keys, first, last, maximum, sum,
                                accumulator);
        });
    }

    // --- convolutions and recurrences -------------------------------------------------------------------------------

    static void convolve(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu,
                         float* out) {
        const int taps = weights.cols;
        for (int block = first_block; block < last_block; ++block) {
            const auto* data =
                reinterpret_cast<const float*>(weights.data) + static_cast<ptrdiff_t>(block) * taps * kLanes;
            const ptrdiff_t channel = static_cast<ptrdiff_t>(block) * kRowBlock;
            const int n = weights.rows - channel < kLanes ? static_cast<int>(weights.rows - channel) : kLanes;
            F sum = V::zero();
            for (int tap = 0; tap < taps; ++tap)
                if (rows[tap]) sum = V::fma(V::load(data + tap * kLanes), V::load_n(rows[tap] + channel, n), sum);
            if (silu) sum = V::div(sum, V::add(V::set1(1.0f), exp_of(V::sub(V::zero(), sum))));
            V::store_n(out + channel, V::canonical(sum), n);
        }
    }

    // Columns v .. v + 16 * N - 1 of the state.
    template <int N>
    static EDGEMOE_INLINE void gated_delta_columns(float* state, int key_dim, int value_dim, const float* query,
                                                   const float* key, const float* value, F decay, F beta, float* out) {
        F memory[N], sums[N];
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) memory[c] = sums[c] = V::zero();
        for (int k = 0; k < key_dim; ++k) {
            const float* row = state + static_cast<ptrdiff_t>(k) * value_dim;
            const F factor = V::set1(key[k]);
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) memory[c] = V::fma(V::mul(V::load(row + c * kLanes), decay), factor, memory[c]);
        }
        F delta[N];
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) delta[c] = V::mul(V::sub(V::load(value + c * kLanes), memory[c]), beta);
        for (int k = 0; k < key_dim; ++k) {
            float* row = state + static_cast<ptrdiff_t>(k) * value_dim;
            const F factor = V::set1(key[k]), asked = V::set1(query[k]);
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const F element = V::fma(factor, delta[c], V::mul(V::load(row + c * kLanes), decay));
                const F stored = V::canonical(element);
                V::store(row + c * kLanes, stored);
                sums[c] = V::fma(stored, asked, sums[c]);
            }
        }
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) V::store(out + c * kLanes, V::canonical(sums[c]));
    }

    static void gated_delta(float* state, int key_dim, int value_dim, const float* query, const float* key,
                            const float* value, float decay, float beta, float* out) {
        const F decays = V::set1(decay), betas = V::set1(beta);
        int v = 0;
        for (; v + 4 * kLanes <= value_dim; v += 4 * kLanes)
            gated_delta_columns<4>(state + v, key_dim, value_dim, query, key, value + v, decays, betas, out + v);
        for (; v < value_dim; v += kLanes)
            gated_delta_columns<1>(state + v, key_dim, value_dim, query, key, value + v, decays, betas, out + v);
    }

    static constexpr Kernels table(std::string_view name) {
        return {
            .name = name,
            .matmul = matmul,
            .quantize = quantize,
            .rms_norm = rms_norm,
            .layer_norm = layer_norm,
            .silu_multiply = silu_multiply,
            .gelu_multiply = gelu_multiply,
            .clamped_swiglu = clamped_swiglu,
            .sigmoid = sigmoid,
            .softcap = softcap,
            .softplus_decay = softplus_decay,
            .softmax = softmax,
            .add_scaled = add_scaled,
            .rope = rope,
            .store_key = store_key,
            .store_value = store_value,
            .attend = attend,
            .attend_latent = attend_latent,
            .sigmoid_multiply = sigmoid_multiply,
            .convolve = convolve,
            .gated_delta = gated_delta,
        };
    }
};

}  // namespace edgemoe
