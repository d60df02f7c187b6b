// Every instruction set against the scalar reference, byte by byte: random inputs of all magnitudes, odd sizes, tails.
#include "edgemoe/kernels.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>

#include "check.h"

namespace edgemoe {

#if defined(EDGEMOE_AVXVNNI_EVEX)
extern const Kernels kAvxVnniEvexKernels;  // avxvnni_evex.cpp
#endif

namespace tests {
namespace {

constexpr Layout kLayouts[] = {Layout::f32,         Layout::bf16,      Layout::f16,       Layout::q8g64,
                               Layout::q4g64,       Layout::ggml_q4_0, Layout::ggml_q4_1, Layout::ggml_q5_0,
                               Layout::ggml_q5_1,   Layout::ggml_q8_0, Layout::ggml_q2_k, Layout::ggml_q3_k,
                               Layout::ggml_q4_k,   Layout::ggml_q5_k, Layout::ggml_q6_k, Layout::ggml_iq4_nl,
                               Layout::ggml_iq4_xs, Layout::ggml_mxfp4};

// Columns of which a row must have a multiple.
int block_columns(Layout layout) {
    if (!is_ggml(layout)) return 1;
    const bool super = (layout >= Layout::ggml_q2_k && layout <= Layout::ggml_q6_k) || layout == Layout::ggml_iq4_xs;
    return super ? 256 : 32;
}

// Normal numbers, or (wild) numbers of all magnitudes, special values and any bit patterns.
void fill(Random& random, std::span<float> values, bool wild) {
    constexpr float infinity = std::numeric_limits<float>::infinity();
    constexpr std::array special{0.0f,   -0.0f, infinity, -infinity, std::nanf(""), 1e-45f,  -1e-45f,
                                 1e-38f, 3e38f, -3e38f,   65504.0f,  65520.0f,      2.9e-8f, 1.0f};
    std::normal_distribution<float> normal;
    for (float& value : values) {
        value = normal(random);
        if (!wild) continue;
        const int kind = pick(random, 0, 15);
        if (kind == 0)
            value = special[random() % special.size()];
        else if (kind == 1)
            value = std::bit_cast<float>(static_cast<uint32_t>(random()));
        else if (kind < 8)
            value = std::ldexp(value, pick(random, -140, 126));
    }
}

Aligned<float> floats(Random& random, size_t size, bool wild) {
    Aligned<float> values(size);
    fill(random, values.span(), wild);
    return values;
}

Aligned<std::byte> noise(Random& random, size_t size) {
    Aligned<std::byte> bytes(size);
    for (std::byte& byte : bytes.span()) byte = static_cast<std::byte>(random());
    return bytes;
}

std::string describe(std::string_view isa, std::string_view what, std::initializer_list<int> numbers) {
    std::string text = std::string(isa) + " " + std::string(what);
    for (const int number : numbers) text.append(" ").append(std::to_string(number));
    return text;
}

void compare_products(const Kernels& kernels, const Kernels& reference, Random& random, Layout layout, bool wild) {
    const int columns = block_columns(layout);
    const int rows = pick(random, 1, 90);
    const int cols = columns == 1 ? pick(random, 1, 260) : columns * pick(random, 1, columns == 256 ? 2 : 9);
    const int tokens = pick(random, 1, 27), groups = (cols + kGroup - 1) / kGroup;
    const auto matrix_data = noise(random, matrix_bytes(layout, rows, cols));
    if (!wild) {
        if (layout == Layout::f32)
            fill(random, {reinterpret_cast<float*>(matrix_data.data()), matrix_data.size() / 4}, false);
        // The top bits of exponents off: no infinities, no NaN where there are halves.
        else
            for (std::byte& byte : matrix_data.span()) byte &= std::byte{0xBF};
    }
    const Matrix matrix{layout, rows, cols, matrix_data.data()};
    const auto x = floats(random, static_cast<size_t>(tokens) * cols, wild && pick(random, 0, 1));
    Aligned<int8_t> codes(static_cast<size_t>(tokens) * groups * kGroup);
    Aligned<float> scales(static_cast<size_t>(tokens) * groups), sums(static_cast<size_t>(tokens) * groups);
    for (int t = 0; t < tokens; ++t)
        reference.quantize({x.data() + t * cols, static_cast<size_t>(cols)}, codes.data() + t * groups * kGroup,
                           scales.data() + t * groups, sums.data() + t * groups);
    const Activations input{x.data(), cols, codes.data(), scales.data(), sums.data()};
    std::vector<int32_t> chosen(static_cast<size_t>(pick(random, 0, 1) * pick(random, 1, 30)));
    for (int32_t& token : chosen) token = pick(random, 0, tokens - 1);
    const int count = chosen.empty() ? tokens : static_cast<int>(chosen.size());
    const int blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int first = pick(random, 0, 1) * pick(random, 0, blocks - 1), last = pick(random, first + 1, blocks);
    const int stride = rows + pick(random, 0, 5);
    Aligned<float> expected(static_cast<size_t>(count) * stride), actual(static_cast<size_t>(count) * stride);
    reference.matmul(matrix, input, chosen, count, first, last, expected.data(), stride);
    kernels.matmul(matrix, input, chosen, count, first, last, actual.data(), stride);
    check_same(expected, actual,
               describe(kernels.name, "product", {static_cast<int>(layout), rows, cols, count, first, last}));
}

// The first levels of a nested matrix, of any widths that make up at most 8 bits.
void compare_nested(const Kernels& kernels, const Kernels& reference, Random& random, bool wild) {
    const int rows = pick(random, 1, 80), cols = pick(random, 1, 700), tokens = pick(random, 1, 19);
    const int groups = (cols + kGroup - 1) / kGroup;
    Matrix matrix{Layout::nested, rows, cols, nullptr};
    std::vector<Aligned<std::byte>> levels;
    // Every other time the widths that products are written for.
    if (pick(random, 0, 1)) {
        matrix.levels.bits = {2, 1, 1};
        matrix.levels.count = pick(random, 1, 3);
    } else {
        for (int left = pick(random, 1, 8); left > 0; left -= matrix.levels.bits[matrix.levels.count++])
            matrix.levels.bits[matrix.levels.count] = static_cast<uint8_t>(pick(random, 1, left));
    }
    matrix.levels.later = pick(random, matrix.levels.count - 1, 8 - matrix.levels.bits[0]);
    for (int level = 0; level < matrix.levels.count; ++level) {
        const std::string number = std::to_string(matrix.levels.bits[level]),
                          name =
                              level ? "refine" + number : "base" + number + "r" + std::to_string(matrix.levels.later);
        levels.push_back(noise(random, stored_bytes(stored_layout(name), rows, cols)));
        matrix.levels.data[level] = levels.back().data();
    }
    // The top bit of exponents, which is this one of some bytes, off: no infinities, no NaN among the scales.
    if (!wild)
        for (std::byte& byte : levels[0].span()) byte &= std::byte{0xBF};
    const auto x = floats(random, static_cast<size_t>(tokens) * cols, false);
    Aligned<int8_t> codes(static_cast<size_t>(tokens) * groups * kGroup);
    Aligned<float> scales(static_cast<size_t>(tokens) * groups), sums(static_cast<size_t>(tokens) * groups);
    for (int t = 0; t < tokens; ++t)
        reference.quantize({x.data() + t * cols, static_cast<size_t>(cols)}, codes.data() + t * groups * kGroup,
                           scales.data() + t * groups, sums.data() + t * groups);
    const Activations input{x.data(), cols, codes.data(), scales.data(), sums.data()};
    const auto product = [&](const Kernels& k) {
        Aligned<float> out(static_cast<size_t>(tokens) * rows);
        k.matmul(matrix, input, {}, tokens, 0, (rows + kRowBlock - 1) / kRowBlock, out.data(), rows);
        return out;
    };
    check_same(
        product(reference), product(kernels),
        describe(kernels.name, "nested product", {matrix.levels.count, matrix.levels.later, rows, cols, tokens}));
}

void compare_vectors(const Kernels& kernels, const Kernels& reference, Random& random, bool wild) {
    const auto size = static_cast<size_t>(pick(random, 1, 200));
    const int number = static_cast<int>(size), groups = (number + kGroup - 1) / kGroup;
    const auto x = floats(random, size, wild), y = floats(random, size, wild);
    const float a = floats(random, 1, wild)[0];
    const auto what = [&](std::string_view name) { return describe(kernels.name, name, {number}); };
    const auto same = [&](std::string_view name, auto&& run) {
        Aligned<float> expected(size), actual(size);
        std::memcpy(expected.data(), y.data(), size * sizeof(float));
        std::memcpy(actual.data(), y.data(), size * sizeof(float));
        run(reference, expected);
        run(kernels, actual);
        check_same(expected, actual, what(name));
    };
    same("rms_norm", [&](const Kernels& k, Aligned<float>& out) { k.rms_norm(x.span(), y.data(), 1e-6f, out.data()); });
    same("silu_multiply",
         [&](const Kernels& k, Aligned<float>& out) { k.silu_multiply(x.span(), y.data(), out.data()); });
    same("layer_norm",
         [&](const Kernels& k, Aligned<float>& out) { k.layer_norm(x.span(), y.data(), x.data(), 1e-5f, out.data()); });
    same("gelu_multiply",
         [&](const Kernels& k, Aligned<float>& out) { k.gelu_multiply(x.span(), y.data(), out.data()); });
    same("clamped_swiglu", [&](const Kernels& k, Aligned<float>& out) {
        k.clamped_swiglu(x.span(), y.data(), 1.702f, 7.0f, out.data());
    });
    same("sigmoid_multiply",
         [&](const Kernels& k, Aligned<float>& out) { k.sigmoid_multiply(x.span(), out.data(), out.data()); });
    same("sigmoid", [&](const Kernels& k, Aligned<float>& out) { k.sigmoid(out.span()); });
    same("softcap", [&](const Kernels& k, Aligned<float>& out) { k.softcap(30.0f, out.span()); });
    same("softplus_decay",
         [&](const Kernels& k, Aligned<float>& out) { k.softplus_decay(out.span(), x.data(), y.data()); });
    same("softmax", [&](const Kernels& k, Aligned<float>& out) { k.softmax(out.span()); });
    same("add_scaled", [&](const Kernels& k, Aligned<float>& out) { k.add_scaled(a, x.data(), out.span()); });
    same("rope",
         [&](const Kernels& k, Aligned<float>& out) { k.rope(out.data(), x.data(), x.data() + size / 2, number / 2); });

    Aligned<int8_t> codes(groups * kGroup), other_codes(groups * kGroup);
    Aligned<float> scales(groups), other_scales(groups), sums(groups), other_sums(groups);
    reference.quantize(x.span(), codes.data(), scales.data(), sums.data());
    kernels.quantize(x.span(), other_codes.data(), other_scales.data(), other_sums.data());
    check_same(codes, other_codes, what("quantize, codes"));
    check_same(scales, other_scales, what("quantize, scales"));
    check_same(sums, other_sums, what("quantize, sums"));
}

// Some blocks of one sequence, somewhere in a pool, with room between them that belongs to others. Entries of the table
// for blocks that are not there must not be read: they name places far outside of it.
struct Blocks {
    Blocks(Random& random, size_t keys, size_t values, int begin, int end)
        : stride((keys + values) * static_cast<size_t>(pick(random, 1, 3))), table(end / kKvBlock + 3) {
        std::vector<int32_t> places(table.size());
        for (size_t i = 0; i < places.size(); ++i) places[i] = static_cast<int32_t>(i);
        std::ranges::shuffle(places, random);
        for (size_t n = 0; n < table.size(); ++n) {
            const int first = static_cast<int>(n) * kKvBlock;
            table[n] = first + kKvBlock > begin && first < end ? places[n] : std::numeric_limits<int32_t>::min() / 2;
        }
        size = stride * (table.size() - 1) + keys + values;
        this->values = keys;
    }
    KvBlocks in(const Aligned<std::byte>& pool) const { return {pool.data(), stride, values, table.data()}; }

