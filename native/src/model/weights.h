// The weights that every token needs: read once, into memory of their own, or on through it to a device's, and found by
// name.
#pragma once

#include <cstddef>
#include <deque>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/backend.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/memory.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/pack_index.h"

namespace edgemoe {

class Weights {
  public:
    // Room for all dense tensors of `index`; what lies in a section is read when a tensor of it is asked for first. All
    // that is given must outlive this. Throws std::invalid_argument where the index promises what a section does not
    // hold.
    Weights(const PackIndex& index, std::span<const std::unique_ptr<DirectFile>> files);
    ~Weights();

    // Of those tensors whose names are chosen.
    static size_t bytes(const PackIndex& index, const std::function<bool(const std::string&)>& is_chosen);

    // These throw std::invalid_argument where there is no such tensor, or one of another shape or layout; IoError where
    // a file cannot be read or a section is damaged.
    Matrix matrix(const std::string& name, int rows, int cols);
    std::span<float> vector(const std::string& name, int size);
    // A vector that no file has: `size` times `value`.
    std::span<const float> constant(int size, float value);
    // Nobody will look at the tensor's bytes again.
    void release(const std::string& name);

  private:
    struct DenseSections;
    std::byte* tensor(const std::string& name);

    const PackIndex& index_;
    std::span<const std::unique_ptr<DirectFile>> files_;
    std::unique_ptr<DenseSections> sections_;
    Arena arena_;
    std::vector<std::byte> scratch_;
    std::deque<std::vector<float>> constants_;
};

// The weights of one layer, or, without a number, of the model as a whole, by their names within it and where a backend
// finds them.
class PlacedWeights {
  public:
    PlacedWeights(const ModelSpec& spec, Weights& weights, Memory& memory, int layer = kWhole)
        : spec_(spec),
          weights_(weights),
          memory_(memory),
          prefix_(layer == kWhole ? "" : "layers." + std::to_string(layer) + ".") {}

    Matrix matrix(std::string_view name, int rows, int cols) const;
    Matrix float_matrix(std::string_view name, int rows, int cols) const;  // of float32 and nothing else
    // Each element is changed first, where it says how.
    ConstFloats vector(std::string_view name, int size, const std::function<float(float)>& change = {}) const;
    ConstFloats constant(int size, float value) const;
    // A norm of the stream, of the model's kind.
    Norm norm(std::string_view name, int size) const;
    // A norm of queries, keys or latents: an RMSNorm in every model.
    Norm rms_norm(std::string_view name, int size, float epsilon) const;
    // The same weights, copied into another memory.
    PlacedWeights copied_to(Memory& memory) const;

  private:
    static constexpr int kWhole = -1;

    std::string full(std::string_view name) const { return prefix_ + std::string(name); }
    // Takes bytes over into the memory; if that is not the host's, nobody needs them there.
    const std::byte* keep(const std::string& name, std::span<const std::byte> bytes) const;

    const ModelSpec& spec_;
    Weights& weights_;
    Memory& memory_;
    std::string prefix_;
    bool copies_ = false;
};

}  // namespace edgemoe
