#include "edgemoe/expert_store.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>

#include "edgemoe/crc32c.h"

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

uint64_t round_down(uint64_t value) { return value / kDiskBlock * kDiskBlock; }
uint64_t round_up(uint64_t value) { return round_down(value + kDiskBlock - 1); }

// Bytes of the block-aligned span around an extent.
uint64_t span_bytes(const Extent& extent) {
    return round_up(extent.offset + extent.length) - round_down(extent.offset);
}

// A row-major matrix that has an extent of its own (GGUF) is interleaved to the beginning of that extent's memory, for
// the extent lies anywhere; one that shares it (a pack keeps matrices 64-byte aligned) where it stands.
bool has_own_extent(const ExpertLayer& layer, const ExpertPart& part) {
    return std::count_if(layer.parts.begin(), layer.parts.end(),
                         [&](const ExpertPart& other) { return other.extent == part.extent; }) == 1;
}

// Where each extent of an expert begins in its slot; the last entry is the end. All are block-aligned.
std::array<uint64_t, 4> extent_places(const ExpertLayer& layer, const Section& section) {
    std::array<uint64_t, 4> places{};
    for (uint32_t i = 0; i < section.extents.size(); ++i) {
        uint64_t bytes = span_bytes(section.extents[i]);
        for (const ExpertPart& part : layer.parts)
            if (part.stored.row_major && part.extent == i && has_own_extent(layer, part))
                bytes = std::max(bytes, round_up(matrix_bytes(part.stored.layout, part.rows, part.cols)));
        places[i + 1] = places[i] + bytes;
    }
    for (size_t i = section.extents.size() + 1; i < places.size(); ++i) places[i] = places[i - 1];
    return places;
}

}  // namespace

size_t ExpertStore::slot_bytes(const PackIndex& index) {
    uint64_t largest = 0;
    for (const auto& [layer, experts] : index.experts)
        for (const uint32_t section : experts.sections)
            largest = std::max(largest, extent_places(experts, index.sections[section]).back());
    return largest;
}

ExpertStore::ExpertStore(const PackIndex& index, const std::vector<std::unique_ptr<DirectFile>>& files,
                         StoreOptions options)
    : index_(index),
      files_(files),
      options_(options),
      slot_bytes_(slot_bytes(index)),
      arena_(slot_bytes_ * options.slots),
      slots_(options.slots),
      ranking_(options.eviction, {}, 0) {
    std::vector<int32_t> layer_of;
    for (const auto& [layer, experts] : index.experts) {
        first_expert_.resize(std::max<size_t>(first_expert_.size(), layer + 1), -1);
        first_expert_[layer] = static_cast<int32_t>(experts_.size());
        for (size_t expert = 0; expert < experts.sections.size(); ++expert) {
            experts_.emplace_back(layer, static_cast<int>(expert));
            layer_of.push_back(layer);
        }
    }
    ranking_ = EvictionRanking(options.eviction, std::move(layer_of), static_cast<int>(first_expert_.size()));
    slot_of_.assign(experts_.size(), -1);
    hinted_.assign(experts_.size(), 0);
    for (int i = 0; i < options.readers; ++i) readers_.emplace_back([this] { read_loop(); });
}

ExpertStore::~ExpertStore() {
    {
        std::lock_guard lock(mutex_);
        stop_ = true;
    }
    work_.notify_all();
    for (auto& reader : readers_) reader.join();
}

StoreCounters ExpertStore::counters() const {
    std::lock_guard lock(mutex_);
    return counters_;
}

int LookAhead::worth(int readers) {
    constexpr double kPushedOut = 0.15;  // chance that what made room is missed before long
    int count = 0;
    for (double left = window_; left > 0 && read_ > 0; left -= read_ / readers, ++count) {
        const double saved = precision_ * std::min(left, read_);
        const double lost = (1 - precision_) * (std::max(read_ - left, 0.0) + kPushedOut * read_);
        if (saved <= lost) break;
    }
    return ++turns_ % 16 == 0 ? std::max(count, 1) : count;
}

bool ExpertStore::wants_hints() const { return options_.prefetch && slots_.size() < experts_.size(); }

void ExpertStore::hint(int layer, std::span<const int32_t> experts) {
    std::lock_guard lock(mutex_);
    for (const int32_t global : hint_) hinted_[global] = 0;
    hint_.clear();
    hints_.clear();
    ahead_.clear();
    ahead_limit_ = look_ahead_.worth(options_.readers);
    // A prediction may take a quarter of the slots at most: what it pushes out must be made up by what it brings in.
    const size_t most = slots_.size() / 4;
    for (const int32_t expert : experts.first(std::min(experts.size(), most))) {
        const int global = global_number(layer, expert);
        hint_.push_back(global);
        hinted_[global] = 1;
        if (slot_of_[global] < 0) hints_.push_back(global);
    }
    if (!hints_.empty()) work_.notify_all();
}

