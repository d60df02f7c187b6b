#include "store/memory_tier.h"

#include <algorithm>
#include <array>
#include <limits>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgemoe {
namespace {

size_t unit_count(const StoreLayout& layout, int slots) {
    const auto units = static_cast<size_t>(layout.units_per_slot()) * static_cast<size_t>(std::max(slots, 0));
    if (layout.unit() != 0 && units > std::numeric_limits<size_t>::max() / 2 / layout.unit())
        throw std::invalid_argument(std::to_string(slots) + " expert slots are more than there can be memory for");
    return units;
}

std::vector<int32_t> layers_of_pieces(const StoreLayout& layout) {
    std::vector<int32_t> layers;
    for (const Piece& piece : layout.pieces()) layers.push_back(layout.layer_of(piece.expert));
    return layers;
}

}  // namespace

MemoryTier::MemoryTier(const StoreLayout& layout, int slots, Eviction policy, StoreCounters& counters)
    : layout_(layout),
      counters_(counters),
      expected_(static_cast<size_t>(layout.experts()), 0),
      owner_(unit_count(layout, slots), -1),
      runs_(owner_.size(), layout.longest_run()),
      is_stale_(owner_.size(), 0),
      ranking_(policy, layers_of_pieces(layout), layout.layers()),
      arena_(layout.unit() * owner_.size()) {
    for (const Piece& piece : layout.pieces()) held_.push_back({piece.run, layout.end_piece(piece.expert)});
    stale_.reserve(owner_.size());
}

// Whether what lies in a unit costs something else by now.
inline void MemoryTier::reconsider(const Held& held) {
    if (held.unit < 0) return;
    for (int unit = held.unit; unit < held.unit + held.run; ++unit)
        if (!std::exchange(is_stale_[unit], 1)) stale_.push_back(unit);
}

void MemoryTier::reconsider(int expert) {
    const int first = layout_.first_piece(expert), end = layout_.end_piece(expert);
    for (int piece = first; piece < end; ++piece) reconsider(held_[piece]);
}

std::byte* MemoryTier::address(int expert, int level) const {
    const Held& held = held_[layout_.first_piece(expert) + layout_.piece_of(level)];
    return arena_.data() + static_cast<uint64_t>(held.unit) * layout_.unit() + layout_.place(expert, level);
}

void MemoryTier::begin_turn(int layer, const Turn& turn) {
    layer_ = layer;
    passed_ = std::min(passed_ + ranking_.begin_turn(layer, turn), layout_.layers());
}

void MemoryTier::expect(int expert, bool expected) {
    expected_[expert] = expected;
    reconsider(expert);
}

bool MemoryTier::keep(int expert, int count) {
    const int first = layout_.first_piece(expert);
    std::array<int, kMaxLevels> added;
    int missing = 0;
    for (int piece = first; piece < first + count; ++piece) {
        ++held_[piece].kept;
        if (held_[piece].unit < 0) added[missing++] = piece;
    }
    reconsider(expert);
    // Long runs first: they would not find a place between short ones.
    std::stable_sort(added.begin(), added.begin() + missing,
                     [this](int left, int right) { return held_[left].run > held_[right].run; });
    for (int i = 0; i < missing; ++i) {
        const int unit = make_room(held_[added[i]].run, false);
        if (unit < 0) {
            while (i-- > 0) drop(added[i]);
            let_go(expert, count);
            return false;
        }
        place(added[i], unit);
    }
    return true;
}

void MemoryTier::let_go(int expert, int count) {
    const int first = layout_.first_piece(expert);
    for (int piece = first; piece < first + count; ++piece) --held_[piece].kept;
    reconsider(expert);
}

bool MemoryTier::place_speculative(int piece) {
    const int unit = make_room(held_[piece].run, true);
    if (unit < 0) return false;
    place(piece, unit);
    held_[piece].speculative = true;
    held_[piece].state = PieceState::reading;
    reconsider(layout_.piece(piece).expert);  // its coarser levels stay meanwhile
    return true;
}

void MemoryTier::place(int piece, int unit) {
    Held& held = held_[piece];
    held.unit = unit;
    reconsider(held);
    std::fill_n(owner_.begin() + unit, held.run, piece);
}

void MemoryTier::drop(int piece) {
    Held& held = held_[piece];
    reconsider(held);
    std::fill_n(owner_.begin() + held.unit, held.run, -1);
    held.unit = -1;
    held.state = PieceState::absent;
    held.speculative = false;
}

void MemoryTier::evict(int piece) {
    for (int finer = held_[piece].end - 1; finer >= piece; --finer) {
        if (held_[finer].unit < 0) continue;
        const uint64_t sections = layout_.piece(finer).sections();
        if (held_[finer].speculative) counters_.prefetch_wasted += sections;
        counters_.evictions += sections;
        drop(finer);
    }
}

bool MemoryTier::can_leave(int piece) const {
    if (held_[piece].kept > 0) return false;
    // The finer levels go with it. They are needed only where it is, but may be on their way.
    for (int finer = piece; finer < held_[piece].end; ++finer)
        if (held_[finer].state == PieceState::queued || held_[finer].state == PieceState::reading) return false;
    return true;
}

void MemoryTier::update_runs() {
    const int layers = layout_.layers();
    for (; passed_ > 0; --passed_) {
        const int layer = (layer_ - passed_ + 1 + layers) % layers;
        for (int expert = layout_.first_expert(layer); expert < layout_.end_expert(layer); ++expert) reconsider(expert);
    }
    for (const int32_t unit : stale_) {
        runs_.set(static_cast<size_t>(unit), cost_of(unit));
        is_stale_[unit] = 0;
    }
    stale_.clear();
}

Cost MemoryTier::cost_of(int unit) const {
    const int32_t piece = owner_[unit];
    if (piece < 0) return {};
    if (!can_leave(piece)) return {Cost::Kind::stays, {}, 0};
    const Piece& facts = layout_.piece(piece);
    return {expected_[facts.expert] ? Cost::Kind::expected : Cost::Kind::leaves, ranking_.rank(piece), -facts.level};
}

int MemoryTier::make_room(int run, bool for_prediction) {
    update_runs();
    const auto [begin, cost] = runs_.cheapest(run);
    if (cost.kind >= (for_prediction ? Cost::Kind::expected : Cost::Kind::stays)) return -1;
    for (int unit = begin; unit < begin + run; ++unit)
        if (owner_[unit] >= 0) evict(owner_[unit]);
    return begin;
}

}  // namespace edgemoe
