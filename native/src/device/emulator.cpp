#include "device/emulator.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "edgemoe/device.h"

// This file is compiled without ThreadSanitizer, the kernels with it: its own memory would be one race.
#if defined(EDGEMOE_TSAN_FIBERS)
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* token);
void __tsan_release(void* token);
}
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

// Switching stacks by hand takes a tenth of the time of ucontext, which asks the system for the mask of signals.
#if defined(__x86_64__) && defined(__linux__) && !defined(EDGEMOE_TSAN_FIBERS) && !defined(__SANITIZE_ADDRESS__)
#define EDGEMOE_OWN_SWITCH
// Saves the registers that a called function must keep, and where the stack ends; goes on where `to` was saved.
extern "C" void edgemoe_switch_stack(void** from, void* to);
asm(R"(
.pushsection .text
.hidden edgemoe_switch_stack
.globl edgemoe_switch_stack
.type edgemoe_switch_stack, @function
edgemoe_switch_stack:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
.size edgemoe_switch_stack, .-edgemoe_switch_stack
.popsection
)");
#else
#include <ucontext.h>
#endif

namespace edgemoe::emulator {
namespace {

constexpr int kWarp = 32;
constexpr size_t kStackBytes = size_t{64} << 10;
constexpr size_t kSharedBytes = size_t{48} << 10;  // what a kernel of CUDA may have

enum class Wait : uint8_t { none, barrier, shuffle, done };

struct Fiber {
    std::unique_ptr<std::byte[]> stack{new std::byte[kStackBytes]};
#if defined(EDGEMOE_OWN_SWITCH)
    void* stack_end = nullptr;
#else
    ucontext_t context{};
#endif
#if defined(EDGEMOE_TSAN_FIBERS)
    void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
#endif
    Wait wait = Wait::none;
    int site = 0;        // of the barrier; of a shuffle, the mask
    uint32_t value = 0;  // given to a shuffle, then what it gave
    unsigned barriers = 0;
};

struct SharedArray {
    int site;
    size_t begin;
    size_t bytes;
};

// What orders memory for ThreadSanitizer: who acquires a token sees what was done before it was released.
struct Token {
    char address;
    void release() {
#if defined(EDGEMOE_TSAN_FIBERS)
        __tsan_release(&address);
#endif
    }
    void acquire() {
#if defined(EDGEMOE_TSAN_FIBERS)
        __tsan_acquire(&address);
#endif
    }
};

}  // namespace

struct Machine::State {
    WarpOrder order;
    std::mt19937 random;
    std::vector<Fiber> fibers;
    const std::function<void()>* kernel = nullptr;
    int group = 0, current = 0, threads = 0;
    std::exception_ptr error;

    std::vector<SharedArray> arrays;  // of the kernel that runs
    size_t shared_used = 0;
    std::byte* shared = nullptr;  // of the group that runs
    std::vector<std::unique_ptr<std::byte[]>> shared_memory;

    Token started, ended;
    // Of every group two, which take turns: a fiber may have released the next one before another has acquired this
    // one.
    std::vector<std::array<Token, 2>> barriers;

#if defined(EDGEMOE_OWN_SWITCH)
    void* stack_end = nullptr;
#else
    ucontext_t context{};
#endif
#if defined(EDGEMOE_TSAN_FIBERS)
    void* tsan = nullptr;
#endif
#if defined(__SANITIZE_ADDRESS__)
    void* fake_stack = nullptr;
    const void* stack_bottom = nullptr;
    size_t stack_size = 0;
#endif

    State(WarpOrder order, uint32_t seed) : order(order), random(seed) {}