    size_t stride, values = 0, size = 0;
    std::vector<int32_t> table;
};

void compare_attention(const Kernels& kernels, const Kernels& reference, Random& random, KvType key_type,
                       KvType value_type, bool wild) {
    const bool grouped = key_type == KvType::q8_0 || value_type == KvType::q8_0;
    const int dim = grouped ? kKvGroup * pick(random, 1, 4) : pick(random, 1, 140), heads = pick(random, 1, 13);
    const auto size = static_cast<size_t>(dim);
    const int end = pick(random, 1, 3 * kKvBlock), begin = pick(random, 0, 1) * pick(random, 0, end - 1);
    const Blocks blocks(random, kv_block_bytes(key_type, dim), kv_block_bytes(value_type, dim), begin, end);
    const Aligned<std::byte> pool(blocks.size), other_pool(blocks.size);
    for (int position = begin; position < end; ++position) {
        const auto x = floats(random, size, wild && position % 8 == 3);
        for (const auto& [k, p] : {std::pair{&reference, &pool}, std::pair{&kernels, &other_pool}}) {
            k->store_key(key_type, x.span(), position, blocks.in(*p));
            k->store_value(value_type, x.span(), position, blocks.in(*p));
        }
    }
    check(std::memcmp(pool.data(), other_pool.data(), pool.size()) == 0,
          describe(kernels.name, "store_key or store_value", {dim, begin, end}));

    const auto queries = floats(random, size * heads, wild && pick(random, 0, 3) == 0);
    const int middle = pick(random, begin, end - 1);
    const auto run = [&](const Kernels& k) {
        // maximum, sum, accumulator
        Aligned<float> state(static_cast<size_t>(heads) * (2 + dim));
        for (size_t i = 0; i < state.size(); ++i)
            state[i] = i < static_cast<size_t>(heads) ? -std::numeric_limits<float>::infinity() : 0.0f;
        for (const int from : {begin, middle})
            k.attend(key_type, value_type, queries.data(), heads, dim, 0.3f, blocks.in(pool), from, end, state.data(),
                     state.data() + heads, state.data() + 2 * heads);
        return state;
    };
    check_same(run(reference), run(kernels), describe(kernels.name, "attend", {dim, heads, begin, end}));
}

void compare_latent_attention(const Kernels& kernels, const Kernels& reference, Random& random, KvType type,
                              bool wild) {
    const int dim = type == KvType::q8_0 ? kKvGroup * pick(random, 1, 5) : pick(random, 1, 150);
    const int value_dim = pick(random, 1, dim), heads = pick(random, 1, 9);
    const int end = pick(random, 1, 3 * kKvBlock), begin = pick(random, 0, 1) * pick(random, 0, end - 1);
    const Blocks blocks(random, kv_block_bytes(type, dim), 0, begin, end);
    const Aligned<std::byte> pool(blocks.size);
    for (int position = begin; position < end; ++position)
        reference.store_key(type, floats(random, static_cast<size_t>(dim), wild && position % 8 == 3).span(), position,
                            blocks.in(pool));
    const auto queries = floats(random, static_cast<size_t>(dim) * heads, false);
    const int middle = pick(random, begin, end - 1);
    const auto run = [&](const Kernels& k) {
        // maximum, sum, accumulator
        Aligned<float> state(static_cast<size_t>(heads) * (2 + value_dim));
        for (size_t i = 0; i < state.size(); ++i)
            state[i] = i < static_cast<size_t>(heads) ? -std::numeric_limits<float>::infinity() : 0.0f;
        for (const int from : {begin, middle})
            k.attend_latent(type, queries.data(), heads, dim, value_dim, 0.3f, blocks.in(pool), from, end, state.data(),
                            state.data() + heads, state.data() + 2 * heads);
        return state;
    };
    check_same(run(reference), run(kernels), describe(kernels.name, "attend_latent", {dim, value_dim, heads}));
}

// The scalar reference itself: the steps of a walk over blocks are those of each block alone, wherever it lies.
void check_walk() {
    const Kernels& kernels = select_kernels("scalar");
    Random random(2);
    constexpr int dim = 24, heads = 3, end = 3 * kKvBlock - 5;
    for (const int begin : {0, 63, 64, 70, 130}) {
        const Blocks blocks(random, kv_block_bytes(KvType::f32, dim), kv_block_bytes(KvType::f32, dim), begin, end);
        const Aligned<std::byte> pool(blocks.size), straight(blocks.size);
        std::vector<int32_t> order(blocks.table.size());
        for (size_t n = 0; n < order.size(); ++n) order[n] = static_cast<int32_t>(n);
        const KvBlocks plain{straight.data(), blocks.stride, blocks.values, order.data()};
        for (int position = begin; position < end; ++position) {
            const auto x = floats(random, dim, false);
            for (const KvBlocks& place : {blocks.in(pool), plain}) {
                kernels.store_key(KvType::f32, x.span(), position, place);
                kernels.store_value(KvType::f32, x.span(), position, place);
            }
        }
        const auto queries = floats(random, size_t{dim} * heads, false);
        const auto run = [&](const KvBlocks& place, bool stepwise) {
            Aligned<float> state(size_t{heads} * (2 + dim));
            for (size_t i = 0; i < state.size(); ++i)
                state[i] = i < heads ? -std::numeric_limits<float>::infinity() : 0.0f;
            for (int from = begin; from < end;) {
                const int to = stepwise ? std::min(from / kKvBlock * kKvBlock + kKvBlock, end) : end;
                kernels.attend(KvType::f32, KvType::f32, queries.data(), heads, dim, 0.3f, place, from, to,
                               state.data(), state.data() + heads, state.data() + 2 * heads);
                from = to;
            }
            return state;
        };
        const auto expected = run(plain, true);
        check_same(expected, run(blocks.in(pool), false), "a walk over blocks anywhere");
        check_same(expected, run(blocks.in(pool), true), "blocks one by one");
    }
}

void compare_recurrences(const Kernels& kernels, const Kernels& reference, Random& random, bool wild) {
    const int taps = pick(random, 1, 5), channels = pick(random, 1, 100), missing = pick(random, 0, taps);
    const auto data = floats(random, matrix_bytes(Layout::f32, channels, taps) / sizeof(float), wild);
    const Matrix weights{Layout::f32, channels, taps, reinterpret_cast<const std::byte*>(data.data())};
    std::vector<Aligned<float>> inputs;
    std::vector<const float*> rows;
    for (int tap = 0; tap < taps; ++tap) {
        inputs.push_back(floats(random, static_cast<size_t>(channels), wild));
        rows.push_back(tap < missing ? nullptr : inputs.back().data());
    }
    const auto convolved = [&](const Kernels& k) {
        Aligned<float> out(static_cast<size_t>(channels));
        k.convolve(weights, rows.data(), 0, (channels + kRowBlock - 1) / kRowBlock, taps % 2 == 0, out.data());
        return out;
    };
    check_same(convolved(reference), convolved(kernels), describe(kernels.name, "convolve", {taps, channels, missing}));

    const int key_dim = pick(random, 1, 70), value_dim = kLanes * pick(random, 1, 6);
    const auto start = floats(random, static_cast<size_t>(key_dim) * value_dim, wild);
    const auto query = floats(random, static_cast<size_t>(key_dim), wild);
    const auto key = floats(random, static_cast<size_t>(key_dim), wild);
    const auto value = floats(random, static_cast<size_t>(value_dim), wild);
    const auto advanced = [&](const Kernels& k) {
        Aligned<float> state(start.size() + value_dim);  // and the output
        std::memcpy(state.data(), start.data(), start.size() * sizeof(float));
        k.gated_delta(state.data(), key_dim, value_dim, query.data(), key.data(), value.data(), 0.9f, 0.4f,
                      state.data() + start.size());
        return state;
    };
    check_same(advanced(reference), advanced(kernels), describe(kernels.name, "gated_delta", {key_dim, value_dim}));
}

// Exponentials around where they become 0 or infinity, and scales of activations around where they become 0: none is
// subnormal.
void check_nothing_is_subnormal(const Kernels& kernels) {
    const auto check_all = [&](std::span<const float> values, const char* what) {
        for (const float value : values)
            check(std::fpclassify(value) != FP_SUBNORMAL, describe(kernels.name, what, {}) + " is subnormal");
    };
    for (const float middle : {87.33654f, 88.72284f, 103.9f})
        for (const float sign : {1.0f, -1.0f}) {
            Aligned<float> x(4001);
            float value = sign * middle;
            for (int i = 0; i < 2000; ++i) value = std::nextafter(value, 0.0f);
            for (float& each : x.span()) each = value = std::nextafter(value, sign * 200);
            Aligned<float> sigmoid(x.size()), decay(x.size()), bias(x.size()), one(x.size());
            std::ranges::copy(x.span(), sigmoid.data());
            std::ranges::copy(x.span(), decay.data());
            std::ranges::fill(bias.span(), 0.0f);
            std::ranges::fill(one.span(), -1.0f);
            kernels.sigmoid(sigmoid.span());
            kernels.softplus_decay(decay.span(), bias.data(), one.data());
            check_all(sigmoid.span(), "sigmoid");
            check_all(decay.span(), "softplus_decay");
        }
    Aligned<float> shares(8192);
    for (size_t i = 0; i < shares.size(); ++i) shares[i] = i % 8 ? -60.0f - static_cast<float>(i % 4096) / 128 : 0.0f;
    kernels.softmax(shares.span());
    check_all(shares.span(), "softmax");
    check(std::ranges::count(shares.span(), 0.0f) > 4000 && shares[1] > 0, "softmax leaves out too much or too little");
    for (float magnitude = 2e-36f; magnitude > 1e-38f; magnitude *= 0.99f) {
        std::array<float, kGroup> x{};
        x[7] = magnitude;
        x[9] = -magnitude / 2;
        std::array<int8_t, kGroup> codes;
        float scale, sum;
        kernels.quantize(x, codes.data(), &scale, &sum);
        check_all({{scale, sum}}, "the scale of activations");
        check(scale > 0 ? codes[7] == 127 : codes[7] == 0, describe(kernels.name, "codes without a scale", {}));
    }
}

// All codes and activations at their extremes: sums that 16 bits might not hold.
void compare_extremes(const Kernels& kernels, const Kernels& reference, Layout layout) {
    constexpr int rows = kRowBlock, cols = 256, tokens = 5, groups = cols / kGroup;
    for (const unsigned pattern : {0x00u, 0xFFu, 0x7Fu, 0x80u}) {
        Aligned<std::byte> data(matrix_bytes(layout, rows, cols));
        for (std::byte& byte : data.span()) byte = static_cast<std::byte>(pattern);
        Aligned<float> x(size_t{tokens} * cols);
        for (size_t i = 0; i < x.size(); ++i) x[i] = i / cols % 2 ? -127.0f : 127.0f;
        Aligned<int8_t> codes(size_t{tokens} * cols);
        Aligned<float> scales(size_t{tokens} * groups), sums(size_t{tokens} * groups);
        for (int t = 0; t < tokens; ++t)
            reference.quantize({x.data() + t * cols, cols}, codes.data() + t * cols, scales.data() + t * groups,
                               sums.data() + t * groups);
        // With scales of NaN nothing could be seen: finite halves where the parameters lie.
        if (layout == Layout::q8g64 || layout == Layout::q4g64)
            for (size_t group = data.size() / groups, g = 0; g < groups; ++g)
                for (size_t i = 0; i < 64; ++i) data[(g + 1) * group - 64 + i] = std::byte{0x20};
        else if (is_ggml(layout))
            for (size_t i = data.size() * 3 / 4; pattern != 0 && i < data.size(); ++i) data[i] &= std::byte{0xBF};
        const Matrix matrix{layout, rows, cols, data.data()};
        const Activations input{x.data(), cols, codes.data(), scales.data(), sums.data()};
        Aligned<float> expected(size_t{tokens} * rows), actual(size_t{tokens} * rows);
        reference.matmul(matrix, input, {}, tokens, 0, 1, expected.data(), rows);
        kernels.matmul(matrix, input, {}, tokens, 0, 1, actual.data(), rows);
        check_same(expected, actual, describe(kernels.name, "extremes of layout", {static_cast<int>(layout)}));
        for (int t = 0; t < tokens; ++t) {
            Aligned<float> alone(rows), row(rows);
            const Activations token{x.data() + t * cols, cols, codes.data() + t * cols, scales.data() + t * groups,
                                    sums.data() + t * groups};
            kernels.matmul(matrix, token, {}, 1, 0, 1, alone.data(), rows);
            std::memcpy(row.data(), expected.data() + t * rows, rows * sizeof(float));
            check_same(row, alone, describe(kernels.name, "extremes of one token", {static_cast<int>(layout)}));
        }
    }
}

void compare_with_scalar(const Kernels& kernels, const char* name) {
    const Kernels& reference = select_kernels("scalar");
    check_nothing_is_subnormal(kernels);
    Random random(1);
    for (const Layout layout : kLayouts) {
        for (int round = 0; round < 24; ++round) compare_products(kernels, reference, random, layout, round % 3 == 0);
        compare_extremes(kernels, reference, layout);
    }
    for (int round = 0; round < 100; ++round) compare_vectors(kernels, reference, random, round % 2 == 0);
    for (int round = 0; round < 60; ++round) compare_nested(kernels, reference, random, round % 4 == 0);
    for (int round = 0; round < 30; ++round) compare_recurrences(kernels, reference, random, round % 2 == 0);
    for (const KvType type : {KvType::f32, KvType::f16, KvType::q8_0})
        for (int round = 0; round < 12; ++round)
            compare_latent_attention(kernels, reference, random, type, round % 2 == 0);
    constexpr KvType types[] = {KvType::f32, KvType::f16, KvType::q8_0};
    for (const KvType key_type : types)
        for (const KvType value_type : types)
            for (int round = 0; round < 8; ++round)
                compare_attention(kernels, reference, random, key_type, value_type, round % 2 == 0);
    std::printf("kernels: %s equals scalar\n", name);
}

}  // namespace

void test_kernels() {
    check_walk();
    check_nothing_is_subnormal(select_kernels("scalar"));
    const auto isas = available_isas();
    for (const std::string_view isa : isas)
        if (isa != "scalar") compare_with_scalar(select_kernels(isa), std::string(isa).c_str());
#if defined(EDGEMOE_AVXVNNI_EVEX)
    if (std::ranges::count(isas, "avx512vnni")) compare_with_scalar(kAvxVnniEvexKernels, "avxvnni, as AVX-512,");
#endif
    check_throws<std::invalid_argument>([] { select_kernels("sse9"); }, "an unknown instruction set");
}

}  // namespace tests
}  // namespace edgemoe
