#include "model/weights.h"

#include <algorithm>
#include <map>
#include <stdexcept>

#include "edgemoe/crc32c.h"

namespace edgemoe {
namespace {

constexpr uint64_t kAlignment = 64;

uint64_t lead(const Extent& extent) { return extent.offset % kDiskBlock; }
uint64_t whole_disk_blocks(uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }
uint64_t span_bytes(const Extent& extent) { return whole_disk_blocks(lead(extent) + extent.length); }

bool is_row_major(const DenseTensor& tensor) {
    return tensor.layout != "vector" && stored_layout(tensor.layout).row_major;
}

// Memory of each dense section: the block-aligned span around its one extent, or what its row-major matrix takes once
// it is interleaved, if that is more.
std::map<uint32_t, uint64_t> dense_sections(const PackIndex& index) {
    std::map<uint32_t, uint64_t> sections;
    for (const auto& [name, tensor] : index.dense) {
        const Section& section = index.sections[tensor.section];
        if (section.extents.size() != 1)
            throw std::invalid_argument("dense section " + std::to_string(tensor.section) + " is not one extent");
        uint64_t& bytes = sections[tensor.section];
        bytes = std::max(bytes, span_bytes(section.extents[0]));
        if (is_row_major(tensor))
            bytes = std::max(
                bytes, whole_disk_blocks(matrix_bytes(stored_layout(tensor.layout).layout, tensor.rows, tensor.cols)));
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
    for (const auto& [number, bytes] : dense_sections(index)) total += bytes;
    return total;
}

Weights::Weights(const PackIndex& index, std::span<const std::unique_ptr<DirectFile>> files)
    : index_(index), arena_(bytes(index)), sections_(index.sections.size(), nullptr) {
    std::byte* target = arena_.data();
    for (const auto& [number, bytes] : dense_sections(index)) {
        const Section& section = index_.sections[number];
        const Extent& extent = section.extents[0];
        const DirectFile& file = *files[extent.file];
        file.read(extent.offset - lead(extent), {target, span_bytes(extent)}, lead(extent) + extent.length);
        if (section.checksum && crc32c({target + lead(extent), extent.length}) != *section.checksum)
            throw IoError(file.path() + ": section " + std::to_string(number) + " at offset " +
                          std::to_string(extent.offset) + " is damaged (its checksum differs)");
        sections_[number] = target + lead(extent);
        target += bytes;
    }
    std::vector<int> users(index_.sections.size(), 0);
    for (const auto& [name, tensor] : index_.dense) ++users[tensor.section];
    std::vector<std::byte> scratch;
    for (const auto& [name, tensor] : index_.dense) {
        if (!is_row_major(tensor)) continue;
        const StoredLayout stored = stored_layout(tensor.layout);
        const Extent& extent = index_.sections[tensor.section].extents[0];
        if (tensor.offset > extent.length ||
            stored_bytes(stored, tensor.rows, tensor.cols) > extent.length - tensor.offset)
            throw std::invalid_argument("tensor " + name + " does not fit into its section");
        std::byte*& data = sections_[tensor.section];
        std::byte* source = data + tensor.offset;
        // Alone in its section (GGUF): to the beginning of the section's memory. In company (a pack): where it stands.
        if (users[tensor.section] == 1)
            data -= lead(extent) + tensor.offset;
        else if (tensor.rows % kRowBlock != 0 || (lead(extent) + tensor.offset) % kAlignment != 0)
            throw std::invalid_argument("tensor " + name +
                                        " is row-major and neither alone in its extent nor in whole, aligned blocks");
        scratch.resize(std::max(scratch.size(), block_bytes(stored.layout, tensor.cols)));
        interleave(stored.layout, tensor.rows, tensor.cols, source, data + tensor.offset, scratch.data());
    }
}

Matrix Weights::matrix(const std::string& name, int rows, int cols) const {
    const DenseTensor& tensor = find(index_, name);
    const StoredLayout stored = stored_layout(tensor.layout);
    const uint64_t length = index_.sections[tensor.section].extents[0].length;
    if (tensor.rows != rows || tensor.cols != cols || tensor.offset > length ||
        stored_bytes(stored, rows, cols) > length - tensor.offset)
        throw std::invalid_argument("tensor " + name + " does not fit into its section");
    return {stored.layout, rows, cols, sections_[tensor.section] + tensor.offset};
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
    const Extent& extent = index_.sections[tensor.section].extents[0];
    if (tensor.layout != "vector" || tensor.rows != size || (lead(extent) + tensor.offset) % sizeof(float) != 0 ||
        tensor.offset > extent.length || size * sizeof(float) > extent.length - tensor.offset)
        throw std::invalid_argument("tensor " + name + " is not a vector of " + std::to_string(size));
    return Floats(reinterpret_cast<float*>(sections_[tensor.section] + tensor.offset));
}

ConstFloats Weights::constant(int size, float value) {
    return ConstFloats(constants_.emplace_back(size, value).data());
}

Norm load_norm(const ModelSpec& spec, const Weights& weights, const std::string& name, int size) {
    const Floats weight = weights.vector(name, size);
    if (spec.norm_offset != 0)
        for (int i = 0; i < size; ++i) weight.address()[i] += spec.norm_offset;
    Norm norm{weight, {}, size, spec.norm_epsilon};
    if (spec.layer_norm) norm.bias = weights.vector(name + "_bias", size);
    return norm;
}

Norm LayerWeights::norm(std::string_view name, int size) const { return load_norm(spec_, weights_, full(name), size); }

}  // namespace edgemoe
