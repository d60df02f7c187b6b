// NEON of AArch64: 16 lanes are four registers. How bytes are multiplied is a parameter: neon.cpp has what every
// processor has, neon_dotprod.cpp the dot product instructions, neon_i8mm.cpp those for 2 x 2 tiles in addition.
//
// A Dot has
//   kQuads       whether it gives signed_lane<N>(sum, weights, x), which adds to each int32 lane of sum the four
//                products of signed bytes of weights with lane N of x
//   kTiles       whether it gives signed_tile(sum, weights, x) and unsigned_tile, the weights being signed or not, and
//                unsigned_lane<N>: 2 rows times 2 tokens of 8 columns each -> {r0 t0, r0 t1, r1 t0, r1 t1}
//   kTokens      tokens of a tile of products with codes
#pragma once

#include <arm_neon.h>

#include <utility>

#include "vector_kernels.h"

namespace edgemoe {
namespace {

alignas(16) constexpr int32_t kLaneNumbers[kLanes] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
// For spread_bits: the first byte of every 32-bit lane four times; a bit for each of them.
alignas(16) constexpr uint8_t kFirstBytes[16] = {0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8, 12, 12, 12, 12};

template <class Dot>
struct Neon {
    struct F {
        float32x4_t a, b, c, d;
    };
    struct I {
        int32x4_t a, b, c, d;
    };

    // Sizes of register tiles, out of 32 registers.
    static constexpr int kQuantizedBlocks = 1;
    static constexpr int kQuantizedTokens = Dot::kTokens;
    static constexpr int kGgmlTokens = Dot::kTokens;
    static constexpr int kGgmlBlocks = 1;
    static constexpr int kFloatBlocks = 1;
    static constexpr int kFloatTokens = 4;
    static constexpr int kVectorBlocks = 2;
    static constexpr int kAttendHeads = 4;  // at most; over 4, half as many chunks
    static constexpr int kScoreChunks = 1;
    static constexpr int kValueChunks = 1;

    // Register by register.
    template <class Op, class... X>
    static EDGEMOE_INLINE F floats_of(Op op, X... x) {
        return {op(x.a...), op(x.b...), op(x.c...), op(x.d...)};
    }
    template <class Op, class... X>
    static EDGEMOE_INLINE I integers_of(Op op, X... x) {
        return {op(x.a...), op(x.b...), op(x.c...), op(x.d...)};
    }

    static EDGEMOE_INLINE F zero() { return set1(0.0f); }
    static EDGEMOE_INLINE F set1(float x) {
        const float32x4_t all = vdupq_n_f32(x);
        return {all, all, all, all};
    }
    static EDGEMOE_INLINE float first(F x) { return vgetq_lane_f32(x.a, 0); }
    static EDGEMOE_INLINE F load(const float* p) {
        return {vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)};
    }
    static EDGEMOE_INLINE F load_n(const float* p, int n, float fill = 0.0f) {
        float values[kLanes];
        for (int i = 0; i < kLanes; ++i) values[i] = i < n ? p[i] : fill;
        return load(values);
    }
    static EDGEMOE_INLINE void store(float* p, F x) {
        vst1q_f32(p, x.a);
        vst1q_f32(p + 4, x.b);
        vst1q_f32(p + 8, x.c);
        vst1q_f32(p + 12, x.d);
    }
    static EDGEMOE_INLINE void store_n(float* p, F x, int n) {
        float values[kLanes];
        store(values, x);
        for (int i = 0; i < n; ++i) p[i] = values[i];
    }

