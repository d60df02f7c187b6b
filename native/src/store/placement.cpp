#include "store/placement.h"

#include <algorithm>
#include <stdexcept>

#include "edgemoe/crc32c.h"

namespace edgemoe {
namespace {

constexpr uint64_t kMatrixAlignment = 64;
// No section and no matrix is as large as this, and no file is as long: sums and products of what is smaller do not
// overflow.
constexpr uint64_t kMostBytes = uint64_t{1} << 38;
constexpr uint64_t kMostOffset = uint64_t{1} << 62;

// Bytes before an extent in the first block of its span.
uint64_t lead(const Extent& extent) { return extent.offset % kDiskBlock; }

uint64_t whole_blocks(uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }

uint64_t span_bytes(const Extent& extent) { return whole_blocks(lead(extent) + extent.length); }

bool is_row_major(const StoredTensor& tensor) { return tensor.layout && tensor.layout->row_major; }

uint64_t file_bytes(const StoredTensor& tensor) {
    return tensor.layout ? stored_bytes(*tensor.layout, tensor.rows, tensor.cols) : tensor.cols * sizeof(float);
}

}  // namespace

StoredTensor stored_tensor(const ExpertPart& part) {
    return {part.extent, part.offset, part.rows, part.cols, part.stored};
}

StoredTensor stored_tensor(const DenseTensor& tensor) {
    if (tensor.layout == "vector") return {0, tensor.offset, 1, tensor.rows, {}};
    return {0, tensor.offset, tensor.rows, tensor.cols, stored_layout(tensor.layout)};
}

bool is_whole_blocks(const Section& section) {
    const Extent& extent = section.extents[0];
    return section.extents.size() == 1 && extent.offset % kDiskBlock == 0 && extent.length % kDiskBlock == 0;
}

Placement::Placement(const Section& section, std::span<const StoredTensor> tensors)
    : section_(section), tensors_(tensors) {
    const size_t extents = section.extents.size();
    if (extents > kMostExtents)
        throw std::invalid_argument("a section has " + std::to_string(extents) + " extents, more than " +
                                    std::to_string(kMostExtents));
    std::array<uint64_t, kMostExtents> bytes{};
    for (size_t i = 0; i < extents; ++i) bytes[i] = span_bytes(section.extents[i]);
    for (const StoredTensor& tensor : tensors)
        if (tensor.extent < extents) ++tenants_[tensor.extent];
    for (const StoredTensor& tensor : tensors)
        if (tensor.extent < extents && moves(tensor))
            bytes[tensor.extent] = std::max(
                bytes[tensor.extent], whole_blocks(matrix_bytes(tensor.layout->layout, tensor.rows, tensor.cols)));
    for (size_t i = 0; i < kMostExtents; ++i) begins_[i + 1] = begins_[i] + bytes[i];
}

bool Placement::moves(const StoredTensor& tensor) const { return is_row_major(tensor) && is_alone(tensor); }

uint64_t Placement::stored_place(const StoredTensor& tensor) const {
    return begins_[tensor.extent] + lead(section_.extents[tensor.extent]) + tensor.offset;
}

uint64_t Placement::read_bytes() const {
    uint64_t bytes = 0;
    for (const Extent& extent : section_.extents) bytes += span_bytes(extent);
    return bytes;
}

uint64_t Placement::place(size_t number) const {
    const StoredTensor& tensor = tensors_[number];
    return moves(tensor) ? begins_[tensor.extent] : stored_place(tensor);
}

void Placement::require_possible(const std::string& name) const {
    if (section_.extents.empty()) throw std::invalid_argument(name + " has no extents");
    uint64_t bytes = 0;
    for (const Extent& extent : section_.extents) {
        if (extent.length < 1 || extent.length > kMostBytes || extent.offset > kMostOffset ||
            (bytes += extent.length) > kMostBytes)
            throw std::invalid_argument(name + " has an impossible extent: " + std::to_string(extent.length) +
                                        " bytes at offset " + std::to_string(extent.offset));
    }
}

void Placement::require_fitting(size_t number, const std::string& name) const {
    const StoredTensor& tensor = tensors_[number];
    const auto refuse = [&](const std::string& why) { throw std::invalid_argument(name + " " + why); };
    // With the sizes bounded, the layout's own sizes are exact.
    const auto rows = static_cast<uint64_t>(std::max(tensor.rows, 0)),
               cols = static_cast<uint64_t>(std::max(tensor.cols, 0));
    if (rows < 1 || cols < 1 || rows * cols > kMostBytes)
        refuse("has the impossible shape [" + std::to_string(tensor.rows) + ", " + std::to_string(tensor.cols) + "]");
    if (tensor.extent >= section_.extents.size())
        refuse("lies in extent " + std::to_string(tensor.extent) + " of a section of " +
               std::to_string(section_.extents.size()));
    const uint64_t length = section_.extents[tensor.extent].length, bytes = file_bytes(tensor);
    if (tensor.offset > length || bytes > length - tensor.offset)
        refuse("does not fit into its section: " + std::to_string(bytes) + " bytes at " +
               std::to_string(tensor.offset) + " of " + std::to_string(length));
    if (moves(tensor)) return;
    if (is_row_major(tensor) && (tensor.rows % kRowBlock != 0 || stored_place(tensor) % kMatrixAlignment != 0))
        refuse("is row-major and neither alone in its extent nor in whole, aligned blocks");
    const uint64_t alignment = tensor.layout ? kMatrixAlignment : sizeof(float);
    if (stored_place(tensor) % alignment != 0)
        refuse("does not begin at a multiple of " + std::to_string(alignment) + " bytes");
}

void Placement::read(std::span<const std::unique_ptr<DirectFile>> files, std::byte* memory) const {
    for (size_t i = 0; i < section_.extents.size(); ++i) {
        const Extent& extent = section_.extents[i];
        if (extent.file >= files.size())
            throw std::invalid_argument("an extent is in file " + std::to_string(extent.file) + " of " +
                                        std::to_string(files.size()));
        files[extent.file]->read(extent.offset - lead(extent),
                                 {memory + begins_[i], static_cast<size_t>(span_bytes(extent))},
                                 lead(extent) + extent.length);
    }
}

bool Placement::is_intact(const std::byte* memory) const {
    if (!section_.checksum) return true;
    uint32_t checksum = 0;
    for (size_t i = 0; i < section_.extents.size(); ++i) {
        const Extent& extent = section_.extents[i];
        checksum = crc32c({memory + begins_[i] + lead(extent), static_cast<size_t>(extent.length)}, checksum);
    }
    return checksum == *section_.checksum;
}

IoError Placement::damage(std::span<const std::unique_ptr<DirectFile>> files, const std::string& name) const {
    const Extent& first = section_.extents[0];
    return IoError(files[first.file]->path() + ": " + name + " at offset " + std::to_string(first.offset) +
                   " is damaged (its checksum differs)");
}

size_t Placement::interleaving_bytes() const {
    size_t bytes = 0;
    for (const StoredTensor& tensor : tensors_)
        if (is_row_major(tensor)) bytes = std::max(bytes, block_bytes(tensor.layout->layout, tensor.cols));
    return bytes;
}

void Placement::interleave(std::byte* memory, std::byte* scratch) const {
    for (size_t number = 0; number < tensors_.size(); ++number) {
        const StoredTensor& tensor = tensors_[number];
        if (is_row_major(tensor))
            edgemoe::interleave(tensor.layout->layout, tensor.rows, tensor.cols, memory + stored_place(tensor),
                                memory + place(number), scratch);
    }
}

}  // namespace edgemoe
