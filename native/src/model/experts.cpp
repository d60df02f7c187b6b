// The feed-forward part of a mixture of experts: each expert is computed when it is in memory.
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {

namespace {

// A matrix of an expert that works at a level, with what is in memory of it.
Matrix at_level(const Matrix& shape, const std::array<const std::byte*, kMaxLevels>& data, int level) {
    Matrix matrix = shape;
    matrix.data = data[0];
    if (matrix.layout == Layout::nested) {
        matrix.levels.count = level + 1;
        matrix.levels.data = data;
    }
    return matrix;
}

}  // namespace

// The level each of a token's experts [top_k] works at. HOBBIT (arXiv 2411.01433) measures how little an expert matters
// by the share of the router's weight that those before it have; unlike there, nothing depends on what is in memory.
// Without thresholds `weights` is not read.
void Engine::choose_levels(const Layer& layer, int top_k, const int32_t* experts, const float* weights,
                           int32_t* levels) const {
    float total = 0;
    for (int slot = 0; !options_.thresholds.empty() && slot < top_k; ++slot) total += weights[slot];
    for (int slot = 0; slot < top_k; ++slot) {
        int level = layer.finest[experts[slot]];
        if (!options_.thresholds.empty()) {
            // Slots stand in descending order of what the router chose them by, which need not be the weight.
            float before = 0;
            for (int other = 0; other < top_k; ++other)
                if (weights[other] > weights[slot] || (weights[other] == weights[slot] && other < slot))
                    before += weights[other];
            for (const float threshold : options_.thresholds) level -= before / total > threshold;
        }
        levels[slot] = std::clamp(level, 0, options_.level_cap);
    }
}

void Engine::expert_ffn(int number, int count, std::span<const int32_t> wanted) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const LayerSpec& spec = spec_.layers[number];
    const int hidden = spec_.hidden_size, ffn = spec.ffn_dim, top_k = spec.top_k;
    const size_t per_pair = groups(ffn);

    route(number, count);
    each_token(count, [&](int t) {
        choose_levels(layer, top_k, s.picks + t * top_k, s.weights + t * top_k, s.levels + t * top_k);
    });

    // Pairs of (token, slot) by expert and level. Experts are asked for in the order of their tokens, most first; for a
    // single token that is its slot order, the router's first choice first.
    const int levels = static_cast<int>(layer.bits.size());
    const auto group_of = [&](int pair) { return s.picks[pair] * levels + s.levels[pair]; };
    std::vector<int32_t> begins(size_t(spec.experts) * levels + 1, 0), uses(spec.experts, 0);
    std::vector<float> weights(size_t(spec.experts) * levels, 0.0f);
    std::vector<int32_t> active;
    for (int pair = 0; pair < count * top_k; ++pair) {
        if (uses[s.picks[pair]]++ == 0) active.push_back(s.picks[pair]);
        ++begins[group_of(pair) + 1];
        weights[group_of(pair)] += s.weights[pair];
        counters_.expert_bits += static_cast<uint64_t>(layer.bits[s.levels[pair]]);
    }
    counters_.expert_uses += static_cast<uint64_t>(count) * top_k;
    std::stable_sort(active.begin(), active.end(),
                     [&](int32_t left, int32_t right) { return uses[left] > uses[right]; });
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<int32_t> cursor(begins.begin(), begins.end() - 1);
    for (int pair = 0; pair < count * top_k; ++pair) {
        const int32_t place = cursor[group_of(pair)]++;
        s.pairs[place] = pair;
        s.tokens[place] = pair / top_k;
    }

    struct Work {
        int expert;
        Matrix gate, up, down;
        int first, count;  // rows of `pairs`
        int gate_item, down_item;
        int gate_step, down_step;  // row blocks per item
    };
    std::vector<Work> work;
    std::vector<ExpertStream::Need> needs;
    for (const int32_t expert : active)
        for (int level = 0; level < levels; ++level) {
            const int group = expert * levels + level;
            const int first = begins[group], end = begins[group + 1];
            if (first < end) needs.push_back({expert, level, s.tokens[end - 1], end - first, weights[group]});
        }
    ExpertStream stream(*store_, number, count, needs);
    if (recording_) {
        const size_t width = routing_column(static_cast<int>(layers_.size())), column = routing_column(number);
        for (int pair = 0; pair < count * top_k; ++pair) {
            const size_t place = pair / top_k * width + column + pair % top_k;
            chunk_routing_.picks[place] = static_cast<uint16_t>(s.picks[pair]);
            chunk_routing_.weights[place] = s.weights[pair];
        }
    }
    if (!pass_ && (store_->wants_hints() || recording_)) predict(number, count, wanted);
    if (spec.shared_dim) shared_expert(number, count);  // while missing experts are read
    if (layer.expert_norm) normalize(layer.expert_norm, s.x, count, s.normed);
    if (pass_) {
        std::copy_n(s.normed, size_t(count) * hidden, pass_->inputs);
        std::copy_n(s.picks, size_t(count) * top_k, pass_->picks);
        std::copy_n(s.weights, size_t(count) * top_k, pass_->weights);
    }
    const std::array<Matrix, 2> inner{layer.gate, layer.up};
    const Activations input = prepare(s.normed, count, hidden, inner);
    // The hidden activations lie in the order of `pairs`: an expert's rows are contiguous.
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};
    for (auto ready = stream.next(); !ready.empty(); ready = stream.next()) {
        work.clear();
        int gate_items = 0, down_items = 0;
        for (const ExpertStream::Item& item : ready) {
            const ExpertStream::Need& need = needs[item.position];
            const int group = need.expert * levels + need.level;
            Work w{};
            w.expert = need.expert;
            w.gate = at_level(layer.gate, item.weights.parts[0], need.level);
            w.up = at_level(layer.up, item.weights.parts[1], need.level);
            w.down = at_level(layer.down, item.weights.parts[2], need.level);
            w.first = begins[group];
            w.count = begins[group + 1] - begins[group];
            // Whole groups of rows, so that each item can quantize what it made for the next product.
            constexpr int kGroupBlocks = kGroup / kRowBlock;
            w.gate_step = std::max(blocks_per_item(w.gate, w.count) / 2 / kGroupBlocks, 1) * kGroupBlocks;
            w.down_step = blocks_per_item(w.down, w.count);
            w.gate_item = gate_items;
            w.down_item = down_items;
            gate_items += (blocks(ffn) + w.gate_step - 1) / w.gate_step;
            down_items += (blocks(hidden) + w.down_step - 1) / w.down_step;
            work.push_back(w);
        }
        pool_.run(gate_items, [&](int item) {
            size_t i = work.size() - 1;
            while (work[i].gate_item > item) --i;
            const Work& w = work[i];
            const int first = (item - w.gate_item) * w.gate_step, last = std::min(first + w.gate_step, blocks(ffn));
            const std::span<const int32_t> tokens(s.tokens + w.first, w.count);
            kernels_.matmul(w.gate, input, tokens, w.count, first, last, s.gate + size_t(w.first) * ffn, ffn);
            kernels_.matmul(w.up, input, tokens, w.count, first, last, s.up + size_t(w.first) * ffn, ffn);
            const size_t begin = size_t(first) * kRowBlock, size = std::min<size_t>(last * kRowBlock, ffn) - begin;
            for (int p = w.first; p < w.first + w.count; ++p) {
                const std::span<float> row{s.gate + size_t(p) * ffn + begin, size};
                const std::span<float> other{s.up + size_t(p) * ffn + begin, size};
                if (layer.gate_bias) {
                    kernels_.add_scaled(1.0f, layer.gate_bias + size_t(w.expert) * ffn + begin, row);
                    kernels_.add_scaled(1.0f, layer.up_bias + size_t(w.expert) * ffn + begin, other);
                }
                activate(spec, row, other.data());
                if (reads_codes(w.down.layout)) {
                    const size_t group = p * per_pair + begin / kGroup;
                    kernels_.quantize(row, s.hidden.codes + group * kGroup, s.hidden.scales + group,
                                      s.hidden.sums + group);
                }
            }
        });
        pool_.run(down_items, [&](int item) {
            size_t i = work.size() - 1;
            while (work[i].down_item > item) --i;
            const Work& w = work[i];
            const int first = (item - w.down_item) * w.down_step, last = std::min(first + w.down_step, blocks(hidden));
            Activations rows = hidden_input;
            rows.values += size_t(w.first) * ffn;
            rows.codes += w.first * per_pair * kGroup;
            rows.scales += w.first * per_pair;
            rows.sums += w.first * per_pair;
            kernels_.matmul(w.down, rows, {}, w.count, first, last, s.outputs + size_t(w.first) * hidden, hidden);
        });
    }

    // Each token adds its experts' outputs in slot order, whenever they were computed: to the residual stream, or where
    // norms come between, to a sum of their own. `tokens` has served its purpose and takes the inverse of `pairs`.
    for (int place = 0; place < count * top_k; ++place) s.tokens[s.pairs[place]] = place;
    if (pass_)
        each_token(count, [&](int t) {
            for (int pair = t * top_k; pair < (t + 1) * top_k; ++pair) {
                const float* output = s.outputs + size_t(s.tokens[pair]) * hidden;
                float peak = 0, energy = 0;
                for (int i = 0; i < hidden; ++i) {
                    peak = std::max(peak, std::abs(output[i]));
                    energy += output[i] * output[i];
                }
                pass_->peaks[pair] = peak;
                pass_->energies[pair] = energy;
                std::copy_n(s.gate + size_t(s.tokens[pair]) * ffn, ffn, pass_->hidden + size_t(pair) * ffn);
            }
        });
    const bool direct = !layer.expert_output_norm && !layer.ffn_output_norm;
    const float scale = direct ? spec_.residual_multiplier : 1.0f;
    each_token(count, [&](int t) {
        const std::span<float> sum{(direct ? s.x : s.projected) + size_t(t) * hidden, size_t(hidden)};
        if (!direct) std::ranges::fill(sum, 0.0f);
        if (spec.shared_dim && !layer.shared_output_norm)
            kernels_.add_scaled(scale, s.shared + size_t(t) * hidden, sum);
        for (int slot = 0; slot < top_k; ++slot) {
            const int pair = t * top_k + slot;
            kernels_.add_scaled(scale * s.weights[pair], s.outputs + size_t(s.tokens[pair]) * hidden, sum);
            if (layer.down_bias)
                kernels_.add_scaled(scale * s.weights[pair], layer.down_bias + size_t(s.picks[pair]) * hidden, sum);
        }
    });
    if (direct) return;
    if (layer.expert_output_norm) normalize(layer.expert_output_norm, s.projected, count, s.projected);
    if (layer.shared_output_norm) {
        normalize(layer.shared_output_norm, s.shared, count, s.shared);
        each_token(count, [&](int t) {
            const size_t row = size_t(t) * hidden;
            kernels_.add_scaled(1.0f, s.shared + row, {s.projected + row, size_t(hidden)});
        });
    }
    add_to_stream(s.projected, layer.ffn_output_norm, count);
}

}  // namespace edgemoe
