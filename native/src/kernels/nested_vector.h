// Products with nested weights, written once for 16 lanes like vector_kernels.h, which includes this; nested_scalar.cpp
// is the reference. Beyond what is listed there and in ggml_vector.h the trait V gives
//
//   select_bits(mask, a, b)      the bits of a where mask has ones, otherwise those of b
//   dot_quads<255, ...>          also for unsigned codes of 8 bits
//
// A row block's levels lie apart in memory, each with its own planes of two bits or one. Planes are put together in
// registers: two or more of them make bytes of two codes (4 bits each), as a 4-bit layout stores them, with about
// as many instructions as taking those apart costs. More than 4 bits, and other steps than 2, 2+1 and 2+1+1, take the
// general way: a byte per code, plane after plane.
//
// A call first packs the activations of its tokens tile by tile, so that one address leads to all tokens of a tile; a
// single token is used as it lies.
#pragma once

#include "ggml_formats.h"
#include "nested_format.h"

namespace edgemoe {

template <class V>
struct NestedKernels {
    using F = typename V::F;
    using I = typename V::I;

    static constexpr int kChunk = 48;                                   // tokens that are packed at a time
    static constexpr size_t kPackedGroup = kGroup + 2 * sizeof(float);  // bytes of a token's group
    static constexpr int kNibble = 28;                                  // where 4 bits are the highest of a lane

    struct Level {
        const std::byte* data;
        size_t bytes;          // of a row block
        int bits;              // that it adds
        const std::byte* end;  // of the row blocks that are multiplied
    };

    struct Product {
        int rows;
        int groups;
        int level_count;
        Level levels[kMaxLevels];
        float* out;
        ptrdiff_t out_stride;
    };

    // The activations of a tile of T tokens.
    template <int T>
    struct Tile {
        const int8_t* codes;  // [groups][T][kGroup]
        const float* scales;  // [groups][T]
        const float* sums;    // [groups][T]

        static EDGEMOE_INLINE Tile at(const std::byte* packed, int groups) {
            const auto* codes = reinterpret_cast<const int8_t*>(packed);
            const auto* scales = reinterpret_cast<const float*>(codes + groups * T * kGroup);
            return {codes, scales, scales + groups * T};
        }
    };

    // The bits that each level adds, known to the compiler; none: known when it runs.
    template <int... D>
    struct Steps {
        static constexpr bool fixed = sizeof...(D) > 0;
        static constexpr int total = fixed ? (D + ... + 0) : 8;
        static constexpr int count = fixed ? int(sizeof...(D)) : kMaxLevels;
        static constexpr int values[sizeof...(D) + 1] = {D...};
    };

    static EDGEMOE_INLINE I plane(const std::byte* codes, int index) { return V::load_bytes(codes + index * 64); }

    // Codes of columns 4 n ... 4 n + 3 of the group whose levels' codes begin at `codes`, one byte each.
    template <class S>
    static EDGEMOE_INLINE I fixed_codes(const std::byte* const* codes, int n) {
        const int k = n / 4, f = n % 4;
        const I base = plane(codes[0], k);
        if constexpr (S::total == 2) {
            const I shifted = f == 0   ? base
                              : f == 1 ? V::template shift_right_16<2>(base)
                              : f == 2 ? V::template shift_right_16<4>(base)
                                       : V::template shift_right_16<6>(base);
            return V::and_i(shifted, V::set1_8(3));
        } else {
            // A byte of `pair` has the codes of f and f + 2 (f = 0, 1) in its low and its high half. Bit 2 f + k % 2 of
            // a plane of single bits belongs to quad n: what two such planes add is a plane of two bits for every k.
            I pair;
            const I bits = plane(codes[1], k / 2);
            if constexpr (S::total == 3) {
                const I mask = V::set1_8(0x66);
                if (f % 2 == 0)
                    pair = V::select_bits(mask, V::template shift_left_16<1>(base),
                                          k % 2 ? V::template shift_right_16<1>(bits) : bits);
                else
                    pair = V::select_bits(
                        mask, V::template shift_right_16<1>(base),
                        k % 2 ? V::template shift_right_16<3>(bits) : V::template shift_right_16<2>(bits));
            } else {
                const I last = plane(codes[2], k / 2);
                const I odd = V::set1_8(0xAA);
                const I fine = k % 2 ? V::select_bits(odd, bits, V::template shift_right_16<1>(last))
                                     : V::select_bits(odd, V::template shift_left_16<1>(bits), last);
                const I mask = V::set1_8(0xCC);
                pair = f % 2 == 0 ? V::select_bits(mask, V::template shift_left_16<2>(base), fine)
                                  : V::select_bits(mask, base, V::template shift_right_16<2>(fine));
            }
            return V::and_i(f < 2 ? pair : V::template shift_right_16<4>(pair), V::set1_8((1 << S::total) - 1));
        }
    }

