// Keys and values in their blocks, and attention over them.
#include <stdexcept>
#include <string>

#include "half.h"
#include "scalar.h"

namespace edgemoe {

size_t kv_block_bytes(KvType type, int dim) {
    const size_t elements = static_cast<size_t>(dim) * kKvBlock;
    switch (type) {
        case KvType::f32:
            return elements * sizeof(float);
        case KvType::f16:
            return elements * sizeof(uint16_t);
        case KvType::q8_0:
            return elements + elements / kKvGroup * sizeof(uint16_t);
    }
    throw std::invalid_argument("unknown cache type number " + std::to_string(static_cast<int>(type)));
}

}  // namespace edgemoe

namespace edgemoe::scalar {
namespace {

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

// An element whose place in the block is `index`, and its scale's place among the scales `scale_index`.
float kv_element(KvType type, const std::byte* block, int dim, size_t index, size_t scale_index) {
    if (type == KvType::f32) return load_f32(block, index);
    if (type == KvType::f16) return float_from_half(load_u16(block, index));
    const auto code = static_cast<int8_t>(block[index]);
    return static_cast<float>(code) *
           float_from_half(load_u16(block + static_cast<size_t>(dim) * kKvBlock, scale_index));
}

float key_element(KvType type, const std::byte* keys, int dim, int place, int d) {
    return kv_element(type, keys, dim, static_cast<size_t>(d) * kKvBlock + place,
                      static_cast<size_t>(d / kKvGroup) * kKvBlock + place);
}

// `value_of(place, d)` is an element of a value; the accumulator has value_dim of them.
template <class Value>
void attend_head(KvType key_type, const float* query, int dim, int value_dim, float scale, const std::byte* keys,
                 const Value& value_of, int begin, int end, float* maximum, float* sum, float* accumulator) {
    std::array<float, kKvBlock> scores;
    scores.fill(-kInfinity);
    for (int place = begin; place < end; ++place) {
        float score = 0.0f;
        for (int d = 0; d < dim; ++d) score = std::fma(query[d], key_element(key_type, keys, dim, place, d), score);
        scores[place] = score * scale;
    }
    Lanes largest;
    largest.fill(-kInfinity);
    for (int place = 0; place < kKvBlock; ++place)
        largest[place % kLanes] = maximum_of(largest[place % kLanes], scores[place]);
    const float old_maximum = *maximum;
    const float new_maximum = maximum_of(old_maximum, fold_max(largest));
    const float correction = old_maximum == -kInfinity ? 0.0f : exp_of(old_maximum - new_maximum);

    Lanes total{};
    for (int place = 0; place < kKvBlock; ++place) {
        scores[place] = place >= begin && place < end ? exp_of(scores[place] - new_maximum) : 0.0f;
        total[place % kLanes] += scores[place];
    }
    *maximum = canonical(new_maximum);
    *sum = canonical(std::fma(*sum, correction, fold_sum(total)));
    for (int d = 0; d < value_dim; ++d) {
        float element = accumulator[d] * correction;
        for (int place = begin; place < end; ++place) element = std::fma(scores[place], value_of(place, d), element);
        accumulator[d] = canonical(element);
    }
}

// Calls step(keys, begin, end) for each block that has positions of [begin, end), with their places in it.
template <class Step>
void each_block(const KvBlocks& blocks, int begin, int end, const Step& step) {
    while (begin < end) {
        const int number = begin / kKvBlock, first = number * kKvBlock;
        step(kv_block(blocks, number), begin - first, end - first < kKvBlock ? end - first : kKvBlock);
        begin = first + kKvBlock;
    }
}

}  // namespace

void store_key(KvType type, std::span<const float> key, int position, const KvBlocks& blocks) {
    const size_t place = position % kKvBlock;
    store_vector(type, key, kKvBlock, place, kKvBlock, place, kv_block(blocks, position / kKvBlock));
}

void store_value(KvType type, std::span<const float> value, int position, const KvBlocks& blocks) {
    const size_t place = position % kKvBlock;
    store_vector(type, value, 1, place * value.size(), 1, place * (value.size() / kKvGroup),
                 kv_block(blocks, position / kKvBlock) + blocks.values);
}

void attend(KvType key_type, KvType value_type, const float* queries, int heads, int dim, float scale,
            const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
    each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
        const auto value_of = [&](int place, int d) {
            return kv_element(value_type, keys + blocks.values, dim, static_cast<size_t>(place) * dim + d,
                              static_cast<size_t>(place) * (dim / kKvGroup) + d / kKvGroup);
        };
        for (int head = 0; head < heads; ++head)
            attend_head(key_type, queries + static_cast<ptrdiff_t>(head) * dim, dim, dim, scale, keys, value_of, first,
                        last, maximum + head, sum + head, accumulator + static_cast<ptrdiff_t>(head) * dim);
    });
}

void attend_latent(KvType type, const float* queries, int heads, int dim, int value_dim, float scale,
                   const KvBlocks& blocks, int begin, int end, float* maximum, float* sum, float* accumulator) {
    each_block(blocks, begin, end, [&](const std::byte* keys, int first, int last) {
        const auto value_of = [&](int place, int d) { return key_element(type, keys, dim, place, d); };
        for (int head = 0; head < heads; ++head)
            attend_head(type, queries + static_cast<ptrdiff_t>(head) * dim, dim, value_dim, scale, keys, value_of,
                        first, last, maximum + head, sum + head,
                        accumulator + static_cast<ptrdiff_t>(head) * value_dim);
    });
}

}  // namespace edgemoe::scalar
