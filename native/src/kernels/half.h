// float16 and bfloat16 in software, to the bit what F16C gives: round half to even, denormals kept, NaN payloads
// truncated and made quiet. In an unnamed namespace because files with different instruction sets include it.
#pragma once

#include <bit>
#include <cstdint>

namespace edgemoe {
namespace {

[[maybe_unused]] float float_from_half(uint16_t half) {
    const uint32_t sign = (half & 0x8000u) << 16;
    const uint32_t exponent = (half >> 10) & 31u;
    const uint32_t mantissa = half & 0x3FFu;
    if (exponent == 31)
        return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13) | (mantissa ? 0x400000u : 0u));
    if (exponent == 0) {
        const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
        return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
    }
    return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

[[maybe_unused]] uint16_t half_from_float(float value) {
    const uint32_t bits = std::bit_cast<uint32_t>(value);
    const auto sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
    uint32_t magnitude = bits & 0x7FFFFFFFu;
    uint32_t half;
    if (magnitude > 0x7F800000u) {
        half = 0x7E00u | ((magnitude >> 13) & 0x3FFu);
    } else if (magnitude >= 0x477FF000u) {  // 65520, the first value that rounds to infinity
        half = 0x7C00u;
    } else if (magnitude < 0x38800000u) {  // below 2^-14: 0.5 has the spacing of float16 denormals, 2^-24
        half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
    } else {
        magnitude += 0xFFFu + ((magnitude >> 13) & 1u);
        half = (magnitude - 0x38000000u) >> 13;
    }
    return static_cast<uint16_t>(sign | half);
}

[[maybe_unused]] float float_from_bf16(uint16_t value) { return std::bit_cast<float>(uint32_t{value} << 16); }

}  // namespace
}  // namespace edgemoe
