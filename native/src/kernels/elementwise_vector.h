// Activations as codes, norms, gates and other functions of vectors; elementwise_scalar.cpp is the reference.
#pragma once

#include "vector_functions.h"

namespace edgemoe {

template <class V>
struct ElementwiseKernels {
    using F = typename V::F;
    using I = typename V::I;
    using Functions = VectorFunctions<V>;

    static void quantize(std::span<const float> x, int8_t* codes, float* scales, float* sums) {
        constexpr int chunks = kGroup / kLanes;
        const float* values = x.data();
        const int cols = static_cast<int>(x.size());
        for (int g = 0; g * kGroup < cols; ++g) {
            F parts[chunks];
            I largest = V::set1_i(0);
            EDGEMOE_UNROLL
            for (int c = 0; c < chunks; ++c) {
                const int start = g * kGroup + c * kLanes;
                const int left = cols - start;
                parts[c] = left >= kLanes ? V::load(values + start)
                           : left > 0     ? V::load_n(values + start, left)
                                          : V::zero();
                largest = V::max_i(largest, V::magnitudes(parts[c]));
            }
            const int32_t bits = V::fold_max_i(largest);
            int8_t* group = codes + g * kGroup;
            if (bits >= 0x7F800000) {
                __builtin_memset(group, 0, kGroup);
                scales[g] = sums[g] = Functions::nan();
                continue;
            }
            const float magnitude = Functions::as_float(bits);
            if (magnitude < kLeastMagnitude) {
                __builtin_memset(group, 0, kGroup);
                scales[g] = sums[g] = 0.0f;
                continue;
            }
            const float inverse = 127.0f / magnitude;
            I total = V::set1_i(0);
            EDGEMOE_UNROLL
            for (int c = 0; c < chunks; ++c) {
                const I code = Functions::round(V::mul(parts[c], V::set1(inverse)));
                V::store_codes(group + c * kLanes, code);
                total = V::add_i(total, code);
            }
            scales[g] = magnitude / 127.0f;
            sums[g] = scales[g] * static_cast<float>(V::fold_sum_i(total));
        }
    }

    static void rms_norm(std::span<const float> x, const float* weight, float epsilon, float* out) {
        const float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        F squares = V::zero();
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes) {
            const F value = V::load(values + i);
            squares = V::fma(value, value, squares);
        }
        if (i < size) {
            const F value = V::load_n(values + i, size - i);
            squares = V::fma(value, value, squares);
        }
        const float mean = V::fold_sum(squares) / static_cast<float>(size);
        const F inverse = V::set1(1.0f / __builtin_sqrtf(mean + epsilon));
        for (i = 0; i + kLanes <= size; i += kLanes)
            V::store(out + i, V::canonical(V::mul(V::mul(V::load(values + i), inverse), V::load(weight + i))));
        if (i < size) {
            const int n = size - i;
            const F scaled = V::mul(V::load_n(values + i, n), inverse);
            V::store_n(out + i, V::canonical(V::mul(scaled, V::load_n(weight + i, n))), n);
        }
    }

    static void layer_norm(std::span<const float> x, const float* weight, const float* bias, float epsilon,
                           float* out) {
        const float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        const ptrdiff_t whole = size / kLanes * kLanes;
        const int rest = size - whole;
        F sums = V::zero();
        for (ptrdiff_t i = 0; i < whole; i += kLanes) sums = V::add(sums, V::load(values + i));
        if (rest) sums = V::add(sums, V::load_n(values + whole, rest));
        const F mean = V::set1(V::fold_sum(sums) / static_cast<float>(size));
        F squares = V::zero();
        for (ptrdiff_t i = 0; i < whole; i += kLanes) {
            const F distance = V::sub(V::load(values + i), mean);
            squares = V::fma(distance, distance, squares);
        }
        if (rest) {
            const F distance = V::keep(V::sub(V::load_n(values + whole, rest), mean), 0, rest, V::zero());
            squares = V::fma(distance, distance, squares);
        }
        const float variance = V::fold_sum(squares) / static_cast<float>(size);
        const F inverse = V::set1(1.0f / __builtin_sqrtf(variance + epsilon));
        for (ptrdiff_t i = 0; i < whole; i += kLanes) {
            const F scaled = V::mul(V::sub(V::load(values + i), mean), inverse);
            V::store(out + i, V::canonical(V::fma(scaled, V::load(weight + i), V::load(bias + i))));
        }
        if (rest) {
            const F scaled = V::mul(V::sub(V::load_n(values + whole, rest), mean), inverse);
            const F sum = V::fma(scaled, V::load_n(weight + whole, rest), V::load_n(bias + whole, rest));
            V::store_n(out + whole, V::canonical(sum), rest);
        }
    }

    // out[i] = operation(x[i], others[i]...).
    template <class Operation, class... Others>
    static EDGEMOE_INLINE void each(std::span<const float> x, float* out, Operation operation, Others... others) {
        const float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            V::store(out + i, V::canonical(operation(V::load(values + i), V::load(others + i)...)));
        if (i < size) {
            const int n = size - i;
            V::store_n(out + i, V::canonical(operation(V::load_n(values + i, n), V::load_n(others + i, n)...)), n);
        }
    }

    static void silu_multiply(std::span<const float> gate, const float* up, float* out) {
        const auto silu = [](F g, F u) EDGEMOE_INLINE_LAMBDA { return V::mul(Functions::gated(g, g), u); };
        each(gate, out, silu, up);
    }

