// Several threads with a sequence each, at work on one engine in turns: everyone gets the logits that it would get
// alone, to the bit. EDGEMOE_TEST_SECONDS says how long they go on; each does a whole text at least.
#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <numeric>
#include <thread>
#include <utility>

#include "check.h"
#include "edgemoe/engine.h"
#include "edgemoe/thread_group.h"
#include "small_model.h"

namespace edgemoe::tests {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kClients = 5, kTextTokens = 30, kMostTokens = 12;

double seconds_to_run() {
    const char* text = std::getenv("EDGEMOE_TEST_SECONDS");
    return text ? std::strtod(text, nullptr) : 0.0;
}

// The engine is whose turn it is; turns go round. Over as soon as one fails.
class Turns {
  public:
    // Waits for the turn of `client`, takes its step, and hands the turn on. False: there are no more turns.
    template <class Step>
    bool take(int client, const Step& step) {
        std::unique_lock lock(mutex_);
        changed_.wait(lock, [&] { return over_ || turn_ == client; });
        if (over_) return false;
        try {
            step();
        } catch (...) {
            over_ = true;
            changed_.notify_all();
            throw;
        }
        do turn_ = (turn_ + 1) % kClients;
        while (gone_[turn_] && turn_ != client);
        changed_.notify_all();
        return true;
    }
    // The client takes no more turns. Only in its step.
    void leave(int client) { gone_[client] = true; }
    void end() {
        const std::lock_guard lock(mutex_);
        over_ = true;
        changed_.notify_all();
    }

  private:
    std::mutex mutex_;
    std::condition_variable changed_;
    int turn_ = 0;
    bool gone_[kClients] = {};
    bool over_ = false;
};

struct Cancelled {};

// One text, again and again, in steps of a few tokens. Every text has a sequence of its own, and now and then a step is
// given up in the middle of a pass.
class Client {
  public:
    Client(Engine& engine, int number) : engine_(engine), random_(100 + number), cancels_(number % 2 == 1) {
        for (int32_t& token : tokens_) token = pick(random_, 0, kVocabulary - 1);
    }

    // Alone on an engine of its own.
    void compute_expected(Engine& engine) {
        const int id = engine.add_sequence();
        forward(engine, id, 0, kTextTokens, expected_.data(), [] {});
        engine.remove_sequence(id);
    }

    // True: the text has ended.
    bool step() {
        if (id_ < 0) id_ = engine_.add_sequence();
        const int begin = engine_.sequence(id_).length();
        const int count = std::min(pick(random_, 0, 2) ? 1 : pick(random_, 1, kMostTokens), kTextTokens - begin);
        int layers = cancels_ && pick(random_, 0, 39) == 0 ? pick(random_, 1, 3) : -1;
        try {
            forward(engine_, id_, begin, count, found_.data(), [&] {
                if (--layers == 0) throw Cancelled();
            });
        } catch (const Cancelled&) {
            // Chunks that were finished stay.
            check(engine_.sequence(id_).length() >= begin, "a client lost what it had before a step that failed");
            return false;
        }
        const size_t size = static_cast<size_t>(count) * kVocabulary * sizeof(float);
        check(std::memcmp(found_.data(), expected_.data() + static_cast<size_t>(begin) * kVocabulary, size) == 0,
              "a client's logits depend on the others");
        if (begin + count < kTextTokens) return false;
        engine_.remove_sequence(std::exchange(id_, -1));
        return true;
    }

  private:
    template <class Check>
    void forward(Engine& engine, int id, int begin, int count, float* logits, const Check& check) const {
        std::vector<int32_t> positions(count), ids(count, id), wanted(count);
        std::iota(positions.begin(), positions.end(), begin);
        std::iota(wanted.begin(), wanted.end(), 0);
        engine.forward({.tokens = std::span(tokens_).subspan(begin, count),
                        .positions = positions,
                        .sequences = ids,
                        .wanted = wanted},
                       logits, check);
    }

    Engine& engine_;
    Random random_;
    bool cancels_;
    int id_ = -1;
    std::array<int32_t, kTextTokens> tokens_;
    std::vector<float> expected_ = std::vector<float>(size_t{kTextTokens} * kVocabulary);
    std::vector<float> found_ = std::vector<float>(size_t{kMostTokens} * kVocabulary);
};

}  // namespace

void test_clients() {
    const Model model("q4g64", "q4g64", false,
                      {AttentionKind::full, AttentionKind::gated_delta, AttentionKind::full, AttentionKind::mla,
                       AttentionKind::short_conv});
    EngineOptions options{.threads = 1,
                          .sequences = 1 + kClients,
                          .context = kContext,
                          .positions = kClients * kTextTokens + kContext,
                          .chunk = 8,
                          .isa = ""};
    std::vector<Client> clients;
    clients.reserve(kClients);
    options.store = {.slots = kTopK + 4, .readers = 3, .arrival_jitter = std::chrono::microseconds(100)};
    options.threads = 2;
    Engine engine(model.spec, model.index, options);
    {
        EngineOptions alone = options;
        alone.threads = 1;
        alone.store = {.slots = 4 * kExperts};
        Engine other(model.spec, model.index, alone);
        for (int number = 0; number < kClients; ++number) clients.emplace_back(engine, number).compute_expected(other);
    }

    Turns turns;
    std::atomic<bool> finished{false};
    std::atomic<uint64_t> asked{0};
    const auto deadline = Clock::now() + std::chrono::duration<double>(seconds_to_run());
    ThreadGroup watcher;
    watcher.start(
        "watch", 0, 1,
        [&](int) {
            EngineCounters last;
            while (!finished) {
                const EngineCounters now = engine.counters();
                check(now.tokens >= last.tokens && now.expert_uses >= last.expert_uses &&
                          now.store.bytes_read >= last.store.bytes_read &&
                          now.store.experts_requested >= last.store.experts_requested,
                      "a counter has gone back");
                check(now.store.experts_hit <= now.store.experts_requested, "more experts were hit than requested");
                last = now;
                const Residency held = engine.residency();
                const auto in_memory = [](uint8_t levels) { return levels != 0 && levels != Residency::kNone; };
                check(std::ranges::count_if(held.levels, in_memory) <= options.store.slots,
                      "more experts are in memory than there is room for");
                ++asked;
                std::this_thread::sleep_for(std::chrono::microseconds(50));
            }
        },
        [&] { finished = true; });
    ThreadGroup drivers;
    drivers.start(
        "drive sequences", 0, kClients,
        [&](int number) {
            for (bool gone = false; !gone;) {
                const bool taken = turns.take(number, [&] {
                    if (!clients[number].step() || Clock::now() < deadline) return;
                    turns.leave(number);
                    gone = true;
                });
                if (!taken) return;
            }
        },
        [&] { turns.end(); });
    drivers.join();
    finished = true;
    watcher.join();
    const EngineCounters counters = engine.counters();
    check(counters.tokens >= uint64_t{kClients} * kTextTokens && asked > 0, "the clients did less than a text each");
    check(counters.store.evictions > 0 && counters.store.experts_hit > 0, "nothing came and went");
}

}  // namespace edgemoe::tests
