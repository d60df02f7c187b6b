// Activations as codes, norms, gates and other functions of vectors.
#include "scalar.h"

namespace edgemoe::scalar {

void quantize(std::span<const float> x, int8_t* codes, float* scales, float* sums) {
    const int cols = static_cast<int>(x.size());
    for (int g = 0; g * kGroup < cols; ++g) {
        const int columns = cols - g * kGroup < kGroup ? cols - g * kGroup : kGroup;
        const float* values = x.data() + g * kGroup;
        const uint32_t largest = largest_magnitude(values, columns);
        std::memset(codes + g * kGroup, 0, kGroup);
        if (largest >= 0x7F800000u) {
            scales[g] = sums[g] = kNan;
            continue;
        }
        const float magnitude = std::bit_cast<float>(largest);
        if (magnitude < kLeastMagnitude) {
            scales[g] = sums[g] = 0.0f;
            continue;
        }
        const float inverse = 127.0f / magnitude;
        int32_t sum = 0;
        for (int i = 0; i < columns; ++i) {
            const int code = static_cast<int>(std::lrint(values[i] * inverse));
            codes[g * kGroup + i] = static_cast<int8_t>(code);
            sum += code;
        }
        scales[g] = magnitude / 127.0f;
        sums[g] = scales[g] * static_cast<float>(sum);
    }
}

void rms_norm(std::span<const float> x, const float* weight, float epsilon, float* out) {
    Lanes squares{};
    for (size_t i = 0; i < x.size(); ++i) squares[i % kLanes] = std::fma(x[i], x[i], squares[i % kLanes]);
    const float mean = fold_sum(squares) / static_cast<float>(x.size());
    const float inverse = 1.0f / std::sqrt(mean + epsilon);
    for (size_t i = 0; i < x.size(); ++i) out[i] = canonical(x[i] * inverse * weight[i]);
}

void layer_norm(std::span<const float> x, const float* weight, const float* bias, float epsilon, float* out) {
    Lanes sums{}, squares{};
    const auto size = static_cast<float>(x.size());
    for (size_t i = 0; i < x.size(); ++i) sums[i % kLanes] += x[i];
    const float mean = fold_sum(sums) / size;
    for (size_t i = 0; i < x.size(); ++i) {
        const float distance = x[i] - mean;
        squares[i % kLanes] = std::fma(distance, distance, squares[i % kLanes]);
    }
    const float inverse = 1.0f / std::sqrt(fold_sum(squares) / size + epsilon);
    for (size_t i = 0; i < x.size(); ++i) out[i] = canonical(std::fma((x[i] - mean) * inverse, weight[i], bias[i]));
}

void silu_multiply(std::span<const float> gate, const float* up, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) {
        const float value = gate[i];
        out[i] = canonical(value / (1.0f + exp_of(0.0f - value)) * up[i]);
    }
}

void gelu_multiply(std::span<const float> gate, const float* up, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) {
        const float x = gate[i];
        const float inner = std::fma(kGeluCubic * x, x * x, x) * kGeluScale;
        out[i] = canonical(x / (1.0f + exp_of(0.0f - inner)) * up[i]);
    }
}

void clamped_swiglu(std::span<const float> gate, const float* up, float alpha, float limit, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) {
        const float g = minimum_of(limit, gate[i]);
        const float u = maximum_of(-limit, minimum_of(limit, up[i]));
        out[i] = canonical(g / (1.0f + exp_of(0.0f - g * alpha)) * (u + 1.0f));
    }
}

void sigmoid(std::span<float> x) {
    for (float& value : x) value = canonical(1.0f / (1.0f + exp_of(0.0f - value)));
}

void sigmoid_multiply(std::span<const float> gate, const float* x, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) out[i] = canonical(x[i] * (1.0f / (1.0f + exp_of(0.0f - gate[i]))));
}

void softcap(float cap, std::span<float> x) {
    for (float& value : x) {
        const float t = value / cap;
        value = canonical((1.0f - 2.0f / (1.0f + exp_of(t + t))) * cap);
    }
}

void softplus_decay(std::span<float> x, const float* bias, const float* rate) {
    for (size_t i = 0; i < x.size(); ++i) x[i] = canonical(exp_of(rate[i] * softplus(x[i] + bias[i])));
}

void softmax(std::span<float> x) {
    if (x.empty()) return;
    Lanes largest;
    largest.fill(-kInfinity);
    // The last round covers all lanes; the missing elements are -infinity.
    const size_t padded = (x.size() + kLanes - 1) / kLanes * kLanes;
    for (size_t i = 0; i < padded; ++i)
        largest[i % kLanes] = maximum_of(largest[i % kLanes], i < x.size() ? x[i] : -kInfinity);
    const float maximum = fold_max(largest);
    Lanes total{};
    for (size_t i = 0; i < x.size(); ++i) {
        const float distance = x[i] - maximum;
        x[i] = exp_of(distance < kLeastDistance ? exponential::kZero : distance);
        total[i % kLanes] += x[i];
    }
    const float sum = fold_sum(total);
    for (float& value : x) value = canonical(value / sum);
}

void add_scaled(float a, const float* x, std::span<float> y) {
    for (size_t i = 0; i < y.size(); ++i) y[i] = canonical(std::fma(a, x[i], y[i]));
}

void rope(float* head, const float* cosine, const float* sine, int pairs) {
    for (int i = 0; i < pairs; ++i) {
        const float first = head[i];
        const float second = head[i + pairs];
        head[i] = canonical(std::fma(first, cosine[i], -(second * sine[i])));
        head[i + pairs] = canonical(std::fma(second, cosine[i], first * sine[i]));
    }
}

}  // namespace edgemoe::scalar
