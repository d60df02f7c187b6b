// Products with ggml's formats, written once for 16 lanes; ggml_scalar.cpp
// is the reference. Beyond what vector.h lists the trait V gives, with an I taken as 64 bytes, 32 int16 or 16 int32:
//
//   load_bytes load_u8 load_u16            64 bytes; 16 uint8 or uint16 widened to int32
//   set1_8 set1_16 and_i or_i              constants and bits
//   sub_8 add_16 sub_16                    wrapping
//   shift_left_16<N> shift_right_16<N>     logical; the latter and shift_right_32 also with a count known at run time
//   shift_right_16_signed<N>
//   madd                                   int16 pairs: a0 * b0 + a1 * b1 -> int32
//   lookup(table, x)                       table[x] per byte, x < 16
//   spread_bits(x, n)                      bits 4 n .. 4 n + 3 of every 32-bit lane -> bit 4 of its four bytes
//   sum_parts(codes, parts)                sums of a group's columns 0-15, 32-47, 16-31, 48-63
//   kSignedOffset signed_bytes             what signed_bytes adds to signed bytes (128 or 0), for dot_quads with Max =
//   0 as_scale                               int32 within int16 -> a factor for dot_quads dot_quads<Max, N, Scaled>
//   dots[r][t] += scale[r] * (N quads of weights . codes of token t, which begin at
//                                          codes + t * kGroup); weights are unsigned bytes up to Max, or results of
//                                          signed_bytes (Max = 0)
//
// A weight's code is an unsigned number less an offset; the offset's part of the product is taken off with the sums of
// the activations' codes. All of this is integer arithmetic and exact, whatever the order.
//
// A call first packs the activations of its tokens tile by tile, so that one address leads to all tokens of a tile.
#pragma once

#include "ggml_formats.h"
#include "vector.h"

namespace edgemoe {
namespace {

struct ByteTable {
    alignas(16) int8_t bytes[16];
};

constexpr ByteTable offset_table(const int8_t (&values)[16], int offset) {
    ByteTable table{};
    for (int i = 0; i < 16; ++i) table.bytes[i] = static_cast<int8_t>(static_cast<uint8_t>(values[i] + offset));
    return table;
}

// The largest unsigned code, 0 where codes are made by signed_bytes.
constexpr int largest_code(Layout layout) {
    switch (layout) {
        case Layout::ggml_q8_0:
        case Layout::ggml_iq4_nl:
        case Layout::ggml_iq4_xs:
            return 0;
        case Layout::ggml_q2_k:
            return 3;
        case Layout::ggml_q3_k:
            return 7;
        case Layout::ggml_mxfp4:
            return 24;
        case Layout::ggml_q5_0:
        case Layout::ggml_q5_1:
        case Layout::ggml_q5_k:
            return 31;
        case Layout::ggml_q6_k:
            return 63;
        default:
            return 15;
    }
}

// Base-2 logarithm of a code's offset; -1: none.
constexpr int offset_bits(Layout layout, int signed_offset) {
    switch (layout) {
        case Layout::ggml_q4_0:
            return 3;
        case Layout::ggml_q5_0:
            return 4;
        case Layout::ggml_q3_k:
            return 2;
        case Layout::ggml_q6_k:
            return 5;
        default:
            return largest_code(layout) == 0 && signed_offset ? 7 : -1;
    }
}

}  // namespace

template <class V>
struct GgmlKernels {
    using F = typename V::F;
    using I = typename V::I;

    static constexpr int kChunk = 48;  // tokens that are packed at a time
    static constexpr size_t kPackedGroup = kGroup + sizeof(float) + 4 * sizeof(int16_t);  // bytes of a token's group
    static constexpr int kMxfp4Offset = 12;

    struct Product {
        const Matrix& matrix;
        const std::byte* packed;  // activations of tokens 0, 1, ...
        float* out;
        ptrdiff_t out_stride;
        size_t bytes;  // of a row block
        size_t groups;
        const std::byte* end;  // of the row blocks that are multiplied
    };

