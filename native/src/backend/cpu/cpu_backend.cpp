#include "cpu_backend.h"

#include <cstring>

#include "blocks.h"
#include "edgemoe/batch.h"

namespace edgemoe {

void CpuBackend::Codes::place(Places& places, size_t groups) {
    places.place(codes, groups * kGroup);
    places.place(scales, groups);
    places.place(sums, groups);
}

void CpuBackend::Workspace::place(Places& places, const BackendSizes& sizes) {
    const size_t rows = sizes.rows;
    size_t pairs = 0;
    for (const RopeSpec& rope : sizes.ropes) pairs = std::max(pairs, rope.inverse_frequencies.size());
    input.place(places, rows * sizes.input_groups);
    inner.place(places, sizes.inner_groups);
    places.place(maximum, rows * sizes.heads);
    places.place(sum, rows * sizes.heads);
    places.place(cosine, sizes.ropes.size() * rows * pairs);
    places.place(sine, sizes.ropes.size() * rows * pairs);
    places.place(separated, rows * 2 * pairs);
    places.place(choice, rows * sizes.experts);
    places.place(order, rows * sizes.experts);
}

size_t CpuBackend::workspace_bytes(const BackendSizes& sizes) {
    Places measured;
    Workspace{}.place(measured, sizes);
    return measured.used();
}

CpuBackend::CpuBackend(const Kernels& kernels, int threads, const BackendSizes& sizes)
    : kernels_(kernels), ropes_(sizes.ropes), memory_(workspace_bytes(sizes)), pool_(threads) {
    for (const RopeSpec& rope : ropes_) widest_pairs_ = std::max(widest_pairs_, rope.inverse_frequencies.size());
    Places places(memory_.data());
    work_.place(places, sizes);
}

void CpuBackend::begin(const Rows& rows) {
    rows_ = rows;
    const int count = rows.count();
    if (ropes_.empty()) return;
    each_row(count, [&](int t) {
        for (size_t r = 0; r < ropes_.size(); ++r) {
            const RopeSpec& rope = ropes_[r];
            const size_t place = (r * count + t) * widest_pairs_;
            rotary(rope.inverse_frequencies, rows.positions[t], rope.attention_factor, work_.cosine + place,
                   work_.sine + place);
        }
    });
}

CpuBackend::Rotation CpuBackend::rotation(int rope, int row) const {
    if (rope < 0) return {};
    const size_t place = (static_cast<size_t>(rope) * rows_.count() + row) * widest_pairs_;
    return {work_.cosine + place, work_.sine + place, static_cast<int>(ropes_[rope].inverse_frequencies.size()),
            ropes_[rope].interleaved};
}

// Interleaved pairs are taken apart first: elements (0, 1, 2, 3, ...) of the rotated part become (0, 2, ..., 1, 3,
// ...), such pairs as Kernels::rope turns. Queries and keys are dealt with alike, so their products stay what they are.
void CpuBackend::rotate(const Rotation& rotation, int row, float* head) const {
    const int pairs = rotation.pairs;
    if (!pairs) return;
    if (rotation.interleaved) {
        float* separated = work_.separated + static_cast<size_t>(row) * 2 * widest_pairs_;
        for (int i = 0; i < pairs; ++i) {
            separated[i] = head[2 * i];
            separated[pairs + i] = head[2 * i + 1];
        }
        std::copy_n(separated, 2 * pairs, head);
    }
    kernels_.rope(head, rotation.cosine, rotation.sine, pairs);
}

void CpuBackend::embed(const Matrix& embedding, float multiplier, Floats out) {
    const size_t size = embedding.cols;
    each_row(rows_.count(), [&](int t) {
        float* x = out.address() + t * size;
        if (rows_.tokens[t] == Batch::kEmbedding) {
            std::ranges::copy(rows_.embeddings.subspan(t * size, size), x);
            return;
        }
        dequantize_row(embedding, rows_.tokens[t], x);
        if (multiplier != 1.0f)
            for (size_t i = 0; i < size; ++i) x[i] = canonical(x[i] * multiplier);
    });
}

void CpuBackend::normalize(const Norm& norm, ConstFloats x, int count, Floats out) {
    const size_t size = norm.size;
    each_row(count, [&](int t) {
        const std::span<const float> row{x.address() + t * size, size};
        float* target = out.address() + t * size;
        if (norm.bias)
            kernels_.layer_norm(row, norm.weight.address(), norm.bias.address(), norm.epsilon, target);
        else
            kernels_.rms_norm(row, norm.weight.address(), norm.epsilon, target);
    });
}

void CpuBackend::add_vector(ConstFloats vector, Floats x, int size, int count) {
    each_row(count, [&](int t) {
        kernels_.add_scaled(1.0f, vector.address(), {x.address() + static_cast<size_t>(t) * size, size_t(size)});
    });
}

void CpuBackend::add(float factor, ConstFloats values, Floats x, int size, int count) {
    each_row(count, [&](int t) {
        const size_t row = static_cast<size_t>(t) * size;
        kernels_.add_scaled(factor, values.address() + row, {x.address() + row, size_t(size)});
    });
}

void CpuBackend::scale(ConstFloats factor, Floats x, int size, int count) {
    each_row(count, [&](int t) {
        float* row = x.address() + static_cast<size_t>(t) * size;
        for (int i = 0; i < size; ++i) row[i] = canonical(row[i] * *factor.address());
    });
}

void CpuBackend::gather(ConstFloats x, std::span<const int32_t> rows, int size, Floats out) {
    for (size_t i = 0; i < rows.size(); ++i)
        std::memmove(out.address() + i * size, x.address() + size_t(rows[i]) * size, size * sizeof(float));
}

void CpuBackend::multiply(ConstFloats a, size_t a_stride, ConstFloats b, size_t b_stride, int size, int count,
                          Floats out, size_t out_stride) {
    each_row(count, [&](int t) {
        const float* left = a.address() + t * a_stride;
        const float* right = b.address() + t * b_stride;
        float* target = out.address() + t * out_stride;
        for (int i = 0; i < size; ++i) target[i] = canonical(left[i] * right[i]);
    });
}

}  // namespace edgemoe