    void start(Fiber& fiber);
    void resume(int fiber);
    void leave(bool forever);
    void wait_at(Wait wait, int site);
    void run_group();
    void run_warp(int warp);
    void throw_error() {
        if (error) std::rethrow_exception(std::exchange(error, nullptr));
    }
    template <size_t n>
    void sort(std::array<int, n>& turns, int count) {
        for (int i = 0; i < count; ++i) turns[i] = order == WarpOrder::descending ? count - 1 - i : i;
        if (order == WarpOrder::shuffled) std::shuffle(turns.begin(), turns.begin() + count, random);
    }
};

namespace {

thread_local Machine::State* running = nullptr;

#if defined(EDGEMOE_TSAN_FIBERS)
// Making one takes a long time, so that they serve many groups, the odd ones and the even ones: two groups that follow
// each other have no thread in common, and nothing orders what they do.
void* tsan_fiber(int set, size_t index) {
    thread_local std::array<std::vector<void*>, 2> fibers;
    while (fibers[set].size() <= index) fibers[set].push_back(__tsan_create_fiber(0));
    return fibers[set][index];
}
#endif

// The first function of every fiber. It never returns.
void begin_fiber() {
    Machine::State& machine = *running;
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(nullptr, &machine.stack_bottom, &machine.stack_size);
#endif
    machine.started.acquire();
    try {
        (*machine.kernel)();
    } catch (...) {
        if (!machine.error) machine.error = std::current_exception();
    }
    machine.ended.release();
    machine.fibers[machine.current].wait = Wait::done;
    machine.leave(true);
    std::abort();
}

}  // namespace

void Machine::State::start(Fiber& fiber) {
    fiber.wait = Wait::none;
    fiber.barriers = 0;
#if defined(EDGEMOE_OWN_SWITCH)
    std::byte* end = fiber.stack.get() + kStackBytes;
    end -= reinterpret_cast<uintptr_t>(end) % 16;
    void** place = reinterpret_cast<void**>(end);
    *--place = nullptr;  // where begin_fiber would return to; functions expect the stack to be odd by this one address
    *--place = reinterpret_cast<void*>(&begin_fiber);
    for (int i = 0; i < 6; ++i) *--place = nullptr;
    fiber.stack_end = place;
#else
    ::getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = nullptr;
    ::makecontext(&fiber.context, begin_fiber, 0);
#endif
#if defined(EDGEMOE_TSAN_FIBERS)
    fiber.tsan = tsan_fiber(group % 2, static_cast<size_t>(&fiber - fibers.data()));
#endif
}

void Machine::State::resume(int index) {
    Fiber& fiber = fibers[index];
    current = index;
#if defined(EDGEMOE_TSAN_FIBERS)
    __tsan_switch_to_fiber(fiber.tsan, 1);  // 1: orders nothing
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&fake_stack, fiber.stack.get(), kStackBytes);
#endif
#if defined(EDGEMOE_OWN_SWITCH)
    edgemoe_switch_stack(&stack_end, fiber.stack_end);
#else
    ::swapcontext(&context, &fiber.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fake_stack, nullptr, nullptr);
#endif
}

// From the fiber that runs to whoever resumed it.
void Machine::State::leave([[maybe_unused]] bool forever) {
    Fiber& fiber = fibers[current];
#if defined(EDGEMOE_TSAN_FIBERS)
    __tsan_switch_to_fiber(tsan, 1);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(forever ? nullptr : &fiber.fake_stack, stack_bottom, stack_size);
#endif
#if defined(EDGEMOE_OWN_SWITCH)
    edgemoe_switch_stack(&fiber.stack_end, stack_end);
#else
    ::swapcontext(&fiber.context, &context);
#endif
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber.fake_stack, &stack_bottom, &stack_size);
#endif
}

void Machine::State::wait_at(Wait wait, int site) {
    Fiber& fiber = fibers[current];
    fiber.wait = wait;
    fiber.site = site;
    leave(false);
}

// Until all lanes of the warp wait at a barrier or are done.
void Machine::State::run_warp(int warp) {
    Fiber* lanes = &fibers[warp * kWarp];
    std::array<int, kWarp> turns;
    for (;;) {
        sort(turns, kWarp);
        for (const int lane : turns)
            if (lanes[lane].wait == Wait::none) resume(warp * kWarp + lane);
        throw_error();
        const auto shuffles =
            std::count_if(lanes, lanes + kWarp, [](const Fiber& f) { return f.wait == Wait::shuffle; });
        if (shuffles == 0) return;
        if (shuffles < kWarp) throw DeviceError("a shuffle is not reached by all lanes of a warp");
        std::array<uint32_t, kWarp> values;
        for (int lane = 0; lane < kWarp; ++lane) {
            if (lanes[lane].site != lanes[0].site) throw DeviceError("the lanes of a warp shuffle differently");
            values[lane] = lanes[lane].value;
        }
        for (int lane = 0; lane < kWarp; ++lane) {
            lanes[lane].value = values[lane ^ lanes[lane].site];
            lanes[lane].wait = Wait::none;
        }
    }
}

