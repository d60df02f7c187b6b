#include "store/expert_store.h"

#include <algorithm>
#include <chrono>
#include <limits>
#include <stdexcept>
#include <string>

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

void require_files(const StoreLayout& layout, size_t files) {
    for (const Piece& piece : layout.pieces())
        for (int level = piece.level; level < piece.end; ++level)
            for (const Extent& extent : layout.section(piece.expert, level).extents)
                if (extent.file >= files)
                    throw std::invalid_argument(layout.name(piece.expert, level) + " is in file " +
                                                std::to_string(extent.file) + " of " + std::to_string(files));
}

}  // namespace

ExpertStore::ExpertStore(const PackIndex& index, const std::vector<std::unique_ptr<DirectFile>>& files,
                         StoreOptions options)
    : options_(options),
      layout_(index, options.all_levels),
      reads_(static_cast<size_t>(layout_.experts()), 0),
      memory_(layout_, options.slots, options.eviction, counters_),
      queue_(layout_, memory_),
      predictions_(layout_, memory_, options.readers, counters_),
      readers_(layout_, files, options.arrival_jitter, mutex_) {
    require_files(layout_, files.size());
    readers_.start(options.readers,
                   {[this] { return take(); }, [this](const ReadRequest& request, const std::exception_ptr& error,
                                                      double seconds) { done(request, error, seconds); }});
}

StoreCounters ExpertStore::counters() const {
    const std::lock_guard lock(mutex_);
    StoreCounters counters = counters_;
    counters.read_seconds = readers_.seconds();
    return counters;
}

void ExpertStore::residency(int layer, std::span<uint8_t> levels, std::span<uint64_t> reads) const {
    const std::lock_guard lock(mutex_);
    const int first = layout_.first_expert(layer);
    for (int expert = first; expert < layout_.end_expert(layer); ++expert) {
        uint64_t present = 0;
        for (int piece = layout_.first_piece(expert); piece < layout_.end_piece(expert); ++piece)
            if (memory_.state(piece) == PieceState::present) present += layout_.piece(piece).sections();
        levels[expert - first] = static_cast<uint8_t>(present);
        reads[expert - first] = reads_[expert];
    }
}

bool ExpertStore::wants_hints() const { return options_.prefetch && memory_.is_short(); }

void ExpertStore::hint(int layer, std::span<const Hint> experts) {
    const std::lock_guard lock(mutex_);
    // A prediction may take a quarter of the memory at most: what it pushes out must be made up by what it brings in.
    experts = experts.first(std::min(experts.size(), static_cast<size_t>(options_.slots) / 4));
    std::vector<Predictions::Expected> expected;
    for (const Hint& hint : experts) expected.push_back({layout_.first_expert(layer) + hint.expert, hint.level});
    predictions_.replace(expected);
    if (predictions_.waits()) readers_.wake_all();
}

int ExpertStore::most_awaited(const Turn& turn) const {
    if (turn.rows == 1 || !memory_.is_short()) return std::numeric_limits<int>::max();
    return std::max(2 * options_.readers, options_.slots / 32);
}

void ExpertStore::begin_turn(const Lock& lock, int layer, const Turn& turn, std::span<Demand> demands) {
    // Nothing is read ahead from one pass to the next.
    if (layer <= layer_) predictions_.pass_begins();
    layer_ = layer;
    memory_.begin_turn(layer, turn);
    for (const Demand& demand : demands)
        for (int piece = demand.pieces - 1; piece >= 0; --piece)
            memory_.use(layout_.first_piece(demand.expert) + piece, demand.last_token[piece], demand.tokens[piece]);
    for (const bool whole : {true, false})
        for (Demand& demand : demands) {
            const int piece = layout_.first_piece(demand.expert) + (whole ? demand.pieces - 1 : 0);
            if (!demand.kept && memory_.has_place(piece)) keep(lock, demand);
        }
    predictions_.layer_begins();
    // They are read while the pass does something else, and before what it expects next.
    int awaited = 0;
    for (const Demand& demand : demands) awaited += demand.kept && present(lock, demand) < demand.pieces;
    for (Demand& demand : demands) {
        if (demand.kept) continue;
        if (awaited++ >= most_awaited(turn) || !keep(lock, demand)) break;
    }
}

