#include "edgemoe/thread_pool.h"

#include <atomic>
#include <chrono>
#include <memory>
#include <string>
#include <system_error>
#include <thread>
#include <vector>

#include "check.h"
#include "edgemoe/thread_group.h"

namespace edgemoe::tests {
namespace {

// What a ThreadGroup runs: it ends when it is stopped. A thread takes a copy of it, and the copy numbered `failing`
// cannot be made, as where the system has no more threads.
struct Body {
    struct Shared {
        std::atomic<bool> stopped{false};
        std::atomic<int> running{0}, copies{0};
        int failing = 0;
    };

    explicit Body(Shared& all) : shared(&all) {}
    Body(Body&& other) noexcept : shared(other.shared) {}
    Body(const Body& other) : shared(other.shared) {
        if (++shared->copies == shared->failing)
            throw std::system_error(std::make_error_code(std::errc::resource_unavailable_try_again));
    }
    void operator()(int) const {
        ++shared->running;
        while (!shared->stopped) std::this_thread::yield();
        --shared->running;
    }

    Shared* shared;
};

void test_thread_group() {
    // Whichever of the threads cannot be started: the others have ended when the error arrives.
    for (const int failing : {1, 2, 5, 9}) {
        Body::Shared shared;
        shared.failing = failing;
        std::string message;
        try {
            ThreadGroup group;
            group.start("test", 0, 8, Body(shared), [&] { shared.stopped = true; });
            check(failing > 8 && group.size() == 8, "a thread that cannot be started is not reported");
        } catch (const ThreadError& error) {
            message = error.what();
        }
        check(shared.running == 0 && shared.stopped == (failing > 1), "threads were not stopped, or not joined");
        check(failing > 8 || message.find("of 8 threads to test only ") != std::string::npos,
              "the message does not say how many threads were asked for: " + message);
    }
    std::atomic<int> sum = 0;
    ThreadGroup group;
    group.start("test", 1, 5, [&](int number) { sum += number; }, [] {});
    group.join();
    check(sum == 10 && group.size() == 0, "a thread did not run, or with another number");
    ThreadGroup failing;
    failing.start(
        "test", 0, 3,
        [&](int number) {
            if (number == 1) throw std::logic_error("on purpose");
        },
        [] {});
    check_throws<std::logic_error>([&] { failing.join(); }, "a group with a failing thread");
}

}  // namespace

void test_thread_pool() {
    test_thread_group();
    for (const int threads : {1, 2, 5}) {
        ThreadPool pool(threads);
        check(pool.threads() == threads, "the pool has another number of threads");
        // Every item once, and what items wrote is seen by the caller and by the next loop's items.
        std::vector<int> counts(300, 0);
        for (int round = 0; round < 300; ++round) {
            const int count = round % 7 == 0 ? round : round % 13;
            pool.run(count, [&](int item) { ++counts[item]; });
        }
        for (int item = 0; item < 300; ++item) {
            int expected = 0;
            for (int round = 0; round < 300; ++round) expected += item < (round % 7 == 0 ? round : round % 13);
            check(counts[item] == expected, "an item was run too often or not often enough");
        }
        // After a pause long enough to park.
        for (int round = 0; round < 5; ++round) {
            std::this_thread::sleep_for(std::chrono::milliseconds(2));
            std::atomic<int> sum = 0;
            pool.run(100, [&](int item) { sum += item; });
            check(sum == 4950, "items were lost after a pause");
        }
        for (int round = 0; round < 20; ++round) {
            std::atomic<int> ran = 0;
            check_throws<std::runtime_error>(
                [&] {
                    pool.run(20, [&](int item) {
                        ++ran;
                        if (item % 3 == 1) throw std::runtime_error("on purpose");
                    });
                },
                "a loop with failing items");
            check(threads == 1 || ran == 20, "a failing item ended its loop");
        }
        int ran = 0;
        pool.run(0, [&](int) { ++ran; });
        check(ran == 0, "a loop without items ran one");
    }
    // Pools that end at once, with threads that have just begun.
    for (int round = 0; round < 20; ++round) ThreadPool pool(4);
}

}  // namespace edgemoe::tests
