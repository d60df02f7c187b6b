// AVX-512 (F, BW, VL, DQ) with VNNI: 16 lanes are one register.
#include <immintrin.h>

#include "vector_kernels.h"

namespace edgemoe {
namespace {

struct Avx512 {
    using F = __m512;
    using I = __m512i;

    // Sizes of register tiles, out of 32 registers.
    static constexpr int kQuantizedBlocks = 2;
    static constexpr int kQuantizedTokens = 6;
    static constexpr int kGgmlTokens = 8;
    static constexpr int kGgmlBlocks = 2;
    static constexpr int kFloatBlocks = 2;
    static constexpr int kFloatTokens = 12;
    static constexpr int kVectorBlocks = 4;
    static constexpr int kAttendHeads = 8;  // at most; over 4, half as many chunks
    static constexpr int kScoreChunks = 4;
    static constexpr int kValueChunks = 4;

    static EDGEMOE_INLINE __mmask16 low(int n) { return static_cast<__mmask16>((1u << n) - 1); }

    static EDGEMOE_INLINE F zero() { return _mm512_setzero_ps(); }
    static EDGEMOE_INLINE F set1(float x) { return _mm512_set1_ps(x); }
    static EDGEMOE_INLINE float first(F x) { return _mm512_cvtss_f32(x); }
    static EDGEMOE_INLINE F load(const float* p) { return _mm512_loadu_ps(p); }
    static EDGEMOE_INLINE F load_n(const float* p, int n, float fill = 0.0f) {
        return _mm512_mask_loadu_ps(_mm512_set1_ps(fill), low(n), p);
    }
    static EDGEMOE_INLINE void store(float* p, F x) { _mm512_storeu_ps(p, x); }
    static EDGEMOE_INLINE void store_n(float* p, F x, int n) { _mm512_mask_storeu_ps(p, low(n), x); }

