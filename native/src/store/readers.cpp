#include "store/readers.h"

#include <algorithm>
#include <thread>
#include <utility>

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

}  // namespace

ReadQueue::ReadQueue(const StoreLayout& layout, MemoryTier& memory) : layout_(layout), memory_(memory) {
    entries_.reserve(static_cast<size_t>(layout.experts()));
}

int32_t ReadQueue::next_queued(const Demand& demand, int32_t from) const {
    const int first = layout_.first_piece(demand.expert);
    while (from < demand.pieces && memory_.state(first + from) != PieceState::queued) ++from;
    return from;
}

void ReadQueue::add(const Demand& demand) { entries_.push_back({demand, next_queued(demand, 0)}); }

// Whether the next piece of `left` is read before that of `right`.
bool ReadQueue::before(const Entry& left, const Entry& right) const {
    const int l = left.next, r = right.next;
    if (left.demand.tokens[l] != right.demand.tokens[r]) return left.demand.tokens[l] > right.demand.tokens[r];
    if (left.demand.weights[l] != right.demand.weights[r]) return left.demand.weights[l] > right.demand.weights[r];
    const auto bytes = [this](const Entry& entry) {
        return layout_.piece(layout_.first_piece(entry.demand.expert) + entry.next).bytes;
    };
    return bytes(left) < bytes(right);
}

ReadRequest ReadQueue::take() {
    const auto first_of_all = [this] {
        auto best = entries_.begin();
        for (auto other = best + 1; other != entries_.end(); ++other)
            if (before(*other, *best)) best = other;
        return best;
    };
    const auto chosen = first_of_all();
    const Demand& demand = chosen->demand;
    const int first = layout_.first_piece(demand.expert);
    ReadRequest request{demand.expert, chosen->next, chosen->next, false, {}};
    do {
        memory_.set_state(first + request.end++, PieceState::reading);
        chosen->next = next_queued(demand, request.end);
    } while (chosen->next == request.end && chosen->next < demand.pieces &&
             layout_.follows(demand.expert, layout_.piece(first + chosen->next).level) && first_of_all() == chosen);
    if (chosen->next == demand.pieces) entries_.erase(chosen);
    return request;
}

void ReadQueue::clear() {
    for (const Entry& entry : entries_) {
        const int first = layout_.first_piece(entry.demand.expert);
        for (int piece = first; piece < first + entry.demand.pieces; ++piece)
            if (memory_.state(piece) == PieceState::queued) memory_.drop(piece);
    }
    entries_.clear();
}

Readers::Readers(const StoreLayout& layout, std::span<const std::unique_ptr<DirectFile>> files,
                 std::chrono::microseconds jitter, std::mutex& mutex)
    : layout_(layout), files_(files), jitter_(jitter), mutex_(mutex) {}

void Readers::start(int threads, Client client) {
    client_ = std::move(client);
    const auto stop = [this] {
        {
            const std::lock_guard lock(mutex_);
            stop_ = true;
        }
        work_.notify_all();
    };
    threads_.start("read experts", 0, threads, [this](int) { run(); }, stop);
}

void Readers::run() {
    std::unique_ptr<std::byte[]> scratch;
    std::unique_lock lock(mutex_);
    while (true) {
        std::optional<ReadRequest> request;
        work_.wait(lock, [&] { return stop_ || (request = client_.take()).has_value(); });
        if (stop_) return;
        if (reading_++ == 0) reading_since_ = Clock::now();
        const uint64_t number = taken_++;
        lock.unlock();

        const auto begin = Clock::now();
        std::exception_ptr error;
        try {
            if (!scratch) scratch = std::make_unique<std::byte[]>(layout_.interleaving_bytes());
            read(*request, scratch.get());
        } catch (...) {
            error = std::current_exception();
        }
        if (jitter_.count() > 0) {
            const uint64_t mixed = (number + 1) * 0x9E3779B97F4A7C15u ^ static_cast<uint64_t>(request->expert) << 17;
            std::this_thread::sleep_for(jitter_ * ((mixed >> 20) % 1000) / 1000);
        }
        const double seconds = seconds_since(begin);

        lock.lock();
        if (--reading_ == 0) seconds_ += seconds_since(reading_since_);
        client_.done(*request, error, seconds);
    }
}

void Readers::read(const ReadRequest& request, std::byte* scratch) const {
    const int expert = request.expert, first_piece = layout_.first_piece(expert);
    const int end_level = layout_.piece(first_piece + request.end - 1).end;
    for (int level = layout_.piece(first_piece + request.first).level; level < end_level;) {
        int end = level + 1;
        while (end < end_level && layout_.follows(expert, end)) ++end;
        if (end - level > 1) {
            // Sections of whole blocks, one after the other: one read into several places.
            std::array<std::span<std::byte>, kMaxLevels> targets;
            uint64_t bytes = 0;
            for (int i = level; i < end; ++i) {
                const uint64_t length = layout_.section(expert, i).extents[0].length;
                targets[i - level] = {request.targets[i], static_cast<size_t>(length)};
                bytes += length;
            }
            const Extent& extent = layout_.section(expert, level).extents[0];
            files_[extent.file]->read(extent.offset, std::span(targets).first(static_cast<size_t>(end - level)), bytes);
        } else {
            layout_.placement(expert, level).read(files_, request.targets[level]);
        }
        for (; level < end; ++level) {
            const Placement placement = layout_.placement(expert, level);
            if (!placement.is_intact(request.targets[level]))
                throw placement.damage(files_, layout_.name(expert, level));
            placement.interleave(request.targets[level], scratch);
        }
    }
}

}  // namespace edgemoe
