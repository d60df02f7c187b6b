// Constants of the exponential function that every instruction set evaluates in the same order of operations:
//
//   x = min(kHigh, max(kLow, x))            (a NaN passes)
//   t = fma(x, 1 / ln 2, kMagic)            (adding 1.5 * 2^23 rounds to an integer, half to even)
//   n = t - kMagic, also as an integer from the low bits of t
//   r = fma(n, -ln2_low, fma(n, -ln2_high, x))
//   p = 1 + (r + r^2 (c0 + r (c1 + r (c2 + r (c3 + r (c4 + r c5))))))
//   result = (p * 2^floor(n / 2)) * 2^(n - floor(n / 2))
//
// The two factors keep both in range, so that denormal results are rounded once and large ones become infinity.
// The error is at most 1.01 units in the last place. The coefficients are those of Cephes' expf.
#pragma once

#include <cstdint>

namespace edgemoe::exponential {

inline constexpr float kLow = -104.0f;  // exp is below half of the smallest denormal: 0
inline constexpr float kHigh = 89.0f;   // exp is above the largest float: infinity
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

namespace edgemoe {

// GELU's tanh form: 0.5 x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) = x / (1 + exp(-kGeluScale (x + kGeluCubic
// x^3))).
inline constexpr float kGeluCubic = 0.044715f;
inline constexpr float kGeluScale = 1.59576912160573071f;  // 2 sqrt(2 / pi)

}  // namespace edgemoe
