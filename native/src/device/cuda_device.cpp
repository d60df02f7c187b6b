#include "edgemoe/cuda_device.h"

#if __has_include(<dlfcn.h>)
#include <dlfcn.h>
#endif

#include <algorithm>
#include <cstring>
#include <deque>
#include <map>
#include <mutex>
#include <set>
#include <utility>

#include "device/emulated_kernels.h"

namespace edgemoe {
namespace {

// --- the driver -----------------------------------------------------------------------------------------------------

using Address = unsigned long long;  // in the device's memory
using Status = int;

// Of cuda.h, as far as it is used.
constexpr Status kSuccess = 0, kOutOfMemory = 2, kNoDevice = 100, kNotReady = 600;
constexpr int kIntegrated = 18, kCapabilityMajor = 75, kCapabilityMinor = 76;
constexpr unsigned kStreamNonBlocking = 1, kEventDisableTiming = 2, kHostPortable = 1;
constexpr int kErrorLog = 5, kErrorLogBytes = 6;  // options of cuModuleLoadDataEx

// The kernels' PTX is of CUDA 12.0 and for GPUs of this capability: no earlier ones can load it.
constexpr int kDriverVersion = 12000;
constexpr int kCapability = 75;

#define EDGEMOE_CUDA_FUNCTIONS(F)                                                                                  \
    F(cuInit, unsigned flags)                                                                                      \
    F(cuDriverGetVersion, int* version)                                                                            \
    F(cuGetErrorName, Status status, const char** name)                                                            \
    F(cuGetErrorString, Status status, const char** text)                                                          \
    F(cuDeviceGetCount, int* count)                                                                                \
    F(cuDeviceGet, int* device, int number)                                                                        \
    F(cuDeviceGetName, char* name, int size, int device)                                                           \
    F(cuDeviceGetAttribute, int* value, int attribute, int device)                                                 \
    F(cuDeviceTotalMem_v2, size_t* bytes, int device)                                                              \
    F(cuDevicePrimaryCtxRetain, void** context, int device)                                                        \
    F(cuDevicePrimaryCtxRelease_v2, int device)                                                                    \
    F(cuCtxSetCurrent, void* context)                                                                              \
    F(cuModuleLoadDataEx, void** module, const void* image, unsigned count, int* options, void** values)           \
    F(cuModuleUnload, void* module)                                                                                \
    F(cuModuleGetFunction, void** function, void* module, const char* name)                                        \
    F(cuMemGetInfo_v2, size_t* free, size_t* total)                                                                \
    F(cuMemAlloc_v2, Address* memory, size_t bytes)                                                                \
    F(cuMemFree_v2, Address memory)                                                                                \
    F(cuMemHostAlloc, void** memory, size_t bytes, unsigned flags)                                                 \
    F(cuMemFreeHost, void* memory)                                                                                 \
    F(cuMemHostRegister_v2, void* memory, size_t bytes, unsigned flags)                                            \
    F(cuMemHostUnregister, void* memory)                                                                           \
    F(cuMemcpyHtoDAsync_v2, Address to, const void* from, size_t bytes, void* stream)                              \
    F(cuMemcpyDtoHAsync_v2, void* to, Address from, size_t bytes, void* stream)                                    \
    F(cuMemcpyDtoDAsync_v2, Address to, Address from, size_t bytes, void* stream)                                  \
    F(cuStreamCreate, void** stream, unsigned flags)                                                               \
    F(cuStreamDestroy_v2, void* stream)                                                                            \
    F(cuStreamSynchronize, void* stream)                                                                           \
    F(cuEventCreate, void** event, unsigned flags)                                                                 \
    F(cuEventDestroy_v2, void* event)                                                                              \
    F(cuEventRecord, void* event, void* stream)                                                                    \
    F(cuEventQuery, void* event)                                                                                   \
    F(cuEventSynchronize, void* event)                                                                             \
    F(cuLaunchKernel, void* function, unsigned groups_x, unsigned groups_y, unsigned groups_z, unsigned threads_x, \
      unsigned threads_y, unsigned threads_z, unsigned shared, void* stream, void** arguments, void** extra)

struct Driver {
#define EDGEMOE_DECLARE(name, ...) Status (*name)(__VA_ARGS__) = nullptr;
    EDGEMOE_CUDA_FUNCTIONS(EDGEMOE_DECLARE)
#undef EDGEMOE_DECLARE

