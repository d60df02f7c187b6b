// Products of weights with the rows of a chunk, feed-forward parts, and the head.
#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>

#include "blocks.h"
#include "cpu_backend.h"

namespace edgemoe {
namespace {

// Work of one loop item, in weight bytes times tiles of rows: some ten microseconds, enough to hide the hand-out.
constexpr size_t kItemBytes = size_t{96} << 10;
constexpr int kTileRows = 8;

}  // namespace

// With many rows a product arranges its activations first, once per item: too few blocks would not pay for it.
int blocks_per_item(const Matrix& matrix, int count) {
    const size_t tiles = static_cast<size_t>((count + kTileRows - 1) / kTileRows);
    const size_t bytes = block_bytes(matrix) * std::max<size_t>(tiles, 1);
    const bool arranges = is_ggml(matrix.layout) || matrix.layout == Layout::nested;
    const size_t least = count <= kTileRows ? 1 : arranges ? 8 : 2;
    return static_cast<int>(std::max(kItemBytes / bytes, least));
}

Activations CpuBackend::prepare(const float* x, int count, int cols, std::span<const Matrix> users) {
    const Codes& codes = work_.input;
    if (std::ranges::any_of(users, [](const Matrix& matrix) { return reads_codes(matrix.layout); })) {
        const size_t per_row = column_groups(cols);
        each_row(count, [&](int t) {
            kernels_.quantize({x + size_t(t) * cols, size_t(cols)}, codes.codes + t * per_row * kGroup,
                              codes.scales + t * per_row, codes.sums + t * per_row);
        });
    }
    return {x, cols, codes.codes, codes.scales, codes.sums};
}

void CpuBackend::multiply_prepared(std::span<const Matrix> matrices, const Activations& input, int count,
                                   std::span<float* const> outputs) {
    struct Part {
        int first_item;
        int step;
    };
    std::array<Part, kMostMatrices> parts{};
    int items = 0;
    for (size_t m = 0; m < matrices.size(); ++m) {
        parts[m] = {items, blocks_per_item(matrices[m], count)};
        items += (row_blocks(matrices[m].rows) + parts[m].step - 1) / parts[m].step;
    }
    pool_.run(items, [&](int item) {
        size_t m = matrices.size() - 1;
        while (parts[m].first_item > item) --m;
        const int first = (item - parts[m].first_item) * parts[m].step;
        const int last = std::min(first + parts[m].step, row_blocks(matrices[m].rows));
        kernels_.matmul(matrices[m], input, {}, count, first, last, outputs[m], matrices[m].rows);
    });
}

void CpuBackend::product(std::span<const Matrix> matrices, ConstFloats x, int count, std::span<const Floats> outputs) {
    if (matrices.size() > kMostMatrices) throw std::logic_error("a product of too many matrices");
    std::array<float*, kMostMatrices> targets{};
    std::ranges::transform(outputs, targets.begin(), &Floats::address);
    const Activations input = prepare(x.address(), count, matrices.front().cols, matrices);
    multiply_prepared(matrices, input, count, std::span(targets).first(outputs.size()));
}

void CpuBackend::products_by_head(const HeadProducts& p, int count) {
    const Codes& codes = work_.input;
    const Matrix& matrix = p.matrix;
    const size_t per_row = column_groups(matrix.cols), size = block_bytes(matrix.layout, matrix.cols);
    const float* values = p.values.address();
    if (reads_codes(matrix.layout))
        each_row(count, [&](int t) {
            for (int h = 0; h < p.heads; ++h) {
                const size_t place = (size_t(h) * count + t) * per_row;
                kernels_.quantize({values + h * p.value_step + t * p.value_stride, size_t(matrix.cols)},
                                  codes.codes + place * kGroup, codes.scales + place, codes.sums + place);
            }
        });
    const Matrix part{matrix.layout, p.rows, matrix.cols, nullptr};
    const int blocks = row_blocks(p.rows), step = blocks_per_item(part, count), items = (blocks + step - 1) / step;
    pool_.run(p.heads * items, [&](int item) {
        const int h = item / items, begin = item % items * step, end = std::min(begin + step, blocks);
        Matrix own = part;
        own.data = matrix.data + size_t(p.first + h) * blocks * size;
        const size_t place = size_t(h) * count * per_row;
        const Activations input{values + h * p.value_step, static_cast<ptrdiff_t>(p.value_stride),
                                codes.codes + place * kGroup, codes.scales + place, codes.sums + place};
        kernels_.matmul(own, input, {}, count, begin, end, p.out.address() + h * p.out_step,
                        static_cast<ptrdiff_t>(p.out_stride));
    });
}

void CpuBackend::activate(const GatedActivation& activation, std::span<float> gate, const float* up) const {
    switch (activation.kind) {
        case Activation::silu:
            return kernels_.silu_multiply(gate, up, gate.data());
        case Activation::gelu_tanh:
            return kernels_.gelu_multiply(gate, up, gate.data());
        case Activation::clamped_swiglu:
            return kernels_.clamped_swiglu(gate, up, activation.alpha, activation.limit, gate.data());
    }
}

void CpuBackend::feed_forward(const FeedForward& part, ConstFloats x, int count, Floats inner, Floats up, Floats out) {
    const size_t ffn = part.gate.rows, per_row = column_groups(part.gate.rows);
    const Codes& codes = work_.inner;
    const std::array matrices{part.gate, part.up};
    const Activations input = prepare(x.address(), count, part.gate.cols, matrices);
    multiply_prepared(matrices, input, count, std::array{inner.address(), up.address()});
    each_row(count, [&](int t) {
        const std::span<float> gate{inner.address() + t * ffn, ffn}, other{up.address() + t * ffn, ffn};
        if (part.gate_bias) {
            kernels_.add_scaled(1.0f, part.gate_bias.address(), gate);
            kernels_.add_scaled(1.0f, part.up_bias.address(), other);
        }
        activate(part.activation, gate, other.data());
        if (reads_codes(part.down.layout))
            kernels_.quantize(gate, codes.codes + t * per_row * kGroup, codes.scales + t * per_row,
                              codes.sums + t * per_row);
    });
    const Activations hidden{inner.address(), static_cast<ptrdiff_t>(ffn), codes.codes, codes.scales, codes.sums};
    multiply_prepared({&part.down, 1}, hidden, count, std::array{out.address()});
    if (part.down_bias) add_vector(part.down_bias, out, part.down.rows, count);
}

void CpuBackend::gate_rows(ConstFloats weights, ConstFloats x, int size, int count, Floats out) {
    each_row(count, [&](int t) {
        // One accumulator for each of kLanes, folded by halves, as in the kernels.
        std::array<float, kLanes> sums{};
        const float* values = x.address() + size_t(t) * size;
        for (int i = 0; i < size; ++i) sums[i % kLanes] = std::fma(values[i], weights.address()[i], sums[i % kLanes]);
        for (int width = kLanes / 2; width >= 1; width /= 2)
            for (int i = 0; i < width; ++i) sums[i] += sums[i + width];
        float gate = sums[0];
        kernels_.sigmoid({&gate, 1});
        float* row = out.address() + size_t(t) * size;
        for (int i = 0; i < size; ++i) row[i] = canonical(row[i] * gate);
    });
}

void CpuBackend::head(const Head& head, ConstFloats x, int count, float* logits) {
    const size_t size = head.matrix.rows;
    const Activations input = prepare(x.address(), count, head.matrix.cols, {&head.matrix, 1});
    multiply_prepared({&head.matrix, 1}, input, count, {&logits, 1});
    if (!head.bias && head.divisor == 1.0f && head.softcap == 0) return;
    each_row(count, [&](int t) {
        const std::span<float> row{logits + t * size, size};
        if (head.bias) kernels_.add_scaled(1.0f, head.bias.address(), row);
        if (head.divisor != 1.0f)
            for (float& logit : row) logit = canonical(logit / head.divisor);
        if (head.softcap != 0) kernels_.softcap(head.softcap, row);
    });
}

}  // namespace edgemoe
