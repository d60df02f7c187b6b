// Products with nested weights, written once for 16 lanes like vector_kernels.h, which includes this; nested_scalar.cpp
// is the reference. Beyond what is listed there and in ggml_vector.h the trait V gives
//
//   select_bits(mask, a, b)      the bits of a where mask has ones, otherwise those of b
//   mul_16                       the low half of int16 products
//   add_madd(sum, a, b)          sum + madd(a, b)
//   dot_quads<255, ...>          also for unsigned codes of 8 bits
//   kScaledTokens                tokens of a tile from which on codes are scaled rather than sums; 0: never
//
// A row block's levels lie apart in memory, each with its own planes of two bits or one. Planes are put together in
// registers: two or more of them make bytes of two codes (4 bits each), as a 4-bit layout stores them, with about
// as many instructions as taking those apart costs. More than 4 bits, and other steps than 2, 2+1 and 2+1+1, take the
// general way: a byte per code, plane after plane.
//
// A group of level 0 has a step for each of its four parts of 16 columns, which the sums of the parts' products
// are multiplied by. A step times a code of up to 4 bits is still an unsigned byte: where dot_quads multiplies such
// bytes as fast as small ones, many tokens share that product instead.
//
// A call first packs the activations of its tokens tile by tile, so that one address leads to all tokens of a tile; of
// a single token only the sums of its parts are made.
#pragma once

#include "ggml_formats.h"
#include "nested_format.h"

namespace edgemoe {

template <class V>
struct NestedKernels {
    using F = typename V::F;
    using I = typename V::I;

    static constexpr int kChunk = 48;  // tokens that are packed at a time
    static constexpr int kParts = kGroup / kNestedPart;
    static constexpr size_t kPackedGroup = kGroup + sizeof(float) + kParts * sizeof(int16_t);  // of a token's group
    static constexpr int kNibble = 28;  // where 4 bits are the highest of a lane

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
        const int8_t* codes;   // [groups][T][kGroup]
        const float* scales;   // [groups][T]
        const int16_t* parts;  // [groups][T][kParts], from V::sum_parts

        static EDGEMOE_INLINE Tile at(const std::byte* packed, int groups) {
            const auto* codes = reinterpret_cast<const int8_t*>(packed);
            const auto* scales = reinterpret_cast<const float*>(codes + groups * T * kGroup);
            return {codes, scales, reinterpret_cast<const int16_t*>(scales + groups * T)};
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

    // The steps of all parts, a byte each, of a group's parameters.
    static EDGEMOE_INLINE I steps_of(I packed) { return V::lookup(kNestedSteps, V::and_i(packed, V::set1_8(7))); }

    // The offset of 5 bits at the top of every int16; its lowest bit is level 0's own: one more or one less.
    static EDGEMOE_INLINE I offset_of(I packed, bool alone) {
        const I even = V::and_i(V::template shift_right_16_signed<11>(packed), V::set1_16(-2));
        if (!alone) return even;
        const I own = V::and_i(V::template shift_right_16<10>(packed), V::set1_16(2));
        return V::sub_16(V::add_16(even, own), V::set1_16(1));
    }

    // What the sums of the parts are multiplied by, as pairs of int16 in the order of sum_parts: parts (0, 2), (1, 3).
    struct Factors {
        I steps[2];
        I offsets[2];  // times their steps

        // bytes: from steps_of; alone: whether there is no other level than 0.
        EDGEMOE_INLINE Factors(I packed, I bytes, bool alone) {
            steps[0] = V::and_i(bytes, V::set1_16(15));
            steps[1] = V::template shift_right_16<8>(bytes);
            offsets[0] = V::mul_16(steps[0], offset_of(V::template shift_left_16<8>(packed), alone));
            offsets[1] = V::mul_16(steps[1], offset_of(packed, alone));
        }

        static EDGEMOE_INLINE F sum(const I (&factors)[2], const int16_t* parts) {
            int32_t pairs[2];
            __builtin_memcpy(pairs, parts, sizeof pairs);
            return V::integers_to_float(
                V::add_madd(V::madd(factors[0], V::set1_i(pairs[0])), factors[1], V::set1_i(pairs[1])));
        }
    };

    // The step of part K, an int32 per row.
    template <int K>
    static EDGEMOE_INLINE I step(I steps) {
        if constexpr (K > 0) steps = V::template shift_right<8 * K>(steps);
        return V::and_i(steps, V::set1_i(15));
    }

    // dots += step * (codes . activations) of part K.
    template <class S, int K, int R, int T>
    static EDGEMOE_INLINE void add_part(const std::byte* const (&codes)[R][S::count], const I (&steps)[R],
                                        const int8_t* inputs, I (&dots)[R][T]) {
        I scale[R];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) scale[r] = V::as_scale(step<K>(steps[r]));
        const auto weights = [&](int n, int r)
                                 __attribute__((always_inline)) { return fixed_codes<S>(codes[r], 4 * K + n); };
        V::template dot_quads<(1 << S::total) - 1, 4, true, R, T>(weights, inputs + K * kNestedPart, scale, dots);
    }

