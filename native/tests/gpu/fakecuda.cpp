// A libcuda.so.1 for machines without a GPU, as far as src/device/cuda_device.cpp uses one. tests/fake_cuda.py compiles
// it and lends it an emulated device for its memory and kernels.
//
// It is no more forgiving than a driver, and where a driver is lucky it is not:
//   - A stream computes nothing until somebody waits for it, or asks often enough whether it has come so far.
//   - Calls need a current context in the thread that makes them.
//   - A module is the PTX that it is given: kernels have the arguments and threads that stand there.
//   - Errors come when they are asked for (fake_fail), and stay where they would (fake_lose).
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace {

using Address = unsigned long long;
using Status = int;

enum : Status {
    kSuccess = 0,
    kInvalidValue = 1,
    kOutOfMemory = 2,
    kNotInitialized = 3,
    kNoDevice = 100,
    kInvalidContext = 201,
    kInvalidPtx = 218,
    kInvalidHandle = 400,
    kNotFound = 500,
    kNotReady = 600,
    kLaunchFailed = 719,
};

// The emulated device's. Each returns 0, or something else where it has failed.
struct Machine {
    int (*allocate)(size_t bytes, Address* memory);
    int (*release)(Address memory);
    int (*write)(Address to, const void* from, size_t bytes);
    int (*read)(void* to, Address from, size_t bytes);
    int (*copy)(Address to, Address from, size_t bytes);
    // Arguments follow one another in `values`; `sizes` has 0 for one that is an address, of 8 bytes.
    int (*launch)(const char* name, int groups, int count, const int* sizes, const void* values);
};

struct Function {
    std::string name;
    unsigned threads = 0;
    std::vector<int> sizes;  // of arguments, 0 for an address
};

struct Stream {
    std::deque<std::function<Status()>> work;
    uint64_t finished = 0;
};

struct Event {
    Stream* stream = nullptr;
    uint64_t after = 0;  // so many of the stream's operations
};

struct Failure {
    int calls;  // until then
    Status status;
};

std::recursive_mutex mutex;
Machine machine{};
std::map<std::string, Failure, std::less<>> failures;
Status lost = kSuccess;
bool eager = false, initialized = false;
int devices = 1, integrated = 0, version = 12040, capability = 90;
size_t memory = size_t{8} << 30;
size_t used = 0;
std::map<Address, size_t> allocations;
std::set<void*> host, registered;
std::map<void*, std::vector<Function>> modules;
std::set<Stream*> streams;
std::set<Event*> events;
int contexts = 0;
char context;
thread_local void* current = nullptr;

// What every call begins with. With a context, unless it is one of the few that need none.
Status begin(std::string_view name, bool with_context) {
    if (lost) return lost;
    if (const auto found = failures.find(name); found != failures.end() && --found->second.calls == 0) {
        const Status status = found->second.status;
        failures.erase(found);
        return status;
    }
    if (!initialized && name != "cuInit" && name != "cuDriverGetVersion") return kNotInitialized;
    return with_context && current != &context ? kInvalidContext : kSuccess;
}

#define BEGIN(with_context)            \
    const std::lock_guard lock(mutex); \
    if (const Status status = begin(__func__, with_context)) return status

Status step(Stream& stream) {
    const auto operation = std::move(stream.work.front());
    stream.work.pop_front();
    ++stream.finished;
    if (const Status status = operation()) lost = status;
    return lost;
}

Status run(Stream& stream, uint64_t until) {
    while (!lost && stream.finished < until && !stream.work.empty()) step(stream);
    return lost;
}

Status run(Stream& stream) { return run(stream, UINT64_MAX); }

Status enqueue(void* handle, std::function<Status()> operation) {
    auto* const stream = static_cast<Stream*>(handle);
    if (!streams.contains(stream)) return kInvalidHandle;
    stream->work.push_back(std::move(operation));
    return eager ? run(*stream) : kSuccess;
}

Status of_machine(int result) { return result ? kLaunchFailed : kSuccess; }

// The kernels of PTX: ".entry name( .param .u64 name_param_0, .param .align 8 .b8 name_param_1[24] ) .maxntid 128, 1,
// 1"
bool parse(std::string_view text, std::vector<Function>& functions) {
    if (text.find(".version 8.0") == text.npos || text.find(".target sm_75") == text.npos) return false;
    for (size_t at = text.find(".entry "); at != text.npos; at = text.find(".entry ", at)) {
        at += 7;
        Function function;
        const size_t open = text.find('(', at), close = text.find(')', at);
        if (open == text.npos || close == text.npos || close < open) return false;
        function.name = text.substr(at, open - at);
        std::string_view list = text.substr(open, close - open);
        for (size_t p = list.find(".param "); p != list.npos; p = list.find(".param ")) {
            list.remove_prefix(p + 7);
            const std::string_view one = list.substr(0, list.find(','));
            int bytes = 0;
            if (const size_t bracket = one.find('['); bracket != one.npos)
                std::sscanf(one.data() + bracket, "[%d]", &bytes);
            else if (one.starts_with(".u32") || one.starts_with(".f32"))
                bytes = 4;
            else if (!one.starts_with(".u64"))
                return false;
            function.sizes.push_back(bytes);
        }
        const size_t threads = text.find(".maxntid ", close);
        if (threads == text.npos || threads - close > 16) return false;
        std::sscanf(text.data() + threads, ".maxntid %u", &function.threads);
        functions.push_back(std::move(function));
    }
    return !functions.empty();
}

}  // namespace