int ExpertStore::make_room(bool for_prediction) {
    int victim = -1;
    EvictionRanking::Rank lowest;
    bool lowest_hinted = false;
    for (int i = 0; i < static_cast<int>(slots_.size()); ++i) {
        const Slot& slot = slots_[i];
        if (slot.state == State::empty) return i;
        if (slot.pins > 0 || slot.state == State::queued || slot.state == State::reading) continue;
        const bool hinted = hinted_[slot.expert];
        if (hinted && for_prediction) continue;
        const EvictionRanking::Rank rank = ranking_.rank(slot.expert);
        // What is expected next leaves only when nothing else can.
        if (victim < 0 || hinted < lowest_hinted || (hinted == lowest_hinted && rank < lowest)) {
            victim = i;
            lowest = rank;
            lowest_hinted = hinted;
        }
    }
    if (victim >= 0) {
        Slot& slot = slots_[victim];
        slot_of_[slot.expert] = -1;
        if (slot.speculative) ++counters_.prefetch_wasted;
        ++counters_.evictions;
        slot = Slot{};
    }
    return victim;
}

void ExpertStore::count_use(Slot& slot) {
    ++counters_.experts_requested;
    if (slot.state == State::present) ++counters_.experts_hit;
    if (slot.speculative) {
        ++(slot.state == State::present ? counters_.prefetch_used : counters_.prefetch_late);
        slot.speculative = false;
    }
}

int ExpertStore::pin(int global) {
    int number = slot_of_[global];
    if (number < 0) {
        number = make_room(false);
        if (number < 0) return -1;
        slots_[number].expert = global;
        slot_of_[global] = number;
    }
    Slot& slot = slots_[number];
    count_use(slot);
    if (slot.state == State::empty || slot.state == State::failed) {
        if (std::exchange(idle_, false)) look_ahead_.observe_window(seconds_since(idle_since_));
        slot.state = State::queued;
        demands_.push_back(number);
        work_.notify_one();
    }
    ++slot.pins;
    return number;
}

int ExpertStore::next_request() {
    if (!demands_.empty()) {
        const int slot = demands_.front();
        demands_.pop_front();
        return slot;
    }
    // Predictions wait until the disk has nothing to do that is known to be needed.
    while (demands_reading_ == 0 && !hints_.empty() && static_cast<int>(ahead_.size()) < ahead_limit_) {
        const int global = hints_.front();
        hints_.pop_front();
        if (slot_of_[global] >= 0) continue;
        const int number = make_room(true);
        if (number < 0) {
            hints_.clear();
            break;
        }
        slots_[number].expert = global;
        slots_[number].speculative = true;
        slot_of_[global] = number;
        ++counters_.prefetch_issued;
        ahead_.push_back(global);
        return number;
    }
    return -1;
}

void ExpertStore::read_into(int global, std::byte* slot, std::vector<std::byte>& scratch) const {
    const auto [layer, expert] = experts_[global];
    const ExpertLayer& experts = index_.experts.at(layer);
    const Section& section = index_.sections[experts.sections[expert]];
    const auto places = extent_places(experts, section);
    uint32_t checksum = 0;
    for (size_t i = 0; i < section.extents.size(); ++i) {
        const Extent& extent = section.extents[i];
        const uint64_t begin = round_down(extent.offset);
        const uint64_t lead = extent.offset - begin;
        std::byte* target = slot + places[i];
        files_[extent.file]->read(begin, {target, static_cast<size_t>(span_bytes(extent))}, lead + extent.length);
        if (section.checksum) checksum = crc32c({target + lead, static_cast<size_t>(extent.length)}, checksum);
    }
    if (section.checksum && checksum != *section.checksum)
        throw IoError(files_[section.extents[0].file]->path() + ": layer " + std::to_string(layer) + " expert " +
                      std::to_string(expert) + " at offset " + std::to_string(section.extents[0].offset) +
                      " is damaged (its checksum differs)");
    for (const ExpertPart& part : experts.parts) {
        if (!part.stored.row_major) continue;
        std::byte* begin = slot + places[part.extent];
        std::byte* source = begin + section.extents[part.extent].offset % kDiskBlock + part.offset;
        interleave(part.stored.layout, part.rows, part.cols, source, has_own_extent(experts, part) ? begin : source,
                   scratch.data());
    }
}

