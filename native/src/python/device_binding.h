// The device behind edgemoe._core.Device.
#pragma once

#include <pybind11/pybind11.h>

#include <memory>

#include "edgemoe/device.h"

namespace edgemoe::python {

std::shared_ptr<Device> device_of(const pybind11::handle& device);  // null for None

}  // namespace edgemoe::python
