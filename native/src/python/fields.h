// Reads a Python dataclass: every field by name and type. A field that is missing, of a wrong type, or there but never
// read is an error that names it, so that neither side can have a field that the other does not know.
#pragma once

#include <pybind11/pybind11.h>

#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace edgemoe::python {

namespace py = pybind11;

class Fields {
  public:
    // Calls `read` with the fields of `object`, which messages call `name`; throws py::type_error for a field that
    // `read` has not asked for.
    template <class Read>
    static auto of(const py::handle& object, const char* name, Read&& read) {
        return finished(Fields(object, nullptr, name), read);
    }

    template <class T>
    T get(const char* name) {
        return convert<T>(attribute(name), name);
    }

    // A string that stands for a value; throws py::value_error for another one.
    template <class T>
    T get(const char* name, const std::map<std::string, T>& known) {
        const auto text = get<std::string>(name);
        const auto found = known.find(text);
        if (found == known.end()) throw py::value_error(where(name) + " = '" + text + "' is not known");
        return found->second;
    }

    // A dataclass in the field.
    template <class Read>
    auto nested(const char* name, Read&& read) {
        const py::object value = attribute(name);
        return finished(Fields(value, this, name), read);
    }

    // The same, or nothing where the field is None.
    template <class Read>
    void nested_or_none(const char* name, Read&& read) {
        const py::object value = attribute(name);
        if (!value.is_none()) finished(Fields(value, this, name), read);
    }

    // A tuple or list of dataclasses: `read` is called with the fields of each.
    template <class Read>
    void each(const char* name, Read&& read) {
        py::ssize_t index = 0;
        for (const py::handle item : sequence(attribute(name), name))
            finished(Fields(item, this, name, std::to_string(index++)), read);
    }

    // A map to dataclasses: `read` is called with each key, a K, and the fields of its value.
    template <class K, class Read>
    void each_of_map(const char* name, Read&& read) {
        const py::object value = attribute(name);
        if (!PyDict_Check(value.ptr())) refuse(value, name, "a dict");
        for (const auto& [key, item] : py::reinterpret_borrow<py::dict>(value)) {
            const K found = convert<K>(key, name);
            finished(Fields(item, this, name, py::str(key)), [&](Fields& fields) { read(found, fields); });
        }
    }

    // Fields that are not for the engine.
    void leave(std::span<const char* const> names) {
        for (const char* name : names) attribute(name);
    }

  private:
    Fields(const py::handle& object, const Fields* parent, const char* name, std::string key = {});

    template <class Read>
    static auto finished(Fields fields, Read&& read) {
        if constexpr (std::is_void_v<decltype(read(fields))>) {
            read(fields);
            fields.require_all_read();
        } else {
            auto result = read(fields);
            fields.require_all_read();
            return result;
        }
    }

    py::object attribute(const char* name);
    void require_all_read() const;
    py::object sequence(const py::object& value, const char* name) const;
    std::string where() const;
    std::string where(const char* name) const { return where() + "." + name; }
    [[noreturn]] void refuse(const py::handle& value, const char* name, const char* expected) const;

    int64_t integer(const py::handle& value, const char* name, int64_t least, int64_t most) const;
    bool boolean(const py::handle& value, const char* name) const;
    double number(const py::handle& value, const char* name) const;
    std::string text(const py::handle& value, const char* name) const;

    template <class T>
    struct Vector : std::false_type {};
    template <class T>
    struct Vector<std::vector<T>> : std::true_type {};
    template <class T>
    struct Optional : std::false_type {};
    template <class T>
    struct Optional<std::optional<T>> : std::true_type {};

    template <class T>
    T convert(const py::handle& value, const char* name) const {
        if constexpr (Optional<T>::value) {
            return value.is_none() ? T{} : T{convert<typename T::value_type>(value, name)};
        } else if constexpr (Vector<T>::value) {
            T result;
            for (const py::handle item : sequence(py::reinterpret_borrow<py::object>(value), name))
                result.push_back(convert<typename T::value_type>(item, name));
            return result;
        } else if constexpr (std::same_as<T, bool>) {
            return boolean(value, name);
        } else if constexpr (std::integral<T>) {
            using Limits = std::numeric_limits<T>;
            const int64_t most =
                std::cmp_less(Limits::max(), INT64_MAX) ? static_cast<int64_t>(Limits::max()) : INT64_MAX;
            return static_cast<T>(integer(value, name, static_cast<int64_t>(Limits::min()), most));
        } else if constexpr (std::floating_point<T>) {
            return static_cast<T>(number(value, name));
        } else {
            static_assert(std::same_as<T, std::string>);
            return text(value, name);
        }
    }

    py::object object_;
    py::object declared_;  // name -> field
    const Fields* parent_;
    const char* name_;
    std::string key_;  // of an element of the parent's field `name_`
    std::vector<const char*> read_;
};

}  // namespace edgemoe::python
