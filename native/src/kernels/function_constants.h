// Constants of the functions that every instruction set evaluates in the same order of operations.
//
// The exponential:
//
//   x = kZero where x < kLow, kInfinite where x > kHigh
//   t = fma(x, 1 / ln 2, kMagic)            (adding 1.5 * 2^23 rounds to an integer, half to even)
//   n = t - kMagic, also as an integer from the low bits of t
//   r = fma(n, -ln2_low, fma(n, -ln2_high, x))
//   p = 1 + (r + r^2 (c0 + r (c1 + r (c2 + r (c3 + r (c4 + r c5))))))
//   result = (p * 2^floor(n / 2)) * 2^(n - floor(n / 2))
//
// Between kLow and kHigh the error is at most 1.01 units in the last place, and neither the result nor one divided by
// it is subnormal. Beyond them the result is 0 or infinity, so that hardware which flushes subnormal numbers to zero
// computes the same. The two factors keep each of them in the range of exponents. The coefficients are those of Cephes'
// expf.
#pragma once

#include <cstdint>

namespace edgemoe::exponential {

inline constexpr float kLow = -87.33654f;  // the least number whose exp is not subnormal
inline constexpr float kHigh = 87.33654f;  // the largest one for which exp's inverse is not
inline constexpr float kZero = -104.0f;    // the last product is below half of the smallest subnormal number: 0
inline constexpr float kInfinite = 89.0f;  // it is above the largest number: infinity
inline constexpr float kInverseLn2 = 1.44269504088896341f;
inline constexpr float kLn2High = 0.693359375f;  // 9 bits: n * kLn2High is exact
inline constexpr float kLn2Low = -2.12194440e-4f;
inline constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23
inline constexpr int32_t kMagicBits = 0x4B400000;
inline constexpr float kC0 = 5.0000001201e-1f;
inline constexpr float kC1 = 1.6666665459e-1f;
inline constexpr float kC2 = 4.1665795894e-2f;
inline constexpr float kC3 = 8.3334519073e-3f;
inline constexpr float kC4 = 1.3981999507e-3f;
inline constexpr float kC5 = 1.9875691500e-4f;

}  // namespace edgemoe::exponential

// log(1 + e) = e (1 + e (c0 + e (c1 + ... + e c8))) for e in [0, 1], evaluated from the inside out with fused
// multiply-adds, and one product at the end. The error is at most 1.6 units in the last place; the coefficients are
// those of the polynomial whose largest relative error is least (2^-27.5), found by Remez' exchange.
namespace edgemoe::logarithm {

inline constexpr int kTerms = 9;
inline constexpr float kC[kTerms] = {-4.999993e-1f, 3.3330464e-1f, -2.4958019e-1f, 1.9692102e-1f, -1.534488e-1f,
                                     1.0661128e-1f, -5.745723e-2f, 2.0086242e-2f,  -3.2904686e-3f};

}  // namespace edgemoe::logarithm

namespace edgemoe {

// Elements of a softmax that are further below the largest one are 0: divided by the sum they could be subnormal.
inline constexpr float kLeastDistance = -64.0f;

// Activations smaller than this count as zeros: their scale would be subnormal.
inline constexpr float kLeastMagnitude = 127 * 0x1p-126f;

// GELU's tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + exp(-kGeluScale (x + kGeluCubic
// x^3))).
inline constexpr float kGeluCubic = 0.044715f;
inline constexpr float kGeluScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)

}  // namespace edgemoe
