#include "store/device_tier.h"

#include <algorithm>
#include <cstring>
#include <utility>

namespace edgemoe {
namespace {

constexpr size_t kAlignment = 256;
constexpr double kNewest = 0.2;  // weight of the last measurement in an average

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

double seconds_since(std::chrono::steady_clock::time_point begin) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

size_t all_bytes(const std::vector<std::array<size_t, 3>>& sizes) {
    size_t total = 0;
    for (const auto& level : sizes)
        for (const size_t bytes : level) total += aligned(bytes);
    return total;
}

}  // namespace

std::vector<std::array<size_t, 3>> expert_bytes(const ExpertLayer& layer) {
    std::vector<std::array<size_t, 3>> sizes;
    for (const ExpertLevel& level : layer.levels) {
        auto& own = sizes.emplace_back();
        for (int part = 0; part < 3; ++part) {
            const ExpertPart& matrix = level.parts[part];
            own[part] = matrix.stored.layout == Layout::nested
                            ? stored_bytes(matrix.stored, matrix.rows, matrix.cols)
                            : matrix_bytes(matrix.stored.layout, matrix.rows, matrix.cols);
        }
    }
    return sizes;
}

void MissRule::Average::add(size_t bytes, double seconds) {
    if (seconds <= 0 || bytes == 0) return;
    const double measured = static_cast<double>(bytes) / seconds;
    rate = rate == 0 ? measured : rate + kNewest * (measured - rate);
}

int MissRule::moved(int misses) {
    if (host_.rate <= 0 || link_.rate <= 0) return 0;
    // Of m misses, n over the link: n / link <= (m - n) / host, with rates in experts.
    const double share = link_.rate / (link_.rate + host_.rate);
    const int whole = static_cast<int>(share * misses);
    // One more, if all are done sooner then.
    const auto longest = [&](int n) { return std::max(n / link_.rate, (misses - n) / host_.rate); };
    const int moved = whole < misses && longest(whole + 1) < longest(whole) ? whole + 1 : whole;
    // Now and then the host takes one, for its figure would never change otherwise.
    if (moved == misses && misses > 0 && ++without_host_ % kAgain == 0) return moved - 1;
    return moved;
}

size_t DeviceTier::slot_bytes(std::span<const ExpertLayer* const> layers) {
    size_t most = 0;
    for (const ExpertLayer* layer : layers)
        if (layer) most = std::max(most, all_bytes(expert_bytes(*layer)));
    return most;
}

DeviceTier::DeviceTier(Device& device, Memory& memory, std::vector<const ExpertLayer*> layers, int slots)
    : device_(device),
      slot_bytes_(slot_bytes(layers)),
      memory_(memory.allocate(slot_bytes_ * slots)),
      slots_(slots),
      staging_(slot_bytes_ * kUploads) {
    int experts = 0;
    for (const ExpertLayer* layer : layers) {
        begins_.push_back(experts);
        sizes_.push_back(layer ? expert_bytes(*layer) : std::vector<std::array<size_t, 3>>());
        if (layer) experts += static_cast<int>(layer->sections.size());
    }
    slot_of_.assign(experts, -1);
    last_use_.assign(experts, 0);
    before_.assign(experts, 0);
    for (int i = 0; i < kUploads; ++i) free_staging_.push_back(i);
    device_.pin({staging_.data(), staging_.size()});
    // A first figure of the link, with what lies in no slot yet.
    if (slots > 0) {
        const std::span<const std::byte> some(staging_.data(), slot_bytes_);
        for (int warm = 1; warm >= 0; --warm) {
            const auto begin = std::chrono::steady_clock::now();
            device_.wait(device_.upload(memory_, some));
            if (!warm) rule_.link_took(slot_bytes_, seconds_since(begin));
        }
    }
}

DeviceTier::~DeviceTier() {
    try {
        wait();
        device_.unpin(staging_.data());
    } catch (...) {  // a device that has failed reads nothing any more
    }
}

void DeviceTier::begin_turn() {
    ++turn_;
    collect();
}

ExpertParts DeviceTier::parts(int layer, int slot) const {
    ExpertParts found{};
    const std::byte* at = memory_ + slot_bytes_ * slot;
    for (size_t level = 0; level < sizes_[layer].size(); ++level)
        for (int part = 0; part < 3; ++part) {
            found[part][level] = at;
            at += aligned(sizes_[layer][level][part]);
        }
    return found;
}

bool DeviceTier::has(int layer, int expert, int level) {
    const int slot = slot_of_[number_of(layer, expert)];
    return slot >= 0 && slots_[slot].here > level;
}

std::optional<ExpertParts> DeviceTier::find(int layer, int expert, int level) {
    const int number = number_of(layer, expert);
    if (last_use_[number] != turn_) before_[number] = std::exchange(last_use_[number], turn_);
    if (!has(layer, expert, level)) return std::nullopt;
    return parts(layer, slot_of_[number]);
}

void DeviceTier::collect() {
    while (!uploads_.empty() && device_.done(uploads_.front().number)) {
        const Upload& arrived = uploads_.front();
        last_arrival_ = std::chrono::steady_clock::now();
        slots_[arrived.slot].here = slots_[arrived.slot].coming;
        free_staging_.push_back(arrived.staging);
        uploads_.pop_front();
    }
}

void DeviceTier::wait() {
    while (!uploads_.empty()) {
        const Upload& next = uploads_.front();
        const auto begin = std::max(next.begin, last_arrival_);  // they go one after the other
        if (device_.done(next.number)) {
            rule_.link_took_at_most(next.bytes, seconds_since(begin));
        } else {
            device_.wait(next.number);
            rule_.link_took(next.bytes, seconds_since(begin));
        }
        collect();
    }
}

// The slot of the expert that has not been used for longest, if that is longer than `used_before`; an empty one first.
int DeviceTier::victim(uint64_t used_before) const {
    int found = -1;
    uint64_t oldest = used_before;
    for (size_t i = 0; i < slots_.size(); ++i) {
        const Slot& slot = slots_[i];
        if (slot.expert < 0) return static_cast<int>(i);
        if (slot.here < slot.coming || last_use_[slot.expert] >= oldest) continue;
        oldest = last_use_[slot.expert];
        found = static_cast<int>(i);
    }
    return found;
}

// The levels that the expert lacks here, up to this one. Nobody reads where they go: other turns have ended, since
// this one's router could be read, and this turn works with none of them.
bool DeviceTier::upload(int layer, int expert, int level, const ExpertParts& from, uint64_t used_before) {
    const int number = number_of(layer, expert);
    int slot = slot_of_[number];
    if (slot >= 0 && (slots_[slot].here < slots_[slot].coming || slots_[slot].here > level)) return false;
    if (free_staging_.empty()) return false;
    if (slot < 0) {
        slot = victim(used_before);
        if (slot < 0) return false;
        if (slots_[slot].expert >= 0) slot_of_[slots_[slot].expert] = -1;
        slots_[slot] = {.expert = number};
        slot_of_[number] = slot;
    }
    Slot& target = slots_[slot];
    const ExpertParts places = parts(layer, slot);
    const int staging = free_staging_.back();
    const auto time = std::chrono::steady_clock::now();
    std::byte* const begin = staging_.data() + slot_bytes_ * staging;
    std::byte* at = begin;
    for (int i = target.here; i <= level; ++i)
        for (int part = 0; part < 3; ++part) {
            std::memcpy(at, from[part][i], sizes_[layer][i][part]);
            at += aligned(sizes_[layer][i][part]);
        }
    const auto bytes = static_cast<size_t>(at - begin);
    auto* const to = const_cast<std::byte*>(places[0][target.here]);  // the levels lie one after the other
    uploads_.push_back({device_.upload(to, {begin, bytes}), slot, staging, bytes, time});
    free_staging_.pop_back();
    target.coming = level + 1;
    ++counters_.uploads;
    counters_.bytes += bytes;
    return true;
}

std::optional<ExpertParts> DeviceTier::bring(int layer, int expert, int level, const ExpertParts& from) {
    collect();
    if (!upload(layer, expert, level, from, std::min(before_[number_of(layer, expert)], turn_))) return std::nullopt;
    return parts(layer, slot_of_[number_of(layer, expert)]);
}

void DeviceTier::offer(int layer, int expert, int level, const ExpertParts& from) {
    collect();
    if (!uploads_.empty()) return;
    upload(layer, expert, level, from, std::min(before_[number_of(layer, expert)], turn_));
}

}  // namespace edgemoe