    // The activations of a tile of T tokens.
    template <int T>
    struct Tile {
        const int8_t* codes;   // [groups][T][kGroup]
        const float* scales;   // [groups][T]
        const int16_t* parts;  // [groups][T][4], from V::sum_parts

        static EDGEMOE_INLINE Tile at(const std::byte* packed, size_t groups) {
            const auto* codes = reinterpret_cast<const int8_t*>(packed);
            const auto* scales = reinterpret_cast<const float*>(codes + groups * T * kGroup);
            return {codes, scales, reinterpret_cast<const int16_t*>(scales + groups * T)};
        }
        EDGEMOE_INLINE Tile group(int g) const {
            return {codes + static_cast<ptrdiff_t>(g) * (T * kGroup), scales + g * T, parts + g * (T * 4)};
        }
    };

    static EDGEMOE_INLINE I word(const std::byte* words, int index) { return V::load_bytes(words + index * 64); }
    static EDGEMOE_INLINE I low_nibble(I x) { return V::and_i(x, V::set1_8(15)); }
    static EDGEMOE_INLINE I high_nibble(I x) { return low_nibble(V::template shift_right_16<4>(x)); }

    static EDGEMOE_INLINE I broadcast_pair(const int16_t* p) {
        int32_t pair;
        __builtin_memcpy(&pair, p, sizeof pair);
        return V::set1_i(pair);
    }
    // (sum of the group's columns 0-31, sum of columns 32-63) as a pair of int16.
    static EDGEMOE_INLINE I half_sums(const int16_t* parts) {
        return V::add_16(broadcast_pair(parts), broadcast_pair(parts + 2));
    }

    // --- blocks of 32 columns ---------------------------------------------------------------------------------------

    // Codes of columns 4 n .. 4 n + 3.
    template <Layout L>
    static EDGEMOE_INLINE I small_codes(const std::byte* words, int n) {
        if constexpr (L == Layout::ggml_q8_0) return V::signed_bytes(word(words, n));
        constexpr int first = L == Layout::ggml_q5_0 || L == Layout::ggml_q5_1 ? 1 : 0;
        const I packed = word(words, first + n % 4);
        const I nibble = n < 4 ? low_nibble(packed) : high_nibble(packed);
        if constexpr (first == 1) return V::or_i(nibble, V::spread_bits(word(words, 0), n));
        if constexpr (L == Layout::ggml_iq4_nl) return V::lookup(kIq4Table.bytes, nibble);
        if constexpr (L == Layout::ggml_mxfp4) return V::lookup(kFp4Table.bytes, nibble);
        return nibble;
    }

    static constexpr ByteTable kIq4Table = offset_table(kIq4Values, V::kSignedOffset);
    static constexpr ByteTable kFp4Table = offset_table(kFp4Values, kMxfp4Offset);

