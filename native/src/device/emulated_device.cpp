#include "edgemoe/emulated_device.h"

#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <new>
#include <optional>
#include <utility>
#include <vector>

#include "device/emulated_kernels.h"
#include "device/emulator.h"

namespace edgemoe {
namespace {

constexpr size_t kAlignment = 256;
constexpr size_t kGuard = 256;  // bytes behind every allocation that nobody writes
constexpr int kGuardByte = 0xA5;

struct Delete {
    void operator()(std::byte* memory) const { ::operator delete[](memory, std::align_val_t{kAlignment}); }
};

struct Allocation {
    std::unique_ptr<std::byte[], Delete> memory;
    size_t bytes;
};

// All of a device's calls may come from several threads.
class EmulatedDevice final : public Device {
  public:
    explicit EmulatedDevice(const EmulatedOptions& options)
        : options_(options), machine_(options.order, options.seed) {}

    DeviceFacts facts() const override {
        const std::lock_guard lock(mutex_);
        return {"emulated", options_.memory, options_.memory - allocated_, false, ""};
    }

    std::byte* allocate(size_t bytes) override {
        const std::lock_guard lock(mutex_);
        check_health();
        if (bytes > options_.memory - allocated_)
            throw DeviceMemoryError("the emulated device has " + std::to_string(options_.memory - allocated_) +
                                    " bytes left, not " + std::to_string(bytes));
        auto* const memory =
            static_cast<std::byte*>(::operator new[](bytes + kGuard, std::align_val_t{kAlignment}, std::nothrow));
        if (!memory)
            throw DeviceMemoryError("there are no " + std::to_string(bytes) + " bytes for the emulated device");
        std::memset(memory, 0xFF, bytes);
        std::memset(memory + bytes, kGuardByte, kGuard);
        const uint64_t address = emulator::device_address(memory);
        allocations_.emplace(address, Allocation{std::unique_ptr<std::byte[], Delete>(memory), bytes});
        allocated_ += bytes;
        return reinterpret_cast<std::byte*>(address);
    }

    void release(std::byte* memory) override {
        const std::lock_guard lock(mutex_);
        const auto found = allocations_.find(number_of(memory));
        if (found == allocations_.end()) throw DeviceError("what is released was not allocated, or released before");
        if (!failure_) {
            run_queue();
            while (!uploads_.empty()) run_upload();
        }
        allocated_ -= found->second.bytes;
        allocations_.erase(found);
    }

    using Device::launch;
    void launch(Kernel kernel, int groups, std::span<const Argument> arguments) override {
        const std::lock_guard lock(mutex_);
        check_health();
        const std::string name(kernel_name(kernel));
        const EmulatedKernel& text = check_launch(kernel, groups, arguments);
        for (size_t i = 0; i < arguments.size(); ++i)
            if (text.parameters[i].address)
                check_address(name + ", argument " + std::to_string(i), text.parameters[i], arguments[i]);
        push([this, groups, threads = kernel_threads(kernel),
              thread = text.bind(arguments)] { machine_.run(groups, threads, thread); },
             name);
    }

    void write(std::byte* to, std::span<const std::byte> from) override {
        const std::lock_guard lock(mutex_);
        check_health();
        std::byte* const target = memory_at("a write", to, from.size());
        push(
            [target, bytes = std::vector<std::byte>(from.begin(), from.end())] {
                if (!bytes.empty()) std::memcpy(target, bytes.data(), bytes.size());
            },
            "a write");
    }

    void copy(std::byte* to, const std::byte* from, size_t bytes) override {
        const std::lock_guard lock(mutex_);
        check_health();
        std::byte* const target = memory_at("a copy", to, bytes);
        const std::byte* const source = memory_at("a copy", from, bytes);
        if (target < source + bytes && source < target + bytes) throw DeviceError("a copy overlaps its source");
        push([=] { std::memcpy(target, source, bytes); }, "a copy");
    }

    void read(std::span<std::byte> to, const std::byte* from) override {
        const std::lock_guard lock(mutex_);
        check_health();
        const std::byte* const source = memory_at("a read", from, to.size());
        run_queue();
        if (!to.empty()) std::memcpy(to.data(), source, to.size());
    }

    void wait() override {
        const std::lock_guard lock(mutex_);
        check_health();
        run_queue();
    }

