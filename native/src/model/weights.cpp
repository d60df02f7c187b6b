#include "model/weights.h"

#include <algorithm>
#include <map>
#include <stdexcept>
#include <utility>

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

size_t bytes_of(const StoredTensor& tensor) {
    return tensor.layout ? matrix_bytes(tensor.layout->layout, tensor.rows, tensor.cols)
                         : sizeof(float) * tensor.rows * tensor.cols;
}

const DenseTensor& find(const PackIndex& index, const std::string& name) {
    const auto found = index.dense.find(name);
    if (found == index.dense.end()) throw std::invalid_argument("tensor " + name + " is missing");
    return found->second;
}

}  // namespace

// Where a section lies in the arena, whole.
struct Weights::DenseSections {
    struct Section {
        DenseSection dense;
        Placement placement;
        std::byte* begin = nullptr;
        bool is_read = false;
    };
    std::map<uint32_t, Section> all;
    size_t bytes = 0;

    explicit DenseSections(const PackIndex& index) {
        for (auto& [number, dense] : dense_sections(index)) {
            const Placement placement(index.sections[number], dense.tensors);
            bytes += placement.bytes();
            all.emplace(number, Section{std::move(dense), placement});
        }
    }
};

size_t Weights::bytes(const PackIndex& index, const std::function<bool(const std::string&)>& is_chosen) {
    size_t total = 0;
    for (const auto& [number, section] : DenseSections(index).all) {
        // What fills a section up counts once, with its first tensor.
        const auto& names = section.dense.names;
        if (is_chosen(names[0])) total += section.placement.bytes();
        for (size_t i = 0; i < names.size(); ++i) {
            if (is_chosen(names[i]) == is_chosen(names[0])) continue;
            const size_t own = bytes_of(section.dense.tensors[i]);
            total = is_chosen(names[i]) ? total + own : total - std::min(total, own);
        }
    }
    return total;
}

Weights::Weights(const PackIndex& index, std::span<const std::unique_ptr<DirectFile>> files)
    : index_(index), files_(files), sections_(std::make_unique<DenseSections>(index)), arena_(sections_->bytes) {
    std::byte* memory = arena_.data();
    for (auto& [number, section] : sections_->all) {
        section.begin = memory;
        memory += section.placement.bytes();
    }
}

Weights::~Weights() = default;

std::byte* Weights::tensor(const std::string& name) {
    const uint32_t number = find(index_, name).section;
    auto& section = sections_->all.at(number);
    if (!section.is_read) {
        const Placement& placement = section.placement;
        scratch_.resize(std::max(scratch_.size(), placement.interleaving_bytes()));
        placement.read(files_, section.begin);
        if (!placement.is_intact(section.begin)) throw placement.damage(files_, "section " + std::to_string(number));
        placement.interleave(section.begin, scratch_.data());
        section.is_read = true;
    }
    const auto& names = section.dense.names;
    return section.begin + section.placement.place(std::ranges::find(names, name) - names.begin());
}

Matrix Weights::matrix(const std::string& name, int rows, int cols) {
    const DenseTensor& tensor = find(index_, name);
    if (tensor.layout == "vector" || tensor.rows != rows || tensor.cols != cols)
        throw std::invalid_argument("tensor " + name + " is not a matrix [" + std::to_string(rows) + ", " +
                                    std::to_string(cols) + "]");
    return {stored_layout(tensor.layout).layout, rows, cols, this->tensor(name)};
}

std::span<float> Weights::vector(const std::string& name, int size) {
    const DenseTensor& tensor = find(index_, name);
    if (tensor.layout != "vector" || tensor.rows != size)
        throw std::invalid_argument("tensor " + name + " is not a vector of " + std::to_string(size));
    return {reinterpret_cast<float*>(this->tensor(name)), size_t(size)};
}

std::span<const float> Weights::constant(int size, float value) { return constants_.emplace_back(size, value); }

void Weights::release(const std::string& name) {
    const std::byte* begin = tensor(name);
    const std::byte* end = begin + bytes_of(stored_tensor(find(index_, name)));
    // Another tensor may have the same bytes.
    const auto& dense = sections_->all.at(find(index_, name).section).dense;
    for (size_t i = 0; i < dense.names.size(); ++i) {
        const std::byte* other = tensor(dense.names[i]);
        if (dense.names[i] != name && other < end && begin < other + bytes_of(dense.tensors[i])) return;
    }
    arena_.release(begin, end - begin);
}

const std::byte* PlacedWeights::keep(const std::string& name, std::span<const std::byte> bytes) const {
    if (copies_) {
        std::byte* copy = memory_.allocate(bytes.size());
        memory_.write(copy, bytes);
        return copy;
    }
    const std::byte* kept = memory_.keep(bytes);
    if (!memory_.is_hosts()) weights_.release(name);
    return kept;
}

PlacedWeights PlacedWeights::copied_to(Memory& memory) const {
    PlacedWeights found(spec_, weights_, memory);
    found.prefix_ = prefix_;
    found.copies_ = true;
    return found;
}

Matrix PlacedWeights::matrix(std::string_view name, int rows, int cols) const {
    Matrix found = weights_.matrix(full(name), rows, cols);
    found.data = keep(full(name), {found.data, matrix_bytes(found.layout, rows, cols)});
    return found;
}

Matrix PlacedWeights::float_matrix(std::string_view name, int rows, int cols) const {
    const Matrix found = matrix(name, rows, cols);
    if (found.layout != Layout::f32)
        throw std::invalid_argument("tensor " + full(name) + " is of type " + std::string(layout_name(found.layout)) +
                                    ": it must be f32");
    return found;
}

ConstFloats PlacedWeights::vector(std::string_view name, int size, const std::function<float(float)>& change) const {
    const std::span<float> found = weights_.vector(full(name), size);
    if (change) std::ranges::transform(found, found.begin(), change);
    return ConstFloats(reinterpret_cast<const float*>(keep(full(name), std::as_bytes(found))));
}

ConstFloats PlacedWeights::constant(int size, float value) const {
    return ConstFloats(reinterpret_cast<const float*>(memory_.keep(std::as_bytes(weights_.constant(size, value)))));
}

Norm PlacedWeights::rms_norm(std::string_view name, int size, float epsilon) const {
    std::function<float(float)> change;
    if (spec_.norm_offset != 0) change = [offset = spec_.norm_offset](float weight) { return weight + offset; };
    return {vector(name, size, change), {}, size, epsilon};
}

Norm PlacedWeights::norm(std::string_view name, int size) const {
    Norm norm = rms_norm(name, size, spec_.norm_epsilon);
    if (spec_.layer_norm) norm.bias = vector(std::string(name) + "_bias", size);
    return norm;
}

}  // namespace edgemoe
