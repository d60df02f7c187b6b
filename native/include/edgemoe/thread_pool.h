// Threads for the arithmetic of one forward pass.
#pragma once

#include <atomic>
#include <cstdint>
#include <exception>
#include <mutex>
#include <type_traits>

#include "edgemoe/thread_group.h"

namespace edgemoe {

// Runs the items of a loop on all threads, the caller's included. Items are handed out one by one, and a loop is over
// when its items are done, not when every thread has shown up: a thread that the system keeps away from its core
// delays nothing but the item it holds. Idle threads spin for some microseconds, then park.
class ThreadPool {
  public:
    explicit ThreadPool(int threads);  // throws ThreadError
    ThreadPool(const ThreadPool&) = delete;
    ThreadPool& operator=(const ThreadPool&) = delete;

    int threads() const { return workers_.size() + 1; }

    // Calls body(item) once for each item in [0, count), in any order and on any thread; returns when all are done.
    // The first exception thrown by an item is thrown here. Not reentrant; one caller at a time.
    template <class Body>
    void run(int count, Body&& body) {
        if (count <= 1 || workers_.size() == 0) {
            for (int item = 0; item < count; ++item) body(item);
            return;
        }
        run_shared(
            count, [](void* context, int item) { (*static_cast<std::remove_reference_t<Body>*>(context))(item); },
            const_cast<void*>(static_cast<const void*>(&body)));
    }

  private:
    using Item = void (*)(void* context, int item);

    void run_shared(int count, Item item, void* context);
    void work();
    bool run_one();

    // One word holds a loop's item count (high half) and its next item (low half). A thread claims an item by adding
    // one; what it got is valid if item < count, whichever loop is current by then, and while it is claimed that loop
    // cannot end: a late thread can neither run a finished loop's item nor read a finished loop's body.
    std::atomic<uint64_t> ticket_{0};
    std::atomic<uint32_t> loop_{0};
    std::atomic<int32_t> pending_{0};
    std::atomic<bool> stop_{false};
    Item item_ = nullptr;
    void* context_ = nullptr;
    std::mutex error_mutex_;
    std::exception_ptr error_;
    ThreadGroup workers_;
};

}  // namespace edgemoe
