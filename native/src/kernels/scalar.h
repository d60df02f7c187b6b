// The scalar kernels: plain C++, no vector instructions. They are the reference, and the other tables equal them byte
// by byte.
//
// Results that are NaN are written as the one canonical NaN, because which operand's NaN an instruction passes on
// depends on the order a compiler puts the operands in.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "edgemoe/kernels.h"
#include "function_constants.h"

namespace edgemoe::scalar {

using Lanes = std::array<float, kLanes>;

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();

// The vector instructions' maximum: the second operand where they are unordered or equal.
inline float maximum_of(float a, float b) { return a > b ? a : b; }
inline float minimum_of(float a, float b) { return a < b ? a : b; }

inline uint16_t load_u16(const std::byte* data, size_t index) {
    uint16_t value;
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

inline float load_f32(const std::byte* data, size_t index) {
    float value;
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

template <class T>
void store(std::byte* data, size_t index, T value) {
    std::memcpy(data + index * sizeof value, &value, sizeof value);
}

inline float exp_of(float x) {
    using namespace exponential;
    x = x < kLow ? kZero : x;
    x = x > kHigh ? kInfinite : x;
    const float t = std::fma(x, kInverseLn2, kMagic);
    const float n = t - kMagic;
    const int32_t integer =
        static_cast<int32_t>(std::bit_cast<uint32_t>(t) - static_cast<uint32_t>(kMagicBits));  // noise if x is NaN
    const float r = std::fma(n, -kLn2Low, std::fma(n, -kLn2High, x));
    float p = kC5;
    p = std::fma(p, r, kC4);
    p = std::fma(p, r, kC3);
    p = std::fma(p, r, kC2);
    p = std::fma(p, r, kC1);
    p = std::fma(p, r, kC0);
    p = std::fma(p, r * r, r) + 1.0f;
    const int32_t half = integer >> 1;
    const float first = std::bit_cast<float>((static_cast<uint32_t>(half) + 127u) << 23);
    const float second =
        std::bit_cast<float>((static_cast<uint32_t>(integer) - static_cast<uint32_t>(half) + 127u) << 23);
    return p * first * second;
}

// log(1 + exp(x))
inline float softplus(float x) {
    const float e = exp_of(0.0f - std::fabs(x));
    float p = logarithm::kC[logarithm::kTerms - 1];
    for (int i = logarithm::kTerms - 2; i >= 0; --i) p = std::fma(p, e, logarithm::kC[i]);
    return maximum_of(0.0f, x) + e * std::fma(p, e, 1.0f);
}

inline float fold_sum(Lanes lanes) {
    for (int width = kLanes / 2; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

inline float fold_max(Lanes lanes) {
    for (int width = kLanes / 2; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = maximum_of(lanes[i], lanes[i + width]);
    return lanes[0];
}

// Bits of the largest magnitude; a NaN's are above infinity's, those above every finite one's.
inline uint32_t largest_magnitude(const float* x, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    return largest;
}

// pack_scalar.cpp: of f32, bf16, f16, q8g64 and q4g64.
void matmul_packs(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count,
                  int first_block, int last_block, float* out, ptrdiff_t out_stride);

// elementwise_scalar.cpp
void quantize(std::span<const float> x, int8_t* codes, float* scales, float* sums);
void rms_norm(std::span<const float> x, const float* weight, float epsilon, float* out);
void layer_norm(std::span<const float> x, const float* weight, const float* bias, float epsilon, float* out);
void silu_multiply(std::span<const float> gate, const float* up, float* out);
void gelu_multiply(std::span<const float> gate, const float* up, float* out);
void clamped_swiglu(std::span<const float> gate, const float* up, float alpha, float limit, float* out);
void sigmoid(std::span<float> x);
void sigmoid_multiply(std::span<const float> gate, const float* x, float* out);
void softcap(float cap, std::span<float> x);
void softplus_decay(std::span<float> x, const float* bias, const float* rate);
void softmax(std::span<float> x);
void add_scaled(float a, const float* x, std::span<float> y);
void rope(float* head, const float* cosine, const float* sine, int pairs);

// attention_scalar.cpp
void store_key(KvType type, std::span<const float> key, int position, const KvBlocks& blocks);
void store_value(KvType type, std::span<const float> value, int position, const KvBlocks& blocks);
void attend(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
            const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);
void attend_latent(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                   const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator);

// recurrence_scalar.cpp
void convolve(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu, float* out);
void gated_delta(float* state, int key_dim, int value_dim, const float* query, const float* key, const float* value,
                 float decay, float beta, float* out);

}  // namespace edgemoe::scalar
