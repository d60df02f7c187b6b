#include "model/weights.h"

#include <algorithm>
#include <stdexcept>

#include "store/placement.h"

namespace edgemoe {
namespace {

struct DenseSection {
    std::vector<std::string> names;
    std::vector<StoredTensor> tensors;
};

// What lies in each section of the dense part, with everything checked.
std::map<uint32_t, DenseSection> dense_sections(const PackIndex& index) {
    std::map<uint32_t, DenseSection> sections;
    for (const auto& [name, tensor] : index.dense) {
        DenseSection& dense = sections[tensor.section];
        dense.names.push_back(name);
        dense.tensors.push_back(stored_tensor(tensor));
    }
    for (const auto& [number, dense] : sections) {
        const Section& section = index.sections.at(number);
        const std::string name = "dense section " + std::to_string(number);
        if (section.extents.size() != 1) throw std::invalid_argument(name + " is not one extent");
        const Placement placement(section, dense.tensors);
        placement.require_possible(name);
        for (size_t i = 0; i < dense.tensors.size(); ++i) placement.require_fitting(i, "tensor " + dense.names[i]);
    }
    return sections;
}

const DenseTensor& find(const PackIndex& index, const std::string& name) {
    const auto found = index.dense.find(name);
    if (found == index.dense.end()) throw std::invalid_argument("tensor " + name + " is missing");
    return found->second;
}

}  // namespace

size_t Weights::bytes(const PackIndex& index) {
    size_t total = 0;
    for (const auto& [number, dense] : dense_sections(index))
        total += Placement(index.sections[number], dense.tensors).bytes();
    return total;
}

Weights::Weights(const PackIndex& index, std::span<const std::unique_ptr<DirectFile>> files)
    : index_(index), arena_(bytes(index)) {
    std::byte* memory = arena_.data();
    std::vector<std::byte> scratch;
    for (const auto& [number, dense] : dense_sections(index)) {
        const Placement placement(index.sections[number], dense.tensors);
        scratch.resize(std::max(scratch.size(), placement.interleaving_bytes()));
        placement.read(files, memory);
        if (!placement.is_intact(memory)) throw placement.damage(files, "section " + std::to_string(number));
        placement.interleave(memory, scratch.data());
        for (size_t i = 0; i < dense.names.size(); ++i) tensors_[dense.names[i]] = memory + placement.place(i);
        memory += placement.bytes();
    }
}

Matrix Weights::matrix(const std::string& name, int rows, int cols) const {
    const DenseTensor& tensor = find(index_, name);
    if (tensor.layout == "vector" || tensor.rows != rows || tensor.cols != cols)
        throw std::invalid_argument("tensor " + name + " is not a matrix [" + std::to_string(rows) + ", " +
                                    std::to_string(cols) + "]");
    return {stored_layout(tensor.layout).layout, rows, cols, tensors_.at(name)};
}

Matrix Weights::float_matrix(const std::string& name, int rows, int cols) const {
    const Matrix weights = matrix(name, rows, cols);
    if (weights.layout != Layout::f32)
        throw std::invalid_argument("tensor " + name + " is of type " + std::string(layout_name(weights.layout)) +
                                    ": it must be f32");
    return weights;
}

Floats Weights::vector(const std::string& name, int size) const {
    const DenseTensor& tensor = find(index_, name);
    if (tensor.layout != "vector" || tensor.rows != size)
        throw std::invalid_argument("tensor " + name + " is not a vector of " + std::to_string(size));
    return Floats(reinterpret_cast<float*>(tensors_.at(name)));
}

ConstFloats Weights::constant(int size, float value) {
    return ConstFloats(constants_.emplace_back(size, value).data());
}

namespace {

Norm load_rms_norm(const Weights& weights, const std::string& name, int size, float offset, float epsilon) {
    const Floats weight = weights.vector(name, size);
    if (offset != 0)
        for (int i = 0; i < size; ++i) weight.address()[i] += offset;
    return {weight, {}, size, epsilon};
}

}  // namespace

Norm load_norm(const ModelSpec& spec, const Weights& weights, const std::string& name, int size) {
    Norm norm = load_rms_norm(weights, name, size, spec.norm_offset, spec.norm_epsilon);
    if (spec.layer_norm) norm.bias = weights.vector(name + "_bias", size);
    return norm;
}

Norm LayerWeights::norm(std::string_view name, int size) const { return load_norm(spec_, weights_, full(name), size); }

Norm LayerWeights::rms_norm(std::string_view name, int size, float epsilon) const {
    return load_rms_norm(weights_, full(name), size, spec_.norm_offset, epsilon);
}

}  // namespace edgemoe
