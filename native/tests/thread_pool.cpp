#include "edgemoe/thread_pool.h"

#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "check.h"

namespace edgemoe::tests {

void test_thread_pool() {
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