    static EDGEMOE_INLINE F load_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static EDGEMOE_INLINE F load_half_n(const uint16_t* p, int n) {
        return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(low(n), p));
    }
    static EDGEMOE_INLINE F set1_half(const uint16_t* p) {
        return _mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(*p)));
    }
    static EDGEMOE_INLINE F load_bf16(const uint16_t* p) {
        const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
        return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
    }
    static EDGEMOE_INLINE F load_codes(const int8_t* p) {
        return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
    }
    static EDGEMOE_INLINE void store_half(uint16_t* p, F x) {
        const __m256i halves = _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), halves);
    }
    static EDGEMOE_INLINE void store_codes(int8_t* p, I x) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(x));
    }
    static EDGEMOE_INLINE uint16_t half_of(float x) {
        return _cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    }
    static EDGEMOE_INLINE float half_to_float(uint16_t x) { return _cvtsh_ss(x); }

    static EDGEMOE_INLINE F add(F a, F b) { return _mm512_add_ps(a, b); }
    static EDGEMOE_INLINE F sub(F a, F b) { return _mm512_sub_ps(a, b); }
    static EDGEMOE_INLINE F mul(F a, F b) { return _mm512_mul_ps(a, b); }
    static EDGEMOE_INLINE F div(F a, F b) { return _mm512_div_ps(a, b); }
    static EDGEMOE_INLINE F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
    static EDGEMOE_INLINE F fms(F a, F b, F c) { return _mm512_fmsub_ps(a, b, c); }
    static EDGEMOE_INLINE F max(F a, F b) { return _mm512_max_ps(a, b); }
    static EDGEMOE_INLINE F min(F a, F b) { return _mm512_min_ps(a, b); }

    static EDGEMOE_INLINE F unless_below(F x, F bound, F other) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_LT_OQ), x, other);
    }
    static EDGEMOE_INLINE F unless_above(F x, F bound, F other) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, bound, _CMP_GT_OQ), x, other);
    }
    static EDGEMOE_INLINE F keep(F x, int begin, int end, F other) {
        const int from = begin < 0 ? 0 : begin > kLanes ? kLanes : begin;
        const int to = end < from ? from : end > kLanes ? kLanes : end;
        return _mm512_mask_blend_ps(static_cast<__mmask16>(low(to) & ~low(from)), other, x);
    }
    static EDGEMOE_INLINE F canonical(F x) {
        return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), x, _mm512_set1_ps(__builtin_nanf("")));
    }

    static EDGEMOE_INLINE I set1_i(int32_t x) { return _mm512_set1_epi32(x); }
    static EDGEMOE_INLINE I bits(F x) { return _mm512_castps_si512(x); }
    static EDGEMOE_INLINE F floats(I x) { return _mm512_castsi512_ps(x); }
    static EDGEMOE_INLINE F integers_to_float(I x) { return _mm512_cvtepi32_ps(x); }
    static EDGEMOE_INLINE I magnitudes(F x) { return _mm512_and_si512(bits(x), _mm512_set1_epi32(0x7FFFFFFF)); }
    static EDGEMOE_INLINE I add_i(I a, I b) { return _mm512_add_epi32(a, b); }
    static EDGEMOE_INLINE I sub_i(I a, I b) { return _mm512_sub_epi32(a, b); }
    static EDGEMOE_INLINE I max_i(I a, I b) { return _mm512_max_epi32(a, b); }
    template <int N>
    static EDGEMOE_INLINE I shift_left(I x) {
        return _mm512_slli_epi32(x, N);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right(I x) {
        return _mm512_srai_epi32(x, N);
    }

    static EDGEMOE_INLINE float fold_sum(F x) {
        const __m256 eight = _mm256_add_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
    }
    static EDGEMOE_INLINE float fold_max(F x) {
        const __m256 eight = _mm256_max_ps(_mm512_castps512_ps256(x), _mm512_extractf32x8_ps(x, 1));
        const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
        const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
        return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
    }
    static EDGEMOE_INLINE int32_t fold_sum_i(I x) { return _mm512_reduce_add_epi32(x); }
    static EDGEMOE_INLINE int32_t fold_max_i(I x) { return _mm512_reduce_max_epi32(x); }

    static EDGEMOE_INLINE I broadcast_quad(const int8_t* p) {
        int32_t quad;
        __builtin_memcpy(&quad, p, sizeof quad);
        return _mm512_set1_epi32(quad);
    }

    // Exact dot products of group `g` of R row blocks (`stride` bytes apart, the first at `data`) and T tokens.
    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void dot_group(const std::byte* data, size_t stride, const int8_t* const (&codes)[T], int g,
                                         I (&dots)[R][T]) {
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) dots[r][t] = _mm512_setzero_si512();
        }
        if constexpr (L == Layout::q8g64) {
            EDGEMOE_UNROLL
            for (int quad = 0; quad < kGroup / 4; ++quad) {
                I weights[R];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) weights[r] = _mm512_loadu_si512(data + r * stride + quad * 64);
                multiply<R, T>(weights, codes, g * kGroup + quad * 4, dots);
            }
        } else {
            const I mask = _mm512_set1_epi8(15);
            EDGEMOE_UNROLL
            for (int octet = 0; octet < kGroup / 8; ++octet) {
                I low[R];
                I high[R];
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const I packed = _mm512_loadu_si512(data + r * stride + octet * 64);
                    low[r] = _mm512_and_si512(packed, mask);
                    high[r] = _mm512_and_si512(_mm512_srli_epi16(packed, 4), mask);
                }
                multiply<R, T>(low, codes, g * kGroup + octet * 8, dots);
                multiply<R, T>(high, codes, g * kGroup + octet * 8 + 4, dots);
            }
        }
    }

    template <int R, int T>
    static EDGEMOE_INLINE void multiply(const I (&weights)[R], const int8_t* const (&codes)[T], int column,
                                        I (&dots)[R][T]) {
        EDGEMOE_UNROLL
        for (int t = 0; t < T; ++t) {
            const I x = broadcast_quad(codes[t] + column);
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) dots[r][t] = _mm512_dpbusd_epi32(dots[r][t], weights[r], x);
        }
    }

    // --- ggml's formats ---------------------------------------------------------------------------------------------

    static constexpr int kSignedOffset = 128;
    static constexpr int kScaledTokens = 8;

    static EDGEMOE_INLINE I load_bytes(const std::byte* p) { return _mm512_loadu_si512(p); }
    static EDGEMOE_INLINE I load_u8(const std::byte* p) {
        return _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
    static EDGEMOE_INLINE I load_u16(const std::byte* p) {
        return _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
    static EDGEMOE_INLINE I set1_8(int x) { return _mm512_set1_epi8(static_cast<char>(x)); }
    static EDGEMOE_INLINE I set1_16(int x) { return _mm512_set1_epi16(static_cast<int16_t>(x)); }
    static EDGEMOE_INLINE I and_i(I a, I b) { return _mm512_and_si512(a, b); }
    static EDGEMOE_INLINE I or_i(I a, I b) { return _mm512_or_si512(a, b); }
    static EDGEMOE_INLINE I select_bits(I mask, I a, I b) { return _mm512_ternarylogic_epi64(mask, a, b, 0xCA); }
    static EDGEMOE_INLINE F low_halves(I x) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(x)); }
    static EDGEMOE_INLINE I sub_8(I a, I b) { return _mm512_sub_epi8(a, b); }
    static EDGEMOE_INLINE I add_16(I a, I b) { return _mm512_add_epi16(a, b); }
    static EDGEMOE_INLINE I sub_16(I a, I b) { return _mm512_sub_epi16(a, b); }
    template <int N>
    static EDGEMOE_INLINE I shift_left_16(I x) {
        return _mm512_slli_epi16(x, N);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16(I x) {
        return _mm512_srli_epi16(x, N);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16_signed(I x) {
        return _mm512_srai_epi16(x, N);
    }
    static EDGEMOE_INLINE I shift_right_16(I x, int n) { return _mm512_srl_epi16(x, _mm_cvtsi32_si128(n)); }
    static EDGEMOE_INLINE I shift_right_32(I x, int n) { return _mm512_srl_epi32(x, _mm_cvtsi32_si128(n)); }
    static EDGEMOE_INLINE I mul_16(I a, I b) { return _mm512_mullo_epi16(a, b); }
    static EDGEMOE_INLINE I madd(I a, I b) { return _mm512_madd_epi16(a, b); }
    static EDGEMOE_INLINE I add_madd(I sum, I a, I b) { return _mm512_dpwssd_epi32(sum, a, b); }
    static EDGEMOE_INLINE I lookup(const int8_t (&table)[16], I x) {
        const __m128i values = _mm_load_si128(reinterpret_cast<const __m128i*>(table));
        return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(values), x);
    }
    static EDGEMOE_INLINE I spread_bits(I x, int n) {
        const __m128i first = _mm_setr_epi8(0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12);
        const __m128i place = _mm_add_epi8(first, _mm_set1_epi8(static_cast<char>(n / 2)));
        const I bytes = _mm512_shuffle_epi8(x, _mm512_broadcast_i32x4(place));
        const I bits = _mm512_set1_epi32(static_cast<int>(n % 2 ? 0x80402010u : 0x08040201u));
        return _mm512_maskz_mov_epi8(_mm512_test_epi8_mask(bytes, bits), _mm512_set1_epi8(16));
    }
    static EDGEMOE_INLINE void sum_parts(const int8_t* codes, int16_t* parts) {
        const I bytes = _mm512_xor_si512(_mm512_loadu_si512(codes), _mm512_set1_epi8(-128));
        const I eights = _mm512_sad_epu8(bytes, _mm512_setzero_si512());
        // Each 128-bit lane has two sums of eight bytes, 128 too large each.
        const I sums = _mm512_add_epi64(eights, _mm512_unpackhi_epi64(eights, eights));
        const I order = _mm512_setr_epi64(0, 4, 2, 6, 0, 0, 0, 0);
        const __m256i four = _mm512_castsi512_si256(_mm512_permutexvar_epi64(order, sums));
        const __m128i halves = _mm256_cvtepi64_epi16(_mm256_sub_epi64(four, _mm256_set1_epi64x(16 * 128)));
        _mm_storel_epi64(reinterpret_cast<__m128i*>(parts), halves);
    }
    static EDGEMOE_INLINE I signed_bytes(I x) { return _mm512_xor_si512(x, _mm512_set1_epi8(-128)); }
    static EDGEMOE_INLINE I as_scale(I x) { return x; }

    template <int Max, int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void dot_quads(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                         I (&dots)[R][T]) {
        I parts[R][T];
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) parts[r][t] = Scaled ? _mm512_setzero_si512() : dots[r][t];
        }
        EDGEMOE_UNROLL
        for (int n = 0; n < N; ++n) {
            I w[R];
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) w[r] = weights(n, r);
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                const I x = broadcast_quad(codes + t * kGroup + n * 4);
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) parts[r][t] = _mm512_dpbusd_epi32(parts[r][t], w[r], x);
            }
        }
        // Sums within int16 are multiplied as the low halves of their lanes, in one instruction instead of three.
        constexpr bool narrow = Max > 0 && Max * 127 * N * 4 < 1 << 15;
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            I scale = scales[r];
            if constexpr (Scaled && narrow) scale = _mm512_and_si512(scale, _mm512_set1_epi32(0xFFFF));
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                if constexpr (!Scaled)
                    dots[r][t] = parts[r][t];
                else if constexpr (narrow)
                    dots[r][t] = _mm512_dpwssd_epi32(dots[r][t], parts[r][t], scale);
                else
                    dots[r][t] = _mm512_add_epi32(dots[r][t], _mm512_mullo_epi32(parts[r][t], scale));
            }
        }
    }
};

}  // namespace

constinit const Kernels kAvx512VnniKernels = VectorKernels<Avx512>::table("avx512vnni");

}  // namespace edgemoe
