// The weights that every token needs: read once, into memory of their own, and found by name.
#pragma once

#include <deque>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/backend.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/pack_index.h"

namespace edgemoe {

class Weights {
  public:
    // Reads all dense tensors of `index`, which must outlive this. Throws IoError where a file cannot be read or a
    // section is damaged, std::invalid_argument where the index promises what a section does not hold.
    Weights(const PackIndex& index, std::span<const std::unique_ptr<DirectFile>> files);

    static size_t bytes(const PackIndex& index);

    // These throw std::invalid_argument where there is no such tensor, or one of another shape or layout.
    Matrix matrix(const std::string& name, int rows, int cols) const;
    Matrix float_matrix(const std::string& name, int rows, int cols) const;  // of float32 and nothing else
    Floats vector(const std::string& name, int size) const;
    // A vector that no file has: `size` times `value`.
    ConstFloats constant(int size, float value);

  private:
    const PackIndex& index_;
    Arena arena_;
    std::map<std::string, std::byte*> tensors_;
    std::deque<std::vector<float>> constants_;
};

// The weights of one layer, by their names within it.
class LayerWeights {
  public:
    LayerWeights(const ModelSpec& spec, Weights& weights, int layer)
        : spec_(spec), weights_(weights), prefix_("layers." + std::to_string(layer) + ".") {}

    Matrix matrix(std::string_view name, int rows, int cols) const { return weights_.matrix(full(name), rows, cols); }
    Matrix float_matrix(std::string_view name, int rows, int cols) const {
        return weights_.float_matrix(full(name), rows, cols);
    }
    Floats vector(std::string_view name, int size) const { return weights_.vector(full(name), size); }
    ConstFloats constant(int size, float value) { return weights_.constant(size, value); }
    // A norm of the stream, of the model's kind.
    Norm norm(std::string_view name, int size) const;
    // A norm of queries, keys or latents: an RMSNorm in every model.
    Norm rms_norm(std::string_view name, int size, float epsilon) const;

  private:
    std::string full(std::string_view name) const { return prefix_ + std::string(name); }

    const ModelSpec& spec_;
    Weights& weights_;
    std::string prefix_;
};

// A norm of the model's kind, whose weights stand under `name`.
Norm load_norm(const ModelSpec& spec, const Weights& weights, const std::string& name, int size);

}  // namespace edgemoe
