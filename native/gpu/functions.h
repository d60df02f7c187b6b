// What several kernels compute, to the bit as the scalar kernels of the processor do (edgemoe/kernels.h).
#pragma once

// A result that is not a number is always this one.
FN float canonical(float x) { return x == x ? x : bits_float(0x7FC00000u); }

FN float infinity() { return bits_float(0x7F800000u); }

// b where the two are equal or unordered.
FN float maximum_of(float a, float b) { return a > b ? a : b; }
FN float minimum_of(float a, float b) { return a < b ? a : b; }

FN float magnitude_of(float x) { return bits_float(float_bits(x) & 0x7FFFFFFFu); }

// Constants of src/kernels/function_constants.h.
FN float exp_of(float x) {
    x = x < -87.33654f ? -104.0f : x;
    x = x > 87.33654f ? 89.0f : x;
    const float t = fused(x, 1.44269504088896341f, 12582912.0f);
    const float n = t - 12582912.0f;
    const i32 integer = i32(float_bits(t) - 0x4B400000u);  // noise if x is not a number
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x));
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, r * r, r) + 1.0f;
    const i32 half = integer >> 1;
    const float first = bits_float((u32(half) + 127u) << 23);
    const float second = bits_float((u32(integer) - u32(half) + 127u) << 23);
    return p * first * second;
}

FN float sigmoid_of(float x) { return 1.0f / (1.0f + exp_of(0.0f - x)); }

// Half to even, as src/kernels/half.h.
FN u32 half_from_float(float value) {
    const u32 bits = float_bits(value);
    const u32 sign = bits >> 16 & 0x8000u;
    u32 magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return sign | 0x7E00u | (magnitude >> 13 & 0x3FFu);
    if (magnitude >= 0x477FF000u) return sign | 0x7C00u;  // 65520, the first value that rounds to infinity
    // Below 2^-14: 0.5 has the spacing of float16's subnormal numbers, 2^-24.
    if (magnitude < 0x38800000u) return sign | (float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u);
    magnitude += 0xFFFu + (magnitude >> 13 & 1u);
    return sign | (magnitude - 0x38000000u) >> 13;
}

FN float float_from_bf16(u32 bits) { return bits_float(bits << 16); }

// Folds the 16 accumulators of lanes 0 to 15, and those of lanes 16 to 31, be they the same or others: i takes in i +
// 8, then i + 4, i + 2, i + 1. All lanes of the warp get here, and have their half's result but for which NaN it is.
FN float fold_sum(float x) {
    for (int width = 8; width >= 1; width /= 2) x += shuffle_xor(x, width);
    return x;
}

// Here the order of the two matters, if one is not a number: that of lane 0 it is for all.
FN float fold_max(float x) {
    for (int width = 8; width >= 1; width /= 2) {
        const float other = shuffle_xor(x, width);
        x = (LANE & width) == 0 ? maximum_of(x, other) : maximum_of(other, x);
    }
    return x;
}
