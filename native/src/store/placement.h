// Where the bytes of a section come to lie in memory, for dense weights and for experts.
//
// A section is read as it is stored, extent by extent. Direct reads move whole disk blocks: each extent gets memory for
// the block-aligned span around it, and its own bytes begin somewhere in the first block. Row-major matrices (GGUF) are
// then interleaved. One that has an extent to itself goes to the beginning of that extent's memory, which is aligned
// wherever the extent begins in the file, and is as long as the interleaved matrix needs. One that shares its extent
// with other tensors is interleaved where it stands, which takes whole, aligned blocks of rows.
//
// Sections and tensors come from an index that nobody vouches for. require_fitting() holds them against each other;
// only what has passed it may be read.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "edgemoe/direct_file.h"
#include "edgemoe/pack_index.h"
#include "edgemoe/weight_layouts.h"

namespace edgemoe {

inline constexpr size_t kMostExtents = 3;  // of a section: the three matrices of an expert

// A tensor of a section, as far as its place is concerned. Matrices lie in memory at multiples of 64 bytes, vectors at
// multiples of a float's size.
struct StoredTensor {
    uint32_t extent;                     // of its section
    uint64_t offset;                     // in that extent
    int rows, cols;                      // a vector is one row
    std::optional<StoredLayout> layout;  // none: a vector of float32
};

StoredTensor stored_tensor(const ExpertPart& part);
StoredTensor stored_tensor(const DenseTensor& tensor);  // throws std::invalid_argument where its layout is not known

// The places of one section's extents and tensors, in bytes from the beginning of its memory. A view: the section and
// the tensors, which are all that the section has, must outlive it.
class Placement {
  public:
    // Throws std::invalid_argument where the section has more than kMostExtents.
    Placement(const Section& section, std::span<const StoredTensor> tensors);

    // Throws std::invalid_argument, which begins with `name`, where the section's extents have impossible lengths or
    // offsets.
    void require_possible(const std::string& name) const;
    // ... where the tensor does not lie within its extent, or not where it can be used.
    void require_fitting(size_t tensor, const std::string& name) const;

    uint64_t bytes() const { return begins_.back(); }  // of memory, in whole disk blocks
    uint64_t read_bytes() const;                       // of them read() fills
    uint64_t place(size_t tensor) const;               // where it is in the end

    // Reads all extents into `memory` [bytes()], which is block-aligned. Throws IoError.
    void read(std::span<const std::unique_ptr<DirectFile>> files, std::byte* memory) const;
    // Whether what was read has the checksum that the index says, if it says one; and the error if it has not, which
    // calls the section `name`.
    bool is_intact(const std::byte* memory) const;
    IoError damage(std::span<const std::unique_ptr<DirectFile>> files, const std::string& name) const;
    // Puts row-major matrices in the order that products read. scratch: interleaving_bytes(), of its own for every
    // thread.
    void interleave(std::byte* memory, std::byte* scratch) const;
    size_t interleaving_bytes() const;

  private:
    bool is_alone(const StoredTensor& tensor) const { return tenants_[tensor.extent] == 1; }
    bool moves(const StoredTensor& tensor) const;
    uint64_t stored_place(const StoredTensor& tensor) const;

    const Section& section_;
    std::span<const StoredTensor> tensors_;
    std::array<uint64_t, kMostExtents + 1> begins_{};  // of the extents' memory; from the last one on, the end
    std::array<uint32_t, kMostExtents> tenants_{};     // tensors in each extent
};

// Whether a section is one extent of whole disk blocks, so that one read can go on from it to the next section, or come
// to it from the one before.
bool is_whole_blocks(const Section& section);

}  // namespace edgemoe