void ExpertStore::read_loop() {
    std::vector<std::byte> scratch;
    for (const auto& [layer, experts] : index_.experts)
        for (const ExpertPart& part : experts.parts)
            if (part.stored.row_major)
                scratch.resize(std::max(scratch.size(), block_bytes(part.stored.layout, part.cols)));
    std::unique_lock lock(mutex_);
    while (true) {
        int number = -1;
        work_.wait(lock, [&] { return stop_ || (number = next_request()) >= 0; });
        if (stop_) return;
        const int global = slots_[number].expert;
        const bool demanded = !slots_[number].speculative;
        slots_[number].state = State::reading;
        demands_reading_ += demanded;
        if (reading_++ == 0) reading_since_ = Clock::now();
        lock.unlock();

        const auto begin = Clock::now();
        std::exception_ptr error;
        try {
            read_into(global, arena_.data() + number * slot_bytes_, scratch);
        } catch (...) {
            error = std::current_exception();
        }

        lock.lock();
        if (--reading_ == 0) counters_.read_seconds += seconds_since(reading_since_);
        if (demanded) look_ahead_.observe_read(seconds_since(begin));
        demands_reading_ -= demanded;
        if (demanded && demands_reading_ == 0 && demands_.empty()) {
            idle_ = true;
            idle_since_ = Clock::now();
        }
        slots_[number].state = error ? State::failed : State::present;
        if (error) error_ = error;
        ++counters_.sections_read;
        const auto [layer, expert] = experts_[global];
        for (const Extent& extent : index_.sections[index_.experts.at(layer).sections[expert]].extents)
            counters_.bytes_read += span_bytes(extent);
        ready_.notify_all();
        if (demands_reading_ == 0 && demands_.empty() && !hints_.empty()) work_.notify_all();
    }
}

ExpertWeights ExpertStore::weights(int global, const std::byte* slot) const {
    const auto [layer, expert] = experts_[global];
    const ExpertLayer& experts = index_.experts.at(layer);
    const Section& section = index_.sections[experts.sections[expert]];
    const auto places = extent_places(experts, section);
    const auto place = [&](const ExpertPart& part) {
        const std::byte* begin = slot + places[part.extent];
        if (part.stored.row_major && has_own_extent(experts, part)) return begin;
        return begin + section.extents[part.extent].offset % kDiskBlock + part.offset;
    };
    return {place(experts.parts[0]), place(experts.parts[1]), place(experts.parts[2])};
}

ExpertStream::ExpertStream(ExpertStore& store, int layer, int tokens, std::span<const Need> needs) : store_(store) {
    experts_.reserve(needs.size());
    for (const Need& need : needs) experts_.push_back(store.global_number(layer, need.expert));
    pinned_.assign(needs.size(), -1);
    items_.reserve(needs.size());
    std::lock_guard lock(store.mutex_);
    store.ranking_.begin_turn(layer, tokens);
    for (size_t i = 0; i < needs.size(); ++i) store.ranking_.use(experts_[i], needs[i].last_token, needs[i].uses);
    // Those in memory first: they are computed while the others are read, and stay safe from eviction by them.
    for (size_t i = 0; i < experts_.size(); ++i)
        if (store.slot_of_[experts_[i]] >= 0) pinned_[i] = store.pin(experts_[i]);
    for (const int32_t global : store.ahead_) {
        const int slot = store.slot_of_[global];
        store.look_ahead_.observe_prediction(slot >= 0 && !store.slots_[slot].speculative);
    }
    store.ahead_.clear();
    store.hints_.clear();
}

ExpertStream::~ExpertStream() {
    std::unique_lock lock(store_.mutex_);
    for (const int32_t slot : pinned_)
        if (slot >= 0) --store_.slots_[slot].pins;
    if (given_ < experts_.size()) store_.abandon(lock);
}

// After a failed pass: nothing that it asked for may still be under way, or its failure would meet the next pass.
void ExpertStore::abandon(std::unique_lock<std::mutex>& lock) {
    for (const int32_t number : demands_) {
        slot_of_[slots_[number].expert] = -1;
        slots_[number] = Slot{};
    }
    demands_.clear();
    hints_.clear();
    ready_.wait(lock, [this] { return reading_ == 0; });
}

std::span<const ExpertStream::Item> ExpertStream::next() {
    std::unique_lock lock(store_.mutex_);
    for (const Item& item : items_) {
        --store_.slots_[pinned_[item.position]].pins;
        pinned_[item.position] = -2;
    }
    items_.clear();
    if (given_ == experts_.size()) return {};
    while (true) {
        for (; asked_ < experts_.size(); ++asked_) {
            if (pinned_[asked_] != -1) continue;
            pinned_[asked_] = store_.pin(experts_[asked_]);
            if (pinned_[asked_] < 0) break;
        }
        for (size_t i = 0; i < experts_.size(); ++i) {
            if (pinned_[i] < 0) continue;
            const auto& slot = store_.slots_[pinned_[i]];
            if (slot.state == ExpertStore::State::failed) std::rethrow_exception(store_.error_);
            if (slot.state == ExpertStore::State::present)
                items_.push_back({static_cast<int>(i),
                                  store_.weights(experts_[i], store_.arena_.data() + pinned_[i] * store_.slot_bytes_)});
        }
        if (!items_.empty()) break;
        const auto begin = Clock::now();
        store_.ready_.wait(lock);
        store_.counters_.stall_seconds += seconds_since(begin);
    }
    given_ += items_.size();
    return items_;
}

}  // namespace edgemoe