    // The same for any levels.
    static EDGEMOE_INLINE I any_codes(const Product& p, const std::byte* const* codes, int k, int f) {
        I code = V::set1_8(0);
        for (int level = 0; level < p.level_count; ++level) {
            const std::byte* place = codes[level];
            int bits = p.levels[level].bits;
            for (; bits >= 2; bits -= 2, place += 256) {
                const I two = V::and_i(V::shift_right_16(plane(place, k), 2 * f), V::set1_8(3));
                code = V::or_i(V::template shift_left_16<2>(code), two);
            }
            if (bits) {
                const I one = V::and_i(V::shift_right_16(plane(place, k / 2), 2 * f + k % 2), V::set1_8(1));
                code = V::or_i(V::template shift_left_16<1>(code), one);
            }
        }
        return code;
    }

    static EDGEMOE_INLINE F bytes_to_float(const std::byte* p) {
        return V::load_codes(reinterpret_cast<const int8_t*>(p));
    }

    template <class S, int R, int T>
    static __attribute__((noinline)) void tile(const Product& p, const Tile<T>& x, int block, int first) {
        const int level_count = S::fixed ? S::count : p.level_count;
        const auto bits_of = [&](int level) __attribute__((always_inline)) {
            return S::fixed ? S::values[level] : p.levels[level].bits;
        };
        F sums[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        const std::byte* chunks[S::count];
        EDGEMOE_UNROLL
        for (int level = 0; level < level_count; ++level)
            chunks[level] = p.levels[level].data + block * p.levels[level].bytes;
        for (int begin = 0; begin < p.groups; begin += kNestedChunk) {
            const int together = p.groups - begin < kNestedChunk ? p.groups - begin : kNestedChunk;
            if constexpr (T == 1) {
                EDGEMOE_UNROLL
                for (int level = 0; level < level_count; ++level)
                    fetch_ahead(chunks[level] + together * nested_codes(bits_of(level)), level == 0 ? 3 : 1,
                                p.levels[level].end);
            }
            for (int i = 0; i < together; ++i) {
                const int g = begin + i;
                const std::byte* codes[R][S::count];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int level = 0; level < level_count; ++level) {
                        codes[r][level] = chunks[level] + r * p.levels[level].bytes + i * nested_codes(bits_of(level));
                        if constexpr (T == 1) fetch_ahead(codes[r][level], 2 * bits_of(level), p.levels[level].end);
                    }
                }
                I dots[R][T];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) dots[r][t] = V::set1_i(0);
                }
                const int8_t* inputs = x.codes + g * T * kGroup;
                I none[R];
                if constexpr (S::fixed) {
                    const auto weights = [&](int n, int r)
                                             __attribute__((always_inline)) { return fixed_codes<S>(codes[r], n); };
                    V::template dot_quads<(1 << S::total) - 1, 16, false, R, T>(weights, inputs, none, dots);
                } else {
                    for (int k = 0; k < 4; ++k) {
                        const auto weights = [&](int n, int r) __attribute__((always_inline)) {
                            return any_codes(p, codes[r], k, n);
                        };
                        V::template dot_quads<255, 4, false, R, T>(weights, inputs + k * 16, none, dots);
                    }
                }
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const std::byte* base = chunks[0] + r * p.levels[0].bytes + together * nested_codes(bits_of(0));
                    F scale = V::load_half(reinterpret_cast<const uint16_t*>(base) + i * kRowBlock);
                    const float middle = static_cast<float>((1 << bits_of(0)) - 1) * 0.5f;
                    F offset = V::mul(scale, V::fma(bytes_to_float(base + (2 * together + i) * kRowBlock),
                                                    V::set1(1.0f / 32), V::set1(-middle)));
                    int below = bits_of(0);
                    EDGEMOE_UNROLL
                    for (int level = 1; level < level_count; ++level) {
                        const int bits = bits_of(level);
                        const std::byte* fine =
                            chunks[level] + r * p.levels[level].bytes + together * nested_codes(bits);
                        // 4 bits at the top of a lane have their sign, and are 2^28 times as much.
                        const I stored = V::load_u8(fine + i * kRowBlock);
                        const F ratio = V::integers_to_float(
                            V::and_i(V::template shift_left<24>(stored), V::set1_i(-(1 << kNibble))));
                        const F shift = V::integers_to_float(V::template shift_left<kNibble>(stored));
                        const float parts = static_cast<float>(1 << bits), unit = 1.0f / (1 << kNibble);
                        scale = V::mul(V::mul(scale, V::set1(1.0f / parts)),
                                       V::fma(ratio, V::set1(unit / static_cast<float>(8 << below)), V::set1(1.0f)));
                        const F moved = V::fma(shift, V::set1(unit * parts / 32), V::set1((1.0f - parts) * 0.5f));
                        offset = V::fma(scale, V::fma(ratio, V::set1(unit * parts / -16), moved), offset);
                        below += bits;
                    }
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const F factor = V::mul(scale, V::set1(x.scales[g * T + t]));
                        const F sum = V::fma(factor, V::integers_to_float(dots[r][t]), sums[r][t]);
                        sums[r][t] = V::fma(offset, V::set1(x.sums[g * T + t]), sum);
                    }
                }
            }
            EDGEMOE_UNROLL
            for (int level = 0; level < level_count; ++level)
                chunks[level] += nested_chunk_bytes(bits_of(level), level == 0, kNestedChunk);
        }
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            const int row = (block + r) * kRowBlock;
            const int rows = p.rows - row;
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

    // The sizes of tiles that a number of tokens is cut into: the largest, 4, 2, 1.
    static EDGEMOE_INLINE int tile_size(int tokens) {
        return tokens >= V::kGgmlTokens ? V::kGgmlTokens : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
    }

    template <class S, int R>
    static void row_blocks(const Product& p, const std::byte* packed, int block, int count) {
        for (int first = 0; first < count;) {
            const int size = tile_size(count - first);
            const std::byte* place = packed + first * p.groups * kPackedGroup;
            if (size == V::kGgmlTokens)
                tile<S, R, V::kGgmlTokens>(p, Tile<V::kGgmlTokens>::at(place, p.groups), block, first);
            else if (size == 4)
                tile<S, R, 4>(p, Tile<4>::at(place, p.groups), block, first);
            else if (size == 2)
                tile<S, R, 2>(p, Tile<2>::at(place, p.groups), block, first);
            else
                tile<S, R, 1>(p, Tile<1>::at(place, p.groups), block, first);
            first += size;
        }
    }

    // One row block after the other: the levels are streams enough for the processor to follow.
    template <class S>
    static void matmul_token(const Product& p, const Tile<1>& x, int first_block, int last_block) {
        for (int block = first_block; block < last_block; ++block) tile<S, 1, 1>(p, x, block, 0);
    }

    template <class S>
    static void matmul_tokens(const Product& p, const std::byte* packed, int count, int first_block, int last_block) {
        int block = first_block;
        if constexpr (V::kGgmlBlocks > 1) {
            for (; block + V::kGgmlBlocks <= last_block; block += V::kGgmlBlocks)
                row_blocks<S, V::kGgmlBlocks>(p, packed, block, count);
        }
        for (; block < last_block; ++block) row_blocks<S, 1>(p, packed, block, count);
    }

    // Tokens first ... first + count - 1 of a call as tiles.
    static void pack(const Activations& x, const int32_t* tokens, int first, int count, int groups, std::byte* packed) {
        for (int start = 0; start < count;) {
            const int size = tile_size(count - start);
            auto* codes = reinterpret_cast<int8_t*>(packed + start * groups * kPackedGroup);
            auto* scales = reinterpret_cast<float*>(codes + groups * size * kGroup);
            float* sums = scales + groups * size;
            for (int t = 0; t < size; ++t) {
                const int i = first + start + t;
                const ptrdiff_t token = static_cast<ptrdiff_t>(tokens ? tokens[i] : i) * groups;
                for (int g = 0; g < groups; ++g) {
                    const int place = g * size + t;
                    __builtin_memcpy(codes + place * kGroup, x.codes + (token + g) * kGroup, kGroup);
                    scales[place] = x.scales[token + g];
                    sums[place] = x.sums[token + g];
                }
            }
            start += size;
        }
    }

    template <class S>
    static void matmul_steps(Product& p, const Activations& x, const int32_t* tokens, int count, int first_block,
                             int last_block) {
        if (count == 1) {
            const ptrdiff_t token = static_cast<ptrdiff_t>(tokens ? tokens[0] : 0) * p.groups;
            return matmul_token<S>(p, {x.codes + token * kGroup, x.scales + token, x.sums + token}, first_block,
                                   last_block);
        }
        std::byte* packed = packed_scratch((count < kChunk ? count : kChunk) * p.groups * kPackedGroup);
        for (int first = 0; first < count; first += kChunk) {
            const int chunk = count - first < kChunk ? count - first : kChunk;
            pack(x, tokens, first, chunk, p.groups, packed);
            matmul_tokens<S>(p, packed, chunk, first_block, last_block);
            p.out += chunk * p.out_stride;
        }
    }

    static void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                       int first_block, int last_block, float* out, ptrdiff_t out_stride) {
        const NestedLevels& levels = matrix.levels;
        Product p{matrix.rows, (matrix.cols + kGroup - 1) / kGroup, levels.count, {}, out, out_stride};
        for (int level = 0; level < levels.count; ++level) {
            const size_t bytes = nested_block_bytes(levels.bits[level], level == 0, matrix.cols);
            p.levels[level] = {levels.data[level], bytes, levels.bits[level], levels.data[level] + last_block * bytes};
        }
        const int32_t* indices = tokens.size() ? tokens.data() : nullptr;
        const bool ones = levels.bits[0] == 2 && (levels.count < 2 || levels.bits[1] == 1) &&
                          (levels.count < 3 || levels.bits[2] == 1);
        if (ones && levels.count == 1)
            matmul_steps<Steps<2>>(p, x, indices, count, first_block, last_block);
        else if (ones && levels.count == 2)
            matmul_steps<Steps<2, 1>>(p, x, indices, count, first_block, last_block);
        else if (ones && levels.count == 3)
            matmul_steps<Steps<2, 1, 1>>(p, x, indices, count, first_block, last_block);
        else
            matmul_steps<Steps<>>(p, x, indices, count, first_block, last_block);
    }
};

}  // namespace edgemoe