    static EDGEMOE_INLINE float32x4_t widen_half(const uint16_t* p) {
        return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
    }
    static EDGEMOE_INLINE F load_half(const uint16_t* p) {
        return {widen_half(p), widen_half(p + 4), widen_half(p + 8), widen_half(p + 12)};
    }
    static EDGEMOE_INLINE F load_half_n(const uint16_t* p, int n) {
        uint16_t halves[kLanes] = {};
        for (int i = 0; i < n; ++i) halves[i] = p[i];
        return load_half(halves);
    }
    static EDGEMOE_INLINE F set1_half(const uint16_t* p) { return set1(half_to_float(*p)); }
    static EDGEMOE_INLINE F load_bf16(const uint16_t* p) {
        const auto wide = [](const uint16_t* q) { return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(q), 16)); };
        return {wide(p), wide(p + 4), wide(p + 8), wide(p + 12)};
    }
    static EDGEMOE_INLINE F load_codes(const int8_t* p) {
        const int8x16_t codes = vld1q_s8(p);
        const int16x8_t low = vmovl_s8(vget_low_s8(codes));
        const int16x8_t high = vmovl_high_s8(codes);
        return integers_to_float(
            {vmovl_s16(vget_low_s16(low)), vmovl_high_s16(low), vmovl_s16(vget_low_s16(high)), vmovl_high_s16(high)});
    }
    static EDGEMOE_INLINE void store_half(uint16_t* p, F x) {
        vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32(x.a)));
        vst1_u16(p + 4, vreinterpret_u16_f16(vcvt_f16_f32(x.b)));
        vst1_u16(p + 8, vreinterpret_u16_f16(vcvt_f16_f32(x.c)));
        vst1_u16(p + 12, vreinterpret_u16_f16(vcvt_f16_f32(x.d)));
    }
    static EDGEMOE_INLINE void store_codes(int8_t* p, I x) {
        const int16x8_t low = vuzp1q_s16(vreinterpretq_s16_s32(x.a), vreinterpretq_s16_s32(x.b));
        const int16x8_t high = vuzp1q_s16(vreinterpretq_s16_s32(x.c), vreinterpretq_s16_s32(x.d));
        vst1q_s8(p, vuzp1q_s8(vreinterpretq_s8_s16(low), vreinterpretq_s8_s16(high)));
    }
    static EDGEMOE_INLINE uint16_t half_of(float x) {
        return vget_lane_u16(vreinterpret_u16_f16(vcvt_f16_f32(vdupq_n_f32(x))), 0);
    }
    static EDGEMOE_INLINE float half_to_float(uint16_t x) {
        return vgetq_lane_f32(vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(x))), 0);
    }

    static EDGEMOE_INLINE F add(F x, F y) {
        return floats_of([](auto p, auto q) { return vaddq_f32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE F sub(F x, F y) {
        return floats_of([](auto p, auto q) { return vsubq_f32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE F mul(F x, F y) {
        return floats_of([](auto p, auto q) { return vmulq_f32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE F div(F x, F y) {
        return floats_of([](auto p, auto q) { return vdivq_f32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE F fma(F x, F y, F z) {
        return floats_of([](auto p, auto q, auto r) { return vfmaq_f32(r, p, q); }, x, y, z);
    }
    static EDGEMOE_INLINE F fms(F x, F y, F z) {
        return floats_of([](auto p, auto q, auto r) { return vfmaq_f32(vnegq_f32(r), p, q); }, x, y, z);
    }
    // vmaxq and vminq give a NaN where either operand is one.
    static EDGEMOE_INLINE float32x4_t max_of(float32x4_t x, float32x4_t y) { return vbslq_f32(vcgtq_f32(x, y), x, y); }
    static EDGEMOE_INLINE F max(F x, F y) {
        return floats_of([](auto p, auto q) { return max_of(p, q); }, x, y);
    }
    static EDGEMOE_INLINE F min(F x, F y) {
        return floats_of([](auto p, auto q) { return vbslq_f32(vcltq_f32(p, q), p, q); }, x, y);
    }

    static EDGEMOE_INLINE F unless_below(F x, F bound, F other) {
        return floats_of([](auto p, auto b, auto o) { return vbslq_f32(vcltq_f32(p, b), o, p); }, x, bound, other);
    }
    static EDGEMOE_INLINE F unless_above(F x, F bound, F other) {
        return floats_of([](auto p, auto b, auto o) { return vbslq_f32(vcgtq_f32(p, b), o, p); }, x, bound, other);
    }
    static EDGEMOE_INLINE F keep(F x, int begin, int end, F other) {
        const int32x4_t from = vdupq_n_s32(begin), to = vdupq_n_s32(end);
        return floats_of(
            [&](float32x4_t p, float32x4_t q, int32x4_t lanes) {
                return vbslq_f32(vandq_u32(vcgeq_s32(lanes, from), vcltq_s32(lanes, to)), p, q);
            },
            x, other, load_i(kLaneNumbers));
    }
    static EDGEMOE_INLINE F canonical(F x) {
        const float32x4_t nan = vdupq_n_f32(__builtin_nanf(""));
        return floats_of([&](auto p) { return vbslq_f32(vceqq_f32(p, p), p, nan); }, x);
    }

    static EDGEMOE_INLINE I load_i(const int32_t* p) {
        return {vld1q_s32(p), vld1q_s32(p + 4), vld1q_s32(p + 8), vld1q_s32(p + 12)};
    }
    static EDGEMOE_INLINE I set1_i(int32_t x) {
        const int32x4_t all = vdupq_n_s32(x);
        return {all, all, all, all};
    }
    static EDGEMOE_INLINE I bits(F x) {
        return integers_of([](auto p) { return vreinterpretq_s32_f32(p); }, x);
    }
    static EDGEMOE_INLINE F floats(I x) {
        return floats_of([](auto p) { return vreinterpretq_f32_s32(p); }, x);
    }
    static EDGEMOE_INLINE F integers_to_float(I x) {
        return floats_of([](auto p) { return vcvtq_f32_s32(p); }, x);
    }
    static EDGEMOE_INLINE I magnitudes(F x) { return and_i(bits(x), set1_i(0x7FFFFFFF)); }
    static EDGEMOE_INLINE I add_i(I x, I y) {
        return integers_of([](auto p, auto q) { return vaddq_s32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE I sub_i(I x, I y) {
        return integers_of([](auto p, auto q) { return vsubq_s32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE I max_i(I x, I y) {
        return integers_of([](auto p, auto q) { return vmaxq_s32(p, q); }, x, y);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_left(I x) {
        return integers_of([](auto p) { return vshlq_n_s32(p, N); }, x);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right(I x) {
        return integers_of([](auto p) { return vshrq_n_s32(p, N); }, x);
    }

    static EDGEMOE_INLINE float fold_sum(F x) {
        const float32x4_t four = vaddq_f32(vaddq_f32(x.a, x.c), vaddq_f32(x.b, x.d));
        const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
        return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
    }
    static EDGEMOE_INLINE float fold_max(F x) {
        const float32x4_t four = max_of(max_of(x.a, x.c), max_of(x.b, x.d));
        const float32x4_t two = max_of(four, vextq_f32(four, four, 2));
        return vgetq_lane_f32(max_of(two, vextq_f32(two, two, 1)), 0);
    }
    static EDGEMOE_INLINE int32_t fold_sum_i(I x) {
        return vaddvq_s32(vaddq_s32(vaddq_s32(x.a, x.c), vaddq_s32(x.b, x.d)));
    }
    static EDGEMOE_INLINE int32_t fold_max_i(I x) {
        return vmaxvq_s32(vmaxq_s32(vmaxq_s32(x.a, x.c), vmaxq_s32(x.b, x.d)));
    }

    // --- products of codes ------------------------------------------------------------------------------------------

    template <int R, int T>
    static EDGEMOE_INLINE void clear(I (&x)[R][T]) {
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) x[r][t] = set1_i(0);
        }
    }

    // body<0>() ... body<N - 1>(): lane numbers must be constants.
    template <int N, class Body>
    static EDGEMOE_INLINE void each(const Body& body) {
        [&]<int... n>(std::integer_sequence<int, n...>) __attribute__((always_inline)) {
            (body.template operator()<n>(), ...);
        }(std::make_integer_sequence<int, N>{});
    }

    // dots[r][t] += N quads of weights(n, r) . codes x(t). The weights are bytes up to Max, signed ones (Max = 0), or,
    // for tiles, unsigned ones (Max = 255).
    template <int Max, int N, int R, int T, class Weights, class Codes>
    static EDGEMOE_INLINE void add_quads(const Weights& weights, const Codes& x, I (&dots)[R][T]) {
        if constexpr (Dot::kTiles && T > 1)
            add_tiles<Max, N, R, T>(weights, x, dots);
        else if constexpr (Dot::kQuads)
            add_lanes<Max, N, R, T, 0>(weights, x, dots);
        else
            add_products<Max, N, R, T>(weights, x, dots);
    }

    // Products are added in 16 bits as long as they fit.
    template <int Max, int N, int R, int T, class Weights, class Codes>
    static EDGEMOE_INLINE void add_products(const Weights& weights, const Codes& x, I (&dots)[R][T]) {
        constexpr int fit = Max == 0 ? 2 : 32767 / (Max * 127);
        constexpr int step = fit >= N ? N : fit >= 8 ? 8 : fit >= 4 ? 4 : 2;
        static_assert(fit >= 2 && N % step == 0);
        struct Sums {
            int16x8_t a, b, c, d, e, f, g, h;
        };
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int base = 0; base < N; base += step) {
                Sums sums[T];
                EDGEMOE_UNROLL
                for (int i = 0; i < step; ++i) {
                    const I w = weights(base + i, r);
                    EDGEMOE_UNROLL
                    for (int t = 0; t < T; ++t) {
                        int32_t quad;
                        __builtin_memcpy(&quad, x(t) + (base + i) * 4, sizeof quad);
                        const int8x16_t codes = vreinterpretq_s8_s32(vdupq_n_s32(quad));
                        const auto low = [&](int16x8_t sum, int32x4_t p) __attribute__((always_inline)) {
                            const int8x8_t half = vget_low_s8(vreinterpretq_s8_s32(p));
                            return i == 0 ? vmull_s8(half, vget_low_s8(codes))
                                          : vmlal_s8(sum, half, vget_low_s8(codes));
                        };
                        const auto high = [&](int16x8_t sum, int32x4_t p) __attribute__((always_inline)) {
                            const int8x16_t all = vreinterpretq_s8_s32(p);
                            return i == 0 ? vmull_high_s8(all, codes) : vmlal_high_s8(sum, all, codes);
                        };
                        Sums& s = sums[t];
                        s = {low(s.a, w.a), high(s.b, w.a), low(s.c, w.b), high(s.d, w.b),
                             low(s.e, w.c), high(s.f, w.c), low(s.g, w.d), high(s.h, w.d)};
                    }
                }
                const auto folded = [](int16x8_t p, int16x8_t q) __attribute__((always_inline)) {
                    return vpaddq_s32(vpaddlq_s16(p), vpaddlq_s16(q));
                };
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) {
                    const Sums& s = sums[t];
                    const I sum{folded(s.a, s.b), folded(s.c, s.d), folded(s.e, s.f), folded(s.g, s.h)};
                    dots[r][t] = add_i(dots[r][t], sum);
                }
            }
        }
    }

    // Of tokens First ... T - 1.
    template <int Max, int N, int R, int T, int First, class Weights, class Codes>
    static EDGEMOE_INLINE void add_lanes(const Weights& weights, const Codes& x, I (&dots)[R][T]) {
        EDGEMOE_UNROLL
        for (int base = 0; base < N; base += 4) {
            int8x16_t codes[T];
            EDGEMOE_UNROLL
            for (int t = First; t < T; ++t) codes[t] = vld1q_s8(x(t) + base * 4);
            each<4>([&]<int lane>() __attribute__((always_inline)) {
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) {
                    const I w = weights(base + lane, r);
                    EDGEMOE_UNROLL
                    for (int t = First; t < T; ++t)
                        dots[r][t] = integers_of(
                            [&](int32x4_t sum, int32x4_t p) __attribute__((always_inline)) {
                                if constexpr (Max == 255)
                                    return Dot::template unsigned_lane<lane>(sum, vreinterpretq_u8_s32(p), codes[t]);
                                else
                                    return Dot::template signed_lane<lane>(sum, vreinterpretq_s8_s32(p), codes[t]);
                            },
                            dots[r][t], w);
                }
            });
        }
    }

    template <int Max, int N, int R, int T, class Weights, class Codes>
    static EDGEMOE_INLINE void add_tiles(const Weights& weights, const Codes& x, I (&dots)[R][T]) {
        const auto tile = [](int32x4_t sum, int32x4_t p, int8x16_t q) __attribute__((always_inline)) {
            if constexpr (Max == 255)
                return Dot::unsigned_tile(sum, vreinterpretq_u8_s32(p), q);
            else
                return Dot::signed_tile(sum, vreinterpretq_s8_s32(p), q);
        };
        constexpr int pairs = T / 2;
        I even[R][pairs], odd[R][pairs];  // rows 0 1 4 5 8 9 12 13, and the others
        clear(even);
        clear(odd);
        EDGEMOE_UNROLL
        for (int n = 0; n < N; n += 2) {
            int8x16_t codes[pairs];
            EDGEMOE_UNROLL
            for (int t = 0; t < pairs; ++t)
                codes[t] = vcombine_s8(vld1_s8(x(2 * t) + n * 4), vld1_s8(x(2 * t + 1) + n * 4));
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                const I first = weights(n, r), second = weights(n + 1, r);
                const I low = integers_of([](auto p, auto q) { return vzip1q_s32(p, q); }, first, second);
                const I high = integers_of([](auto p, auto q) { return vzip2q_s32(p, q); }, first, second);
                EDGEMOE_UNROLL
                for (int t = 0; t < pairs; ++t) {
                    const auto add = [&](int32x4_t sum, int32x4_t p)
                                         __attribute__((always_inline)) { return tile(sum, p, codes[t]); };
                    even[r][t] = integers_of(add, even[r][t], low);
                    odd[r][t] = integers_of(add, odd[r][t], high);
                }
            }
        }
        EDGEMOE_UNROLL
        for (int r = 0; r < R; ++r) {
            EDGEMOE_UNROLL
            for (int t = 0; t < pairs; ++t) {
                const I one = integers_of([](auto p, auto q) { return vuzp1q_s32(p, q); }, even[r][t], odd[r][t]);
                const I other = integers_of([](auto p, auto q) { return vuzp2q_s32(p, q); }, even[r][t], odd[r][t]);
                dots[r][2 * t] = add_i(dots[r][2 * t], one);
                dots[r][2 * t + 1] = add_i(dots[r][2 * t + 1], other);
            }
        }
        if constexpr (T % 2) add_lanes<Max, N, R, T, T - 1>(weights, x, dots);
    }

    // Exact dot products of group `g` of R row blocks (`stride` bytes apart, the first at `data`) and T tokens.
    template <Layout L, int R, int T>
    static EDGEMOE_INLINE void dot_group(const std::byte* data, size_t stride, const int8_t* const (&codes)[T], int g,
                                         I (&dots)[R][T]) {
        clear(dots);
        const auto x = [&](int t) __attribute__((always_inline)) { return codes[t] + g * kGroup; };
        if constexpr (L == Layout::q4g64) {
            const auto weights = [&](int n, int r) __attribute__((always_inline)) {
                const I packed = load_bytes(data + r * stride + n / 2 * 64);
                return and_i(n % 2 ? shift_right_16<4>(packed) : packed, set1_8(15));
            };
            add_quads<15, kGroup / 4, R, T>(weights, x, dots);
        } else if constexpr (Dot::kTiles) {
            const auto weights = [&](int n, int r)
                                     __attribute__((always_inline)) { return load_bytes(data + r * stride + n * 64); };
            add_quads<255, kGroup / 4, R, T>(weights, x, dots);
        } else {
            // Less 128 the codes are signed.
            EDGEMOE_UNROLL
            for (int t = 0; t < T; ++t) {
                int16_t parts[4];
                sum_parts(x(t), parts);
                const I offset = set1_i((parts[0] + parts[1] + parts[2] + parts[3]) * 128);
                EDGEMOE_UNROLL
                for (int r = 0; r < R; ++r) dots[r][t] = offset;
            }
            const auto weights = [&](int n, int r) __attribute__((always_inline)) {
                const I sign = set1_8(-128);
                return integers_of([](auto p, auto q) { return veorq_s32(p, q); },
                                   load_bytes(data + r * stride + n * 64), sign);
            };
            add_quads<0, kGroup / 4, R, T>(weights, x, dots);
        }
    }

    // --- ggml's formats ---------------------------------------------------------------------------------------------

    static constexpr int kSignedOffset = 0;
    static constexpr int kScaledTokens = Dot::kTiles ? 2 : 0;

    static EDGEMOE_INLINE I load_bytes(const std::byte* p) {
        const auto* bytes = reinterpret_cast<const uint8_t*>(p);
        const auto load_16 = [](const uint8_t* q) { return vreinterpretq_s32_u8(vld1q_u8(q)); };
        return {load_16(bytes), load_16(bytes + 16), load_16(bytes + 32), load_16(bytes + 48)};
    }
    static EDGEMOE_INLINE I widen_16(uint16x8_t low, uint16x8_t high) {
        return {vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(low))), vreinterpretq_s32_u32(vmovl_high_u16(low)),
                vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(high))), vreinterpretq_s32_u32(vmovl_high_u16(high))};
    }
    static EDGEMOE_INLINE I load_u8(const std::byte* p) {
        const uint8x16_t bytes = vld1q_u8(reinterpret_cast<const uint8_t*>(p));
        return widen_16(vmovl_u8(vget_low_u8(bytes)), vmovl_high_u8(bytes));
    }
    static EDGEMOE_INLINE I load_u16(const std::byte* p) {
        const auto* words = reinterpret_cast<const uint16_t*>(p);
        return widen_16(vld1q_u16(words), vld1q_u16(words + 8));
    }
    static EDGEMOE_INLINE I set1_8(int x) {
        const int32x4_t all = vreinterpretq_s32_s8(vdupq_n_s8(static_cast<int8_t>(x)));
        return {all, all, all, all};
    }
    static EDGEMOE_INLINE I set1_16(int x) {
        const int32x4_t all = vreinterpretq_s32_s16(vdupq_n_s16(static_cast<int16_t>(x)));
        return {all, all, all, all};
    }
    static EDGEMOE_INLINE I and_i(I x, I y) {
        return integers_of([](auto p, auto q) { return vandq_s32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE I or_i(I x, I y) {
        return integers_of([](auto p, auto q) { return vorrq_s32(p, q); }, x, y);
    }
    static EDGEMOE_INLINE I select_bits(I mask, I x, I y) {
        return integers_of([](auto m, auto p, auto q) { return vbslq_s32(vreinterpretq_u32_s32(m), p, q); }, mask, x,
                           y);
    }
    static EDGEMOE_INLINE F low_halves(I x) {
        const auto wide = [](int32x4_t p) { return vcvt_f32_f16(vreinterpret_f16_s16(vmovn_s32(p))); };
        return {wide(x.a), wide(x.b), wide(x.c), wide(x.d)};
    }
    static EDGEMOE_INLINE I sub_8(I x, I y) {
        return integers_of(
            [](auto p, auto q) {
                return vreinterpretq_s32_s8(vsubq_s8(vreinterpretq_s8_s32(p), vreinterpretq_s8_s32(q)));
            },
            x, y);
    }
    static EDGEMOE_INLINE I add_16(I x, I y) {
        return integers_of(
            [](auto p, auto q) {
                return vreinterpretq_s32_s16(vaddq_s16(vreinterpretq_s16_s32(p), vreinterpretq_s16_s32(q)));
            },
            x, y);
    }
    static EDGEMOE_INLINE I sub_16(I x, I y) {
        return integers_of(
            [](auto p, auto q) {
                return vreinterpretq_s32_s16(vsubq_s16(vreinterpretq_s16_s32(p), vreinterpretq_s16_s32(q)));
            },
            x, y);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_left_16(I x) {
        return integers_of([](auto p) { return vreinterpretq_s32_s16(vshlq_n_s16(vreinterpretq_s16_s32(p), N)); }, x);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16(I x) {
        return integers_of([](auto p) { return vreinterpretq_s32_u16(vshrq_n_u16(vreinterpretq_u16_s32(p), N)); }, x);
    }
    template <int N>
    static EDGEMOE_INLINE I shift_right_16_signed(I x) {
        return integers_of([](auto p) { return vreinterpretq_s32_s16(vshrq_n_s16(vreinterpretq_s16_s32(p), N)); }, x);
    }
    static EDGEMOE_INLINE I shift_right_16(I x, int n) {
        const int16x8_t left = vdupq_n_s16(static_cast<int16_t>(-n));
        return integers_of([&](auto p) { return vreinterpretq_s32_u16(vshlq_u16(vreinterpretq_u16_s32(p), left)); }, x);
    }
    static EDGEMOE_INLINE I shift_right_32(I x, int n) {
        const int32x4_t left = vdupq_n_s32(-n);
        return integers_of([&](auto p) { return vreinterpretq_s32_u32(vshlq_u32(vreinterpretq_u32_s32(p), left)); }, x);
    }
    static EDGEMOE_INLINE I madd(I x, I y) {
        return integers_of(
            [](int32x4_t p, int32x4_t q) {
                const int16x8_t one = vreinterpretq_s16_s32(p), other = vreinterpretq_s16_s32(q);
                return vpaddq_s32(vmull_s16(vget_low_s16(one), vget_low_s16(other)), vmull_high_s16(one, other));
            },
            x, y);
    }
    static EDGEMOE_INLINE I mul_16(I x, I y) {
        return integers_of(
            [](auto p, auto q) {
                return vreinterpretq_s32_s16(vmulq_s16(vreinterpretq_s16_s32(p), vreinterpretq_s16_s32(q)));
            },
            x, y);
    }
    static EDGEMOE_INLINE I add_madd(I sum, I x, I y) { return add_i(sum, madd(x, y)); }
    static EDGEMOE_INLINE I lookup(const int8_t (&table)[16], I x) {
        const int8x16_t values = vld1q_s8(table);
        return integers_of([&](auto p) { return vreinterpretq_s32_s8(vqtbl1q_s8(values, vreinterpretq_u8_s32(p))); },
                           x);
    }
    static EDGEMOE_INLINE I spread_bits(I x, int n) {
        const uint8x16_t place = vaddq_u8(vld1q_u8(kFirstBytes), vdupq_n_u8(static_cast<uint8_t>(n / 2)));
        const uint8x16_t chosen = vreinterpretq_u8_u32(vdupq_n_u32(n % 2 ? 0x80402010u : 0x08040201u));
        const uint8x16_t bit = vdupq_n_u8(16);
        return integers_of(
            [&](auto p) {
                const uint8x16_t bytes = vqtbl1q_u8(vreinterpretq_u8_s32(p), place);
                return vreinterpretq_s32_u8(vandq_u8(vtstq_u8(bytes, chosen), bit));
            },
            x);
    }
    static EDGEMOE_INLINE void sum_parts(const int8_t* codes, int16_t* parts) {
        parts[0] = vaddlvq_s8(vld1q_s8(codes));
        parts[1] = vaddlvq_s8(vld1q_s8(codes + 32));
        parts[2] = vaddlvq_s8(vld1q_s8(codes + 16));
        parts[3] = vaddlvq_s8(vld1q_s8(codes + 48));
    }
    static EDGEMOE_INLINE I signed_bytes(I x) { return x; }
    static EDGEMOE_INLINE I as_scale(I x) { return x; }

    template <int Max, int N, bool Scaled, int R, int T, class Weights>
    static EDGEMOE_INLINE void dot_quads(const Weights& weights, const int8_t* codes, const I (&scales)[R],
                                         I (&dots)[R][T]) {
        const auto x = [&](int t) __attribute__((always_inline)) { return codes + t * kGroup; };
        if constexpr (Scaled) {
            I parts[R][T];
            clear(parts);
            dot_quads<Max, N, false, R, T>(weights, codes, scales, parts);
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t)
                    dots[r][t] = integers_of([](auto sum, auto p, auto q) { return vmlaq_s32(sum, p, q); }, dots[r][t],
                                             parts[r][t], scales[r]);
            }
        } else if constexpr (Max > 127 && !Dot::kTiles) {
            // As signed bytes codes of 8 bits are too large: the halves of a byte one after the other.
            const auto low = [&](int n, int r)
                                 __attribute__((always_inline)) { return and_i(weights(n, r), set1_8(15)); };
            const auto high = [&](int n, int r) __attribute__((always_inline)) {
                return and_i(shift_right_16<4>(weights(n, r)), set1_8(15));
            };
            I upper[R][T];
            clear(upper);
            add_quads<15, N, R, T>(low, x, dots);
            add_quads<15, N, R, T>(high, x, upper);
            EDGEMOE_UNROLL
            for (int r = 0; r < R; ++r) {
                EDGEMOE_UNROLL
                for (int t = 0; t < T; ++t) dots[r][t] = add_i(dots[r][t], shift_left<4>(upper[r][t]));
            }
        } else {
            add_quads<Max, N, R, T>(weights, x, dots);
        }
    }
};

}  // namespace
}  // namespace edgemoe
