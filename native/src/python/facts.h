// What the engine is told by Python: dataclasses of edgemoe/formats/index.py, edgemoe/spec.py and edgemoe/options.py.
#pragma once

#include <pybind11/pybind11.h>

#include "edgemoe/engine.h"

namespace edgemoe::python {

struct ModelFacts {
    ModelSpec spec;
    PackIndex index;
};

struct Options {
    EngineOptions engine;
    Quality quality;  // of rows that have none of their own
};

// These throw py::type_error for fields that are missing, unknown or of a wrong type, and std::invalid_argument for
// values that cannot be.
ModelFacts read_index(const pybind11::handle& index);   // ModelIndex
Options read_options(const pybind11::handle& options);  // EngineOptions
Quality read_quality(const pybind11::handle& quality);  // Quality

}  // namespace edgemoe::python
