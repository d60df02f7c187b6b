#include "store/layout.h"

#include <algorithm>
#include <bit>
#include <functional>
#include <map>
#include <numeric>
#include <stdexcept>

namespace edgemoe {
namespace {

constexpr int kMostLayers = 1 << 16;

uint64_t whole_blocks(uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }

uint64_t run_of(uint64_t bytes, uint64_t unit) {
    return std::bit_ceil(std::max<uint64_t>((bytes + unit - 1) / unit, 1));
}

// Units of a length that divide memory for pieces of various lengths, and what all pieces take in them.
struct Division {
    uint64_t unit, bytes;
};

// The lengths of pieces and their halves, quarters, ...: that which wastes least, and of similar ones the largest, with
// which there is least to keep account of. counts: of pieces that take so many bytes.
Division least_waste(const std::map<uint64_t, uint64_t>& counts) {
    constexpr int kHalvings = 4;
    constexpr size_t kCandidates = 16;
    std::vector<uint64_t> candidates;
    for (auto at = counts.rbegin(); at != counts.rend() && candidates.size() < kCandidates * kHalvings; ++at)
        for (int halvings = 0; halvings < kHalvings; ++halvings)
            candidates.push_back(whole_blocks((at->first + (1 << halvings) - 1) >> halvings));
    std::ranges::sort(candidates, std::greater());
    Division best{0, 0};
    for (const uint64_t unit : candidates) {
        uint64_t total = 0;
        for (const auto& [bytes, count] : counts) total += run_of(bytes, unit) * unit * count;
        if (best.unit == 0 || static_cast<double>(total) < 0.99 * static_cast<double>(best.bytes)) best = {unit, total};
    }
    return best;
}

// Whether the levels of a layer's experts go together: one of any layout, or nested ones, coarse to fine.
void require_nested(const ExpertLayer& experts, const std::string& name) {
    const size_t levels = experts.levels.size();
    if (levels < 1 || levels > kMaxLevels) throw std::invalid_argument(name + " has no or too many levels");
    for (int part = 0; part < 3; ++part) {
        int bits = 0;
        for (size_t level = 0; level < levels; ++level) {
            const StoredLayout& stored = experts.levels[level].parts[part].stored;
            bits += stored.level_bits;
            if ((levels > 1 && stored.layout != Layout::nested) || stored.refines != (level > 0) || bits > 8 ||
                (level == 0 && stored.later != static_cast<int>(levels) - 1))
                throw std::invalid_argument(name + " has levels that are not nested");
        }
    }
}

}  // namespace

StoreLayout::StoreLayout(const PackIndex& index, bool may_join) {
    number_sections(index);
    if (sections_.empty()) return;
    const bool several =
        std::ranges::any_of(index.experts, [](const auto& layer) { return layer.second.levels.size() > 1; });
    divide(several, may_join);
    number_pieces();
}

void StoreLayout::number_sections(const PackIndex& index) {
    first_section_.push_back(0);
    for (const auto& [layer, layer_experts] : index.experts) {
        const std::string name = "an expert of layer " + std::to_string(layer);
        if (layer < 0 || layer >= kMostLayers) throw std::invalid_argument(name + ": there is no such layer");
        require_nested(layer_experts, name);
        // Layers in between have none.
        first_expert_.resize(static_cast<size_t>(layer) + 1, experts());
        first_matrices_.resize(static_cast<size_t>(layer) + 1, static_cast<int32_t>(matrices_.size()));
        for (const ExpertLevel& level : layer_experts.levels) {
            const auto& [gate, up, down] = level.parts;
            matrices_.push_back({stored_tensor(gate), stored_tensor(up), stored_tensor(down)});
        }
        for (const std::vector<uint32_t>& sections : layer_experts.sections) {
            if (sections.empty() || sections.size() > layer_experts.levels.size())
                throw std::invalid_argument(name + " has no levels, or more than its layer");
            const int expert = experts();
            layer_of_.push_back(layer);
            for (const uint32_t section : sections) sections_.push_back(&index.sections.at(section));
            for (int level = 0; level < static_cast<int>(sections.size()); ++level) {
                const Placement level_placement = placement(expert, level);
                level_placement.require_possible(name);
                for (size_t i = 0; i < std::tuple_size_v<Matrices>; ++i) level_placement.require_fitting(i, name);
                level_bytes_.push_back(level_placement.bytes());
                interleaving_bytes_ = std::max(interleaving_bytes_, level_placement.interleaving_bytes());
            }
            first_section_.push_back(static_cast<int32_t>(sections_.size()));
        }
    }
    first_expert_.push_back(experts());
}

std::span<const uint64_t> StoreLayout::level_bytes(int expert) const {
    return std::span(level_bytes_).subspan(first_section_[expert], first_section_[expert + 1] - first_section_[expert]);
}

void StoreLayout::divide(bool several_levels, bool may_join) {
    std::map<uint64_t, uint64_t> levels, sums;  // how many levels, or whole experts, take so many bytes
    for (int expert = 0; expert < experts(); ++expert) {
        const auto sizes = level_bytes(expert);
        for (const uint64_t bytes : sizes) ++levels[bytes];
        ++sums[std::accumulate(sizes.begin(), sizes.end(), uint64_t{0})];
    }
    if (!several_levels) {
        unit_ = levels.rbegin()->first;
        return;
    }
    const Division apart = least_waste(levels), together = least_waste(sums);
    joined_ = may_join && together.bytes <= apart.bytes;
    unit_ = joined_ ? together.unit : apart.unit;
}

void StoreLayout::number_pieces() {
    first_piece_.push_back(0);
    for (int expert = 0; expert < experts(); ++expert) {
        const auto sizes = level_bytes(expert);
        const int levels = static_cast<int>(sizes.size());
        int units = 0;
        for (int level = 0; level < levels;) {
            Piece piece{expert, level, joined_ ? levels : level + 1, 0, 0};
            uint64_t bytes = 0;
            for (; level < piece.end; ++level) {
                places_.push_back(bytes);
                bytes += sizes[level];
                piece.bytes += placement(expert, level).read_bytes();
            }
            piece.run = run(bytes);
            units += piece.run;
            longest_run_ = std::max(longest_run_, piece.run);
            pieces_.push_back(piece);
        }
        first_piece_.push_back(static_cast<int32_t>(pieces_.size()));
        units_per_slot_ = std::max(units_per_slot_, units);
        units_ += static_cast<uint64_t>(units);
    }
}

int StoreLayout::run(uint64_t bytes) const { return static_cast<int>(run_of(bytes, unit_)); }

int StoreLayout::slots() const {
    const auto per_slot = static_cast<uint64_t>(units_per_slot_);
    return per_slot ? static_cast<int>((units_ + per_slot - 1) / per_slot) : 0;
}

Placement StoreLayout::placement(int expert, int level) const {
    return {section(expert, level), matrices_[first_matrices_[layer_of_[expert]] + level]};
}

bool StoreLayout::follows(int expert, int level) const {
    const Section &before = section(expert, level - 1), &next = section(expert, level);
    return is_whole_blocks(before) && is_whole_blocks(next) && before.extents[0].file == next.extents[0].file &&
           before.extents[0].offset + before.extents[0].length == next.extents[0].offset;
}

std::string StoreLayout::name(int expert, int level) const {
    const int layer = layer_of_[expert];
    return "layer " + std::to_string(layer) + " expert " + std::to_string(expert - first_expert_[layer]) +
           (level ? " level " + std::to_string(level) : "");
}

}  // namespace edgemoe
