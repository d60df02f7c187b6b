// The Python module edgemoe._core: checksums, the engine, and (for tests) the kernels.
#include <pybind11/pybind11.h>

#include <exception>

#include "bytes.h"
#include "edgemoe/crc32c.h"
#include "edgemoe/device.h"
#include "edgemoe/direct_file.h"
#include "edgemoe/engine.h"
#include "edgemoe/recorders.h"
#include "edgemoe/thread_group.h"

namespace py = pybind11;

void bind_device(py::module_& module);
void bind_engine(py::module_& module);
void bind_kernels(py::module_& module);
void bind_profiling(py::module_& module);

namespace {

// Raises the Python class edgemoe.errors.<name>.
void raise(const char* name, const std::exception& error) {
    const py::object type = py::module_::import("edgemoe.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
}

void translate(std::exception_ptr pointer) {
    try {
        if (pointer) std::rethrow_exception(pointer);
    } catch (const edgemoe::IoError& error) {
        raise("ReadError", error);
    } catch (const edgemoe::StateError& error) {
        raise("StateError", error);
    } catch (const edgemoe::ContextError& error) {
        raise("ContextLengthError", error);
    } catch (const edgemoe::ThreadError& error) {
        raise("ThreadError", error);
    } catch (const edgemoe::DeviceMemoryError& error) {
        raise("DeviceMemoryError", error);
    } catch (const edgemoe::NoDeviceError& error) {
        raise("NoDeviceError", error);
    } catch (const edgemoe::DeviceError& error) {
        raise("DeviceError", error);
    }
}

uint32_t crc32c(const py::buffer& buffer, uint32_t crc) {
    const py::buffer_info info = buffer.request();
    const auto bytes = edgemoe::python::bytes_of(info);
    const py::gil_scoped_release release;
    return edgemoe::crc32c(bytes, crc);
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.attr("__version__") = EDGEMOE_VERSION;
    py::register_exception_translator(&translate);
    module.def("crc32c", &crc32c, py::arg("buffer"), py::arg("crc") = 0);
    bind_device(module);
    bind_engine(module);
    bind_kernels(module);
    bind_profiling(module);
}
