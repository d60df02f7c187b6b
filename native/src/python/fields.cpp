#include "fields.h"

#include <algorithm>
#include <unordered_map>

namespace edgemoe::python {

namespace {

// The Python string of a literal. Made once for each: an index has some ten thousand sections.
PyObject* interned(const char* literal) {
    static std::unordered_map<const char*, PyObject*> known;  // guarded by the GIL
    PyObject*& text = known[literal];
    if (text == nullptr && (text = PyUnicode_InternFromString(literal)) == nullptr) throw py::error_already_set();
    return text;
}

}  // namespace

Fields::Fields(const py::handle& object, const Fields* parent, const char* name, std::string key)
    : object_(py::reinterpret_borrow<py::object>(object)), parent_(parent), name_(name), key_(std::move(key)) {
    read_.reserve(8);
    auto* type = reinterpret_cast<PyObject*>(Py_TYPE(object_.ptr()));
    if (PyObject* fields = PyObject_GetAttr(type, interned("__dataclass_fields__"))) {
        declared_ = py::reinterpret_steal<py::object>(fields);
    } else {
        PyErr_Clear();
        throw py::type_error(where() + ": a dataclass is expected, not " + Py_TYPE(object_.ptr())->tp_name);
    }
    if (!PyDict_Check(declared_.ptr())) throw py::type_error(where() + " is not a dataclass");
}

py::object Fields::attribute(const char* name) {
    PyObject* key = interned(name);
    PyObject* value = nullptr;
    if (PyDict_Contains(declared_.ptr(), key) == 1) {
        value = PyObject_GetAttr(object_.ptr(), key);
        if (value == nullptr) PyErr_Clear();
    }
    if (value == nullptr) throw py::type_error(where(name) + " is missing");
    read_.push_back(name);
    return py::reinterpret_steal<py::object>(value);
}

void Fields::require_all_read() const {
    // Each name that was read is a field, so with as many of them no field is left.
    if (static_cast<py::ssize_t>(read_.size()) == PyDict_Size(declared_.ptr())) return;
    for (const auto& [key, field] : py::reinterpret_borrow<py::dict>(declared_)) {
        const auto name = py::str(key).cast<std::string>();
        if (std::find(read_.begin(), read_.end(), name) == read_.end())
            throw py::type_error(where(name.c_str()) + " is not a field that the engine knows");
    }
}

py::object Fields::sequence(const py::object& value, const char* name) const {
    if (!PyTuple_Check(value.ptr()) && !PyList_Check(value.ptr())) refuse(value, name, "a tuple");
    return value;
}

std::string Fields::where() const {
    std::string text = parent_ != nullptr ? parent_->where() + "." + name_ : name_;
    return key_.empty() ? text : text + "[" + key_ + "]";
}

void Fields::refuse(const py::handle& value, const char* name, const char* expected) const {
    throw py::type_error(where(name) + ": " + expected + " is expected, not " + Py_TYPE(value.ptr())->tp_name);
}

int64_t Fields::integer(const py::handle& value, const char* name, int64_t least, int64_t most) const {
    if (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())) refuse(value, name, "an int");
    int overflow = 0;
    const int64_t number = PyLong_AsLongLongAndOverflow(value.ptr(), &overflow);
    if (overflow != 0 || number < least || number > most)
        throw py::value_error(where(name) + " = " + py::str(value).cast<std::string>() + " is not between " +
                              std::to_string(least) + " and " + std::to_string(most));
    return number;
}

bool Fields::boolean(const py::handle& value, const char* name) const {
    if (!PyBool_Check(value.ptr())) refuse(value, name, "a bool");
    return value.ptr() == Py_True;
}

double Fields::number(const py::handle& value, const char* name) const {
    // An int is a float to Python's type checkers.
    if (!PyFloat_Check(value.ptr()) && (!PyLong_Check(value.ptr()) || PyBool_Check(value.ptr())))
        refuse(value, name, "a float");
    const double number = PyFloat_AsDouble(value.ptr());
    if (number == -1.0 && PyErr_Occurred() != nullptr) throw py::error_already_set();
    return number;
}

std::string Fields::text(const py::handle& value, const char* name) const {
    if (!PyUnicode_Check(value.ptr())) refuse(value, name, "a str");
    return py::reinterpret_borrow<py::str>(value).cast<std::string>();
}

}  // namespace edgemoe::python