    // The steps of all parts, in both int16 halves of a lane: times the two codes there, whose products are bytes.
    static EDGEMOE_INLINE void spread_steps(I bytes, I (&steps)[kParts]) {
        const auto both = [](I x) __attribute__((always_inline)) { return V::or_i(x, V::template shift_left<16>(x)); };
        steps[0] = both(step<0>(bytes));
        steps[1] = both(step<1>(bytes));
        steps[2] = both(step<2>(bytes));
        steps[3] = both(step<3>(bytes));
    }

    template <class S, int R, int T>
    static EDGEMOE_INLINE void dot_group(const Product& p, const std::byte* const (&codes)[R][S::count],
                                         const I (&steps)[R], const int8_t* inputs, I (&dots)[R][T]) {
        if constexpr (S::fixed && V::kScaledTokens && T >= V::kScaledTokens) {
            static_assert(15 * ((1 << S::total) - 1) < 256);
            I spread[R][kParts], none[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) spread_steps(steps[r], spread[r]);
            const auto weights = [&](int n, int r) __attribute__((always_inline)) {
                return V::mul_16(fixed_codes<S>(codes[r], n), spread[r][n / 4]);
            };
            V::template dot_quads<255, 16, false, R, T>(weights, inputs, none, dots);
        } else if constexpr (S::fixed) {
            add_part<S, 0, R, T>(codes, steps, inputs, dots);
            add_part<S, 1, R, T>(codes, steps, inputs, dots);
            add_part<S, 2, R, T>(codes, steps, inputs, dots);
            add_part<S, 3, R, T>(codes, steps, inputs, dots);
        } else {
            for (int k = 0; k < kParts; ++k) {
                I scale[R];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r)
                    scale[r] = V::as_scale(V::and_i(V::shift_right_32(steps[r], 8 * k), V::set1_i(15)));
                const auto weights = [&](int n, int r)
                                         __attribute__((always_inline)) { return any_codes(p, codes[r], k, n); };
                V::template dot_quads<255, 4, true, R, T>(weights, inputs + k * kNestedPart, scale, dots);
            }
        }
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
        // Level 0: of the next group; later levels: of the chunk.
        const std::byte* places[S::count];
        EDGEMOE_UNROLL
        for (int level = 0; level < level_count; ++level)
            places[level] = p.levels[level].data + block * p.levels[level].bytes;
        const auto* scales = reinterpret_cast<const uint16_t*>(places[0]);
        const size_t header = nested_header(p.groups);
        if constexpr (T == 1) {
            for (size_t at = 0; at < header; at += 64) fetch_ahead(places[0] + at, 1, p.levels[0].end);
        }
        places[0] += header;
        const float codes_0 = static_cast<float>(1 << bits_of(0));
        for (int begin = 0; begin < p.groups; begin += kNestedChunk) {
            const int together = p.groups - begin < kNestedChunk ? p.groups - begin : kNestedChunk;
            if constexpr (T == 1) {
                EDGEMOE_UNROLL
                for (int level = 1; level < level_count; ++level)
                    fetch_ahead(places[level] + together * nested_codes(bits_of(level)), 1, p.levels[level].end);
            }
            F scales_0[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) scales_0[r] = V::load_half(scales + r * (p.levels[0].bytes / sizeof(uint16_t)));
            scales += kRowBlock;
            for (int i = 0; i < together; ++i) {
                const int g = begin + i;
                const std::byte* codes[R][S::count];
                I packed[R], steps[R];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int level = 0; level < level_count; ++level) {
                        codes[r][level] = places[level] + r * p.levels[level].bytes;
                        if (level > 0) codes[r][level] += i * nested_codes(bits_of(level));
                        if constexpr (T == 1)
                            fetch_ahead(codes[r][level], 2 * bits_of(level) + (level == 0), p.levels[level].end);
                    }
                    packed[r] = V::load_bytes(codes[r][0] + nested_codes(bits_of(0)));
                    steps[r] = steps_of(packed[r]);
                }
                places[0] += nested_base_group(bits_of(0));
                I dots[R][T];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) dots[r][t] = V::set1_i(0);
                }
                dot_group<S, R, T>(p, codes, steps, x.codes + g * T * kGroup, dots);
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    F scale = scales_0[r];
                    const F unit = V::mul(scale, V::set1(codes_0 / 64));
                    F center = V::mul(scale, V::set1((codes_0 - 1) / -2));
                    int below = bits_of(0);
                    EDGEMOE_UNROLL
                    for (int level = 1; level < level_count; ++level) {
                        const int bits = bits_of(level);
                        const std::byte* fine =
                            places[level] + r * p.levels[level].bytes + together * nested_codes(bits);
                        // 4 bits at the top of a lane have their sign, and are 2^28 times as much.
                        const I stored = V::load_u8(fine + i * kRowBlock);
                        const F ratio = V::integers_to_float(
                            V::and_i(V::template shift_left<24>(stored), V::set1_i(-(1 << kNibble))));
                        const F shift = V::integers_to_float(V::template shift_left<kNibble>(stored));
                        const float parts = static_cast<float>(1 << bits), part = 1.0f / (1 << kNibble);
                        scale = V::mul(V::mul(scale, V::set1(1.0f / parts)),
                                       V::fma(ratio, V::set1(part / static_cast<float>(8 << below)), V::set1(1.0f)));
                        const F moved = V::fma(shift, V::set1(part * parts / 32), V::set1((1.0f - parts) * 0.5f));
                        center = V::fma(scale, V::fma(ratio, V::set1(part * parts / -16), moved), center);
                        below += bits;
                    }
                    const Factors factors(packed[r], steps[r], level_count == 1);
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const F x_scale = V::set1(x.scales[g * T + t]);
                        const int16_t* parts = x.parts + (g * T + t) * kParts;
                        F sum = V::mul(scale, V::integers_to_float(dots[r][t]));
                        sum = V::fma(unit, Factors::sum(factors.offsets, parts), sum);
                        sum = V::fma(center, Factors::sum(factors.steps, parts), sum);
                        sums[r][t] = V::fma(sum, x_scale, sums[r][t]);
                    }
                }
            }
            EDGEMOE_UNROLL
            for (int level = 1; level < level_count; ++level)
                places[level] += nested_chunk_bytes(bits_of(level), kNestedChunk);
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

    // The sizes of tiles that a number of tokens is cut into: those of ggml's products, and of single row blocks twice
    // the largest of them where there are registers for two row blocks. A row block's codes are put together and scaled
    // for all tokens of a tile, which takes longer than what two row blocks can share.
    static constexpr int kLongTile = V::kGgmlBlocks > 1 ? V::kGgmlBlocks * V::kGgmlTokens : 0;
    static EDGEMOE_INLINE int tile_size(int tokens) {
        if (kLongTile && tokens >= kLongTile) return kLongTile;
        return tokens >= V::kGgmlTokens ? V::kGgmlTokens : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
    }

    template <class S, int R>
    static void row_blocks(const Product& p, const std::byte* packed, int block, int count) {
        for (int first = 0; first < count;) {
            const int size = tile_size(count - first);
            const std::byte* place = packed + first * p.groups * kPackedGroup;
            if constexpr (kLongTile) {
                if (size == kLongTile) {
                    for (int r = 0; r < R; ++r)
                        tile<S, 1, kLongTile>(p, Tile<kLongTile>::at(place, p.groups), block + r, first);
                    first += size;
                    continue;
                }
            }
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
            auto* parts = reinterpret_cast<int16_t*>(scales + groups * size);
            for (int t = 0; t < size; ++t) {
                const int i = first + start + t;
                const ptrdiff_t token = static_cast<ptrdiff_t>(tokens ? tokens[i] : i) * groups;
                for (int g = 0; g < groups; ++g) {
                    const int place = g * size + t;
                    const int8_t* source = x.codes + (token + g) * kGroup;
                    __builtin_memcpy(codes + place * kGroup, source, kGroup);
                    scales[place] = x.scales[token + g];
                    V::sum_parts(source, parts + place * kParts);
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
            const int8_t* codes = x.codes + token * kGroup;
            auto* parts = reinterpret_cast<int16_t*>(packed_scratch(p.groups * kParts * sizeof(int16_t)));
            for (int g = 0; g < p.groups; ++g) V::sum_parts(codes + g * kGroup, parts + g * kParts);
            return matmul_token<S>(p, {codes, x.scales + token, parts}, first_block, last_block);
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
