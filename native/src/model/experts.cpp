// The feed-forward part of a mixture of experts: each expert is computed when it is in memory.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "engine_parts.h"

namespace edgemoe {

void Engine::expert_ffn(int number, int count) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const LayerSpec& spec = spec_.layers[number];
    const int hidden = spec_.hidden_size, ffn = spec.ffn_dim, top_k = spec.top_k;
    const size_t per_pair = groups(ffn);

    route(number, count);

    // Pairs of (token, slot) by expert. Experts are asked for in the order of their tokens, most first; for a single
    // token that is its slot order, the router's first choice first.
    std::vector<int32_t> begins(spec.experts + 1, 0);
    for (int pair = 0; pair < count * top_k; ++pair) ++begins[s.picks[pair] + 1];
    std::vector<int32_t> active;
    for (int pair = 0; pair < count * top_k; ++pair) {
        const int32_t expert = s.picks[pair];
        if (begins[expert + 1] > 0) {
            active.push_back(expert);
            begins[expert + 1] = -begins[expert + 1];
        }
    }
    std::stable_sort(active.begin(), active.end(),
                     [&](int32_t left, int32_t right) { return begins[left + 1] < begins[right + 1]; });
    for (int32_t& begin : begins) begin = std::abs(begin);
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<int32_t> cursor(begins.begin(), begins.end() - 1);
    for (int pair = 0; pair < count * top_k; ++pair) {
        const int32_t place = cursor[s.picks[pair]]++;
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
        needs.push_back({expert, s.tokens[begins[expert + 1] - 1], begins[expert + 1] - begins[expert]});
    ExpertStream stream(*store_, number, count, needs);
    if (recording_) {
        const size_t width = routing_column(static_cast<int>(layers_.size())), column = routing_column(number);
        for (int pair = 0; pair < count * top_k; ++pair) {
            const size_t place = pair / top_k * width + column + pair % top_k;
            chunk_routing_.picks[place] = static_cast<uint16_t>(s.picks[pair]);
            chunk_routing_.weights[place] = s.weights[pair];
        }
    }
    if (store_->wants_hints() || recording_) predict(number, count);
    if (spec.shared_dim) shared_expert(number, count);  // while missing experts are read
    if (layer.expert_norm) normalize(layer.expert_norm, s.x, count, s.normed);
    const std::array<Matrix, 2> inner{layer.gate, layer.up};
    const Activations input = prepare(s.normed, count, hidden, inner);
    // The hidden activations lie in the order of `pairs`: an expert's rows are contiguous.
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};
    for (auto ready = stream.next(); !ready.empty(); ready = stream.next()) {
        work.clear();
        int gate_items = 0, down_items = 0;
        for (const ExpertStream::Item& item : ready) {
            const int32_t expert = active[item.position];
            Work w{};
            w.expert = expert;
            w.gate = layer.gate;
            w.up = layer.up;
            w.down = layer.down;
            w.gate.data = item.weights.gate;
            w.up.data = item.weights.up;
            w.down.data = item.weights.down;
            w.first = begins[expert];
            w.count = begins[expert + 1] - begins[expert];
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
