// Products with nested weights, written once for 16 lanes; nested_scalar.cpp
// is the reference. Beyond what vector.h and ggml_vector.h list the trait V gives
//
//   select_bits(mask, a, b)      the bits of a where mask has ones, otherwise those of b
//   low_halves                   the float16 in the low half of every 32-bit lane
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
// A group has a step for each of its four parts of 16 columns, which the sums of the parts' products are multiplied by.
// A step times a code of up to 4 bits is still a signed byte: where dot_quads multiplies such bytes as fast as small
// ones, many tokens share that product instead.
//
// A call first packs the activations of its tokens tile by tile, so that one address leads to all tokens of a tile; of
// a single token only the sums of its parts are made.
#pragma once

#include "ggml_formats.h"
#include "nested_format.h"
#include "vector.h"

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

    // What a row's weights have in common in a chunk.
    struct Line {
        F scale, unit, center;
    };

    struct Product {
        int rows;
        int groups;
        int level_count;
        size_t parameters;  // bytes that a chunk of level 0 begins with
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

    template <class S>
    static EDGEMOE_INLINE int bits_of(const Product& p, int level) {
        return S::fixed ? S::values[level] : p.levels[level].bits;
    }

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
    static EDGEMOE_INLINE I steps_of(I packed) { return V::lookup(kNestedSteps, V::and_i(packed, V::set1_8(3))); }

    static constexpr ByteTable offset_table(bool alone) {
        ByteTable table{};
        for (int i = 0; i < 16; ++i) table.bytes[i] = static_cast<int8_t>(nested_offset(i, alone));
        return table;
    }

    // The offsets of all parts, a signed byte each; alone: whether there is no other level than 0.
    static EDGEMOE_INLINE I offsets_of(I packed, bool alone) {
        static constexpr ByteTable kFine = offset_table(false), kAlone = offset_table(true);
        return V::lookup(alone ? kAlone.bytes : kFine.bytes,
                         V::and_i(V::template shift_right_16<2>(packed), V::set1_8(15)));
    }

    // The lines of a row block, of the parameters that its chunk begins with.
    template <class S>
    static EDGEMOE_INLINE Line line_of(const Product& p, const std::byte* parameters) {
        const int level_count = S::fixed ? S::count : p.level_count;
        const auto bytes = [&](int i)
                               __attribute__((always_inline)) { return V::load_bytes(parameters + i * kNestedLine); };
        // Two bits of each byte from every group: a float16, then the bytes of the second and the first later level.
        I word = V::select_bits(V::set1_8(0x0F),
                                V::select_bits(V::set1_8(0x03), V::template shift_right_16<6>(bytes(0)),
                                               V::template shift_right_16<4>(bytes(1))),
                                V::select_bits(V::set1_8(0x30), V::template shift_right_16<2>(bytes(2)), bytes(3)));
        Line line;
        line.scale = V::low_halves(word);
        const float codes = static_cast<float>(1 << bits_of<S>(p, 0));
        line.unit = V::mul(line.scale, V::set1(codes / 128));
        line.center = V::mul(line.scale, V::set1((codes - 1) / -2));
        int below = bits_of<S>(p, 0);
        EDGEMOE_UNROLL
        for (int level = 1; level < level_count; ++level) {
            // The level's byte comes to the top of its lane.
            const int index = level - kNestedLaterInGroups - 1;
            if (index >= 0 && index % kNestedLaterInLine == 0)
                word = bytes(kNestedChunk + index / kNestedLaterInLine);
            else if (level > 1)
                word = V::template shift_left<8>(word);
            // 4 bits at the top of a lane have their sign, and are 2^28 times as much.
            const I mask = V::set1_i(-(1 << kNibble));
            const F ratio = V::integers_to_float(V::and_i(word, mask));
            const F shift = V::integers_to_float(V::and_i(V::template shift_left<4>(word), mask));
            const int bits = bits_of<S>(p, level);
            const float parts = static_cast<float>(1 << bits), part = 1.0f / (1 << kNibble);
            line.scale = V::mul(V::mul(line.scale, V::set1(1.0f / parts)),
                                V::fma(ratio, V::set1(part / static_cast<float>(8 << below)), V::set1(1.0f)));
            const F moved = V::fma(shift, V::set1(part * parts / 32), V::set1((1.0f - parts) * 0.5f));
            line.center = V::fma(line.scale, V::fma(ratio, V::set1(part * parts / -16), moved), line.center);
            below += bits;
        }
        return line;
    }

    // What the sums of the parts are multiplied by, as pairs of int16 in the order of sum_parts: parts (0, 2), (1, 3).
    struct Factors {
        I steps[2];
        I offsets[2];  // times their steps

        // Of what steps_of and offsets_of give.
        EDGEMOE_INLINE Factors(I step, I offset) {
            steps[0] = V::and_i(step, V::set1_16(15));
            steps[1] = V::template shift_right_16<8>(step);
            const I even = V::template shift_right_16_signed<8>(V::template shift_left_16<8>(offset));
            offsets[0] = V::mul_16(steps[0], even);
            offsets[1] = V::mul_16(steps[1], V::template shift_right_16_signed<8>(offset));
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
            constexpr int largest = kNestedLargestStep * ((1 << S::total) - 1);
            static_assert(largest < 128);
            I spread[R][kParts], none[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) spread_steps(steps[r], spread[r]);
            const auto weights = [&](int n, int r) __attribute__((always_inline)) {
                return V::mul_16(fixed_codes<S>(codes[r], n), spread[r][n / 4]);
            };
            V::template dot_quads<largest, 16, false, R, T>(weights, inputs, none, dots);
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
        F sums[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) sums[r][t] = V::zero();
        }
        // Level 0: of the chunk's parameters, then of the next group's codes; later levels: of these.
        const std::byte* places[S::count];
        EDGEMOE_UNROLL
        for (int level = 0; level < level_count; ++level)
            places[level] = p.levels[level].data + block * p.levels[level].bytes;
        for (int begin = 0; begin < p.groups; begin += kNestedChunk) {
            const int end = p.groups - begin < kNestedChunk ? p.groups : begin + kNestedChunk;
            const std::byte* parameters = places[0];
            if constexpr (T == 1) {
                fetch_ahead(parameters, kNestedChunk, p.levels[0].end);
                for (size_t at = kNestedChunk * kNestedLine; at < p.parameters; at += kNestedLine)
                    fetch_ahead(parameters + at, 1, p.levels[0].end);
            }
            places[0] += p.parameters;
            Line lines[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) lines[r] = line_of<S>(p, parameters + r * p.levels[0].bytes);
            for (int g = begin; g < end; ++g) {
                const std::byte* codes[R][S::count];
                I packed[R], steps[R];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int level = 0; level < level_count; ++level) {
                        codes[r][level] = places[level] + r * p.levels[level].bytes;
                        if constexpr (T == 1)
                            fetch_ahead(codes[r][level], 2 * bits_of<S>(p, level), p.levels[level].end);
                    }
                    packed[r] = V::load_bytes(parameters + r * p.levels[0].bytes + (g - begin) * kNestedLine);
                    steps[r] = steps_of(packed[r]);
                }
                EDGEMOE_UNROLL
                for (int level = 0; level < level_count; ++level) places[level] += nested_codes(bits_of<S>(p, level));
                I dots[R][T];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) dots[r][t] = V::set1_i(0);
                }
                dot_group<S, R, T>(p, codes, steps, x.codes + g * T * kGroup, dots);
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const Factors factors(steps[r], offsets_of(packed[r], level_count == 1));
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const F x_scale = V::set1(x.scales[g * T + t]);
                        const int16_t* parts = x.parts + (g * T + t) * kParts;
                        F sum = V::mul(lines[r].scale, V::integers_to_float(dots[r][t]));
                        sum = V::fma(lines[r].unit, Factors::sum(factors.offsets, parts), sum);
                        sum = V::fma(lines[r].center, Factors::sum(factors.steps, parts), sum);
                        sums[r][t] = V::fma(sum, x_scale, sums[r][t]);
                    }
                }
            }
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
        Product p{
            matrix.rows, (matrix.cols + kGroup - 1) / kGroup, levels.count, nested_parameters(levels.later), {}, out,
            out_stride};
        for (int level = 0; level < levels.count; ++level) {
            const size_t bytes = nested_block_bytes(levels, level, matrix.cols);
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
