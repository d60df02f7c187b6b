// A device that has failed once fails every time after: states and weights in its memory may be anything by then, so
// nothing may be computed from them, whatever the device itself would say.
#pragma once

#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>

#include "edgemoe/device.h"

namespace edgemoe {

class FailStop final : public Device {
  public:
    explicit FailStop(std::shared_ptr<Device> device) : device_(std::move(device)) {}

    DeviceFacts facts() const override { return device_->facts(); }
    // No room for more is no failure: nothing has been touched.
    std::byte* allocate(size_t bytes) override {
        try {
            return guarded([&] { return device_->allocate(bytes); });
        } catch (const DeviceMemoryError&) {
            forget();
            throw;
        }
    }
    void release(std::byte* memory) override { device_->release(memory); }
    using Device::launch;
    void launch(Kernel kernel, int groups, std::span<const Argument> arguments) override {
        guarded([&] { device_->launch(kernel, groups, arguments); });
    }
    void write(std::byte* to, std::span<const std::byte> from) override {
        guarded([&] { device_->write(to, from); });
    }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override {
        guarded([&] { device_->copy(to, from, bytes); });
    }
    void read(std::span<std::byte> to, const std::byte* from) override {
        guarded([&] { device_->read(to, from); });
    }
    void wait() override {
        guarded([&] { device_->wait(); });
    }
    uint64_t upload(std::byte* to, std::span<const std::byte> from) override {
        return guarded([&] { return device_->upload(to, from); });
    }
    bool done(uint64_t upload) override {
        return guarded([&] { return device_->done(upload); });
    }
    void wait(uint64_t upload) override {
        guarded([&] { device_->wait(upload); });
    }
    bool pin(std::span<std::byte> memory) override { return device_->pin(memory); }
    void unpin(std::byte* memory) override { device_->unpin(memory); }

  private:
    template <class Action>
    std::invoke_result_t<Action> guarded(Action action) {
        {
            const std::lock_guard lock(mutex_);
            if (failure_) throw DeviceError(*failure_);
        }
        try {
            return action();
        } catch (const std::exception& error) {
            const std::lock_guard lock(mutex_);
            failure_ = error.what();
            throw;
        }
    }
    void forget() {
        const std::lock_guard lock(mutex_);
        failure_.reset();
    }

    std::shared_ptr<Device> device_;
    std::mutex mutex_;
    std::optional<std::string> failure_;
};

}  // namespace edgemoe
