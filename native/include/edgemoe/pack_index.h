// Where a model's weights lie: what the Python reader has validated and resolved from a pack's index (docs/format.md).
#pragma once

#include <array>
#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "edgemoe/weight_layouts.h"

namespace edgemoe {

struct Extent {
    uint32_t file;
    uint64_t offset;
    uint64_t length;
};

// What is read at once: extents, one after the other. Packs have a CRC32C for all of them together, GGUF files none.
struct Section {
    std::vector<Extent> extents;
    std::optional<uint32_t> checksum;
};

// A matrix or vector of the dense part.
struct DenseTensor {
    uint32_t section;
    uint64_t offset;
    std::string layout;  // of StoredLayout, or "vector"
    int rows;            // of a vector: its length
    int cols;            // of a vector: 1
};

// One level of one of an expert's three matrices: which extent of its section, and where in it. A row-major one fills
// its extent.
struct ExpertPart {
    StoredLayout stored;
    uint32_t extent;
    uint64_t offset;
    int rows;
    int cols;
};

// One level of a layer's experts; all of them share the places of their parts.
struct ExpertLevel {
    int bits;                         // of a weight, coarser levels included
    std::array<ExpertPart, 3> parts;  // gate, up, down
};

// The experts of one layer. One level: of any layout. Several: nested, coarse to fine.
struct ExpertLayer {
    std::vector<ExpertLevel> levels;
    std::vector<std::vector<uint32_t>> sections;  // [experts][its first one or more levels]
};

struct PackIndex {
    std::vector<std::string> files;
    std::vector<Section> sections;
    std::map<std::string, DenseTensor> dense;
    std::map<int, ExpertLayer> experts;
};

}  // namespace edgemoe
