// The backend that computes with the kernels of this processor, on a pool of threads. Buffers are pointers, and every
// operation is finished when it returns.
#pragma once

#include <algorithm>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/backend.h"
#include "edgemoe/thread_pool.h"

namespace edgemoe {

class CpuBackend final : public Backend {
  public:
    CpuBackend(const Kernels& kernels, int threads, const BackendSizes& sizes);

    // Memory that it keeps for itself.
    static size_t workspace_bytes(const BackendSizes& sizes);

    std::string_view name() const override { return kernels_.name; }
    Memory& memory() override { return buffers_; }

    void begin(const Rows& rows) override;
    void embed(const Matrix& embedding, float multiplier, Floats out) override;
    void normalize(const Norm& norm, ConstFloats x, int count, Floats out) override;
    void product(std::span<const Matrix> matrices, ConstFloats x, int count, std::span<const Floats> outputs) override;
    void add_vector(ConstFloats vector, Floats x, int size, int count) override;
    void add(float factor, ConstFloats values, Floats x, int size, int count) override;
    void scale(ConstFloats factor, Floats x, int size, int count) override;
    void gather(ConstFloats x, std::span<const int32_t> rows, int size, Floats out) override;
    void multiply(ConstFloats a, size_t a_stride, ConstFloats b, size_t b_stride, int size, int count, Floats out,
                  size_t out_stride) override;

    void store(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) override;
    void attend(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) override;
    void store_latents(const LatentHeads& heads, int layer, Floats queries, Floats latents) override;
    void attend_latents(const LatentHeads& heads, int layer, const LatentBuffers& buffers) override;
    void products_by_head(const HeadProducts& products, int count) override;

    void convolve(const Matrix& weights, int layer, ConstFloats in, bool silu, Floats out) override;
    void gated_delta(const DeltaHeads& heads, int layer, const DeltaBuffers& buffers) override;

    void feed_forward(const FeedForward& part, ConstFloats x, int count, Floats inner, Floats up, Floats out) override;
    void gate_rows(ConstFloats weights, ConstFloats x, int size, int count, Floats out) override;

    void choose(const Choice& choice, Floats scores, int count, Buffer<int32_t> picks, Floats weights) override;
    void begin_experts(const ExpertShapes& shapes, ConstFloats x, int count) override;
    void experts(const ExpertShapes& shapes, std::span<const ExpertWork> work, const ExpertBuffers& buffers) override;
    void combine(const Combination& combination, int size, int count) override;

    void head(const Head& head, ConstFloats x, int count, float* logits) override;

    std::span<const float> read(ConstFloats buffer, size_t count) override { return {buffer.address(), count}; }
    std::span<const int32_t> read(Buffer<const int32_t> buffer, size_t count) override {
        return {buffer.address(), count};
    }
    void wait() override {}

  private:
    // int8 inputs of a product.
    struct Codes {
        int8_t* codes;
        float* scales;
        float* sums;

        void place(Places& places, size_t groups);
    };

    struct Workspace {
        Codes input;       // of the rows of a product, or of its rows for each head
        Codes inner;       // of what the last matrix of a feed-forward part multiplies
        float* maximum;    // [rows, heads] of the online softmax
        float* sum;        // [rows, heads]
        float* cosine;     // [ropes, rows, widest_pairs]
        float* sine;       // [ropes, rows, widest_pairs]
        float* separated;  // [rows, 2 * widest_pairs] a head whose interleaved pairs are taken apart
        float* choice;     // [rows, experts] what experts are chosen by
        int32_t* order;    // [rows, experts] their numbers

        void place(Places& places, const BackendSizes& sizes);
    };

    // Cosines and sines of a row's position.
    struct Rotation {
        const float* cosine = nullptr;
        const float* sine = nullptr;
        int pairs = 0;
        bool interleaved = false;
    };
    Rotation rotation(int rope, int row) const;
    void rotate(const Rotation& rotation, int row, float* head) const;

    // Runs body(row) for each row, some of them at a time.
    template <class Body>
    void each_row(int count, Body&& body) {
        constexpr int kBatch = 4;
        pool_.run((count + kBatch - 1) / kBatch, [&](int item) {
            for (int t = item * kBatch; t < std::min(count, (item + 1) * kBatch); ++t) body(t);
        });
    }
    // The input of products: x [count, cols] as it is for float layouts, as int8 codes for the others.
    Activations prepare(const float* x, int count, int cols, std::span<const Matrix> users);
    void multiply_prepared(std::span<const Matrix> matrices, const Activations& input, int count,
                           std::span<float* const> outputs);
    void activate(const GatedActivation& activation, std::span<float> gate, const float* up) const;

    const Kernels& kernels_;
    std::span<const RopeSpec> ropes_;
    size_t widest_pairs_ = 0;
    Arena memory_;
    Workspace work_{};
    Rows rows_;
    Activations expert_input_{};
    HostMemory buffers_;
    ThreadPool pool_;
};

}  // namespace edgemoe