bool ExpertStore::keep(const Lock& /*lock*/, Demand& demand) {
    if (!memory_.keep(demand.expert, demand.pieces)) return false;
    demand.kept = true;
    const int first = layout_.first_piece(demand.expert);
    bool hit = true, reads = false;
    for (int piece = first; piece < first + demand.pieces; ++piece) {
        predictions_.needed(piece);
        const PieceState state = memory_.state(piece);
        hit &= state == PieceState::present;
        if (state != PieceState::absent && state != PieceState::failed) continue;
        memory_.set_state(piece, PieceState::queued);
        reads = true;
    }
    ++counters_.experts_requested;
    if (hit) ++counters_.experts_hit;
    if (reads) {
        predictions_.disk_is_needed();
        queue_.add(demand);
        readers_.wake_one();
    }
    return true;
}

void ExpertStore::let_go(const Lock& /*lock*/, Demand& demand) {
    memory_.let_go(demand.expert, demand.pieces);
    demand.kept = false;
}

int ExpertStore::present(const Lock& /*lock*/, const Demand& demand) const {
    const int first = layout_.first_piece(demand.expert);
    int count = 0;
    while (count < demand.pieces && memory_.state(first + count) == PieceState::present) ++count;
    if (count < demand.pieces && memory_.state(first + count) == PieceState::failed) std::rethrow_exception(error_);
    return count;
}

ExpertWeights ExpertStore::weights(const Lock& /*lock*/, int expert, int level) const {
    ExpertWeights found{};
    for (int number = 0; number <= level; ++number) {
        const Placement placement = layout_.placement(expert, number);
        const std::byte* memory = memory_.address(expert, number);
        for (size_t part = 0; part < found.parts.size(); ++part)
            found.parts[part][number] = memory + placement.place(part);
    }
    return found;
}

bool ExpertStore::is_reading(const Lock& /*lock*/) const { return readers_.reading() > 0; }

void ExpertStore::wait(Lock& lock) {
    const auto begin = Clock::now();
    arrived_.wait(lock);
    counters_.stall_seconds += std::chrono::duration<double>(Clock::now() - begin).count();
}

void ExpertStore::evict(const Lock& /*lock*/, int expert) { memory_.evict(layout_.first_piece(expert)); }

void ExpertStore::abandon(Lock& lock) {
    queue_.clear();
    predictions_.stop_reading();
    arrived_.wait(lock, [this] { return readers_.reading() == 0; });
}

std::optional<ReadRequest> ExpertStore::take() {
    std::optional<ReadRequest> request;
    if (!queue_.empty()) {
        request = queue_.take();
        ++needed_reading_;
        if (!queue_.empty()) readers_.wake_one();
    } else if (needed_reading_ == 0) {
        // Predictions wait until the disk has nothing to do that is known to be needed.
        const std::optional<int32_t> piece = predictions_.next();
        if (!piece) return {};
        const int32_t expert = layout_.piece(*piece).expert, number = *piece - layout_.first_piece(expert);
        request = {expert, number, number + 1, true, {}};
    } else {
        return {};
    }
    const int first = layout_.first_piece(request->expert);
    for (int piece = first + request->first; piece < first + request->end; ++piece)
        for (int level = layout_.piece(piece).level; level < layout_.piece(piece).end; ++level)
            request->targets[level] = memory_.address(request->expert, level);
    return request;
}

void ExpertStore::done(const ReadRequest& request, const std::exception_ptr& error, double seconds) {
    uint64_t bytes = 0, sections = 0;
    const int first = layout_.first_piece(request.expert);
    for (int piece = first + request.first; piece < first + request.end; ++piece) {
        memory_.set_state(piece, error ? PieceState::failed : PieceState::present);
        bytes += layout_.piece(piece).bytes;
        sections += layout_.piece(piece).sections();
        if (error) predictions_.failed(piece);
    }
    memory_.reads_ended(request.expert);
    if (!error) {
        counters_.sections_read += sections;
        counters_.bytes_read += bytes;
        ++reads_[request.expert];
        if (!request.speculative) predictions_.observe_read(seconds, bytes);
    } else {
        error_ = error;
    }
    if (!request.speculative && --needed_reading_ == 0 && queue_.empty()) predictions_.disk_idles();
    arrived_.notify_all();
    if (needed_reading_ == 0 && queue_.empty() && predictions_.waits()) readers_.wake_all();
}

}  // namespace edgemoe
