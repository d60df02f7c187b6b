// Keys and values into the state, and attention over what came before.
#include "../../../gpu/shapes.h"
#include "device_backend.h"

namespace edgemoe {
namespace {

using gpu::i32;

int groups_for(size_t elements, Kernel kernel) {
    return static_cast<int>((elements + kernel_threads(kernel) - 1) / kernel_threads(kernel));
}

}  // namespace

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
        device_->launch(Kernel::split_gates, groups_for(size_t(count) * query_size, Kernel::split_gates), b.projected,
                        b.queries, shape, rows);
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
            device_->launch(Kernel::clip, groups_for(size_t(size) * count, Kernel::clip), values, shape);
        }
    const size_t pairs = a.rope < 0 ? 0 : ropes_[a.rope].inverse_frequencies.size();
    const size_t place = a.rope < 0 ? 0 : a.rope * size_t(count) * widest_pairs_;
    const auto turn = [&](Floats x, int heads, ConstFloats norm, size_t turned) {
        if (!norm && !turned) return;
        const gpu::HeadsShape shape{heads, a.dim, static_cast<i32>(turned), turned && ropes_[a.rope].interleaved,
                                    a.norm_epsilon};
        device_->launch(Kernel::turn_heads, count * heads, x, norm, ConstFloats(work_.cosine + place),
                        ConstFloats(work_.sine + place), shape);
    };
    const bool by_head = a.qk_norm == QkNorm::head;
    turn(b.queries, a.heads, by_head ? a.q_norm : ConstFloats(), pairs);
    turn(b.keys, a.kv_heads, by_head ? a.k_norm : ConstFloats(), pairs);
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

}  // namespace edgemoe
