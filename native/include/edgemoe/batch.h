// What a pass computes: rows, each of which is a token, or an embedding, at a position of a sequence.
#pragma once

#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "edgemoe/weight_layouts.h"

namespace edgemoe {

// How exactly the experts of a row are computed, where they are nested. Pick i of a token works as many levels below
// its finest as there are thresholds (ascending) below the share of the router's weight that the picks
// with larger weights have. None: exact. What is in memory or on its way makes no difference.
struct Quality {
    std::vector<float> thresholds;
    int level_cap = kMaxLevels;  // no expert works above this level
};

// Rows are computed as if one after the other: a row sees the earlier rows of its sequence.
struct Batch {
    static constexpr int32_t kEmbedding = -1;  // in place of a token: the row's stream is given in `embeddings`

    std::span<const int32_t> tokens;       // [rows]
    std::span<const int32_t> positions;    // [rows] of a sequence, each the one after its last
    std::span<const int32_t> sequences;    // [rows] ids from Engine::add_sequence
    std::span<const int32_t> wanted{};     // rows whose logits are wanted, ascending
    std::span<const Quality> qualities{};  // none: exact
    std::span<const uint8_t> quality{};    // [rows] into `qualities`; empty: the first of them for all rows
    std::span<const int32_t> overlays{};   // [rows] whose weights; empty or 0: the model's own, others do not exist yet
    std::span<const float> embeddings{};   // [rows, hidden], read where the token is kEmbedding; empty if there is none
};

// The layers [first, end) that rows go through.
struct LayerRange {
    int first;
    int end;
};

// A position beyond the context, or not the next one of its sequence.
struct ContextError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

}  // namespace edgemoe