    static void gelu_multiply(std::span<const float> gate, const float* up, float* out) {
        const auto gelu = [](F g, F u) EDGEMOE_INLINE_LAMBDA {
            const F cubic = V::fma(V::mul(V::set1(kGeluCubic), g), V::mul(g, g), g);
            return V::mul(Functions::gated(g, V::mul(cubic, V::set1(kGeluScale))), u);
        };
        each(gate, out, gelu, up);
    }

    static void clamped_swiglu(std::span<const float> gate, const float* up, float alpha, float limit, float* out) {
        const auto swiglu = [alpha, limit](F g, F u) EDGEMOE_INLINE_LAMBDA {
            g = V::min(V::set1(limit), g);
            u = V::max(V::set1(-limit), V::min(V::set1(limit), u));
            return V::mul(Functions::gated(g, V::mul(g, V::set1(alpha))), V::add(u, V::set1(1.0f)));
        };
        each(gate, out, swiglu, up);
    }

    static void sigmoid(std::span<float> x) {
        each(x, x.data(), [](F value) EDGEMOE_INLINE_LAMBDA { return Functions::gated(V::set1(1.0f), value); });
    }

    static void sigmoid_multiply(std::span<const float> gate, const float* x, float* out) {
        const auto gated = [](F g, F value)
                               EDGEMOE_INLINE_LAMBDA { return V::mul(value, Functions::gated(V::set1(1.0f), g)); };
        each(gate, out, gated, x);
    }

    static void softcap(float cap, std::span<float> x) {
        each(x, x.data(), [cap](F value) EDGEMOE_INLINE_LAMBDA {
            const F t = V::div(value, V::set1(cap));
            const F part = V::div(V::set1(2.0f), V::add(V::set1(1.0f), Functions::exp_of(V::add(t, t))));
            return V::mul(V::sub(V::set1(1.0f), part), V::set1(cap));
        });
    }

    static void softplus_decay(std::span<float> x, const float* bias, const float* rate) {
        const auto decay = [](F value, F b, F r) EDGEMOE_INLINE_LAMBDA {
            return Functions::exp_of(V::mul(r, Functions::softplus(V::add(value, b))));
        };
        each(x, x.data(), decay, bias, rate);
    }

    // Of an element of a softmax, before it is divided by the sum.
    static EDGEMOE_INLINE F share(F x, F maximum) {
        return Functions::exp_of(
            V::unless_below(V::sub(x, maximum), V::set1(kLeastDistance), V::set1(exponential::kZero)));
    }

    static void softmax(std::span<float> x) {
        float* values = x.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(x.size());
        if (size == 0) return;
        F largest = V::set1(-Functions::kInfinity);
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes) largest = V::max(largest, V::load(values + i));
        if (i < size) largest = V::max(largest, V::load_n(values + i, size - i, -Functions::kInfinity));
        const F maximum = V::set1(V::fold_max(largest));
        F total = V::zero();
        for (i = 0; i + kLanes <= size; i += kLanes) {
            const F value = share(V::load(values + i), maximum);
            V::store(values + i, value);
            total = V::add(total, value);
        }
        if (i < size) {
            const int n = size - i;
            const F value = share(V::load_n(values + i, n), maximum);
            V::store_n(values + i, value, n);
            total = V::add(total, V::keep(value, 0, n, V::zero()));
        }
        const F sum = V::set1(V::fold_sum(total));
        for (i = 0; i + kLanes <= size; i += kLanes)
            V::store(values + i, V::canonical(V::div(V::load(values + i), sum)));
        if (i < size) {
            const int n = size - i;
            V::store_n(values + i, V::canonical(V::div(V::load_n(values + i, n), sum)), n);
        }
    }

    static void add_scaled(float a, const float* x, std::span<float> y) {
        float* values = y.data();
        const ptrdiff_t size = static_cast<ptrdiff_t>(y.size());
        const F factor = V::set1(a);
        ptrdiff_t i = 0;
        for (; i + kLanes <= size; i += kLanes)
            V::store(values + i, V::canonical(V::fma(factor, V::load(x + i), V::load(values + i))));
        if (i < size) {
            const int n = size - i;
            V::store_n(values + i, V::canonical(V::fma(factor, V::load_n(x + i, n), V::load_n(values + i, n))), n);
        }
    }

    static void rope(float* head, const float* cosine, const float* sine, int pairs) {
        int i = 0;
        for (; i + kLanes <= pairs; i += kLanes) {
            const F first = V::load(head + i);
            const F second = V::load(head + pairs + i);
            const F c = V::load(cosine + i);
            const F s = V::load(sine + i);
            V::store(head + i, V::canonical(V::fms(first, c, V::mul(second, s))));
            V::store(head + pairs + i, V::canonical(V::fma(second, c, V::mul(first, s))));
        }
        if (i < pairs) {
            const int n = pairs - i;
            const F first = V::load_n(head + i, n);
            const F second = V::load_n(head + pairs + i, n);
            const F c = V::load_n(cosine + i, n);
            const F s = V::load_n(sine + i, n);
            V::store_n(head + i, V::canonical(V::fms(first, c, V::mul(second, s))), n);
            V::store_n(head + pairs + i, V::canonical(V::fma(second, c, V::mul(first, s))), n);
        }
    }
};

}  // namespace edgemoe
