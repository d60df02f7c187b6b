#include "edgemoe/machine_speed.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/thread_group.h"

namespace edgemoe {
namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) { return std::chrono::duration<double>(Clock::now() - begin).count(); }

// Runs body(thread) on so many threads at the same time and gives the time from the common start to the last end.
// An exception of a body is thrown here. Throws ThreadError.
template <class Body>
double run_together(int threads, const Body& body) {
    enum class Signal { wait, go, stop };
    std::atomic<Signal> signal{Signal::wait};
    const auto work = [&](int thread) {
        while (signal.load(std::memory_order_acquire) == Signal::wait) std::this_thread::yield();
        if (signal.load(std::memory_order_acquire) == Signal::go) body(thread);
    };
    ThreadGroup workers;
    workers.start("measure with", 1, threads, work, [&] {
        Signal waiting = Signal::wait;
        signal.compare_exchange_strong(waiting, Signal::stop);
    });
    const auto begin = Clock::now();
    signal.store(Signal::go, std::memory_order_release);
    body(0);
    workers.join();
    return seconds_since(begin);
}

}  // namespace

Throughput memory_read_speed(size_t size, int threads, double seconds, int streams) {
    constexpr size_t kWords = 512;  // of a place, before the next one's turn
    const size_t stream = std::max<size_t>(size / sizeof(uint64_t) / threads / streams / kWords, 1) * kWords;
    const size_t part = stream * streams;
    std::vector<uint64_t> memory(part * threads, 1);
    std::atomic<uint64_t> bytes{0};
    std::atomic<uint64_t> sink{0};
    const auto begin = Clock::now();
    const double taken = run_together(threads, [&](int thread) {
        const uint64_t* data = memory.data() + part * thread;
        uint64_t sum = 0, rounds = 0;
        do {
            for (size_t i = 0; i < stream; i += kWords)
                for (size_t place = i; place < part; place += stream)
                    for (size_t j = 0; j < kWords; ++j) sum += data[place + j];
            ++rounds;
        } while (seconds_since(begin) < seconds);
        sink += sum;  // keeps the loop from being dropped
        bytes += rounds * part * sizeof(uint64_t);
    });
    return {bytes, taken};
}

Throughput disk_read_speed(const std::string& path, size_t block, int depth, double seconds, uint64_t limit) {
    const DirectFile file(path);
    const uint64_t places = file.size() / block;
    if (places == 0) throw IoError(path + ": is shorter than a block of " + std::to_string(block) + " bytes");
    const Arena buffers(block * depth);
    std::atomic<uint64_t> bytes{0};
    const auto begin = Clock::now();
    const double taken = run_together(depth, [&](int thread) {
        uint64_t random = 0x9E3779B97F4A7C15u * (thread + 1);
        do {
            random = random * 6364136223846793005u + 1442695040888963407u;
            const uint64_t place = (random >> 20) % places;
            file.read(place * block, {buffers.data() + block * thread, block}, block);
        } while ((bytes += block) < limit && seconds_since(begin) < seconds);
    });
    return {bytes, taken};
}

}  // namespace edgemoe