void Machine::State::run_group() {
    constexpr int kMostWarps = 32;
    const int warps = threads / kWarp;
    std::array<int, kMostWarps> turns;
    for (;;) {
        sort(turns, warps);
        for (int i = 0; i < warps; ++i) run_warp(turns[i]);
        int done = 0, waiting = 0;
        for (int i = 0; i < threads; ++i) {
            done += fibers[i].wait == Wait::done;
            waiting += fibers[i].wait == Wait::barrier && fibers[i].site == fibers[0].site;
        }
        if (done == threads) return;
        if (waiting != threads)
            throw DeviceError("a barrier is not reached by all threads of a group: of " + std::to_string(threads) +
                              ", " + std::to_string(waiting) + " wait there and " + std::to_string(done) + " are done");
        for (int i = 0; i < threads; ++i) fibers[i].wait = Wait::none;
    }
}

Machine::Machine(WarpOrder order, uint32_t seed) : state_(std::make_unique<State>(order, seed)) {}
Machine::~Machine() = default;

void Machine::run(int groups, int threads, const std::function<void()>& kernel) {
    State& state = *state_;
    if (threads <= 0 || threads % kWarp != 0 || threads > 32 * kWarp)
        throw DeviceError("a group cannot have " + std::to_string(threads) + " threads");
    state.kernel = &kernel;
    state.threads = threads;
    state.error = nullptr;
    state.arrays.clear();
    while (static_cast<int>(state.fibers.size()) < threads) state.fibers.emplace_back();
    // Under ThreadSanitizer every group has shared memory of its own: nothing orders one after another.
#if defined(EDGEMOE_TSAN_FIBERS)
    state.tsan = __tsan_get_current_fiber();
    const size_t shared = static_cast<size_t>(groups);
#else
    const size_t shared = 1;
#endif
    state.barriers.resize(static_cast<size_t>(groups));
    for (const auto& memory : state.shared_memory) std::memset(memory.get(), 0xFF, state.shared_used);
    while (state.shared_memory.size() < shared) {
        state.shared_memory.emplace_back(new std::byte[kSharedBytes]);
        std::memset(state.shared_memory.back().get(), 0xFF, kSharedBytes);
    }
    state.shared_used = 0;

    struct Running {
        Machine::State* before;
        explicit Running(Machine::State& state) : before(std::exchange(running, &state)) {}
        ~Running() { running = before; }
    } const now(state);
    state.started.release();
    for (int group = 0; group < groups; ++group) {
        state.group = group;
        state.shared = state.shared_memory[shared == 1 ? 0 : static_cast<size_t>(group)].get();
        if (shared == 1 && group > 0) std::memset(state.shared, 0xFF, state.shared_used);
        for (int i = 0; i < threads; ++i) state.start(state.fibers[i]);
        state.run_group();
    }
    state.ended.acquire();
}

void* host_pointer(uint64_t address) {
    if (address == 0) return nullptr;
    if ((address & kDeviceBit) == 0) throw DeviceError("a kernel reads an address that is not the device's");
    return reinterpret_cast<void*>(static_cast<uintptr_t>(address & ~kDeviceBit));
}

int group() { return running->group; }
int thread() { return running->current; }

void barrier(int site) {
    Machine::State& machine = *running;
    Token& token = machine.barriers[machine.group][machine.fibers[machine.current].barriers++ & 1];
    token.release();
    machine.wait_at(Wait::barrier, site);
    token.acquire();
}

uint32_t shuffle_xor(uint32_t value, int mask) {
    Machine::State& machine = *running;
    if (mask < 0 || mask >= kWarp) throw DeviceError("a shuffle with lane ^ " + std::to_string(mask));
    Fiber& fiber = machine.fibers[machine.current];
    fiber.value = value;
    machine.wait_at(Wait::shuffle, mask);
    return fiber.value;
}

void* shared_bytes(int site, size_t bytes) {
    Machine::State& machine = *running;
    for (const SharedArray& array : machine.arrays)
        if (array.site == site) return machine.shared + array.begin;
    // Arrays do not touch: what is read behind one is not a number.
    constexpr size_t kGap = 64;
    const size_t begin = machine.shared_used;
    const size_t end = begin + (bytes + kGap - 1) / kGap * kGap;
    if (end > kSharedBytes) throw DeviceError("a kernel has more than 48 KiB of shared memory");
    machine.arrays.push_back({site, begin, bytes});
    machine.shared_used = std::min(end + kGap, kSharedBytes);
    return machine.shared + begin;
}

}  // namespace edgemoe::emulator
