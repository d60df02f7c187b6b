// The pieces that experts are made of, and how memory is divided for them.
//
// An expert is one section, or several where its weights are nested: level 0 by itself is a coarse expert, and every
// later level refines it. A piece is what lies in memory, comes and leaves as one: a level of an expert, or all of its
// levels where experts never work with less.
//
// Memory is divided into equal units. A piece takes a run of 1, 2, 4, ... of them that begins at a multiple of its
// length, so that no order of coming and leaving can scatter what is free: dropping what lies in such a run always
// makes room for a piece of its length.
//
// The unit is chosen to waste little on this rounding. Levels need runs of two lengths, and that of a refinement is not
// a half or a quarter of the base's: levels of 2, 3 and 4 bits (2.5, 1 and 1 with their parameters) take 11 % more than
// their bytes. Experts that never work with less than all their levels are better one piece, of one unit if they are
// all alike, which wastes nothing: so they lie, come and leave as if they had one level.
//
// Nothing here changes once it is made: it says what there is, not where it lies.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "edgemoe/pack_index.h"
#include "store/placement.h"

namespace edgemoe {

struct Piece {
    int32_t expert;      // of all experts
    int32_t level, end;  // its sections are those of levels level ... end - 1
    int32_t run;         // units it takes
    uint64_t bytes;      // that are read for it

    uint64_t sections() const { return static_cast<uint64_t>(end - level); }
};

class StoreLayout {
  public:
    // may_join: experts never work with less than all levels. The index must outlive the layout. Throws
    // std::invalid_argument where it says something impossible about an expert.
    StoreLayout(const PackIndex& index, bool may_join);

    uint64_t unit() const { return unit_; }                 // bytes
    int units_per_slot() const { return units_per_slot_; }  // of the largest expert
    uint64_t units() const { return units_; }               // of all experts
    int longest_run() const { return longest_run_; }
    int run(uint64_t bytes) const;  // units of a piece that takes so many bytes

    // Memory that the largest expert takes; so many of them hold all experts.
    size_t slot_bytes() const { return unit_ * static_cast<uint64_t>(units_per_slot_); }
    int slots() const;

    // Experts of all layers are numbered one after the other, and so are their pieces. Layers without routed experts
    // have none.
    int layers() const { return static_cast<int>(first_expert_.size()) - 1; }
    int experts() const { return static_cast<int>(layer_of_.size()); }
    int first_expert(int layer) const { return first_expert_[layer]; }
    int end_expert(int layer) const { return first_expert_[layer + 1]; }
    int layer_of(int expert) const { return layer_of_[expert]; }
    std::span<const Piece> pieces() const { return pieces_; }
    const Piece& piece(int number) const { return pieces_[number]; }
    int first_piece(int expert) const { return first_piece_[expert]; }
    int end_piece(int expert) const { return first_piece_[expert + 1]; }
    // Which of its expert's pieces a level is in, from 0 on.
    int piece_of(int level) const { return joined_ ? 0 : level; }

    const Section& section(int expert, int level) const { return *sections_[first_section_[expert] + level]; }
    Placement placement(int expert, int level) const;
    // Where a level begins in the memory of its piece.
    uint64_t place(int expert, int level) const { return places_[first_section_[expert] + level]; }
    // Whether a level begins in the file where the one before it ends, so that one read brings both.
    bool follows(int expert, int level) const;
    // "layer 3 expert 7 level 1", for messages.
    std::string name(int expert, int level) const;
    size_t interleaving_bytes() const { return interleaving_bytes_; }  // of scratch memory, for any section

  private:
    using Matrices = std::array<StoredTensor, 3>;

    void number_sections(const PackIndex& index);
    void divide(bool several_levels, bool may_join);
    void number_pieces();
    std::span<const uint64_t> level_bytes(int expert) const;

    bool joined_ = false;
    uint64_t unit_ = 0;
    int units_per_slot_ = 0;
    uint64_t units_ = 0;
    int longest_run_ = 1;
    std::vector<int32_t> first_expert_;  // [layers + 1]
    std::vector<int32_t> layer_of_;      // [experts]
    std::vector<Piece> pieces_;
    std::vector<int32_t> first_piece_;      // [experts + 1]
    std::vector<Matrices> matrices_;        // of the levels of all layers
    std::vector<int32_t> first_matrices_;   // [layers] into these
    std::vector<const Section*> sections_;  // of the levels of all experts
    std::vector<int32_t> first_section_;    // [experts + 1] into these
    std::vector<uint64_t> level_bytes_;     // that each of these takes in memory
    std::vector<uint64_t> places_;          // where each of these begins in its piece
    size_t interleaving_bytes_ = 0;
};

}  // namespace edgemoe
