// A Python buffer as bytes.
#pragma once

#include <pybind11/pybind11.h>

#include <cstddef>
#include <span>

namespace edgemoe::python {

// Throws py::value_error for a buffer that is not contiguous.
inline std::span<const std::byte> bytes_of(const pybind11::buffer_info& info) {
    pybind11::ssize_t stride = info.itemsize;
    for (pybind11::ssize_t axis = info.ndim; axis-- > 0; stride *= info.shape[axis])
        if (info.shape[axis] > 1 && info.strides[axis] != stride)
            throw pybind11::value_error("the buffer is not contiguous");
    return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

}  // namespace edgemoe::python
