// The reference: plain C++, no vector instructions. The other tables equal it byte by byte.
//
// Results that are NaN are written as the one canonical NaN, because which operand's NaN an instruction passes on
// depends on the order a compiler puts the operands in.
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>

#include "exp.h"
#include "ggml_formats.h"
#include "half.h"
#include "nested_format.h"
#include "tables.h"

namespace edgemoe {
namespace {

using Lanes = std::array<float, kLanes>;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
const float kNan = std::bit_cast<float>(0x7FC00000u);

float canonical(float x) { return x == x ? x : kNan; }

// The vector instructions' maximum: the second operand where they are unordered or equal.
float maximum_of(float a, float b) { return a > b ? a : b; }
float minimum_of(float a, float b) { return a < b ? a : b; }

uint16_t load_u16(const std::byte* data, size_t index) {
    uint16_t value;
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

float load_f32(const std::byte* data, size_t index) {
    float value;
    std::memcpy(&value, data + index * sizeof value, sizeof value);
    return value;
}

template <class T>
void store(std::byte* data, size_t index, T value) {
    std::memcpy(data + index * sizeof value, &value, sizeof value);
}

float exp_of(float x) {
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
float softplus(float x) {
    const float e = exp_of(0.0f - std::fabs(x));
    float p = logarithm::kC[logarithm::kTerms - 1];
    for (int i = logarithm::kTerms - 2; i >= 0; --i) p = std::fma(p, e, logarithm::kC[i]);
    return maximum_of(0.0f, x) + e * std::fma(p, e, 1.0f);
}

float fold_sum(Lanes lanes) {
    for (int width = kLanes / 2; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
    return lanes[0];
}

float fold_max(Lanes lanes) {
    for (int width = kLanes / 2; width >= 1; width /= 2)
        for (int i = 0; i < width; ++i) lanes[i] = maximum_of(lanes[i], lanes[i + width]);
    return lanes[0];
}

// Bits of the largest magnitude; a NaN's are above infinity's, those above every finite one's.
uint32_t largest_magnitude(const float* x, int count) {
    uint32_t largest = 0;
    for (int i = 0; i < count; ++i) {
        const uint32_t magnitude = std::bit_cast<uint32_t>(x[i]) & 0x7FFFFFFFu;
        if (magnitude > largest) largest = magnitude;
    }
    return largest;
}

// --- products -------------------------------------------------------------------------------------------------------

float float_weight(Layout layout, const std::byte* data, size_t index) {
    if (layout == Layout::f32) return load_f32(data, index);
    const uint16_t bits = load_u16(data, index);
    return layout == Layout::bf16 ? float_from_bf16(bits) : float_from_half(bits);
}

void float_product(const Matrix& matrix, const std::byte* block, const float* x, Lanes& sums) {
    for (int column = 0; column < matrix.cols; ++column)
        for (int row = 0; row < kRowBlock; ++row) {
            const float weight = float_weight(matrix.layout, block, static_cast<size_t>(column) * kRowBlock + row);
            sums[row] = std::fma(weight, x[column], sums[row]);
        }
}

int code_of(Layout layout, const std::byte* group, int row, int column) {
    const auto* codes = reinterpret_cast<const uint8_t*>(group);
    if (layout == Layout::q8g64) return codes[column / 4 * 64 + 4 * row + column % 4];
    const int byte = codes[column / 8 * 64 + 4 * row + column % 4];
    return column % 8 < 4 ? byte & 15 : byte >> 4;
}

void quantized_product(const Matrix& matrix, const std::byte* block, const int8_t* codes, const float* scales,
                       const float* x_sums, Lanes& sums) {
    const int groups = (matrix.cols + kGroup - 1) / kGroup;
    const size_t code_bytes = matrix.layout == Layout::q8g64 ? kQ8Codes : kQ4Codes;
    for (int g = 0; g < groups; ++g) {
        const std::byte* group = block + static_cast<size_t>(g) * (code_bytes + kGroupParameters);
        for (int row = 0; row < kRowBlock; ++row) {
            int32_t dot = 0;
            for (int column = 0; column < kGroup; ++column)
                dot += code_of(matrix.layout, group, row, column) * codes[g * kGroup + column];
            const float scale = float_from_half(load_u16(group + code_bytes, row));
            const float offset = float_from_half(load_u16(group + code_bytes, kRowBlock + row));
            sums[row] = std::fma(scale * scales[g], static_cast<float>(dot), sums[row]);
            sums[row] = std::fma(offset, x_sums[g], sums[row]);
        }
    }
}

void matmul(const Matrix& matrix, const Activations& x, std::span<const int32_t> tokens, int count, int first_block,
            int last_block, float* out, ptrdiff_t out_stride) {
    if (matrix.layout == Layout::nested)
        return nested_matmul_scalar(matrix, x, tokens, count, first_block, last_block, out, out_stride);
    if (is_ggml(matrix.layout))
        return ggml_matmul_scalar(matrix, x, tokens, count, first_block, last_block, out, out_stride);
    const size_t groups = (static_cast<size_t>(matrix.cols) + kGroup - 1) / kGroup;
    const size_t bytes = block_bytes(matrix.layout, matrix.cols);
    const bool quantized = matrix.layout == Layout::q8g64 || matrix.layout == Layout::q4g64;
    for (int block = first_block; block < last_block; ++block) {
        const std::byte* data = matrix.data + block * bytes;
        for (int i = 0; i < count; ++i) {
            const auto token = static_cast<size_t>(tokens.empty() ? i : tokens[i]);
            Lanes sums{};
            if (quantized)
                quantized_product(matrix, data, x.codes + token * groups * kGroup, x.scales + token * groups,
                                  x.sums + token * groups, sums);
            else
                float_product(matrix, data, x.values + static_cast<ptrdiff_t>(token) * x.value_stride, sums);
            for (int row = 0; row < kRowBlock && block * kRowBlock + row < matrix.rows; ++row)
                out[i * out_stride + block * kRowBlock + row] = canonical(sums[row]);
        }
    }
}

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
        const float inverse = 127.0f / magnitude;
        if (magnitude < kLeastMagnitude) {
            scales[g] = sums[g] = 0.0f;
            continue;
        }
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

// --- element-wise ---------------------------------------------------------------------------------------------------

void rms_norm(std::span<const float> x, const float* weight, float epsilon, float* out) {
    Lanes squares{};
    for (size_t i = 0; i < x.size(); ++i) squares[i % kLanes] = std::fma(x[i], x[i], squares[i % kLanes]);
    const float mean = fold_sum(squares) / static_cast<float>(x.size());
    const float inverse = 1.0f / std::sqrt(mean + epsilon);
    for (size_t i = 0; i < x.size(); ++i) out[i] = canonical(x[i] * inverse * weight[i]);
}

void silu_multiply(std::span<const float> gate, const float* up, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) {
        const float value = gate[i];
        out[i] = canonical(value / (1.0f + exp_of(0.0f - value)) * up[i]);
    }
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

void softcap(float cap, std::span<float> x) {
    for (float& value : x) {
        const float t = value / cap;
        value = canonical((1.0f - 2.0f / (1.0f + exp_of(t + t))) * cap);
    }
}

void sigmoid_multiply(std::span<const float> gate, const float* x, float* out) {
    for (size_t i = 0; i < gate.size(); ++i) out[i] = canonical(x[i] * (1.0f / (1.0f + exp_of(0.0f - gate[i]))));
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
        x[i] = exp_of(x[i] - maximum);
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

// --- keys, values, attention ----------------------------------------------------------------------------------------

// One group of kKvGroup elements as q8_0; returns the float16 scale.
uint16_t quantize_kv(const float* x, int8_t* codes) {
    std::memset(codes, 0, kKvGroup);
    const uint32_t largest = largest_magnitude(x, kKvGroup);
    if (largest >= 0x7F800000u) return 0x7E00;
    const uint16_t half = half_from_float(std::bit_cast<float>(largest) / 127.0f);
    if (half == 0x7C00) return 0x7E00;
    if (half == 0) return 0;
    const float scale = float_from_half(half);
    for (int i = 0; i < kKvGroup; ++i) {
        const float ratio = minimum_of(127.0f, maximum_of(-127.0f, x[i] / scale));
        codes[i] = static_cast<int8_t>(std::lrint(ratio));
    }
    return half;
}

// Element `d` of a vector goes to place d * stride + start of a block.
void store_vector(KvType type, std::span<const float> x, size_t stride, size_t start, size_t scale_stride,
                  size_t scale_start, std::byte* block) {
    const size_t dim = x.size();
    if (type == KvType::q8_0) {
        std::byte* scales = block + dim * kKvBlock;
        for (size_t g = 0; g < dim / kKvGroup; ++g) {
            int8_t codes[kKvGroup];
            store(scales, g * scale_stride + scale_start, quantize_kv(x.data() + g * kKvGroup, codes));
            for (size_t i = 0; i < kKvGroup; ++i) store(block, (g * kKvGroup + i) * stride + start, codes[i]);
        }
        return;
    }
    for (size_t d = 0; d < dim; ++d) {
        if (type == KvType::f32)
            store(block, d * stride + start, x[d]);
        else
            store(block, d * stride + start, half_from_float(x[d]));
    }
}

// Block `number` of a sequence: its keys, with its values behind them.
std::byte* kv_block(const KvBlocks& blocks, int number) {
    return blocks.pool + static_cast<size_t>(blocks.table[number]) * blocks.stride;
}

void store_key(KvType type, std::span<const float> key, int position, const KvBlocks& blocks) {
    const size_t slot = position % kKvBlock;
    store_vector(type, key, kKvBlock, slot, kKvBlock, slot, kv_block(blocks, position / kKvBlock));
}

void store_value(KvType type, std::span<const float> value, int position, const KvBlocks& blocks) {
    const size_t slot = position % kKvBlock;
    store_vector(type, value, 1, slot * value.size(), 1, slot * (value.size() / kKvGroup),
                 kv_block(blocks, position / kKvBlock) + blocks.values);
}

// An element whose place in the block is `index`, and its scale's place among the scales `scale_index`.
float kv_element(KvType type, const std::byte* block, int dim, size_t index, size_t scale_index) {
    if (type == KvType::f32) return load_f32(block, index);
    if (type == KvType::f16) return float_from_half(load_u16(block, index));
    const auto code = static_cast<int8_t>(block[index]);
    return static_cast<float>(code) *
           float_from_half(load_u16(block + static_cast<size_t>(dim) * kKvBlock, scale_index));
}

float key_element(KvType type, const std::byte* keys, int dim, int slot, int d) {
    return kv_element(type, keys, dim, static_cast<size_t>(d) * kKvBlock + slot,
                      static_cast<size_t>(d / kKvGroup) * kKvBlock + slot);
}

// `value_of(slot, d)` is an element of a value; the accumulator has value_dim of them.
template <class Value>
void attend_head(KvType key_type, const float* query, int dim, int value_dim, float scale, const std::byte* keys,
                 const Value& value_of, int begin, int end, float* maximum, float* sum, float* accumulator) {
    std::array<float, kKvBlock> scores;
    scores.fill(-kInfinity);
    for (int slot = begin; slot < end; ++slot) {
        float score = 0.0f;
        for (int d = 0; d < dim; ++d) score = std::fma(query[d], key_element(key_type, keys, dim, slot, d), score);
        scores[slot] = score * scale;
    }
    Lanes largest;
    largest.fill(-kInfinity);
    for (int slot = 0; slot < kKvBlock; ++slot)
        largest[slot % kLanes] = maximum_of(largest[slot % kLanes], scores[slot]);
    const float old_maximum = *maximum;
    const float new_maximum = maximum_of(old_maximum, fold_max(largest));
    const float correction = old_maximum == -kInfinity ? 0.0f : exp_of(old_maximum - new_maximum);

    Lanes total{};
    for (int slot = 0; slot < kKvBlock; ++slot) {
        scores[slot] = slot >= begin && slot < end ? exp_of(scores[slot] - new_maximum) : 0.0f;
        total[slot % kLanes] += scores[slot];
    }
    *maximum = canonical(new_maximum);
    *sum = canonical(std::fma(*sum, correction, fold_sum(total)));
    for (int d = 0; d < value_dim; ++d) {
        float element = accumulator[d] * correction;
        for (int slot = begin; slot < end; ++slot) element = std::fma(scores[slot], value_of(slot, d), element);
        accumulator[d] = canonical(element);
    }
}

// Calls step(keys, begin, end) for each block that has positions of [begin, end), with their slots in it.
template <class Step>
void each_block(const KvBlocks& blocks, int begin, int end, const Step& step) {
    while (begin < end) {
        const int number = begin / kKvBlock, first = number * kKvBlock;
        step(kv_block(blocks, number), begin - first, end - first < kKvBlock ? end - first : kKvBlock);
        begin = first + kKvBlock;
    }
}

void attend(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
            const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
    each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
        const auto value_of = [&](int slot, int d) {
            return kv_element(value_type, keys + blocks.values, dim, static_cast<size_t>(slot) * dim + d,
                              static_cast<size_t>(slot) * (dim / kKvGroup) + d / kKvGroup);
        };
        for (int head = 0; head < heads; ++head)
            attend_head(key_type, queries + static_cast<ptrdiff_t>(head) * dim, dim, dim, scale, keys, value_of, first,
                        last, maximum + head, sum + head, accumulator + static_cast<ptrdiff_t>(head) * dim);
    });
}

void attend_latent(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                   const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
    each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
        const auto value_of = [&](int slot, int d) { return key_element(type, keys, dim, slot, d); };
        for (int head = 0; head < heads; ++head)
            attend_head(type, queries + static_cast<ptrdiff_t>(head) * dim, dim, value_dim, scale, keys, value_of,
                        first, last, maximum + head, sum + head,
                        accumulator + static_cast<ptrdiff_t>(head) * value_dim);
    });
}

// --- convolutions and recurrences -----------------------------------------------------------------------------------

void convolve(const Matrix& weights, const float* const* rows, int first_block, int last_block, bool silu, float* out) {
    const size_t taps = weights.cols;
    for (int channel = first_block * kRowBlock; channel < last_block * kRowBlock && channel < weights.rows; ++channel) {
        const std::byte* block = weights.data + channel / kRowBlock * block_bytes(Layout::f32, weights.cols);
        float sum = 0.0f;
        for (size_t tap = 0; tap < taps; ++tap)
            if (rows[tap])
                sum = std::fma(load_f32(block, tap * kRowBlock + channel % kRowBlock), rows[tap][channel], sum);
        out[channel] = canonical(silu ? sum / (1.0f + exp_of(0.0f - sum)) : sum);
    }
}

void gated_delta(float* state, int key_dim, int value_dim, const float* query, const float* key, const float* value,
                 float decay, float beta, float* out) {
    for (int v = 0; v < value_dim; ++v) {
        float memory = 0.0f;
        for (int k = 0; k < key_dim; ++k) memory = std::fma(state[k * value_dim + v] * decay, key[k], memory);
        const float delta = (value[v] - memory) * beta;
        float sum = 0.0f;
        for (int k = 0; k < key_dim; ++k) {
            float& element = state[k * value_dim + v];
            element = canonical(std::fma(key[k], delta, element * decay));
            sum = std::fma(element, query[k], sum);
        }
        out[v] = canonical(sum);
    }
}

}  // namespace

constinit const Kernels kScalarKernels = {
    .name = "scalar",
    .matmul = matmul,
    .quantize = quantize,
    .rms_norm = rms_norm,
    .layer_norm = layer_norm,
    .silu_multiply = silu_multiply,
    .gelu_multiply = gelu_multiply,
    .clamped_swiglu = clamped_swiglu,
    .sigmoid = sigmoid,
    .softcap = softcap,
    .softplus_decay = softplus_decay,
    .softmax = softmax,
    .add_scaled = add_scaled,
    .rope = rope,
    .store_key = store_key,
    .store_value = store_value,
    .attend = attend,
    .attend_latent = attend_latent,
    .sigmoid_multiply = sigmoid_multiply,
    .convolve = convolve,
    .gated_delta = gated_delta,
};

}  // namespace edgemoe
