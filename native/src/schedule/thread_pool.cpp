#include "edgemoe/thread_pool.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edgemoe {
namespace {

constexpr int kSpins = 2000;  // some tens of microseconds: longer than the gap between two loops of one layer

void pause() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

}  // namespace

ThreadPool::ThreadPool(int threads) {
    const auto stop = [this] {
        stop_ = true;
        loop_.fetch_add(1);
        loop_.notify_all();
    };
    workers_.start("compute", 1, threads, [this](int) { work(); }, stop);
}

bool ThreadPool::run_one() {
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    const uint32_t item = static_cast<uint32_t>(ticket);
    if (item >= static_cast<uint32_t>(ticket >> 32)) return false;
    try {
        item_(context_, static_cast<int>(item));
    } catch (...) {
        std::lock_guard lock(error_mutex_);
        if (!error_) error_ = std::current_exception();
    }
    if (pending_.fetch_sub(1, std::memory_order_acq_rel) == 1) pending_.notify_all();
    return true;
}

void ThreadPool::work() {
    uint32_t seen = 0;
    while (true) {
        uint32_t loop = loop_.load(std::memory_order_acquire);
        for (int spin = 0; loop == seen && spin < kSpins; ++spin) {
            pause();
            loop = loop_.load(std::memory_order_acquire);
        }
        if (loop == seen) {
            loop_.wait(seen, std::memory_order_acquire);
            continue;
        }
        if (stop_) return;
        seen = loop;
        while (run_one()) {
        }
    }
}

void ThreadPool::run_shared(int count, Item item, void* context) {
    item_ = item;
    context_ = context;
    pending_.store(count, std::memory_order_relaxed);
    ticket_.store(static_cast<uint64_t>(count) << 32, std::memory_order_release);
    loop_.fetch_add(1, std::memory_order_release);
    loop_.notify_all();
    while (run_one()) {
    }
    for (int spin = 0;; ++spin) {
        const int32_t pending = pending_.load(std::memory_order_acquire);
        if (pending == 0) break;
        if (spin < kSpins)
            pause();
        else
            pending_.wait(pending, std::memory_order_acquire);
    }
    if (error_) {
        std::exception_ptr error = std::exchange(error_, nullptr);
        std::rethrow_exception(error);
    }
}

}  // namespace edgemoe
