// The backend that computes with the kernels of a device (native/gpu). Buffers are the device's addresses, and
// operations are finished when wait() says so.
//
// It looks up no embedding: that is the host's.
#pragma once

#include <array>
#include <deque>
#include <memory>
#include <span>
#include <vector>

#include "edgemoe/backend.h"
#include "edgemoe/device.h"

namespace edgemoe {

namespace gpu {
struct LatentShape;
}

// A device's memory in pieces that stay. Small ones share a larger one.
class DeviceMemory final : public Memory {
  public:
    explicit DeviceMemory(Device& device) : device_(device) {}
    ~DeviceMemory() override;
    DeviceMemory(const DeviceMemory&) = delete;
    DeviceMemory& operator=(const DeviceMemory&) = delete;

    // One piece for so many bytes of what is kept: a driver rounds each piece up.
    void reserve(size_t bytes);

    bool is_hosts() const override { return false; }
    std::byte* allocate(size_t bytes) override;
    void write(std::byte* to, std::span<const std::byte> from) override { device_.write(to, from); }
    void read(std::span<std::byte> to, const std::byte* from) override { device_.read(to, from); }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override { device_.copy(to, from, bytes); }
    const std::byte* keep(std::span<const std::byte> bytes) override;

  private:
    Device& device_;
    std::vector<std::byte*> pieces_;
    std::byte* piece_ = nullptr;  // the shared one at hand
    size_t left_ = 0;             // bytes of it
    std::byte* reserved_ = nullptr;
    size_t reserved_left_ = 0;
};

class DeviceBackend final : public Backend {
  public:
    // weights: bytes of them that will be kept.
    DeviceBackend(std::shared_ptr<Device> device, const BackendSizes& sizes, int vocabulary, size_t weights);
    ~DeviceBackend() override;

    // Of the device's memory that it keeps for itself.
    static size_t workspace_bytes(const BackendSizes& sizes, int vocabulary);

    Device& device() { return *device_; }

    std::string_view name() const override { return name_; }
    DeviceMemory& memory() override { return memory_; }

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

    std::span<const float> read(ConstFloats buffer, size_t count) override;
    std::span<const int32_t> read(Buffer<const int32_t> buffer, size_t count) override;
    void wait() override { device_->wait(); }

  private:
    // int8 inputs of a product.
    struct Codes {
        Buffer<int8_t> codes;
        Floats scales, sums;

        void place(Places& places, size_t groups);
        Codes from(size_t groups) const;
    };
    struct Input {
        ConstFloats values;
        Codes codes;
    };
    struct Workspace {
        Codes input;                   // of the rows of a product
        Codes inner;                   // of what the last matrix of a feed-forward part multiplies
        Floats cosine, sine;           // [ropes, rows, widest_pairs]
        Buffer<int32_t> positions;     // [rows]
        Buffer<int32_t> sequences;     // [rows] which table is theirs
        Buffer<int32_t> rows;          // [rows] for gather()
        Floats gathered;               // [rows, hidden]
        Floats choice;                 // [rows, experts]
        Buffer<int32_t> order;         // [rows, experts]
        Buffer<int32_t> pair_experts;  // [rows, experts at most]
        Floats logits;                 // [kHeadRows, vocabulary]
        Floats by_head, of_heads;      // [heads, rows, ...] what heads multiply, and their products
        Buffer<uint64_t> states;       // [rows] addresses of recurrences or convolutions
        Buffer<uint64_t> before;       // [rows]

        void place(Places& places, const BackendSizes& sizes, int vocabulary);
    };
    // Tables of the chunk's sequences for a group of layers, on the device.
    struct Tables {
        Buffer<int32_t> tables;
        size_t room = 0;  // entries
        bool is_current = false;
    };
    // A matrix at work on some rows or pairs: native/gpu/shapes.h.
    struct Product {
        Matrix matrix;
        Floats out;
        Buffer<const int32_t> inputs;
        int first, count;
    };
    static constexpr int kHeadRows = 8;

    struct Rotation {
        ConstFloats cosine, sine;
        int pairs = 0;
        bool interleaved = false;
    };
    static int groups_for(Kernel kernel, size_t elements);
    // A kernel with a thread for each element.
    template <class... Arguments>
    void launch_each(Kernel kernel, size_t elements, const Arguments&... arguments) {
        device_->launch(kernel, groups_for(kernel, elements), arguments...);
    }
    Rotation rotation(int rope) const;
    gpu::LatentShape latent_shape(const LatentHeads& heads, int layer);
    // Where the rows' constants of a layer lie, and what they go on from: into `states` and `before`.
    template <class State, class Before>
    void write_states(State&& state, Before&& before);
    void copy_heads(ConstFloats x, size_t from_step, size_t from_stride, Floats out, size_t to_step, size_t to_stride,
                    int size, int heads, int count);
    Codes quantize(ConstFloats x, int count, int cols, const Codes& codes);
    Input prepare(ConstFloats x, int count, int cols, std::span<const Matrix> users);
    void multiply_prepared(std::span<const Product> products, const Input& input);
    void activate(const GatedActivation& activation, int size, int first, int count, Floats gate, ConstFloats up,
                  ConstFloats gate_bias, ConstFloats up_bias, Buffer<const int32_t> experts);
    Buffer<const int32_t> tables(int group);
    std::span<std::byte> staging(size_t bytes);

    std::shared_ptr<Device> device_;
    std::string name_;
    DeviceMemory memory_;
    std::span<const RopeSpec> ropes_;
    size_t widest_pairs_ = 0;
    Workspace work_{};
    Rows rows_;
    std::vector<SequenceState*> sequences_;  // of the chunk, each once
    std::vector<Tables> tables_;             // [groups]
    Input expert_input_{};
    std::deque<std::vector<std::byte>> staging_;  // what was read, until the next operation
    size_t staged_ = 0;
};

}  // namespace edgemoe
