// Keys and values into the state, and attention over what came before.
#include "../../../gpu/shapes.h"
#include "device_backend.h"

namespace edgemoe {
using gpu::i32;

DeviceBackend::Rotation DeviceBackend::rotation(int rope) const {
    if (rope < 0) return {};
    const size_t place = rope * static_cast<size_t>(rows_.count()) * widest_pairs_;
    return {work_.cosine + place, work_.sine + place, static_cast<int>(ropes_[rope].inverse_frequencies.size()),
            ropes_[rope].interleaved};
}

// Of all sequences of the chunk, once for each chunk and group of layers.
Buffer<const int32_t> DeviceBackend::tables(int group) {
    if (tables_.size() <= size_t(group)) tables_.resize(group + 1);
    Tables& of_group = tables_[group];
    if (of_group.is_current) return of_group.tables;
    const size_t blocks = sequences_.front()->table(group).size(), entries = blocks * sequences_.size();
    if (entries > of_group.room) {
        if (of_group.room) device_->release(reinterpret_cast<std::byte*>(of_group.tables.address()));
        of_group.room = 0;
        of_group.tables = Buffer<int32_t>(reinterpret_cast<int32_t*>(device_->allocate(entries * sizeof(int32_t))));
        of_group.room = entries;
    }
    std::vector<int32_t> all;
    all.reserve(entries);
    for (const SequenceState* sequence : sequences_) {
        const std::span<const int32_t> own = sequence->table(group);
        all.insert(all.end(), own.begin(), own.end());
    }
    write(std::span<const int32_t>(all), of_group.tables);
    of_group.is_current = true;
    return of_group.tables;
}

namespace {

gpu::StateShape state_shape(const AttentionHeads& a, SequenceState& state, int layer) {
    const KvBlocks blocks = state.blocks(layer, 0);
    const KvShape& shape = state.pool().layers()[layer];
    return {.heads = a.heads,
            .kv_heads = a.kv_heads,
            .dim = a.dim,
            .key_type = static_cast<i32>(a.key_type),
            .value_type = static_cast<i32>(a.value_type),
            .window = a.window,
            .gated = a.output_gate,
            .blocks = static_cast<i32>(state.table(state.pool().group(layer)).size()),
            .pool = reinterpret_cast<uintptr_t>(blocks.pool),
            .stride = blocks.stride,
            .values = blocks.values,
            .head = shape.head_bytes(),
            .scale = a.scale};
}

}  // namespace

void DeviceBackend::store(const AttentionHeads& a, int layer, const AttentionBuffers& b) {
    const int count = rows_.count();
    const int query_size = a.heads * a.dim, key_size = a.kv_heads * a.dim;
    const i32 rows = count;
    if (a.output_gate) {
        const gpu::HeadsShape shape{a.heads, a.dim, 0, 0, 0};
        launch_each(Kernel::split_gates, size_t(count) * query_size, b.projected, b.queries, shape, rows);
    }
    if (a.q_bias) {
        add_vector(a.q_bias, b.queries, query_size, count);
        add_vector(a.k_bias, b.keys, key_size, count);
        if (a.v_bias) add_vector(a.v_bias, b.values, key_size, count);
    }
    if (a.values_are_keys)
        device_->copy(reinterpret_cast<std::byte*>(b.values.address()),
                      reinterpret_cast<const std::byte*>(b.keys.address()), sizeof(float) * key_size * count);
    if (a.qk_norm == QkNorm::full) {
        normalize({a.q_norm, {}, query_size, a.norm_epsilon}, b.queries, count, b.queries);
        normalize({a.k_norm, {}, key_size, a.norm_epsilon}, b.keys, count, b.keys);
    }
    if (a.clip > 0)
        for (const auto& [values, size] :
             {std::pair{b.queries, query_size}, {b.keys, key_size}, {b.values, key_size}}) {
            const gpu::VectorShape shape{size, count, a.clip};
            launch_each(Kernel::clip, size_t(size) * count, values, shape);
        }
    const Rotation turned_by = rotation(a.rope);
    const auto turn = [&](Floats x, int heads, ConstFloats norm, int turned) {
        if (!norm && !turned) return;
        const gpu::HeadsShape shape{heads, a.dim, turned, turned_by.interleaved, a.norm_epsilon};
        device_->launch(Kernel::turn_heads, count * heads, x, norm, turned_by.cosine, turned_by.sine, shape);
    };
    const bool by_head = a.qk_norm == QkNorm::head;
    turn(b.queries, a.heads, by_head ? a.q_norm : ConstFloats(), turned_by.pairs);
    turn(b.keys, a.kv_heads, by_head ? a.k_norm : ConstFloats(), turned_by.pairs);
    turn(b.values, a.kv_heads, a.value_norm, 0);
    SequenceState& state = *sequences_.front();
    const gpu::StateShape shape = state_shape(a, state, layer);
    const Buffer<const int32_t> all = tables(state.pool().group(layer));
    device_->launch(Kernel::store_keys, count * a.kv_heads, b.keys, work_.positions, work_.sequences, all, shape);
    device_->launch(Kernel::store_values, count * a.kv_heads, b.values, work_.positions, work_.sequences, all, shape);
}

void DeviceBackend::attend(const AttentionHeads& a, int layer, const AttentionBuffers& b) {
    SequenceState& state = *sequences_.front();
    const gpu::StateShape shape = state_shape(a, state, layer);
    device_->launch(Kernel::attend, rows_.count() * a.heads, b.queries, b.projected, a.sinks, work_.positions,
                    work_.sequences, tables(state.pool().group(layer)), b.attended, shape);
}

gpu::LatentShape DeviceBackend::latent_shape(const LatentHeads& a, int layer) {
    SequenceState& state = *sequences_.front();
    const KvBlocks blocks = state.blocks(layer, 0);
    const Rotation turned = rotation(a.rope);
    gpu::LatentShape shape{};
    shape.state = {.heads = a.heads,
                   .kv_heads = 1,
                   .dim = a.kv_rank + a.rope_dim,
                   .key_type = static_cast<i32>(a.type),
                   .value_type = static_cast<i32>(a.type),
                   .window = 0,
                   .gated = 0,
                   .blocks = static_cast<i32>(state.table(state.pool().group(layer)).size()),
                   .pool = reinterpret_cast<uintptr_t>(blocks.pool),
                   .stride = blocks.stride,
                   .values = blocks.values,
                   .head = state.pool().layers()[layer].head_bytes(),
                   .scale = a.scale};
    shape.rank = a.kv_rank;
    shape.rope_dim = a.rope_dim;
    shape.head_dim = a.head_dim;
    shape.pairs = turned.pairs;
    shape.interleaved = turned.interleaved;
    shape.epsilon = a.norm_epsilon;
    return shape;
}

void DeviceBackend::store_latents(const LatentHeads& a, int layer, Floats queries, Floats latents) {
    const Rotation turned = rotation(a.rope);
    const gpu::LatentShape shape = latent_shape(a, layer);
    device_->launch(Kernel::store_latents, rows_.count() * (1 + a.heads), queries, latents, a.kv_norm, turned.cosine,
                    turned.sine, work_.positions, work_.sequences, tables(sequences_.front()->pool().group(layer)),
                    shape);
}

void DeviceBackend::attend_latents(const LatentHeads& a, int layer, const LatentBuffers& b) {
    gpu::LatentShape shape = latent_shape(a, layer);
    shape.first = b.first;
    shape.count = b.heads;
    device_->launch(Kernel::attend_latents, rows_.count() * b.heads, b.queries, b.asked, work_.positions,
                    work_.sequences, tables(sequences_.front()->pool().group(layer)), b.found, shape);
}

}  // namespace edgemoe
