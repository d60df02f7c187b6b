// Cosine and sine of rotary angles, in double precision. Two C libraries may differ in the last bit of theirs, and a
// token's logits with them; only sums, products and std::fma, which is exact everywhere, are used here.
#include <cmath>
#include <limits>

#include "edgemoe/kernels.h"

namespace edgemoe {
namespace {

// pi / 2 as the sum of two numbers; what is missing is below 2^-109.
constexpr double kHalfPiHigh = 0x1.921fb54442d18p+0, kHalfPiLow = 0x1.1a62633145c07p-54;
constexpr double kTwoOverPi = 0x1.45f306dc9c883p-1;
constexpr double kMagic = 0x1.8p+52;  // adding it rounds to an integer
// No float32 comes nearer to a multiple of pi / 2 than 2^-30 (Kahan). So up to this angle, what is left of it after the
// reduction is exact to one part in 2^36, and up to 2^31, which no context reaches, to one in 2^46.
constexpr double kLargestAngle = 0x1p+40;

struct Turn {
    double cosine, sine;
};

Turn turn(double angle) {
    if (!(std::fabs(angle) <= kLargestAngle)) {
        constexpr double nan = std::numeric_limits<double>::quiet_NaN();
        return {nan, nan};
    }
    const double quarters = (angle * kTwoOverPi + kMagic) - kMagic;
    const double r = std::fma(-quarters, kHalfPiLow, std::fma(-quarters, kHalfPiHigh, angle));
    // Taylor's series on [-pi / 4, pi / 4]: what is left out is below 2^-53 of the sum.
    const double z = r * r;
    double s = -1.0 / 1307674368000;  // 15!
    s = s * z + 1.0 / 6227020800;
    s = s * z - 1.0 / 39916800;
    s = s * z + 1.0 / 362880;
    s = s * z - 1.0 / 5040;
    s = s * z + 1.0 / 120;
    s = s * z - 1.0 / 6;
    s = r + r * z * s;
    double c = 1.0 / 20922789888000;  // 16!
    c = c * z - 1.0 / 87178291200;
    c = c * z + 1.0 / 479001600;
    c = c * z - 1.0 / 3628800;
    c = c * z + 1.0 / 40320;
    c = c * z - 1.0 / 720;
    c = c * z + 1.0 / 24;
    c = 1.0 + z * (c * z - 0.5);
    switch (static_cast<int64_t>(quarters) & 3) {
        case 0:
            return {c, s};
        case 1:
            return {-s, c};
        case 2:
            return {-c, -s};
        default:
            return {s, -c};
    }
}

}  // namespace

void rotary(std::span<const float> inverse_frequencies, int position, float factor, float* cosine, float* sine) {
    for (size_t pair = 0; pair < inverse_frequencies.size(); ++pair) {
        const float angle = static_cast<float>(position) * inverse_frequencies[pair];
        const Turn found = turn(angle);
        cosine[pair] = static_cast<float>(found.cosine) * factor;
        sine[pair] = static_cast<float>(found.sine) * factor;
    }
}

}  // namespace edgemoe
