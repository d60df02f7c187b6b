// edgemoe._core.Device: a device by itself, for tests.
#include "device_binding.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <variant>
#include <vector>

#include "bytes.h"
#include "edgemoe/cuda_device.h"
#include "edgemoe/device.h"
#include "edgemoe/emulated_device.h"

namespace py = pybind11;

void bind_device(py::module_& module);

namespace {

using edgemoe::Argument;
using edgemoe::Device;
using edgemoe::WarpOrder;

std::byte* pointer(uint64_t address) { return reinterpret_cast<std::byte*>(static_cast<uintptr_t>(address)); }

WarpOrder order_from_name(const std::string& name) {
    if (name == "ascending") return WarpOrder::ascending;
    if (name == "descending") return WarpOrder::descending;
    if (name == "shuffled") return WarpOrder::shuffled;
    throw py::value_error("unknown order '" + name + "'; known: ascending, descending, shuffled");
}

using Values = std::vector<std::variant<uint64_t, py::bytes>>;  // addresses, and the bytes of a number or struct

// Of a launch, with what they are of.
class Arguments {
  public:
    explicit Arguments(const Values& values) {
        for (const auto& value : values)
            if (const auto* address = std::get_if<uint64_t>(&value))
                bytes_.emplace_back(reinterpret_cast<const char*>(address), sizeof *address);
            else
                bytes_.push_back(std::get<py::bytes>(value));
        for (const std::string& one : bytes_) list_.push_back({one.data(), one.size()});
    }
    Arguments(const Arguments&) = delete;
    Arguments(Arguments&&) = default;  // the strings stay where they are

    std::span<const Argument> list() const { return list_; }

  private:
    std::vector<std::string> bytes_;
    std::vector<Argument> list_;
};

class PythonDevice {
  public:
    PythonDevice(const std::string& kind, const std::string& order, uint32_t seed, bool eager, size_t memory,
                 const std::string& library, const std::optional<py::bytes>& image) {
        if (kind == "emulated") {
            device_ = edgemoe::emulated_device({order_from_name(order), seed, eager, memory});
        } else if (kind == "cuda") {
            const py::bytes ptx =
                image ? *image : py::bytes(py::module_::import("edgemoe.kernel_images").attr("ptx")());
            const std::string_view text = ptx;
            const py::gil_scoped_release unlocked;
            device_ = edgemoe::open_cuda_device(text, library);
        } else {
            throw py::value_error("unknown kind of device '" + kind + "'; known: emulated, cuda");
        }
    }

    std::shared_ptr<Device> shared() const { return device_; }

    uint64_t allocate(size_t bytes) { return reinterpret_cast<uintptr_t>(device_->allocate(bytes)); }
    void release(uint64_t address) {
        const py::gil_scoped_release unlocked;
        device_->release(pointer(address));
    }

    void write(uint64_t address, const py::buffer& data) {
        const py::buffer_info info = data.request();
        device_->write(pointer(address), edgemoe::python::bytes_of(info));
    }

    py::bytes read(uint64_t address, size_t bytes) {
        std::vector<std::byte> data(bytes);
        {
            const py::gil_scoped_release unlocked;
            device_->read(data, pointer(address));
        }
        return {reinterpret_cast<const char*>(data.data()), data.size()};
    }

    void copy(uint64_t to, uint64_t from, size_t bytes) { device_->copy(pointer(to), pointer(from), bytes); }

    void launch(const std::string& name, int groups, const Values& values) {
        const Arguments arguments(values);
        const py::gil_scoped_release unlocked;
        device_->launch(edgemoe::kernel_from_name(name), groups, arguments.list());
    }

    // So many launches, with each of the lists in turn.
    void launches(const std::string& name, int groups, const std::vector<Values>& lists, size_t times) {
        if (lists.empty()) throw py::value_error("no arguments");
        std::vector<Arguments> arguments(lists.begin(), lists.end());
        const py::gil_scoped_release unlocked;
        const edgemoe::Kernel kernel = edgemoe::kernel_from_name(name);
        for (size_t i = 0; i < times; ++i) device_->launch(kernel, groups, arguments[i % arguments.size()].list());
    }

    // The bytes are kept until somebody has been told that the upload is done.
    uint64_t upload(uint64_t address, const py::buffer& data) {
        py::buffer_info info = data.request();
        const uint64_t number = device_->upload(pointer(address), edgemoe::python::bytes_of(info));
        uploads_.emplace(number, std::move(info));
        return number;
    }

    bool done(uint64_t upload) {
        const bool result = device_->done(upload);
        if (result) uploads_.erase(upload);
        return result;
    }

    void wait(std::optional<uint64_t> upload) {
        {
            const py::gil_scoped_release unlocked;
            upload ? device_->wait(*upload) : device_->wait();
        }
        if (upload) uploads_.erase(*upload);
    }

    bool pin(const py::buffer& data) {
        py::buffer_info info = data.request(true);
        const auto bytes = edgemoe::python::bytes_of(info);
        if (!device_->pin({static_cast<std::byte*>(info.ptr), bytes.size()})) return false;
        pinned_.insert_or_assign(info.ptr, std::move(info));
        return true;
    }

    void unpin(const py::buffer& data) {
        const py::buffer_info info = data.request();
        device_->unpin(static_cast<std::byte*>(info.ptr));
        pinned_.erase(info.ptr);
    }

    py::dict facts() const {
        const edgemoe::DeviceFacts facts = device_->facts();
        py::dict result;
        result["name"] = facts.name;
        result["memory"] = facts.memory;
        result["available"] = facts.available;
        result["unified"] = facts.unified;
        result["driver"] = facts.driver;
        return result;
    }

  private:
    std::map<uint64_t, py::buffer_info> uploads_;
    std::map<void*, py::buffer_info> pinned_;
    std::shared_ptr<Device> device_;
};

}  // namespace

std::shared_ptr<edgemoe::Device> edgemoe::python::device_of(const py::handle& device) {
    return device.is_none() ? nullptr : py::cast<PythonDevice&>(device).shared();
}

void bind_device(py::module_& module) {
    using py::arg;
    py::class_<PythonDevice>(module, "Device")
        .def(py::init<const std::string&, const std::string&, uint32_t, bool, size_t, const std::string&,
                      const std::optional<py::bytes>&>(),
             arg("kind"), py::kw_only(), arg("order") = "ascending", arg("seed") = 0, arg("eager") = false,
             arg("memory") = edgemoe::EmulatedOptions{}.memory, arg("library") = edgemoe::kCudaLibrary,
             arg("image") = py::none())
        .def("allocate", &PythonDevice::allocate, arg("nbytes"))
        .def("release", &PythonDevice::release, arg("address"))
        .def("write", &PythonDevice::write, arg("address"), arg("data"))
        .def("read", &PythonDevice::read, arg("address"), arg("nbytes"))
        .def("copy", &PythonDevice::copy, arg("to"), arg("from_"), arg("nbytes"))
        .def("launch", &PythonDevice::launch, arg("name"), arg("groups"), arg("arguments"))
        .def("launches", &PythonDevice::launches, arg("name"), arg("groups"), arg("arguments"), arg("times"))
        .def("upload", &PythonDevice::upload, arg("address"), arg("data"))
        .def("done", &PythonDevice::done, arg("upload"))
        .def("wait", &PythonDevice::wait, arg("upload") = py::none())
        .def("pin", &PythonDevice::pin, arg("data"))
        .def("unpin", &PythonDevice::unpin, arg("data"))
        .def("facts", &PythonDevice::facts);
}