    template <Layout L>
    static EDGEMOE_INLINE F small_scale(const std::byte* parameters) {
        if constexpr (L == Layout::ggml_mxfp4) {
            // Half of 2^(e - 127), in bits: (e - 1) << 23, but 1 << 22 for 1 and 1 << 21 for 0.
            const I e = V::load_u8(parameters);
            const I normal = V::template shift_left<23>(V::max_i(V::sub_i(e, V::set1_i(1)), V::set1_i(0)));
            const I small = V::max_i(V::sub_i(V::set1_i(2), e), V::set1_i(0));  // 2 for 0, 1 for 1, otherwise 0
            const I one = V::template shift_left<22>(V::and_i(small, V::set1_i(1)));
            const I zero = V::template shift_left<20>(V::and_i(small, V::set1_i(2)));
            return V::floats(V::or_i(normal, V::or_i(one, zero)));
        } else {
            return V::load_half(reinterpret_cast<const uint16_t*>(parameters));
        }
    }

    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void small_block(const Product& p, const std::byte* words, const std::byte* parameters,
                                           int block, const Tile<T>& tile, F (&sums)[R][T]) {
        constexpr int bits = offset_bits(L, V::kSignedOffset);
        constexpr int offset = L == Layout::ggml_mxfp4 ? kMxfp4Offset : bits < 0 ? 0 : 1 << (bits < 0 ? 0 : bits);
        if constexpr (T == 1 && !ggml_format(L).plain()) fetch_ahead(words, ggml_format(L).words, p.end);
        const Tile<T> x = tile.group(block / 2);
        const int odd = block % 2;
        I dots[R][T];
        // Takes the block's half out of half_sums.
        const I take = V::set1_i(odd ? static_cast<int32_t>(static_cast<uint32_t>(-offset) << 16) : -offset & 0xFFFF);
        EDGEMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            I start = V::set1_i(0);
            if constexpr (offset != 0) start = V::madd(take, half_sums(x.parts + t * 4));
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) dots[r][t] = start;
        }
        const auto weights = [&](int n, int r)
                                 __attribute__((always_inline)) { return small_codes<L>(words + r * p.bytes, n); };
        I none[R];
        V::template dot_quads<largest_code(L), 8, false, R, T>(weights, x.codes + odd * 32, none, dots);
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            const std::byte* place = parameters + r * p.bytes;
            const F scale = small_scale<L>(place);
            F minimum;
            if constexpr (ggml_has_minimum(L))
                minimum = V::load_half(reinterpret_cast<const uint16_t*>(place) + kRowBlock);
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const F x_scale = V::set1(x.scales[t]);
                sums[r][t] = V::fma(V::mul(scale, x_scale), V::integers_to_float(dots[r][t]), sums[r][t]);
                if constexpr (ggml_has_minimum(L)) {
                    const int16_t* parts = x.parts + t * 4 + odd;
                    const F total = V::set1(static_cast<float>(parts[0] + parts[2]));
                    sums[r][t] = V::fma(V::mul(minimum, x_scale), total, sums[r][t]);
                }
            }
        }
    }

    // --- blocks of 256 columns --------------------------------------------------------------------------------------

    // Groups are numbered 2 * half + P. Codes of columns 4 n .. 4 n + 3 of sub-block K of a group.
    template <Layout L, int P, int K>
    static EDGEMOE_INLINE I large_codes(const std::byte* words, int half, int n) {
        const int g = 2 * half + P;
        if constexpr (ggml_sub_block(L) == 32) {
            if constexpr (L == Layout::ggml_iq4_xs) {
                const I packed = word(words, 1 + 8 * g + 4 * K + n % 4);
                return V::lookup(kIq4Table.bytes, n < 4 ? low_nibble(packed) : high_nibble(packed));
            }
            constexpr int first = L == Layout::ggml_q5_k ? 11 : 3;
            const I packed = word(words, first + 8 * g + n);
            const I nibble = K == 0 ? low_nibble(packed) : high_nibble(packed);
            if constexpr (L == Layout::ggml_q5_k) {
                const I bits = V::shift_right_16(word(words, 3 + n), 4 * half);
                const I high = V::template shift_left_16<4 - 2 * P - K>(bits);
                return V::or_i(nibble, V::and_i(high, V::set1_8(16)));
            }
            return nibble;
        }
        constexpr int upper = K / 2;  // half of the group
        const int place = K % 2 * 4 + n;
        constexpr int shift = P * 4 + upper * 2;
        if constexpr (L == Layout::ggml_q6_k) {
            const I packed = word(words, half * 24 + ggml_word(L, upper * 8 + place));
            const I low = P == 0 ? low_nibble(packed) : high_nibble(packed);
            const I bits = word(words, half * 24 + ggml_word(L, 32 + place));
            I high = bits;
            if constexpr (shift < 4) high = V::template shift_left_16<4 - shift>(bits);
            if constexpr (shift > 4) high = V::template shift_right_16<shift - 4>(bits);
            return V::or_i(low, V::and_i(high, V::set1_8(0x30)));
        }
        constexpr int first = L == Layout::ggml_q3_k ? 8 : 4;
        const I packed = word(words, first + half * 8 + place);
        const I low = V::and_i(V::template shift_right_16<shift>(packed), V::set1_8(3));
        if constexpr (L == Layout::ggml_q3_k) {
            constexpr int bit = 2 * P + upper;
            I bits = V::shift_right_16(word(words, place), 4 * half);
            if constexpr (bit < 2) bits = V::template shift_left_16<2 - bit>(bits);
            if constexpr (bit > 2) bits = V::template shift_right_16<bit - 2>(bits);
            return V::or_i(low, V::and_i(bits, V::set1_8(4)));
        }
        return low;
    }

    // Integer factors of a group, one row per lane: two int16 (sub-blocks of 32) or four int8 (sub-blocks of 16).
    struct Factors {
        I scales;
        I minimums;
    };

    // Bytes 2 (g % 2) and 2 (g % 2) + 1 of every lane as a pair of int16.
    static EDGEMOE_INLINE I byte_pair(I x, int g) {
        x = V::shift_right_32(x, g % 2 * 16);
        const I second = V::template shift_left<8>(V::and_i(x, V::set1_i(0xFF00)));
        return V::or_i(V::and_i(x, V::set1_i(0xFF)), second);
    }

    template <Layout L>
    static EDGEMOE_INLINE Factors factors(const std::byte* words, const std::byte* parameters, int g) {
        if constexpr (L == Layout::ggml_q4_k || L == Layout::ggml_q5_k) {
            I scales = word(words, 0);
            I minimums = word(words, 1);
            if (g < 2) {
                scales = V::and_i(scales, V::set1_8(63));
                minimums = V::and_i(minimums, V::set1_8(63));
            } else {
                const I low = word(words, 2);
                const I mask = V::set1_8(0x30);
                scales = V::or_i(low_nibble(low), V::and_i(V::template shift_right_16<2>(scales), mask));
                minimums = V::or_i(high_nibble(low), V::and_i(V::template shift_right_16<2>(minimums), mask));
            }
            return {byte_pair(scales, g), byte_pair(minimums, g)};
        } else if constexpr (L == Layout::ggml_iq4_xs) {
            const I low = V::shift_right_32(word(words, 0), 8 * g);
            const I high = V::shift_right_32(V::load_u16(parameters + 2 * kRowBlock), 4 * g);
            const I first =
                V::or_i(V::and_i(low, V::set1_i(15)), V::template shift_left<4>(V::and_i(high, V::set1_i(3))));
            const I second = V::or_i(V::template shift_left<12>(V::and_i(low, V::set1_i(0xF0))),
                                     V::template shift_left<18>(V::and_i(high, V::set1_i(12))));
            const I scales = V::sub_16(V::or_i(first, second), V::set1_16(32));
            return {scales, scales};
        } else if constexpr (L == Layout::ggml_q2_k) {
            const I packed = word(words, g);
            return {low_nibble(packed), high_nibble(packed)};
        } else if constexpr (L == Layout::ggml_q3_k) {
            const I low = low_nibble(V::shift_right_16(word(words, 24 + g % 2), g / 2 * 4));
            const I high = V::and_i(V::shift_right_16(word(words, 26), 2 * g), V::set1_8(3));
            const I scales = V::sub_8(V::or_i(low, V::template shift_left_16<4>(high)), V::set1_8(32));
            return {scales, scales};
        } else {
            const I scales = word(words, ggml_word(L, 48) + g);
            return {scales, scales};
        }
    }

    // Factor K of a group.
    template <Layout L, int K>
    static EDGEMOE_INLINE I factor(I x) {
        if constexpr (ggml_sub_block(L) == 16)
            return V::template shift_right<24>(V::template shift_left<24 - 8 * K>(x));
        else
            return V::template shift_right<16>(V::template shift_left<16 - 16 * K>(x));
    }

    // Factors as pairs of int16 in the order of parts: those of sub-blocks (0, 1), or (0, 2) and (1, 3).
    struct Pairs {
        I first;
        I second;
    };
    template <Layout L>
    static EDGEMOE_INLINE Pairs pairs(I x) {
        if constexpr (ggml_sub_block(L) == 32) return {x, x};
        return {V::template shift_right_16_signed<8>(V::template shift_left_16<8>(x)),
                V::template shift_right_16_signed<8>(x)};
    }

    // The sum over sub-blocks of factor * (sum of codes).
    template <Layout L>
    static EDGEMOE_INLINE I weigh_sums(const Pairs& factors, const int16_t* parts) {
        if constexpr (ggml_sub_block(L) == 32) return V::madd(factors.first, half_sums(parts));
        return V::add_i(V::madd(factors.first, broadcast_pair(parts)),
                        V::madd(factors.second, broadcast_pair(parts + 2)));
    }

    template <Layout L, int P, int K, int R, int T>
    static EDGEMOE_INLINE void sub_block(const Product& p, const std::byte* words, int half, const int8_t* codes,
                                         const Factors (&group)[R], I (&dots)[R][T]) {
        I scale[R];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) scale[r] = V::as_scale(factor<L, K>(group[r].scales));
        const auto weights = [&](int n, int r) __attribute__((always_inline)) {
            return large_codes<L, P, K>(words + r * p.bytes, half, n);
        };
        constexpr int width = ggml_sub_block(L);
        if constexpr (T == 1) {
            // A part of the half's lines; the two halves of an odd number share one.
            constexpr int lines = ggml_format(L).words, upper = (lines + 1) / 2, parts = 128 / width;
            constexpr int part = P * (parts / 2) + K, begin = part * upper / parts, end = (part + 1) * upper / parts;
            fetch_ahead(words + (half * (lines / 2) + begin) * 64, end - begin, p.end);
        }
        V::template dot_quads<largest_code(L), width / 4, true, R, T>(weights, codes + K * width, scale, dots);
    }

    template <Layout L, int P, int R, int T>
    static EDGEMOE_INLINE void large_group(const Product& p, const std::byte* words, const std::byte* parameters,
                                           int half, const Tile<T>& x, F (&sums)[R][T]) {
        constexpr int bits = offset_bits(L, V::kSignedOffset);
        Factors integers[R];
        I dots[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            integers[r] = factors<L>(words + r * p.bytes, parameters + r * p.bytes, 2 * half + P);
            if constexpr (bits >= 0) {
                Pairs offsets = pairs<L>(integers[r].scales);
                const I zero = V::set1_i(0);
                offsets.first = V::sub_16(zero, V::template shift_left_16<bits>(offsets.first));
                offsets.second = V::sub_16(zero, V::template shift_left_16<bits>(offsets.second));
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) dots[r][t] = weigh_sums<L>(offsets, x.parts + t * 4);
            } else {
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) dots[r][t] = V::set1_i(0);
            }
        }
        sub_block<L, P, 0, R, T>(p, words, half, x.codes, integers, dots);
        sub_block<L, P, 1, R, T>(p, words, half, x.codes, integers, dots);
        if constexpr (ggml_sub_block(L) == 16) {
            sub_block<L, P, 2, R, T>(p, words, half, x.codes, integers, dots);
            sub_block<L, P, 3, R, T>(p, words, half, x.codes, integers, dots);
        }
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            const auto* halves = reinterpret_cast<const uint16_t*>(parameters + r * p.bytes);
            const F scale = V::load_half(halves);
            F minimum;
            Pairs weights;
            if constexpr (ggml_has_minimum(L)) {
                minimum = V::mul(V::load_half(halves + kRowBlock), V::set1(-1.0f));
                weights = pairs<L>(integers[r].minimums);
            }
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const F x_scale = V::set1(x.scales[t]);
                sums[r][t] = V::fma(V::mul(scale, x_scale), V::integers_to_float(dots[r][t]), sums[r][t]);
                if constexpr (ggml_has_minimum(L)) {
                    const F total = V::integers_to_float(weigh_sums<L>(weights, x.parts + t * 4));
                    sums[r][t] = V::fma(V::mul(minimum, x_scale), total, sums[r][t]);
                }
            }
        }
    }

    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void large_block(const Product& p, const std::byte* words, const std::byte* parameters,
                                           int block, const Tile<T>& tile, F (&sums)[R][T]) {
        for (int half = 0; half < 2; ++half) {
            large_group<L, 0, R, T>(p, words, parameters, half, tile.group(block * 4 + half * 2), sums);
            large_group<L, 1, R, T>(p, words, parameters, half, tile.group(block * 4 + half * 2 + 1), sums);
        }
    }

    // --- tiles ------------------------------------------------------------------------------------------------------

    // R row blocks times T tokens.
    template <Layout L, int R, int T>
    static __attribute__((noinline)) void tile(const Product& p, int block, int first) {
        constexpr GgmlFormat format = ggml_format(L);
        const Tile<T> x = Tile<T>::at(p.packed + first * p.groups * kPackedGroup, p.groups);
        F sums[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        const int blocks = p.matrix.cols / format.cols;
        const std::byte* words = p.matrix.data + block * p.bytes;
        for (int begin = 0; begin < blocks; begin += format.chunk()) {
            const int end = blocks - begin < format.chunk() ? blocks : begin + format.chunk();
            const std::byte* parameters = words + (end - begin) * format.word_bytes();
            if constexpr (T == 1 && !format.plain()) fetch_ahead(parameters, 1, p.end);
            for (int i = begin; i < end; ++i) {
                if constexpr (format.cols == 32)
                    small_block<L, R, T>(p, words, parameters, i, x, sums);
                else
                    large_block<L, R, T>(p, words, parameters, i, x, sums);
                words += format.word_bytes();
                parameters += format.parameters_bytes();
            }
            words = parameters;
        }
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

    // The sizes of tiles that a number of tokens is cut into: the largest, 4, 2, 1. Sizes between would gain less than
    // their code costs.
    static EDGEMOE_INLINE int tile_size(int tokens) {
        return tokens >= V::kGgmlTokens ? V::kGgmlTokens : tokens >= 4 ? 4 : tokens >= 2 ? 2 : 1;
    }

    template <Layout L, int R>
    static void row_blocks(const Product& p, int block, int count) {
        for (int first = 0; first < count;) {
            const int size = tile_size(count - first);
            if (size == V::kGgmlTokens)
                tile<L, R, V::kGgmlTokens>(p, block, first);
            else if (size == 4)
                tile<L, R, 4>(p, block, first);
            else if (size == 2)
                tile<L, R, 2>(p, block, first);
            else
                tile<L, R, 1>(p, block, first);
            first += size;
        }
    }

    template <Layout L>
    static void matmul_layout(const Product& p, int count, int first_block, int last_block) {
        int block = first_block;
        if constexpr (ggml_format(L).plain()) {
            for (; count == 1 && block + V::kVectorBlocks <= last_block; block += V::kVectorBlocks)
                tile<L, V::kVectorBlocks, 1>(p, block, 0);
        }
        if constexpr (V::kGgmlBlocks > 1) {
            for (; count > 1 && block + V::kGgmlBlocks <= last_block; block += V::kGgmlBlocks)
                row_blocks<L, V::kGgmlBlocks>(p, block, count);
        }
        for (; block < last_block; ++block) row_blocks<L, 1>(p, block, count);
    }

    static void matmul_tokens(const Product& p, int count, int first_block, int last_block) {
        switch (p.matrix.layout) {
            case Layout::ggml_q4_0:
                return matmul_layout<Layout::ggml_q4_0>(p, count, first_block, last_block);
            case Layout::ggml_q4_1:
                return matmul_layout<Layout::ggml_q4_1>(p, count, first_block, last_block);
            case Layout::ggml_q5_0:
                return matmul_layout<Layout::ggml_q5_0>(p, count, first_block, last_block);
            case Layout::ggml_q5_1:
                return matmul_layout<Layout::ggml_q5_1>(p, count, first_block, last_block);
            case Layout::ggml_q8_0:
                return matmul_layout<Layout::ggml_q8_0>(p, count, first_block, last_block);
            case Layout::ggml_q2_k:
                return matmul_layout<Layout::ggml_q2_k>(p, count, first_block, last_block);
            case Layout::ggml_q3_k:
                return matmul_layout<Layout::ggml_q3_k>(p, count, first_block, last_block);
            case Layout::ggml_q4_k:
                return matmul_layout<Layout::ggml_q4_k>(p, count, first_block, last_block);
            case Layout::ggml_q5_k:
                return matmul_layout<Layout::ggml_q5_k>(p, count, first_block, last_block);
            case Layout::ggml_q6_k:
                return matmul_layout<Layout::ggml_q6_k>(p, count, first_block, last_block);
            case Layout::ggml_iq4_nl:
                return matmul_layout<Layout::ggml_iq4_nl>(p, count, first_block, last_block);
            case Layout::ggml_iq4_xs:
                return matmul_layout<Layout::ggml_iq4_xs>(p, count, first_block, last_block);
            case Layout::ggml_mxfp4:
                return matmul_layout<Layout::ggml_mxfp4>(p, count, first_block, last_block);
            default:
                return;
        }
    }

    // Tokens first ... first + count - 1 of a call as tiles.
    static void pack(const Activations& x, const int32_t* tokens, int first, int count, size_t groups,
                     std::byte* packed) {
        for (int start = 0; start < count;) {
            const int size = tile_size(count - start);
            auto* codes = reinterpret_cast<int8_t*>(packed + start * groups * kPackedGroup);
            auto* scales = reinterpret_cast<float*>(codes + groups * size * kGroup);
            auto* parts = reinterpret_cast<int16_t*>(scales + groups * size);
            for (int t = 0; t < size; ++t) {
                const int i = first + start + t;
                const size_t token = static_cast<size_t>(tokens ? tokens[i] : i) * groups;
                for (size_t g = 0; g < groups; ++g) {
                    const size_t place = g * size + t;
                    const int8_t* source = x.codes + (token + g) * kGroup;
                    __builtin_memcpy(codes + place * kGroup, source, kGroup);
                    scales[place] = x.scales[token + g];
                    V::sum_parts(source, parts + place * 4);
                }
            }
            start += size;
        }
    }

    static void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                       int first_block, int last_block, float* out, ptrdiff_t out_stride) {
        const auto groups = (static_cast<size_t>(matrix.cols) + kGroup - 1) / kGroup;
        const size_t bytes = block_bytes(matrix.layout, matrix.cols);
        const std::byte* end = matrix.data + last_block * bytes;
        std::byte* packed = packed_scratch((count < kChunk ? count : kChunk) * groups * kPackedGroup);
        for (int first = 0; first < count; first += kChunk) {
            const int chunk = count - first < kChunk ? count - first : kChunk;
            pack(x, tokens.size() ? tokens.data() : nullptr, first, chunk, groups, packed);
            const Product p{matrix, packed, out + first * out_stride, out_stride, bytes, groups, end};
            matmul_tokens(p, chunk, first_block, last_block);
        }
    }
};

}  // namespace edgemoe