    uint64_t upload(std::byte* to, std::span<const std::byte> from) override {
        const std::lock_guard lock(mutex_);
        check_health();
        uploads_.push_back({memory_at("an upload", to, from.size()), from});
        if (options_.eager) run_upload();
        return uploaded_ + uploads_.size();
    }

    // Asking gets it on: the one who asks again and again, and meanwhile does other things, sees it done.
    bool done(uint64_t upload) override {
        const std::lock_guard lock(mutex_);
        check_upload(upload);
        if (upload <= uploaded_) return true;
        run_upload();
        return false;
    }

    void wait(uint64_t upload) override {
        const std::lock_guard lock(mutex_);
        check_upload(upload);
        while (uploaded_ < upload) run_upload();
    }

  private:
    struct Operation {
        std::function<void()> run;
        std::string name;
    };
    struct Upload {
        std::byte* to;
        std::span<const std::byte> from;
    };

    static uint64_t number_of(const std::byte* address) { return reinterpret_cast<uintptr_t>(address); }

    void check_health() const {
        if (failure_) throw DeviceError(*failure_);
    }

    void check_upload(uint64_t upload) const {
        check_health();
        if (upload < 1 || upload > uploaded_ + uploads_.size())
            throw DeviceError("there is no upload " + std::to_string(upload));
    }

    // The allocation which an address lies in, or behind whose last byte.
    const Allocation& allocation_of(const std::string& what, uint64_t address) const {
        if ((address & emulator::kDeviceBit) == 0) throw DeviceError(what + ": a pointer of the host");
        auto found = allocations_.upper_bound(address);
        if (found == allocations_.begin() || address > (--found)->first + found->second.bytes)
            throw DeviceError(what + ": an address where nothing is allocated");
        return found->second;
    }

    std::byte* memory_at(const std::string& what, const std::byte* address, size_t bytes) const {
        const Allocation& allocation = allocation_of(what, number_of(address));
        auto* const memory = static_cast<std::byte*>(emulator::host_pointer(number_of(address)));
        if (bytes > static_cast<size_t>(allocation.memory.get() + allocation.bytes - memory))
            throw DeviceError(what + " goes beyond the memory that was allocated");
        return memory;
    }

    void check_address(const std::string& what, const EmulatedKernel::Parameter& parameter,
                       const Argument& argument) const {
        uint64_t address;
        std::memcpy(&address, argument.value, sizeof address);
        if (address == 0) return;
        allocation_of(what, address);
        if (address % parameter.alignment != 0) throw DeviceError(what + ": the address is not aligned");
    }

    void push(std::function<void()> run, std::string name) {
        queue_.push_back({std::move(run), std::move(name)});
        if (options_.eager) run_queue();
    }

    void run_queue() {
        try {
            while (!queue_.empty()) {
                const Operation operation = std::move(queue_.front());
                queue_.pop_front();
                try {
                    operation.run();
                    check_guards();
                } catch (const DeviceError& error) {
                    throw DeviceError(operation.name + ": " + error.what());
                }
            }
        } catch (const std::exception& error) {
            failure_ = error.what();
            queue_.clear();
            throw;
        }
    }

    void run_upload() {
        const Upload upload = uploads_.front();
        uploads_.pop_front();
        if (!upload.from.empty()) std::memcpy(upload.to, upload.from.data(), upload.from.size());
        ++uploaded_;
    }

    void check_guards() const {
        static const std::vector<std::byte> untouched(kGuard, std::byte{kGuardByte});
        for (const auto& [address, allocation] : allocations_)
            if (std::memcmp(allocation.memory.get() + allocation.bytes, untouched.data(), kGuard) != 0)
                throw DeviceError("something was written behind an allocation of " + std::to_string(allocation.bytes) +
                                  " bytes");
    }

    const EmulatedOptions options_;
    mutable std::mutex mutex_;
    emulator::Machine machine_;
    std::map<uint64_t, Allocation> allocations_;
    size_t allocated_ = 0;
    std::deque<Operation> queue_;
    std::deque<Upload> uploads_;
    uint64_t uploaded_ = 0;
    std::optional<std::string> failure_;
};

}  // namespace

std::unique_ptr<Device> emulated_device(const EmulatedOptions& options) {
    return std::make_unique<EmulatedDevice>(options);
}

}  // namespace edgemoe
