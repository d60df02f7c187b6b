// What is read first, and the threads that read it.
#pragma once

#include <array>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <vector>

#include "edgemoe/direct_file.h"
#include "edgemoe/thread_group.h"
#include "store/layout.h"
#include "store/memory_tier.h"

namespace edgemoe {

// What a layer needs of an expert: its first pieces, and how many tokens need each of them, with what weight.
struct Demand {
    int32_t expert;  // of all
    int32_t pieces;
    std::array<int32_t, kMaxLevels> tokens;
    std::array<int32_t, kMaxLevels> last_token;  // of the turn, that needs it
    std::array<float, kMaxLevels> weights;
    bool kept = false;  // all of them have places, and stay
};

// Pieces of an expert that are read together, one after the other.
struct ReadRequest {
    int32_t expert;
    int32_t first, end;  // of its pieces
    bool speculative;
    std::array<std::byte*, kMaxLevels> targets;  // by level
};

// Demands whose pieces are not all read yet, in the order of D2MoE's HEBF (arXiv 2504.15299): of the next missing level
// of each expert that which the most tokens wait for; of equal ones that with the larger weights, then the smaller one.
// A part of ExpertStore, whose lock covers all calls.
class ReadQueue {
  public:
    ReadQueue(const StoreLayout& layout, MemoryTier& memory);

    bool empty() const { return entries_.empty(); }
    // The demand's queued pieces, of which there is at least one.
    void add(const Demand& demand);
    // The pieces of an expert to be read next, as many as one read brings if nothing else comes before; they are being
    // read from then on. Targets are the caller's matter.
    ReadRequest take();
    // Queued pieces lose their places.
    void clear();

  private:
    struct Entry {
        Demand demand;
        int32_t next;  // of its pieces
    };

    bool before(const Entry& left, const Entry& right) const;
    int32_t next_queued(const Demand& demand, int32_t from) const;

    const StoreLayout& layout_;
    MemoryTier& memory_;
    std::vector<Entry> entries_;  // in the order in which they were asked for
};

// Threads that read pieces: they take requests, read, check and interleave what these ask for, and hand them back. They
// know nothing of why a piece is read, or where it lies.
class Readers {
  public:
    struct Client {
        std::function<std::optional<ReadRequest>()> take;
        // `error` is null where everything was read, undamaged; `seconds` is how long it took.
        std::function<void(const ReadRequest&, const std::exception_ptr& error, double seconds)> done;
    };

    // `mutex` is held when the client is called, and when wake_one(), wake_all(), reading() and seconds() are.
    Readers(const StoreLayout& layout, std::span<const std::unique_ptr<DirectFile>> files,
            std::chrono::microseconds jitter, std::mutex& mutex);
    // Starts so many threads. Throws ThreadError.
    void start(int threads, Client client);

    // There is something to take: for one thread, or for all.
    void wake_one() { work_.notify_one(); }
    void wake_all() { work_.notify_all(); }

    int reading() const { return reading_; }     // requests that were taken and not handed back
    double seconds() const { return seconds_; }  // in which at least one was under way

  private:
    void run();
    void read(const ReadRequest& request, std::byte* scratch) const;

    const StoreLayout& layout_;
    std::span<const std::unique_ptr<DirectFile>> files_;
    std::chrono::microseconds jitter_;
    std::mutex& mutex_;
    std::condition_variable work_;
    Client client_;
    uint64_t taken_ = 0;
    int reading_ = 0;
    double seconds_ = 0;
    std::chrono::steady_clock::time_point reading_since_;
    bool stop_ = false;
    ThreadGroup threads_;
};

}  // namespace edgemoe
