// Products with the layouts of packs that are not nested (f32, bf16, f16, q8g64, q4g64); pack_scalar.cpp is the
// reference.
//
// The trait V gives dot_group<L, R, T>(group, bytes, codes, g, dots) beyond what vector.h lists: the dot products of R
// row blocks, `bytes` apart, with the codes of T tokens, of one group of columns.
#pragma once

#include "pack_format.h"
#include "vector.h"

namespace edgemoe {

template <class V>
struct PackKernels {
    using F = typename V::F;
    using I = typename V::I;

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
};

}  // namespace edgemoe
