// Convolutions and recurrences; recurrence_scalar.cpp is the reference.
#pragma once

#include "vector_functions.h"

namespace edgemoe {

template <class V>
struct RecurrenceKernels {
    using F = typename V::F;
    using Functions = VectorFunctions<V>;

    static void convolve(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu,
                         float* out) {
        const int taps = weights.cols;
        for (int block = first_block; block < last_block; ++block) {
            const auto* data =
                reinterpret_cast<const float*>(weights.data) + static_cast<ptrdiff_t>(block) * taps * kLanes;
            const ptrdiff_t channel = static_cast<ptrdiff_t>(block) * kRowBlock;
            const int n = weights.rows - channel < kLanes ? static_cast<int>(weights.rows - channel) : kLanes;
            F sum = V::zero();
            for (int tap = 0; tap < taps; ++tap)
                if (rows[tap]) sum = V::fma(V::load(data + tap * kLanes), V::load_n(rows[tap] + channel, n), sum);
            if (silu) sum = V::div(sum, V::add(V::set1(1.0f), Functions::exp_of(V::sub(V::zero(), sum))));
            V::store_n(out + channel, V::canonical(sum), n);
        }
    }

    // Columns v .. v + 16 * N - 1 of the state.
    template <int N>
    static EDGEMOE_INLINE void gated_delta_columns(float* state, int key_dim, int value_dim, const float* query,
                                                   const float* key, const float* value, F decay, F beta, float* out) {
        F memory[N], sums[N];
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) memory[c] = sums[c] = V::zero();
        for (int k = 0; k < key_dim; ++k) {
            const float* row = state + static_cast<ptrdiff_t>(k) * value_dim;
            const F factor = V::set1(key[k]);
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) memory[c] = V::fma(V::mul(V::load(row + c * kLanes), decay), factor, memory[c]);
        }
        F delta[N];
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) delta[c] = V::mul(V::sub(V::load(value + c * kLanes), memory[c]), beta);
        for (int k = 0; k < key_dim; ++k) {
            float* row = state + static_cast<ptrdiff_t>(k) * value_dim;
            const F factor = V::set1(key[k]), asked = V::set1(query[k]);
            EDGEMOE_UNROLL
            for (int c = 0; c < N; ++c) {
                const F element = V::fma(factor, delta[c], V::mul(V::load(row + c * kLanes), decay));
                const F stored = V::canonical(element);
                V::store(row + c * kLanes, stored);
                sums[c] = V::fma(stored, asked, sums[c]);
            }
        }
        EDGEMOE_UNROLL
        for (int c = 0; c < N; ++c) V::store(out + c * kLanes, V::canonical(sums[c]));
    }

    static void gated_delta(float* state, int key_dim, int value_dim, const float* query, const float* key,
                            const float* value, float decay, float beta, float* out) {
        const F decays = V::set1(decay), betas = V::set1(beta);
        int v = 0;
        for (; v + 4 * kLanes <= value_dim; v += 4 * kLanes)
            gated_delta_columns<4>(state + v, key_dim, value_dim, query, key, value + v, decays, betas, out + v);
        for (; v < value_dim; v += kLanes)
            gated_delta_columns<1>(state + v, key_dim, value_dim, query, key, value + v, decays, betas, out + v);
    }
};

}  // namespace edgemoe