extern "C" {

// --- for tests ------------------------------------------------------------------------------------------------------

void fake_connect(const Machine* of) {
    const std::lock_guard lock(mutex);
    machine = *of;
    failures.clear();
    lost = kSuccess;
    eager = false;
    initialized = false;
    devices = 1;
    integrated = 0;
    version = 12040;
    capability = 90;
    memory = size_t{8} << 30;
}
void fake_set(const char* name, long long value) {
    const std::lock_guard lock(mutex);
    const std::string_view what(name);
    if (what == "devices") devices = static_cast<int>(value);
    if (what == "integrated") integrated = static_cast<int>(value);
    if (what == "version") version = static_cast<int>(value);
    if (what == "capability") capability = static_cast<int>(value);
    if (what == "memory") memory = static_cast<size_t>(value);
    if (what == "eager") eager = value != 0;
}
// The n-th call of a function from now on fails. "kernel": what is computed fails, long after it was asked for.
void fake_fail(const char* function, int n, Status status) {
    const std::lock_guard lock(mutex);
    failures.insert_or_assign(function, Failure{n, status});
}
// From now on everything fails.
void fake_lose(Status status) {
    const std::lock_guard lock(mutex);
    lost = status;
}
// Things that were made and not given back.
int fake_live(const char* kind) {
    const std::lock_guard lock(mutex);
    const std::string_view what(kind);
    if (what == "allocations") return static_cast<int>(allocations.size());
    if (what == "host") return static_cast<int>(host.size() + registered.size());
    if (what == "modules") return static_cast<int>(modules.size());
    if (what == "streams") return static_cast<int>(streams.size());
    if (what == "events") return static_cast<int>(events.size());
    if (what == "contexts") return contexts;
    return -1;
}

// --- the driver -----------------------------------------------------------------------------------------------------

Status cuInit(unsigned) {
    BEGIN(false);
    if (devices == 0) return kNoDevice;
    initialized = true;
    return kSuccess;
}
Status cuDriverGetVersion(int* result) {
    BEGIN(false);
    *result = version;
    return kSuccess;
}
Status cuGetErrorName(Status status, const char** name) {
    static const std::map<Status, const char*> names{
        {kInvalidValue, "CUDA_ERROR_INVALID_VALUE"},     {kOutOfMemory, "CUDA_ERROR_OUT_OF_MEMORY"},
        {kNotInitialized, "CUDA_ERROR_NOT_INITIALIZED"}, {kNoDevice, "CUDA_ERROR_NO_DEVICE"},
        {kInvalidContext, "CUDA_ERROR_INVALID_CONTEXT"}, {kInvalidPtx, "CUDA_ERROR_INVALID_PTX"},
        {kInvalidHandle, "CUDA_ERROR_INVALID_HANDLE"},   {kNotFound, "CUDA_ERROR_NOT_FOUND"},
        {kLaunchFailed, "CUDA_ERROR_LAUNCH_FAILED"}};
    const auto found = names.find(status);
    *name = found == names.end() ? nullptr : found->second;
    return found == names.end() ? kInvalidValue : kSuccess;
}
Status cuGetErrorString(Status, const char** text) {
    *text = "as the fake driver says";
    return kSuccess;
}
Status cuDeviceGetCount(int* count) {
    BEGIN(false);
    *count = devices;
    return kSuccess;
}
Status cuDeviceGet(int* device, int number) {
    BEGIN(false);
    if (number < 0 || number >= devices) return kInvalidValue;
    *device = number;
    return kSuccess;
}
Status cuDeviceGetName(char* name, int size, int device) {
    BEGIN(false);
    std::snprintf(name, static_cast<size_t>(size), "Fake %d", device);
    return kSuccess;
}
Status cuDeviceGetAttribute(int* value, int attribute, int) {
    BEGIN(false);
    if (attribute == 18)
        *value = integrated;
    else if (attribute == 75)
        *value = capability / 10;
    else if (attribute == 76)
        *value = capability % 10;
    else
        return kInvalidValue;
    return kSuccess;
}
Status cuDeviceTotalMem_v2(size_t* bytes, int) {
    BEGIN(false);
    *bytes = memory;
    return kSuccess;
}
Status cuDevicePrimaryCtxRetain(void** result, int) {
    BEGIN(false);
    ++contexts;
    *result = &context;
    return kSuccess;
}
Status cuDevicePrimaryCtxRelease_v2(int) {
    const std::lock_guard lock(mutex);
    --contexts;
    return kSuccess;
}
Status cuCtxSetCurrent(void* to) {
    const std::lock_guard lock(mutex);
    current = to;
    return to && lost ? lost : kSuccess;
}
Status cuModuleLoadDataEx(void** module, const void* image, unsigned count, int* options, void** values) {
    BEGIN(true);
    std::vector<Function> functions;
    if (!parse(static_cast<const char*>(image), functions)) {
        for (unsigned i = 0; i < count; ++i)
            if (options[i] == 5) std::strcpy(static_cast<char*>(values[i]), "ptxas fatal   : no PTX of version 8.0");
        return kInvalidPtx;
    }
    *module = new char;
    modules.emplace(*module, std::move(functions));
    return kSuccess;
}
Status cuModuleUnload(void* module) {
    const std::lock_guard lock(mutex);
    if (!modules.erase(module)) return kInvalidHandle;
    delete static_cast<char*>(module);
    return kSuccess;
}
Status cuModuleGetFunction(void** result, void* module, const char* name) {
    BEGIN(true);
    for (Function& function : modules.at(module))
        if (function.name == name) {
            *result = &function;
            return kSuccess;
        }
    return kNotFound;
}
Status cuMemGetInfo_v2(size_t* free, size_t* total) {
    BEGIN(true);
    *free = memory - used;
    *total = memory;
    return kSuccess;
}
Status cuMemAlloc_v2(Address* result, size_t bytes) {
    BEGIN(true);
    if (bytes == 0) return kInvalidValue;
    if (bytes > memory - used) return kOutOfMemory;
    if (machine.allocate(bytes, result)) return kOutOfMemory;
    allocations.emplace(*result, bytes);
    used += bytes;
    return kSuccess;
}
Status cuMemFree_v2(Address address) {
    const std::lock_guard lock(mutex);
    const auto found = allocations.find(address);
    if (found == allocations.end()) return kInvalidValue;
    for (Stream* const stream : streams) run(*stream);
    used -= found->second;
    allocations.erase(found);
    machine.release(address);
    return lost;
}
Status cuMemHostAlloc(void** result, size_t bytes, unsigned) {
    BEGIN(true);
    *result = ::operator new(bytes);
    host.insert(*result);
    return kSuccess;
}
Status cuMemFreeHost(void* address) {
    const std::lock_guard lock(mutex);
    if (!host.erase(address)) return kInvalidValue;
    ::operator delete(address);
    return kSuccess;
}
Status cuMemHostRegister_v2(void* address, size_t, unsigned) {
    BEGIN(true);
    return registered.insert(address).second ? kSuccess : kInvalidValue;
}
Status cuMemHostUnregister(void* address) {
    const std::lock_guard lock(mutex);
    return registered.erase(address) ? kSuccess : kInvalidValue;
}
Status cuMemcpyHtoDAsync_v2(Address to, const void* from, size_t bytes, void* stream) {
    BEGIN(true);
    return enqueue(stream, [=] { return of_machine(machine.write(to, from, bytes)); });
}
Status cuMemcpyDtoHAsync_v2(void* to, Address from, size_t bytes, void* stream) {
    BEGIN(true);
    return enqueue(stream, [=] { return of_machine(machine.read(to, from, bytes)); });
}
Status cuMemcpyDtoDAsync_v2(Address to, Address from, size_t bytes, void* stream) {
    BEGIN(true);
    return enqueue(stream, [=] { return of_machine(machine.copy(to, from, bytes)); });
}
Status cuStreamCreate(void** result, unsigned) {
    BEGIN(true);
    *result = *streams.insert(new Stream).first;
    return kSuccess;
}
Status cuStreamDestroy_v2(void* handle) {
    const std::lock_guard lock(mutex);
    auto* const stream = static_cast<Stream*>(handle);
    if (!streams.erase(stream)) return kInvalidHandle;
    delete stream;
    return kSuccess;
}
Status cuStreamSynchronize(void* handle) {
    BEGIN(true);
    return run(*static_cast<Stream*>(handle));
}
Status cuEventCreate(void** result, unsigned) {
    BEGIN(true);
    *result = *events.insert(new Event).first;
    return kSuccess;
}
Status cuEventDestroy_v2(void* handle) {
    const std::lock_guard lock(mutex);
    auto* const event = static_cast<Event*>(handle);
    if (!events.erase(event)) return kInvalidHandle;
    delete event;
    return kSuccess;
}
Status cuEventRecord(void* handle, void* in) {
    BEGIN(true);
    auto* const stream = static_cast<Stream*>(in);
    *static_cast<Event*>(handle) = {stream, stream->finished + stream->work.size()};
    return kSuccess;
}
Status cuEventQuery(void* handle) {
    BEGIN(true);
    const Event& event = *static_cast<Event*>(handle);
    if (!event.stream || event.stream->finished >= event.after) return kSuccess;
    if (const Status status = step(*event.stream)) return status;
    return kNotReady;
}
Status cuEventSynchronize(void* handle) {
    BEGIN(true);
    const Event& event = *static_cast<Event*>(handle);
    return event.stream ? run(*event.stream, event.after) : kSuccess;
}
Status cuLaunchKernel(void* handle, unsigned groups, unsigned groups_y, unsigned groups_z, unsigned threads,
                      unsigned threads_y, unsigned threads_z, unsigned shared, void* stream, void** arguments,
                      void** extra) {
    BEGIN(true);
    const Function& function = *static_cast<Function*>(handle);
    if (groups == 0 || groups > 0x7FFFFFFF || groups_y != 1 || groups_z != 1 || threads != function.threads ||
        threads_y != 1 || threads_z != 1 || shared || extra)
        return kInvalidValue;
    std::string values;
    for (size_t i = 0; i < function.sizes.size(); ++i)
        values.append(static_cast<const char*>(arguments[i]), function.sizes[i] ? function.sizes[i] : 8);
    return enqueue(stream, [=, values = std::move(values), function = &function]() -> Status {
        if (const auto found = failures.find("kernel"); found != failures.end() && --found->second.calls == 0)
            return found->second.status;
        return of_machine(machine.launch(function->name.c_str(), static_cast<int>(groups),
                                         static_cast<int>(function->sizes.size()), function->sizes.data(),
                                         values.data()));
    });
}

}  // extern "C"
