// AVX2 with FMA and F16C: 16 lanes are two registers. How bytes are multiplied is a parameter: avx2.cpp has pairs added
// in 16 bits, avxvnni.cpp AVX-VNNI's sums of four in 32 bits.
//
// A Dot has kQuads: whether it gives add(sum, weights, x), which adds to each int32 lane of sum the four products of
// unsigned bytes of weights and signed ones of x, and add_pairs, which adds the two products of int16 of both.
#pragma once

#include <immintrin.h>

#include "vector_kernels.h"

namespace edgemoe {
namespace {

alignas(64) constexpr int32_t kMask[32] = {-1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1};

template <class Dot>
struct Avx2 {
    struct F {
        __m256 low, high;
    };
    struct I {
        __m256i low, high;
    };

    // Sizes of register tiles, out of 16 registers.
    static constexpr int kQuantizedBlocks = 1;
    static constexpr int kQuantizedTokens = 4;
    static constexpr int kGgmlTokens = 4;
    static constexpr int kGgmlBlocks = 1;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kFloatTokens = 6;
    static constexpr int kVectorBlocks = 2;
    static constexpr int kAttendHeads = 4;  // at most; over 4, half as many chunks
    static constexpr int kScoreChunks = 1;
    static constexpr int kValueChunks = 1;

