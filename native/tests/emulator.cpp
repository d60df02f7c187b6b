// The emulator of devices: that it runs kernels as a GPU may, and refuses what a GPU does not promise.
#include "device/emulator.h"

#include <array>
#include <bit>
#include <cstring>
#include <set>
#include <string>
#include <vector>

#include "check.h"
#include "edgemoe/device.h"

namespace edgemoe::tests {
namespace {

using namespace edgemoe::emulator;

constexpr int kThreads = 128;
constexpr WarpOrder kOrders[] = {WarpOrder::ascending, WarpOrder::descending, WarpOrder::shuffled};

// Runs a kernel of one group in every order.
template <class Kernel>
void run(Kernel&& kernel, int groups = 1) {
    for (const WarpOrder order : kOrders) Machine(order, 5).run(groups, kThreads, kernel);
}

template <class Kernel>
void check_refused(Kernel&& kernel, const std::string& what) {
    for (const WarpOrder order : kOrders) {
        Machine machine(order, 5);
        check_throws<DeviceError>([&] { machine.run(2, kThreads, kernel); }, what);
        int ran = 0;  // and goes on afterwards
        machine.run(1, kThreads, [&] { ran += 1; });
        check(ran == kThreads, "the emulator runs another kernel after " + what);
    }
}

void test_numbers() {
    std::vector<int> seen(3 * kThreads);
    run([&] { seen[group() * kThreads + thread()] += 1; }, 3);
    for (const int times : seen) check(times == 3, "every thread of every group runs once");
}

void test_shuffles() {
    std::vector<uint32_t> across(kThreads);
    run([&] {
        const uint32_t own = 100 + thread();
        across[thread()] = shuffle_xor(own, 5);
    });
    for (uint32_t i = 0; i < kThreads; ++i) check(across[i] == 100 + (i ^ 5), "a shuffle gives what lane ^ mask has");
}

void test_barriers() {
    std::vector<uint32_t> result(kThreads);
    const auto reverse = [&](bool waits) {
        auto* const exchanged = shared<uint32_t>(0, kThreads);
        exchanged[thread()] = static_cast<uint32_t>(thread());
        if (waits) barrier(1);
        result[thread()] = exchanged[kThreads - 1 - thread()];
    };
    for (const WarpOrder order : kOrders) {
        Machine machine(order, 5);
        bool same = true;
        machine.run(1, kThreads, [&] { reverse(true); });
        for (uint32_t i = 0; i < kThreads; ++i) same &= result[i] == kThreads - 1 - i;
        check(same, "what was written before a barrier is to be seen after it");
        machine.run(1, kThreads, [&] { reverse(false); });
        for (uint32_t i = 0; i < kThreads; ++i) same &= result[i] == kThreads - 1 - i;
        check(!same, "a missing barrier shows");
    }
}

void test_shared_memory() {
    bool fresh = true;
    run(
        [&] {
            auto* const first = shared<uint32_t>(0, 100);
            auto* const second = shared<uint32_t>(1, 7);
            if (thread() != 0) return;
            for (int i = 0; i < 100; ++i) fresh &= first[i] == 0xFFFFFFFFu;
            for (int i = 0; i < 7; ++i) fresh &= second[i] == 0xFFFFFFFFu;
            check(first + 100 < second || second + 7 < first, "arrays do not touch");
            std::memset(first, 1, 400);
            std::memset(second, 1, 28);
        },
        3);
    check(fresh, "shared memory is not a number at first");
    run([] { shared_bytes(0, 48 << 10); });
    check_refused(
        [] {
            shared_bytes(0, 40 << 10);
            shared_bytes(1, 9 << 10);
        },
        "too much shared memory");
}

// The order in which threads run: all of them, and of the warps.
std::vector<int> turns(WarpOrder order, uint32_t seed) {
    std::vector<int> result;
    Machine(order, seed).run(1, kThreads, [&] { result.push_back(thread()); });
    return result;
}

void test_orders() {
    const std::vector<int> up = turns(WarpOrder::ascending, 0), down = turns(WarpOrder::descending, 0);
    for (int i = 0; i < kThreads; ++i) {
        check(up[i] == i, "threads run in ascending order");
        check(down[i] == kThreads - 1 - i, "threads run in descending order");
    }
    std::set<std::vector<int>> orders;
    for (uint32_t seed = 0; seed < 5; ++seed) orders.insert(turns(WarpOrder::shuffled, seed));
    check(orders.size() == 5, "seeds give other orders");
    check(turns(WarpOrder::shuffled, 3) == turns(WarpOrder::shuffled, 3), "a seed gives one order");
}

void test_refusals() {
    check_refused(
        [] {
            if (thread() != 77) barrier(0);
        },
        "a barrier that one thread does not reach");
    check_refused([] { barrier(thread() < 32 ? 0 : 1); }, "two barriers at once");
    check_refused(
        [] {
            if (thread() < 16) shuffle_xor(1, 1);
        },
        "a shuffle by half a warp");
    check_refused(
        [] {
            if (thread() < 16)
                shuffle_xor(1, 1);
            else
                barrier(0);
        },
        "a shuffle while others wait at a barrier");
    check_refused([] { shuffle_xor(1, thread() % 2 + 1); }, "different shuffles");
    check_refused([] { shuffle_xor(1, 32); }, "a shuffle with another warp");
    check_refused(
        [] {
            barrier(0);
            if (thread() == 40) host_pointer(64);
            barrier(1);
        },
        "an address of the host");
    Machine machine(WarpOrder::ascending);
    for (const int threads : {0, 31, 33, 1056})
        check_throws<DeviceError>([&] { machine.run(1, threads, [] {}); }, std::to_string(threads) + " threads");
}

void test_addresses() {
    std::byte memory[8];
    const uint64_t address = device_address(memory);
    check(address != reinterpret_cast<uintptr_t>(memory), "a device's address is none of the host's");
    check(host_pointer(address) == memory && host_pointer(address + 5) == memory + 5, "kernels find their memory");
    check(host_pointer(0) == nullptr, "no address");
}

}  // namespace

void test_emulator() {
    test_numbers();
    test_shuffles();
    test_barriers();
    test_shared_memory();
    test_orders();
    test_refusals();
    test_addresses();
}

}  // namespace edgemoe::tests
