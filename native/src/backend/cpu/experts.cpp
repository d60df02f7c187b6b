// Routed experts at work, and what their tokens make of them.
#include "blocks.h"
#include "cpu_backend.h"

namespace edgemoe {

void CpuBackend::begin_experts(const ExpertShapes& shapes, ConstFloats x, int count) {
    const std::array matrices{shapes.gate, shapes.up};
    expert_input_ = prepare(x.address(), count, shapes.gate.cols, matrices);
}

void CpuBackend::experts(const ExpertShapes& shapes, std::span<const ExpertWork> work, const ExpertBuffers& buffers) {
    const int ffn = shapes.gate.rows, hidden = shapes.down.rows;
    const size_t per_pair = column_groups(ffn);
    const Codes& codes = work_.inner;
    float* const inner = buffers.hidden.address();
    float* const up = buffers.up.address();

    // One loop over the blocks of all experts' matrices, first of gate and up, then of down.
    struct Items {
        int gate_first, down_first;
        int gate_step, down_step;  // row blocks per item
    };
    std::vector<Items> items(work.size());
    int gate_items = 0, down_items = 0;
    for (size_t i = 0; i < work.size(); ++i) {
        const ExpertWork& w = work[i];
        // Whole groups of rows, so that each item can quantize what it made for the next product.
        constexpr int kGroupBlocks = kGroup / kRowBlock;
        const int gate_step = std::max(blocks_per_item(w.gate, w.count) / 2 / kGroupBlocks, 1) * kGroupBlocks;
        items[i] = {gate_items, down_items, gate_step, blocks_per_item(w.down, w.count)};
        gate_items += (row_blocks(ffn) + gate_step - 1) / gate_step;
        down_items += (row_blocks(hidden) + items[i].down_step - 1) / items[i].down_step;
    }
    pool_.run(gate_items, [&](int item) {
        size_t i = work.size() - 1;
        while (items[i].gate_first > item) --i;
        const ExpertWork& w = work[i];
        const int step = items[i].gate_step, first = (item - items[i].gate_first) * step;
        const int last = std::min(first + step, row_blocks(ffn));
        const std::span<const int32_t> rows(buffers.rows.address() + w.first, w.count);
        kernels_.matmul(w.gate, expert_input_, rows, w.count, first, last, inner + size_t(w.first) * ffn, ffn);
        kernels_.matmul(w.up, expert_input_, rows, w.count, first, last, up + size_t(w.first) * ffn, ffn);
        const size_t begin = size_t(first) * kRowBlock, size = std::min<size_t>(last * kRowBlock, ffn) - begin;
        for (int p = w.first; p < w.first + w.count; ++p) {
            const std::span<float> row{inner + size_t(p) * ffn + begin, size};
            const std::span<float> other{up + size_t(p) * ffn + begin, size};
            if (shapes.gate_bias) {
                kernels_.add_scaled(1.0f, shapes.gate_bias.address() + size_t(w.expert) * ffn + begin, row);
                kernels_.add_scaled(1.0f, shapes.up_bias.address() + size_t(w.expert) * ffn + begin, other);
            }
            activate(shapes.activation, row, other.data());
            if (reads_codes(w.down.layout)) {
                const size_t group = p * per_pair + begin / kGroup;
                kernels_.quantize(row, codes.codes + group * kGroup, codes.scales + group, codes.sums + group);
            }
        }
    });
    pool_.run(down_items, [&](int item) {
        size_t i = work.size() - 1;
        while (items[i].down_first > item) --i;
        const ExpertWork& w = work[i];
        const int step = items[i].down_step, first = (item - items[i].down_first) * step;
        const int last = std::min(first + step, row_blocks(hidden));
        const size_t group = w.first * per_pair;
        const Activations rows{inner + size_t(w.first) * ffn, ffn, codes.codes + group * kGroup, codes.scales + group,
                               codes.sums + group};
        kernels_.matmul(w.down, rows, {}, w.count, first, last, buffers.outputs.address() + size_t(w.first) * hidden,
                        hidden);
    });
}

void CpuBackend::combine(const Combination& c, int size, int count) {
    each_row(count, [&](int t) {
        const std::span<float> sum{c.sum.address() + size_t(t) * size, size_t(size)};
        if (c.from_zero) std::ranges::fill(sum, 0.0f);
        if (c.shared) kernels_.add_scaled(c.scale, c.shared.address() + size_t(t) * size, sum);
        for (int pair = t * c.top_k; pair < (t + 1) * c.top_k; ++pair) {
            const float weight = c.scale * c.weights.address()[pair];
            kernels_.add_scaled(weight, c.outputs.address() + size_t(c.places.address()[pair]) * size, sum);
            if (c.down_bias)
                kernels_.add_scaled(weight, c.down_bias.address() + size_t(c.picks.address()[pair]) * size, sum);
        }
    });
}

}  // namespace edgemoe