    explicit Driver(const std::string& path) {
#if __has_include(<dlfcn.h>)
        // Never closed: the driver has threads of its own.
        void* const library = dlopen(path.c_str(), RTLD_NOW | RTLD_LOCAL);
        if (!library) throw NoDeviceError("no NVIDIA driver: " + path + " could not be opened: " + dlerror());
#define EDGEMOE_LOAD(name, ...)                                            \
    if (!(name = reinterpret_cast<decltype(name)>(dlsym(library, #name)))) \
        throw DeviceError("the NVIDIA driver is too old, or no driver: " + path + " has no " #name);
        EDGEMOE_CUDA_FUNCTIONS(EDGEMOE_LOAD)
#undef EDGEMOE_LOAD
#else
        throw NoDeviceError("no NVIDIA driver: " + path + " is not opened on this system");
#endif
    }

    void check(Status status, const char* call, const std::string& more = "") const {
        if (status == kSuccess) return;
        const char* name = nullptr;
        const char* text = nullptr;
        if (cuGetErrorName(status, &name) != kSuccess || !name) name = "an unknown error";
        if (cuGetErrorString(status, &text) != kSuccess || !text) text = "no explanation";
        const std::string message =
            std::string(call) + ": " + name + " (" + std::to_string(status) + "): " + text + more;
        if (status == kOutOfMemory) throw DeviceMemoryError(message);
        throw DeviceError(message);
    }
};

#define EDGEMOE_CALL(driver, function, ...) (driver).check((driver).function(__VA_ARGS__), #function)

// --- what it lends --------------------------------------------------------------------------------------------------

// Given back with a function of the driver, whose status nobody can act on any more.
template <auto kFunction>
struct Return {
    const Driver* driver = nullptr;
    void operator()(void* handle) const { (driver->*kFunction)(handle); }
};
template <auto kFunction>
using Owned = std::unique_ptr<void, Return<kFunction>>;
using Module = Owned<&Driver::cuModuleUnload>;
using Stream = Owned<&Driver::cuStreamDestroy_v2>;
using Event = Owned<&Driver::cuEventDestroy_v2>;
using HostMemory = Owned<&Driver::cuMemFreeHost>;
using Registration = Owned<&Driver::cuMemHostUnregister>;

// The context that all of a process share.
class Context {
  public:
    Context(const Driver& driver, int device) : driver_(driver), device_(device) {
        EDGEMOE_CALL(driver_, cuDevicePrimaryCtxRetain, &context_, device);
        enter();
    }
    ~Context() {
        driver_.cuCtxSetCurrent(nullptr);
        driver_.cuDevicePrimaryCtxRelease_v2(device_);
    }
    Context(const Context&) = delete;
    Context& operator=(const Context&) = delete;

    // A context is current for one thread, and any may call.
    void enter() const { EDGEMOE_CALL(driver_, cuCtxSetCurrent, context_); }
    void enter_quietly() const { driver_.cuCtxSetCurrent(context_); }

  private:
    const Driver& driver_;
    const int device_;
    void* context_ = nullptr;
};

Stream make_stream(const Driver& driver) {
    void* stream = nullptr;
    EDGEMOE_CALL(driver, cuStreamCreate, &stream, kStreamNonBlocking);
    return Stream(stream, {&driver});
}

Event make_event(const Driver& driver) {
    void* event = nullptr;
    EDGEMOE_CALL(driver, cuEventCreate, &event, kEventDisableTiming);
    return Event(event, {&driver});
}

HostMemory make_host_memory(const Driver& driver, size_t bytes) {
    void* memory = nullptr;
    EDGEMOE_CALL(driver, cuMemHostAlloc, &memory, bytes, kHostPortable);
    return HostMemory(memory, {&driver});
}

std::string cuda_version(int number) {
    return std::to_string(number / 1000) + "." + std::to_string(number % 1000 / 10);
}

int first_device(const Driver& driver) {
    const Status status = driver.cuInit(0);
    if (status == kNoDevice) throw NoDeviceError("the NVIDIA driver sees no GPU");
    driver.check(status, "cuInit");
    int version = 0, count = 0, device = 0, major = 0, minor = 0;
    EDGEMOE_CALL(driver, cuDriverGetVersion, &version);
    if (version < kDriverVersion)
        throw DeviceError("the NVIDIA driver is of CUDA " + cuda_version(version) +
                          ", but the kernels need 12.0 or later");
    EDGEMOE_CALL(driver, cuDeviceGetCount, &count);
    if (count < 1) throw NoDeviceError("the NVIDIA driver sees no GPU");
    EDGEMOE_CALL(driver, cuDeviceGet, &device, 0);
    EDGEMOE_CALL(driver, cuDeviceGetAttribute, &major, kCapabilityMajor, device);
    EDGEMOE_CALL(driver, cuDeviceGetAttribute, &minor, kCapabilityMinor, device);
    if (major * 10 + minor < kCapability)
        throw DeviceError("the GPU's compute capability is " + std::to_string(major) + "." + std::to_string(minor) +
                          ", but the kernels need 7.5 or later");
    return device;
}

Module load_module(const Driver& driver, const std::string& image) {
    std::array<char, 4096> log{};
    std::array<int, 2> options{kErrorLog, kErrorLogBytes};
    std::array<void*, 2> values{log.data(), reinterpret_cast<void*>(log.size() - 1)};
    void* module = nullptr;
    const Status status =
        driver.cuModuleLoadDataEx(&module, image.c_str(), options.size(), options.data(), values.data());
    driver.check(status, "cuModuleLoadDataEx", log[0] ? std::string("\n") + log.data() : "");
    return Module(module, {&driver});
}

Address address_of(const std::byte* memory) { return reinterpret_cast<Address>(memory); }

// --- copies from memory of any kind
// -----------------------------------------------------------------------------------

// Pinned memory for what write() copies: bytes lie there until the device has them. It is used in turn, a segment after
// the other; one that comes round again is waited for.
class Staging {
  public:
    static constexpr size_t kSegment = size_t{1} << 20;
    static constexpr size_t kSegments = 8;

    explicit Staging(const Driver& driver) : driver_(driver), memory_(make_host_memory(driver, kSegment * kSegments)) {
        for (Event& event : left_) event = make_event(driver);
    }

    void copy(Address to, std::span<const std::byte> from, void* stream) {
        while (!from.empty()) {
            if (used_ == kSegment) next(stream);
            const size_t bytes = std::min(from.size(), kSegment - used_);
            std::byte* const place = static_cast<std::byte*>(memory_.get()) + current_ * kSegment + used_;
            std::memcpy(place, from.data(), bytes);
            EDGEMOE_CALL(driver_, cuMemcpyHtoDAsync_v2, to, place, bytes, stream);
            used_ += std::min(kSegment - used_, (bytes + kAlignment - 1) / kAlignment * kAlignment);
            to += bytes;
            from = from.subspan(bytes);
        }
    }

  private:
    static constexpr size_t kAlignment = 64;

    void next(void* stream) {
        EDGEMOE_CALL(driver_, cuEventRecord, left_[current_].get(), stream);
        in_use_[current_] = true;
        current_ = (current_ + 1) % kSegments;
        if (in_use_[current_]) EDGEMOE_CALL(driver_, cuEventSynchronize, left_[current_].get());
        used_ = 0;
    }

    const Driver& driver_;
    const HostMemory memory_;
    std::array<Event, kSegments> left_;  // after the last copy out of it
    std::array<bool, kSegments> in_use_{};
    size_t current_ = 0, used_ = 0;
};

// --- the device
// -------------------------------------------------------------------------------------------------------

constexpr size_t kKernels = 0
#define EDGEMOE_KERNEL(name, threads) +1
#include "../../gpu/kernel_list.h"
#undef EDGEMOE_KERNEL
    ;

// Any thread may call. What is computed is in the order of the calls; uploads hold up nothing else.
class CudaDevice final : public Device {
  public:
    CudaDevice(std::string_view image, const std::string& library)
        : driver_(library),
          device_(first_device(driver_)),
          context_(driver_, device_),
          module_(load_module(driver_, std::string(image))),
          work_(make_stream(driver_)),
          uploading_(make_stream(driver_)),
          staging_(driver_),
          landing_(make_host_memory(driver_, kLanding)) {
        for (size_t kernel = 0; kernel < functions_.size(); ++kernel) {
            const std::string name(kernel_name(static_cast<Kernel>(kernel)));
            driver_.check(driver_.cuModuleGetFunction(&functions_[kernel], module_.get(), name.c_str()),
                          "cuModuleGetFunction", ": " + name);
        }
    }

    ~CudaDevice() override {
        // Nobody is there to be told if the device has failed.
        context_.enter_quietly();
        driver_.cuStreamSynchronize(work_.get());
        driver_.cuStreamSynchronize(uploading_.get());
        for (const Address memory : allocated_) driver_.cuMemFree_v2(memory);
    }

    DeviceFacts facts() const override {
        context_.enter();
        DeviceFacts facts;
        std::array<char, 256> name{};
        EDGEMOE_CALL(driver_, cuDeviceGetName, name.data(), name.size() - 1, device_);
        facts.name = name.data();
        int count = 0, integrated = 0, version = 0;
        EDGEMOE_CALL(driver_, cuDriverGetVersion, &version);
        facts.driver = "CUDA " + cuda_version(version);
        EDGEMOE_CALL(driver_, cuDeviceGetCount, &count);
        if (count > 1) facts.name += " (the first of " + std::to_string(count) + ")";
        EDGEMOE_CALL(driver_, cuDeviceTotalMem_v2, &facts.memory, device_);
        size_t total = 0;
        EDGEMOE_CALL(driver_, cuMemGetInfo_v2, &facts.available, &total);
        EDGEMOE_CALL(driver_, cuDeviceGetAttribute, &integrated, kIntegrated, device_);
        facts.unified = integrated != 0;
        return facts;
    }

    std::byte* allocate(size_t bytes) override {
        const std::lock_guard lock(mutex_);
        context_.enter();
        Address memory = 0;
        const Status status = driver_.cuMemAlloc_v2(&memory, std::max<size_t>(bytes, 1));
        driver_.check(status, "cuMemAlloc_v2", ": " + std::to_string(bytes) + " bytes");
        allocated_.insert(memory);
        return reinterpret_cast<std::byte*>(memory);
    }

    void release(std::byte* memory) override {
        const std::lock_guard lock(mutex_);
        if (!allocated_.contains(address_of(memory))) throw DeviceError("memory is released that was not allocated");
        context_.enter();
        EDGEMOE_CALL(driver_, cuStreamSynchronize, work_.get());
        EDGEMOE_CALL(driver_, cuStreamSynchronize, uploading_.get());
        EDGEMOE_CALL(driver_, cuMemFree_v2, address_of(memory));
        allocated_.erase(address_of(memory));
    }

    void launch(Kernel kernel, int groups, std::span<const Argument> arguments) override {
        check_launch(kernel, groups, arguments);  // the driver reads what it believes is there
        context_.enter();
        std::vector<void*> values;
        values.reserve(arguments.size());
        for (const Argument& argument : arguments) values.push_back(const_cast<void*>(argument.value));
        const auto threads = static_cast<unsigned>(kernel_threads(kernel));
        const Status status =
            driver_.cuLaunchKernel(functions_[static_cast<size_t>(kernel)], static_cast<unsigned>(groups), 1, 1,
                                   threads, 1, 1, 0, work_.get(), values.data(), nullptr);
        if (status != kSuccess) driver_.check(status, "cuLaunchKernel", ": " + std::string(kernel_name(kernel)));
    }

    void write(std::byte* to, std::span<const std::byte> from) override {
        const std::lock_guard lock(mutex_);
        context_.enter();
        staging_.copy(address_of(to), from, work_.get());
    }

    void copy(std::byte* to, const std::byte* from, size_t bytes) override {
        if (bytes == 0) return;
        context_.enter();
        EDGEMOE_CALL(driver_, cuMemcpyDtoDAsync_v2, address_of(to), address_of(from), bytes, work_.get());
    }

    void read(std::span<std::byte> to, const std::byte* from) override {
        const std::lock_guard lock(mutex_);
        context_.enter();
        do {
            const size_t bytes = std::min(to.size(), kLanding);
            if (bytes)
                EDGEMOE_CALL(driver_, cuMemcpyDtoHAsync_v2, landing_.get(), address_of(from), bytes, work_.get());
            EDGEMOE_CALL(driver_, cuStreamSynchronize, work_.get());
            if (bytes) std::memcpy(to.data(), landing_.get(), bytes);
            to = to.subspan(bytes);
            from += bytes;
        } while (!to.empty());
    }

    void wait() override {
        context_.enter();
        EDGEMOE_CALL(driver_, cuStreamSynchronize, work_.get());
    }

    uint64_t upload(std::byte* to, std::span<const std::byte> from) override {
        const std::lock_guard lock(uploads_mutex_);
        context_.enter();
        if (spare_.empty()) spare_.push_back(make_event(driver_));
        if (!from.empty())
            EDGEMOE_CALL(driver_, cuMemcpyHtoDAsync_v2, address_of(to), from.data(), from.size(), uploading_.get());
        if (const Status status = driver_.cuEventRecord(spare_.back().get(), uploading_.get())) {
            driver_.cuStreamSynchronize(uploading_.get());  // nobody could wait for it
            driver_.check(status, "cuEventRecord");
        }
        uploads_.push_back(std::move(spare_.back()));
        spare_.pop_back();
        return finished_ + uploads_.size();
    }

    bool done(uint64_t upload) override {
        const std::lock_guard lock(uploads_mutex_);
        void* const event = event_of(upload);
        if (!event) return true;
        context_.enter();
        const Status status = driver_.cuEventQuery(event);
        if (status == kNotReady) return false;
        driver_.check(status, "cuEventQuery");
        finish(upload);
        return true;
    }

    void wait(uint64_t upload) override {
        const std::lock_guard lock(uploads_mutex_);
        void* const event = event_of(upload);
        if (!event) return;
        context_.enter();
        EDGEMOE_CALL(driver_, cuEventSynchronize, event);
        finish(upload);
    }

    bool pin(std::span<std::byte> memory) override {
        const std::lock_guard lock(uploads_mutex_);
        context_.enter();
        if (driver_.cuMemHostRegister_v2(memory.data(), memory.size(), kHostPortable) != kSuccess) return false;
        pinned_.emplace(memory.data(), Registration(memory.data(), {&driver_}));
        return true;
    }

    void unpin(std::byte* memory) override {
        const std::lock_guard lock(uploads_mutex_);
        context_.enter();
        EDGEMOE_CALL(driver_, cuStreamSynchronize, uploading_.get());
        pinned_.erase(memory);
    }

  private:
    static constexpr size_t kLanding = size_t{1} << 20;

    // Of an upload that may be under way; none of one that is done.
    void* event_of(uint64_t upload) const {
        if (upload > finished_ + uploads_.size()) throw DeviceError("there is no such upload");
        return upload <= finished_ ? nullptr : uploads_[upload - finished_ - 1].get();
    }

    // Uploads are done in their order.
    void finish(uint64_t upload) {
        while (finished_ < upload) {
            spare_.push_back(std::move(uploads_.front()));
            uploads_.pop_front();
            ++finished_;
        }
    }

    // In this order: what comes later needs what comes before to be given back.
    const Driver driver_;
    const int device_;
    const Context context_;
    const Module module_;
    const Stream work_;
    const Stream uploading_;
    std::array<void*, kKernels> functions_{};

    std::mutex mutex_;
    Staging staging_;
    const HostMemory landing_;  // of read()
    std::set<Address> allocated_;

    std::mutex uploads_mutex_;
    std::map<std::byte*, Registration> pinned_;
    std::deque<Event> uploads_;  // that may be under way, of the numbers after finished_
    std::vector<Event> spare_;
    uint64_t finished_ = 0;
};

}  // namespace

std::unique_ptr<Device> open_cuda_device(std::string_view image, const std::string& library) {
    return std::make_unique<CudaDevice>(image, library);
}

}  // namespace edgemoe
