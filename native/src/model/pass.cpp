#include "model/pass.h"

#include <algorithm>

namespace edgemoe {

void Pass::Buffers::place(Places& places, const ModelSpec& model, int rows) {
    const size_t stream = size_t(rows) * model.hidden_size;
    places.place(x, stream);
    places.place(normed, stream);
    places.place(projected, stream);
    size_t half_bytes = 0, ahead_bytes = 0;
    for (const LayerSpec& layer : model.layers) {
        const auto [feed_forward, expected] = half_buffer_bytes(model, layer, rows);
        const size_t mixer = mixer_kind(layer.attention.kind).buffer_bytes(layer.attention, rows);
        half_bytes = std::max({half_bytes, feed_forward, mixer});
        ahead_bytes = std::max(ahead_bytes, expected);
    }
    places.place(half, half_bytes);
    places.place(ahead, ahead_bytes);
}

size_t Pass::buffer_bytes(const ModelSpec& model, int rows) {
    Places measured;
    Buffers{}.place(measured, model, rows);
    return measured.used();
}

BackendSizes Pass::backend_sizes(const ModelSpec& model, int rows) {
    BackendSizes sizes{.rows = rows, .input_groups = column_groups(model.hidden_size), .ropes = model.ropes};
    for (const LayerSpec& layer : model.layers) {
        const AttentionSpec& a = layer.attention;
        sizes.input_groups =
            std::max({sizes.input_groups, column_groups(a.heads * a.value_dim), mixer_kind(a.kind).input_groups(a)});
        const size_t pairs = size_t(rows) * std::max(layer.top_k, 1);
        sizes.inner_groups = std::max(
            {sizes.inner_groups, pairs * column_groups(layer.ffn_dim), rows * column_groups(layer.shared_dim)});
        sizes.heads = std::max(sizes.heads, a.heads);
        sizes.experts = std::max(sizes.experts, layer.experts);
    }
    return sizes;
}

Pass::Pass(const Setting& setting, Weights& weights, Backend& backend, ExpertStore* store)
    : model_(setting.model), backend_(backend) {
    const int hidden = model_.hidden_size, rows = setting.rows;
    Places places(backend.allocate(buffer_bytes(model_, rows)));
    buffers_.place(places, model_, rows);
    embedding_ = weights.matrix("embedding", model_.vocab_size, hidden);
    head_ = {model_.tied_embeddings ? embedding_ : weights.matrix("head", model_.vocab_size, hidden),
             {},
             model_.logits_divisor,
             model_.logits_softcap};
    if (model_.head_bias) head_.bias = weights.vector("head_bias", model_.vocab_size);
    final_norm_ = load_norm(model_, weights, "final_norm", hidden);
    layers_.reserve(model_.layers.size());
    for (int number = 0; number < static_cast<int>(model_.layers.size()); ++number) {
        const LayerSpec& spec = model_.layers[number];
        const AttentionSpec& a = spec.attention;
        LayerWeights own(model_, weights, number);
        Layer& layer = layers_.emplace_back();
        layer.mixer_norm = own.norm("attention_norm", hidden);
        layer.mixer = mixer_kind(a.kind).load({model_, a, number, setting.key_type, setting.value_type}, own, rows,
                                              buffers_.half);
        layer.output = own.matrix("o", hidden, a.heads * a.value_dim);
        if (a.output_bias) layer.output_bias = own.vector("o_bias", hidden);
        if (spec.output_norms) layer.output_norm = own.norm("attention_output_norm", hidden);
        layer.half_norm = own.norm("ffn_norm", hidden);
        layer.half = load_half({model_, spec, number, layer.half_norm, setting.index, store}, own,
                               {rows, buffers_.half, buffers_.ahead});
        if (spec.output_scale) layer.output_scale = own.vector("output_scale", 1);
    }
}

void Pass::mix(const Layer& layer, int count) {
    const Floats projected = buffers_.projected;
    backend_.normalize(layer.mixer_norm, buffers_.x, count, buffers_.normed);
    const ConstFloats mixed = layer.mixer->run(backend_, buffers_.normed, count);
    backend_.product({&layer.output, 1}, mixed, count, {&projected, 1});
    if (layer.output_bias) backend_.add_vector(layer.output_bias, projected, model_.hidden_size, count);
    if (layer.output_norm) backend_.normalize(layer.output_norm, projected, count, projected);
    backend_.add(model_.residual_multiplier, projected, buffers_.x, model_.hidden_size, count);
}

void Pass::run(const Chunk& chunk, LayerRange layers, Observer* observer, EngineCounters& counters, float* logits,
               const std::function<void()>& check) {
    const Floats x = buffers_.x;
    const int count = chunk.rows.count(), hidden = model_.hidden_size;
    const int last_layer = static_cast<int>(layers_.size()) - 1;
    const auto wanted_count = static_cast<int>(chunk.wanted.size());
    // The last layer's feed-forward half changes nothing but logits: rows that nobody wants logits of need not go
    // through it, unless somebody watches.
    const auto takes_wanted_only = [&](int layer) { return layer == last_layer && !observer; };
    std::vector<const Quality*> wanted_qualities;
    for (const int32_t row : chunk.wanted) wanted_qualities.push_back(chunk.qualities[row]);

    backend_.begin(chunk.rows);
    if (observer) observer->begin(count);
    backend_.embed(embedding_, model_.embedding_multiplier, x);
    for (int number = layers.first; number < layers.end; ++number) {
        const Layer& layer = layers_[number];
        check();
        mix(layer, count);
        int active = count;
        if (takes_wanted_only(number)) {
            active = wanted_count;
            if (active == 0) break;
            backend_.gather(x, chunk.wanted, hidden, x);
        }
        backend_.normalize(layer.half_norm, x, active, buffers_.normed);
        HalfInput input{.x = x,
                        .normed = buffers_.normed,
                        .count = active,
                        .steps = std::min(chunk.steps, active),
                        .qualities = takes_wanted_only(number) ? std::span<const Quality* const>(wanted_qualities)
                                                               : chunk.qualities,
                        .observer = observer,
                        .counters = counters,
                        .next = nullptr,
                        .next_rows = {}};
        int next = number + 1;
        while (next < layers.end && !model_.layers[next].experts) ++next;
        if (next < layers.end) {
            input.next = layers_[next].half.get();
            if (takes_wanted_only(next)) input.next_rows = chunk.wanted;
        }
        layer.half->run(backend_, input);
        if (layer.output_scale) backend_.scale(layer.output_scale, x, hidden, active);
        if (observer && observer->wants_residuals())
            observer->residual(number, backend_.read(ConstFloats(x), size_t(count) * hidden));
    }
    if (wanted_count > 0) {
        if (!takes_wanted_only(layers.end - 1)) backend_.gather(x, chunk.wanted, hidden, x);
        backend_.normalize(final_norm_, x, wanted_count, buffers_.normed);
        backend_.head(head_, buffers_.normed, wanted_count, logits);
    }
    if (observer) observer->finish();
}

}  // namespace edgemoe