    // The first n of 16 lanes.
    static EDGEMOE_INLINE I first_lanes(int n) { return load_i(kMask + 16 - n); }
    static EDGEMOE_INLINE I load_i(const int32_t* p) {
        return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)),
                _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 8))};
    }

    static EDGEMOE_INLINE F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
    static EDGEMOE_INLINE F set1(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
    static EDGEMOE_INLINE float first(F x) { return _mm256_cvtss_f32(x.low); }
    static EDGEMOE_INLINE F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
    static EDGEMOE_INLINE F load_n(const float* p, int n, float fill = 0.0f) {
        const I mask = first_lanes(n);
        const F x{_mm256_maskload_ps(p, mask.low), _mm256_maskload_ps(p + 8, mask.high)};
        return select(mask, x, set1(fill));
    }
    static EDGEMOE_INLINE void store(float* p, F x) {
        _mm256_storeu_ps(p, x.low);
        _mm256_storeu_ps(p + 8, x.high);
    }
    static EDGEMOE_INLINE void store_n(float* p, F x, int n) {
        const I mask = first_lanes(n);
        _mm256_maskstore_ps(p, mask.low, x.low);
        _mm256_maskstore_ps(p + 8, mask.high, x.high);
    }
    static EDGEMOE_INLINE F select(I mask, F yes, F no) {
        return {_mm256_blendv_ps(no.low, yes.low, _mm256_castsi256_ps(mask.low)),
                _mm256_blendv_ps(no.high, yes.high, _mm256_castsi256_ps(mask.high))};
    }

    static EDGEMOE_INLINE __m128i load_128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
    static EDGEMOE_INLINE F load_half(const uint16_t* p) {
        return {_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8))};
    }
    static EDGEMOE_INLINE F load_half_n(const uint16_t* p, int n) {
        uint16_t halves[kLanes] = {};
        for (int i = 0; i < n; ++i) halves[i] = p[i];
        return load_half(halves);
    }
    static EDGEMOE_INLINE F set1_half(const uint16_t* p) {
        const __m256 x = _mm256_cvtph_ps(_mm_set1_epi16(static_cast<int16_t>(*p)));
        return {x, x};
    }
    static EDGEMOE_INLINE F load_bf16(const uint16_t* p) {
        const auto wide = [](__m128i x) {
            return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(x), 16));
        };
        return {wide(load_128(p)), wide(load_128(p + 8))};
    }
    static EDGEMOE_INLINE F load_codes(const int8_t* p) {
        const __m128i codes = load_128(p);
        return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_srli_si128(codes, 8)))};
    }
    static EDGEMOE_INLINE void store_half(uint16_t* p, F x) {
        constexpr int rounding = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(x.low, rounding));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(x.high, rounding));
    }
    // The values fit into int8, so that saturation changes nothing.
    static EDGEMOE_INLINE void store_codes(int8_t* p, I x) {
        const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.low, x.high), 0b11011000);
        const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
    }
    static EDGEMOE_INLINE uint16_t half_of(float x) {
        return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static EDGEMOE_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

    static EDGEMOE_INLINE F add(F a, F b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
    static EDGEMOE_INLINE F sub(F a, F b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
    static EDGEMOE_INLINE F mul(F a, F b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
    static EDGEMOE_INLINE F div(F a, F b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
    static EDGEMOE_INLINE F fma(F a, F b, F c) {
        return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
    }
    static EDGEMOE_INLINE F fms(F a, F b, F c) {
        return {_mm256_fmsub_ps(a.low, b.low, c.low), _mm256_fmsub_ps(a.high, b.high, c.high)};
    }
    static EDGEMOE_INLINE F max(F a, F b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
    static EDGEMOE_INLINE F min(F a, F b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }

    static EDGEMOE_INLINE F unless_below(F x, F bound, F other) {
        return {_mm256_blendv_ps(x.low, other.low, _mm256_cmp_ps(x.low, bound.low, _CMP_LT_OQ)),
                _mm256_blendv_ps(x.high, other.high, _mm256_cmp_ps(x.high, bound.high, _CMP_LT_OQ))};
    }
    static EDGEMOE_INLINE F unless_above(F x, F bound, F other) {
        return {_mm256_blendv_ps(x.low, other.low, _mm256_cmp_ps(x.low, bound.low, _CMP_GT_OQ)),
                _mm256_blendv_ps(x.high, other.high, _mm256_cmp_ps(x.high, bound.high, _CMP_GT_OQ))};
    }
    static EDGEMOE_INLINE F keep(F x, int begin, int end, F other) {
        const int from = begin < 0 ? 0 : begin > kLanes ? kLanes : begin;
        const int to = end < from ? from : end > kLanes ? kLanes : end;
        return select(first_lanes(from), other, select(first_lanes(to), x, other));
    }
    static EDGEMOE_INLINE F canonical(F x) {
        const __m256 nan = _mm256_set1_ps(__builtin_nanf(""));
        return {_mm256_blendv_ps(x.low, nan, _mm256_cmp_ps(x.low, x.low, _CMP_UNORD_Q)),
                _mm256_blendv_ps(x.high, nan, _mm256_cmp_ps(x.high, x.high, _CMP_UNORD_Q))};
    }

    static EDGEMOE_INLINE I set1_i(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
    static EDGEMOE_INLINE I bits(F x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
    static EDGEMOE_INLINE F floats(I x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
    static EDGEMOE_INLINE F integers_to_float(I x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
    static EDGEMOE_INLINE I magnitudes(F x) {
        const __m256i mask = _mm256_set1_epi32(0x7FFFFFFF);
        const I b = bits(x);
        return {_mm256_and_si256(b.low, mask), _mm256_and_si256(b.high, mask)};
    }
    static EDGEMOE_INLINE I add_i(I a, I b) {
        return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)};
    }
    static EDGEMOE_INLINE I sub_i(I a, I b) {
        return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)};
    }
    static EDGEMOE_INLINE I max_i(I a, I b) {
        return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)};
    }
    template <int N>
    static EDGEMOE_INLINE I shift_left(I x) {
        return {_mm256_slli_epi32(x.low, N), _mm256_slli_epi32(x.high, N)};
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right(I x) {
        return {_mm256_srai_epi32(x.low, N), _mm256_srai_epi32(x.high, N)};
    }

    static EDGEMOE_INLINE float fold_sum(F x) {
        const __m256 eight = _mm256_add_ps(x.low, x.high);
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static EDGEMOE_INLINE float fold_max(F x) {
        const __m256 eight = _mm256_max_ps(x.low, x.high);
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static EDGEMOE_INLINE int32_t fold_sum_i(I x) {
        const __m256i eight = _mm256_add_epi32(x.low, x.high);
        __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
        return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
    }
    static EDGEMOE_INLINE int32_t fold_max_i(I x) {
        const __m256i eight = _mm256_max_epi32(x.low, x.high);
        __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
        four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0b01001110));
        return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0b10110001)));
    }

    // Exact dot products of group `g` of R row blocks (`stride` bytes apart, the first at `data`) and T tokens.
    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void dot_group(const std::byte* data, size_t stride, const int8_t* const (&codes)[T], int g,
                                         I (&dots)[R][T]) {
        if constexpr (Dot::kQuads)
            dot_group_quads<L, R, T>(data, stride, codes, g, dots);
        else if constexpr (L == Layout::q8g64)
            dot_group_8<R, T>(data, stride, codes, g, dots);
        else
            dot_group_4<R, T>(data, stride, codes, g, dots);
    }

    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void dot_group_quads(const std::byte* data, size_t stride, const int8_t* const (&codes)[T],
                                               int g, I (&dots)[R][T]) {
        constexpr int width = L == Layout::q8g64 ? 4 : 8;  // columns of 64 bytes
        const __m256i mask = _mm256_set1_epi8(15);
        clear(dots);
        EDGEMOE_UNROLL
        for (int i = 0; i < kGroup / width; ++i) {
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const I packed = load_bytes(data + r * stride + i * 64);
                EDGEMOE_UNROLL
                for (int part = 0; part < width / 4; ++part) {
                    I weights = packed;
                    if constexpr (L == Layout::q4g64) {
                        if (part == 1) weights = shift_right_16<4>(packed);
                        weights = {_mm256_and_si256(weights.low, mask), _mm256_and_si256(weights.high, mask)};
                    }
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const __m256i x = broadcast_quad(codes[t] + g * kGroup + i * width + part * 4);
                        dots[r][t].low = Dot::add(dots[r][t].low, weights.low, x);
                        dots[r][t].high = Dot::add(dots[r][t].high, weights.high, x);
                    }
                }
            }
        }
    }

    // Pair products of 8-bit codes do not fit into 16 bits. Both sides are widened instead: a 32-bit lane holds a row's
    // columns (0, 2) or (1, 3) of a quad, which madd multiplies with the same two of the token and adds.
    template <int R, int T>
    static EDGEMOE_INLINE void dot_group_8(const std::byte* data, size_t stride, const int8_t* const (&codes)[T], int g,
                                           I (&dots)[R][T]) {
        alignas(32) int32_t even[T][kGroup / 4];
        alignas(32) int32_t odd[T][kGroup / 4];
        EDGEMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            EDGEMOE_UNROLL
            for (int half = 0; half < 2; ++half) {
                const __m256i x = load_256(codes[t] + g * kGroup + half * 32);
                store_256(even[t] + half * 8, _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8));
                store_256(odd[t] + half * 8, _mm256_srai_epi16(x, 8));
            }
        }
        clear(dots);
        const __m256i mask = _mm256_set1_epi16(255);
        for (int quad = 0; quad < kGroup / 4; ++quad) {
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const __m256i low = load_256(data + r * stride + quad * 64);
                const __m256i high = load_256(data + r * stride + quad * 64 + 32);
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const __m256i x = _mm256_set1_epi32(even[t][quad]);
                    add_product(dots[r][t].low, _mm256_and_si256(low, mask), x);
                    add_product(dots[r][t].high, _mm256_and_si256(high, mask), x);
                }
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const __m256i x = _mm256_set1_epi32(odd[t][quad]);
                    add_product(dots[r][t].low, _mm256_srli_epi16(low, 8), x);
                    add_product(dots[r][t].high, _mm256_srli_epi16(high, 8), x);
                }
            }
        }
    }

    // Pair products of 4-bit codes stay below 2^12, so that eight of them add up in 16 bits.
    template <int R, int T>
    static EDGEMOE_INLINE void dot_group_4(const std::byte* data, size_t stride, const int8_t* const (&codes)[T], int g,
                                           I (&dots)[R][T]) {
        const __m256i mask = _mm256_set1_epi8(15);
        const __m256i ones = _mm256_set1_epi16(1);
        clear(dots);
        for (int part = 0; part < 2; ++part) {
            I pairs[R][T];
            clear(pairs);
            EDGEMOE_UNROLL
            for (int i = 0; i < 4; ++i) {
                const int octet = part * 4 + i;
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const __m256i low = load_256(data + r * stride + octet * 64);
                    const __m256i high = load_256(data + r * stride + octet * 64 + 32);
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const __m256i x = broadcast_quad(codes[t] + g * kGroup + octet * 8);
                        add_pairs(pairs[r][t].low, _mm256_and_si256(low, mask), x);
                        add_pairs(pairs[r][t].high, _mm256_and_si256(high, mask), x);
                    }
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const __m256i x = broadcast_quad(codes[t] + g * kGroup + octet * 8 + 4);
                        add_pairs(pairs[r][t].low, _mm256_and_si256(_mm256_srli_epi16(low, 4), mask), x);
                        add_pairs(pairs[r][t].high, _mm256_and_si256(_mm256_srli_epi16(high, 4), mask), x);
                    }
                }
            }
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    add_product(dots[r][t].low, pairs[r][t].low, ones);
                    add_product(dots[r][t].high, pairs[r][t].high, ones);
                }
            }
        }
    }

    static EDGEMOE_INLINE __m256i load_256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
    static EDGEMOE_INLINE void store_256(void* p, __m256i x) { _mm256_storeu_si256(static_cast<__m256i*>(p), x); }
    static EDGEMOE_INLINE __m256i broadcast_quad(const int8_t* p) {
        int32_t quad;
        __builtin_memcpy(&quad, p, sizeof quad);
        return _mm256_set1_epi32(quad);
    }
    static EDGEMOE_INLINE void add_product(__m256i& sum, __m256i a, __m256i b) {
        sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, b));
    }
    static EDGEMOE_INLINE void add_pairs(__m256i& sum, __m256i weights, __m256i x) {
        sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(weights, x));
    }
    template <int R, int T>
    static EDGEMOE_INLINE void clear(I (&x)[R][T]) {
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) x[r][t] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
        }
    }

    // --- ggml's formats ---------------------------------------------------------------------------------------------

    static constexpr int kSignedOffset = Dot::kQuads ? 128 : 0;
    static constexpr int kScaledTokens = 0;

    static EDGEMOE_INLINE I load_bytes(const std::byte* p) { return {load_256(p), load_256(p + 32)}; }
    static EDGEMOE_INLINE I load_u8(const std::byte* p) {
        const __m128i bytes = load_128(p);
        return {_mm256_cvtepu8_epi32(bytes), _mm256_cvtepu8_epi32(_mm_srli_si128(bytes, 8))};
    }
    static EDGEMOE_INLINE I load_u16(const std::byte* p) {
        return {_mm256_cvtepu16_epi32(load_128(p)), _mm256_cvtepu16_epi32(load_128(p + 16))};
    }
    static EDGEMOE_INLINE I set1_8(int x) {
        return {_mm256_set1_epi8(static_cast<char>(x)), _mm256_set1_epi8(static_cast<char>(x))};
    }
    static EDGEMOE_INLINE I set1_16(int x) {
        return {_mm256_set1_epi16(static_cast<int16_t>(x)), _mm256_set1_epi16(static_cast<int16_t>(x))};
    }
    static EDGEMOE_INLINE I and_i(I a, I b) {
        return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)};
    }
    static EDGEMOE_INLINE I or_i(I a, I b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
    static EDGEMOE_INLINE I select_bits(I mask, I a, I b) {
        return {_mm256_or_si256(_mm256_and_si256(mask.low, a.low), _mm256_andnot_si256(mask.low, b.low)),
                _mm256_or_si256(_mm256_and_si256(mask.high, a.high), _mm256_andnot_si256(mask.high, b.high))};
    }
    static EDGEMOE_INLINE F low_halves(I x) {
        const I halves = and_i(x, set1_i(0xFFFF));
        const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(halves.low, halves.high), 0b11011000);
        return {_mm256_cvtph_ps(_mm256_castsi256_si128(all)), _mm256_cvtph_ps(_mm256_extracti128_si256(all, 1))};
    }
    static EDGEMOE_INLINE I sub_8(I a, I b) { return {_mm256_sub_epi8(a.low, b.low), _mm256_sub_epi8(a.high, b.high)}; }
    static EDGEMOE_INLINE I add_16(I a, I b) {
        return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)};
    }
    static EDGEMOE_INLINE I sub_16(I a, I b) {
        return {_mm256_sub_epi16(a.low, b.low), _mm256_sub_epi16(a.high, b.high)};
    }
    template <int N>
    static EDGEMOE_INLINE I shift_left_16(I x) {
        return {_mm256_slli_epi16(x.low, N), _mm256_slli_epi16(x.high, N)};
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16(I x) {
        return {_mm256_srli_epi16(x.low, N), _mm256_srli_epi16(x.high, N)};
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16_signed(I x) {
        return {_mm256_srai_epi16(x.low, N), _mm256_srai_epi16(x.high, N)};
    }
    static EDGEMOE_INLINE I shift_right_16(I x, int n) {
        const __m128i count = _mm_cvtsi32_si128(n);
        return {_mm256_srl_epi16(x.low, count), _mm256_srl_epi16(x.high, count)};
    }
    static EDGEMOE_INLINE I shift_right_32(I x, int n) {
        const __m128i count = _mm_cvtsi32_si128(n);
        return {_mm256_srl_epi32(x.low, count), _mm256_srl_epi32(x.high, count)};
    }
    static EDGEMOE_INLINE I madd(I a, I b) {
        return {_mm256_madd_epi16(a.low, b.low), _mm256_madd_epi16(a.high, b.high)};
    }
    static EDGEMOE_INLINE I mul_16(I a, I b) {
        return {_mm256_mullo_epi16(a.low, b.low), _mm256_mullo_epi16(a.high, b.high)};
    }
    static EDGEMOE_INLINE I add_madd(I sum, I a, I b) {
        if constexpr (Dot::kQuads)
            return {Dot::add_pairs(sum.low, a.low, b.low), Dot::add_pairs(sum.high, a.high, b.high)};
        else
            return add_i(sum, madd(a, b));
    }
    static EDGEMOE_INLINE I lookup(const int8_t (&table)[16], I x) {
        const __m256i values = _mm256_broadcastsi128_si256(load_128(table));
        return {_mm256_shuffle_epi8(values, x.low), _mm256_shuffle_epi8(values, x.high)};
    }
    static EDGEMOE_INLINE I spread_bits(I x, int n) {
        const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
        const __m128i added = _mm_add_epi8(first, _mm_set1_epi8(static_cast<char>(n / 2)));
        const __m256i place = _mm256_broadcastsi128_si256(added);
        const __m256i bits = _mm256_set1_epi32(static_cast<int>(n % 2 ? 0x80402010u : 0x08040201u));
        const auto spread = [&](__m256i words) __attribute__((always_inline)) {
            const __m256i chosen = _mm256_and_si256(_mm256_shuffle_epi8(words, place), bits);
            return _mm256_and_si256(_mm256_cmpeq_epi8(chosen, bits), _mm256_set1_epi8(16));
        };
        return {spread(x.low), spread(x.high)};
    }
    static EDGEMOE_INLINE void sum_parts(const int8_t* codes, int16_t* parts) {
        for (int half = 0; half < 2; ++half) {
            const __m256i bytes = _mm256_xor_si256(load_256(codes + half * 32), _mm256_set1_epi8(-128));
            const __m256i eights = _mm256_sad_epu8(bytes, _mm256_setzero_si256());
            // Each 128-bit lane has two sums of eight bytes, 128 too large each.
            const __m256i sums = _mm256_add_epi64(eights, _mm256_unpackhi_epi64(eights, eights));
            parts[half] = static_cast<int16_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(sums)) - 16 * 128);
            parts[half + 2] = static_cast<int16_t>(_mm_cvtsi128_si32(_mm256_extracti128_si256(sums, 1)) - 16 * 128);
        }
    }
    static EDGEMOE_INLINE I signed_bytes(I x) {
        if constexpr (!Dot::kQuads) return x;
        const __m256i sign = _mm256_set1_epi8(-128);
        return {_mm256_xor_si256(x.low, sign), _mm256_xor_si256(x.high, sign)};
    }
    // For pairs, twice in the int16 halves of a lane.
    static EDGEMOE_INLINE I as_scale(I x) {
        return Dot::kQuads ? x : or_i(and_i(x, set1_i(0xFFFF)), shift_left<16>(x));
    }

    template <int Max, int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void dot_quads(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                         I (&dots)[R][T]) {
        if constexpr (Dot::kQuads)
            add_quads<Max, N, Scaled, R, T>(weights, codes, scales, dots);
        else if constexpr (Max > 127)
            add_nibbles<N, Scaled, R, T>(weights, codes, scales, dots);
        else
            add_all_pairs<Max, N, Scaled, R, T>(weights, codes, scales, dots);
    }

    // Sums within int16 are multiplied by the scale as the low halves of their lanes.
    template <int Max, int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void add_quads(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                         I (&dots)[R][T]) {
        I parts[R][T];
        clear(parts);
        EDGEMOE_UNROLL
        for (int n = 0; n < N; ++n) {
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const I w = weights(n, r);
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const __m256i x = broadcast_quad(codes + t * kGroup + n * 4);
                    parts[r][t].low = Dot::add(parts[r][t].low, w.low, x);
                    parts[r][t].high = Dot::add(parts[r][t].high, w.high, x);
                }
            }
        }
        constexpr bool narrow = Max > 0 && Max * 127 * N * 4 < 1 << 15;
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            I scale = scales[r];
            if constexpr (Scaled && narrow) scale = and_i(scale, set1_i(0xFFFF));
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                if constexpr (Scaled && narrow) {
                    dots[r][t] = add_madd(dots[r][t], parts[r][t], scale);
                    continue;
                }
                if constexpr (Scaled)
                    parts[r][t] = {_mm256_mullo_epi32(parts[r][t].low, scale.low),
                                   _mm256_mullo_epi32(parts[r][t].high, scale.high)};
                dots[r][t] = add_i(dots[r][t], parts[r][t]);
            }
        }
    }

    // Products of 8-bit codes: the halves of a byte one after the other.
    template <int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void add_nibbles(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                           I (&dots)[R][T]) {
        const auto low = [&](int n, int r) __attribute__((always_inline)) { return and_i(weights(n, r), set1_8(15)); };
        const auto high = [&](int n, int r) __attribute__((always_inline)) {
            return and_i(shift_right_16<4>(weights(n, r)), set1_8(15));
        };
        I upper[R][T];
        clear(upper);
        add_all_pairs<15, N, Scaled, R, T>(low, codes, scales, dots);
        add_all_pairs<15, N, Scaled, R, T>(high, codes, scales, upper);
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) dots[r][t] = add_i(dots[r][t], shift_left<4>(upper[r][t]));
        }
    }

    // Pair products are added in 16 bits as long as they fit, and multiplied by the scale as they are widened. Signed
    // codes: |w| * (x with the sign of w), which fits once.
    template <int Max, int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void add_all_pairs(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                             I (&dots)[R][T]) {
        constexpr int fit = Max == 0 ? 1 : 32767 / (Max * 2 * 127);
        constexpr int step = fit >= N ? N : fit >= 4 ? 4 : fit >= 2 ? 2 : 1;
        static_assert(fit >= 1 && N % step == 0);
        EDGEMOE_UNROLL
        for (int base = 0; base < N; base += step) {
            I pairs[R][T];
            clear(pairs);
            EDGEMOE_UNROLL
            for (int i = 0; i < step; ++i) {
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const I w = weights(base + i, r);
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        const __m256i x = broadcast_quad(codes + t * kGroup + (base + i) * 4);
                        if constexpr (Max == 0) {
                            pairs[r][t].low = _mm256_maddubs_epi16(_mm256_abs_epi8(w.low), _mm256_sign_epi8(x, w.low));
                            pairs[r][t].high =
                                _mm256_maddubs_epi16(_mm256_abs_epi8(w.high), _mm256_sign_epi8(x, w.high));
                        } else {
                            add_pairs(pairs[r][t].low, w.low, x);
                            add_pairs(pairs[r][t].high, w.high, x);
                        }
                    }
                }
            }
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const I scale = Scaled ? scales[r] : set1_16(1);
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    add_product(dots[r][t].low, pairs[r][t].low, scale.low);
                    add_product(dots[r][t].high, pairs[r][t].high, scale.high);
                }
            }
        }
    }
};

}  // namespace
}  // namespace edgemoe
