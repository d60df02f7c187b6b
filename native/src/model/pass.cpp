#include "model/pass.h"

#include <algorithm>
#include <array>

namespace edgemoe {

void Pass::Buffers::place(Places& places, const ModelSpec& model, int rows, const DeviceShare& share, bool of_device) {
    const size_t stream = size_t(rows) * model.hidden_size;
    places.place(x, stream);
    places.place(normed, stream);
    places.place(projected, stream);
    size_t half_bytes = 0, ahead_bytes = 0;
    for (size_t number = 0; number < model.layers.size(); ++number) {
        const LayerSpec& layer = model.layers[number];
        if (share.mixers[number] == of_device)
            half_bytes = std::max(half_bytes, mixer_kind(layer.attention.kind).buffer_bytes(layer.attention, rows));
        if (share.halves[number] == of_device) {
            const auto [feed_forward, expected] = half_buffer_bytes(model, layer, rows);
            half_bytes = std::max(half_bytes, feed_forward);
            ahead_bytes = std::max(ahead_bytes, expected);
        } else if (!of_device) {
            half_bytes = std::max(half_bytes, host_buffer_bytes(model, layer, rows));
        }
    }
    places.place(half, half_bytes);
    places.place(ahead, ahead_bytes);
}

size_t Pass::buffer_bytes(const ModelSpec& model, int rows, const DeviceShare& share, bool of_device) {
    Places measured;
    Buffers{}.place(measured, model, rows, share, of_device);
    return measured.used();
}

bool Pass::is_of_mixer(const std::string& name) {
    constexpr std::array kOfHalves{"ffn_", "ffn.", "shared", "router", "selection_bias", "expert", "output_scale"};
    return std::ranges::none_of(kOfHalves, [&](const char* begin) { return name.starts_with(begin); });
}

BackendSizes Pass::backend_sizes(const ModelSpec& model, int rows) {
    BackendSizes sizes{.rows = rows,
                       .hidden = model.hidden_size,
                       .input_groups = column_groups(model.hidden_size),
                       .ropes = model.ropes};
    for (const LayerSpec& layer : model.layers) {
        const AttentionSpec& a = layer.attention;
        sizes.input_groups =
            std::max({sizes.input_groups, column_groups(a.heads * a.value_dim), mixer_kind(a.kind).input_groups(a)});
        const size_t pairs = size_t(rows) * std::max(layer.top_k, 1);
        sizes.inner_groups = std::max(
            {sizes.inner_groups, pairs * column_groups(layer.ffn_dim), rows * column_groups(layer.shared_dim)});
        if (a.kind == AttentionKind::mla)
            sizes.by_head = std::max(sizes.by_head, size_t(std::min(a.heads, kHeadsAtATime)) *
                                                        std::max({a.head_dim - a.rope_dim, a.kv_rank, a.value_dim}));
        sizes.heads = std::max(sizes.heads, a.heads);
        sizes.experts = std::max(sizes.experts, layer.experts);
    }
    return sizes;
}

Pass::Pass(const Setting& setting, Weights& weights, Backend& host, Backend* device, const DeviceShare& share,
           ExpertStore* store, DeviceTier* tier)
    : model_(setting.model), host_{&host}, device_{device} {
    const int hidden = model_.hidden_size, rows = setting.rows;
    for (Side* side : {&host_, &device_}) {
        if (!side->backend) continue;
        const bool of_device = side == &device_;
        Places places(side->backend->memory().allocate(buffer_bytes(model_, rows, share, of_device)));
        side->buffers.place(places, model_, rows, share, of_device);
    }
    const auto side_of = [&](bool of_device) { return of_device ? &device_ : &host_; };
    head_side_ = side_of(share.head);
    // Rows of the embedding are looked up on the host.
    const PlacedWeights whole(model_, weights, host.memory());
    embedding_ = whole.matrix("embedding", model_.vocab_size, hidden);
    Memory& memory = head_side_->backend->memory();
    const PlacedWeights last(model_, weights, memory);
    head_ = {embedding_, {}, model_.logits_divisor, model_.logits_softcap};
    if (!model_.tied_embeddings)
        head_.matrix = last.matrix("head", model_.vocab_size, hidden);
    else
        head_.matrix.data = memory.keep({embedding_.data, matrix_bytes(embedding_.layout, model_.vocab_size, hidden)});
    if (model_.head_bias) head_.bias = last.vector("head_bias", model_.vocab_size);
    final_norm_ = last.norm("final_norm", hidden);
    layers_.reserve(model_.layers.size());
    for (int number = 0; number < static_cast<int>(model_.layers.size()); ++number) {
        const LayerSpec& spec = model_.layers[number];
        const AttentionSpec& a = spec.attention;
        Layer& layer = layers_.emplace_back();
        layer.mixer_side = side_of(share.mixers[number]);
        layer.half_side = side_of(share.halves[number]);
        const PlacedWeights first(model_, weights, layer.mixer_side->backend->memory(), number),
            second(model_, weights, layer.half_side->backend->memory(), number);
        layer.mixer_norm = first.norm("attention_norm", hidden);
        layer.mixer = mixer_kind(a.kind).load({model_, a, number, setting.key_type, setting.value_type}, first, rows,
                                              layer.mixer_side->buffers.half);
        layer.output = first.matrix("o", hidden, a.heads * a.value_dim);
        if (a.output_bias) layer.output_bias = first.vector("o_bias", hidden);
        if (spec.output_norms) layer.output_norm = first.norm("attention_output_norm", hidden);
        layer.half_norm = second.norm("ffn_norm", hidden);
        const Buffers& buffers = layer.half_side->buffers;
        layer.half = load_half(
            {*layer.half_side->backend, host, model_, spec, number, layer.half_norm, setting.index, store, tier},
            second, {rows, buffers.half, buffers.ahead, host_.buffers.half});
        if (spec.output_scale) layer.output_scale = second.vector("output_scale", 1);
    }
}

void Pass::mix(const Layer& layer, int count) {
    Backend& backend = *layer.mixer_side->backend;
    const Buffers& buffers = layer.mixer_side->buffers;
    const Floats projected = buffers.projected;
    backend.normalize(layer.mixer_norm, buffers.x, count, buffers.normed);
    const ConstFloats mixed = layer.mixer->run(backend, buffers.normed, count);
    backend.product({&layer.output, 1}, mixed, count, {&projected, 1});
    if (layer.output_bias) backend.add_vector(layer.output_bias, projected, model_.hidden_size, count);
    if (layer.output_norm) backend.normalize(layer.output_norm, projected, count, projected);
    backend.add(model_.residual_multiplier, projected, buffers.x, model_.hidden_size, count);
}

void Pass::go_on(Side*& from, Side& to, int count) const {
    if (from == &to) return;
    const size_t size = size_t(count) * model_.hidden_size;
    from->backend->take(from->buffers.x, size, *to.backend, to.buffers.x);
    from = &to;
}

void Pass::run(const Chunk& chunk, LayerRange layers, Observer* observer, EngineCounters& counters, float* logits,
               const std::function<void()>& check) {
    const int count = chunk.rows.count(), hidden = model_.hidden_size;
    const int last_layer = static_cast<int>(layers_.size()) - 1;
    const auto wanted_count = static_cast<int>(chunk.wanted.size());
    // The last layer's feed-forward half changes nothing but logits: rows that nobody wants logits of need not go
    // through it, unless somebody watches.
    const auto takes_wanted_only = [&](int layer) { return layer == last_layer && !observer; };
    std::vector<const Quality*> wanted_qualities;
    for (const int32_t row : chunk.wanted) wanted_qualities.push_back(chunk.qualities[row]);

    for (const Side* side : {&host_, &device_})
        if (side->backend) side->backend->begin(chunk.rows);
    if (observer) observer->begin(count);
    host_.backend->embed(embedding_, model_.embedding_multiplier, host_.buffers.x);
    Side* at = &host_;  // where the stream is
    for (int number = layers.first; number < layers.end; ++number) {
        const Layer& layer = layers_[number];
        check();
        go_on(at, *layer.mixer_side, count);
        mix(layer, count);
        int active = count;
        if (takes_wanted_only(number)) {
            active = wanted_count;
            if (active == 0) break;
            at->backend->gather(at->buffers.x, chunk.wanted, hidden, at->buffers.x);
        }
        go_on(at, *layer.half_side, active);
        Backend& backend = *at->backend;
        const Floats x = at->buffers.x;
        backend.normalize(layer.half_norm, x, active, at->buffers.normed);
        HalfInput input{.backend = backend,
                        .x = x,
                        .normed = at->buffers.normed,
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
        layer.half->run(input);
        if (layer.output_scale) backend.scale(layer.output_scale, x, hidden, active);
        if (observer && observer->wants_residuals())
            observer->residual(number, backend.read(ConstFloats(x), size_t(count) * hidden));
    }
    if (wanted_count > 0) {
        if (!takes_wanted_only(layers.end - 1)) at->backend->gather(at->buffers.x, chunk.wanted, hidden, at->buffers.x);
        go_on(at, *head_side_, wanted_count);
        at->backend->normalize(final_norm_, at->buffers.x, wanted_count, at->buffers.normed);
        at->backend->head(head_, at->buffers.normed, wanted_count, logits);
    }
    if (observer) observer->finish();
}

}  // namespace edgemoe
