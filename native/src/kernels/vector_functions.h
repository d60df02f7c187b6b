// Functions of 16 lanes that several kernels use.
#pragma once

#include "function_constants.h"
#include "vector.h"

namespace edgemoe {

template <class V>
struct VectorFunctions {
    using F = typename V::F;
    using I = typename V::I;

    static constexpr float kInfinity = __builtin_inff();

    static float nan() { return __builtin_nanf(""); }

    static EDGEMOE_INLINE F exp_of(F x) {
        using namespace exponential;
        x = V::unless_below(x, V::set1(kLow), V::set1(kZero));
        x = V::unless_above(x, V::set1(kHigh), V::set1(kInfinite));
        const F t = V::fma(x, V::set1(kInverseLn2), V::set1(kMagic));
        const F n = V::sub(t, V::set1(kMagic));
        const I integer = V::sub_i(V::bits(t), V::set1_i(kMagicBits));
        const F r = V::fma(n, V::set1(-kLn2Low), V::fma(n, V::set1(-kLn2High), x));
        F p = V::set1(kC5);
        p = V::fma(p, r, V::set1(kC4));
        p = V::fma(p, r, V::set1(kC3));
        p = V::fma(p, r, V::set1(kC2));
        p = V::fma(p, r, V::set1(kC1));
        p = V::fma(p, r, V::set1(kC0));
        p = V::add(V::fma(p, V::mul(r, r), r), V::set1(1.0f));
        const I half = V::template shift_right<1>(integer);
        const I bias = V::set1_i(127);
        const F first = V::floats(V::template shift_left<23>(V::add_i(half, bias)));
        const F second = V::floats(V::template shift_left<23>(V::add_i(V::sub_i(integer, half), bias)));
        return V::mul(V::mul(p, first), second);
    }

    static EDGEMOE_INLINE float exp_of(float x) { return V::first(exp_of(V::set1(x))); }

    // log(1 + exp(x))
    static EDGEMOE_INLINE F softplus(F x) {
        using namespace logarithm;
        const F e = exp_of(V::sub(V::zero(), V::floats(V::magnitudes(x))));
        F p = V::set1(kC[kTerms - 1]);
        EDGEMOE_UNROLL
        for (int i = kTerms - 2; i >= 0; --i) p = V::fma(p, e, V::set1(kC[i]));
        return V::add(V::max(V::zero(), x), V::mul(e, V::fma(p, e, V::set1(1.0f))));
    }

    // x / (1 + exp(-z))
    static EDGEMOE_INLINE F gated(F x, F z) { return V::div(x, V::add(V::set1(1.0f), exp_of(V::sub(V::zero(), z)))); }

    // x rounded to integers, half to even, for |x| < 2^22.
    static EDGEMOE_INLINE I round(F x) {
        return V::sub_i(V::bits(V::add(x, V::set1(exponential::kMagic))), V::set1_i(exponential::kMagicBits));
    }

    static EDGEMOE_INLINE float as_float(int32_t bits) {
        float value;
        __builtin_memcpy(&value, &bits, sizeof value);
        return value;
    }
};

}  // namespace edgemoe
