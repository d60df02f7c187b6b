// edgemoe._core.Engine and what it gives back.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "bytes.h"
#include "device_binding.h"
#include "edgemoe/engine.h"
#include "edgemoe/recorders.h"
#include "facts.h"

namespace py = pybind11;

void bind_engine(py::module_& module);

namespace {

using edgemoe::Engine;
using edgemoe::EngineCounters;
using edgemoe::MemoryPlan;
using edgemoe::PackIndex;
using edgemoe::Quality;
using edgemoe::StoreCounters;
using edgemoe::python::bytes_of;
using Integers = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
using Numbers = py::array_t<uint8_t, py::array::c_style>;

// Every counter once: what Python sees, and what is added.
constexpr std::pair<const char*, uint64_t EngineCounters::*> kCounts[] = {
    {"tokens", &EngineCounters::tokens},
    {"expert_uses", &EngineCounters::expert_uses},
    {"expert_bits", &EngineCounters::expert_bits},
    {"device_hits", &EngineCounters::device_hits},
    {"device_uploads", &EngineCounters::device_uploads},
    {"device_upload_bytes", &EngineCounters::device_upload_bytes},
};
constexpr std::pair<const char*, double EngineCounters::*> kTimes[] = {{"seconds", &EngineCounters::seconds}};
constexpr std::pair<const char*, uint64_t StoreCounters::*> kStoreCounts[] = {
    {"experts_requested", &StoreCounters::experts_requested},
    {"experts_hit", &StoreCounters::experts_hit},
    {"sections_read", &StoreCounters::sections_read},
    {"bytes_read", &StoreCounters::bytes_read},
    {"evictions", &StoreCounters::evictions},
    {"prefetch_issued", &StoreCounters::prefetch_issued},
    {"prefetch_used", &StoreCounters::prefetch_used},
    {"prefetch_late", &StoreCounters::prefetch_late},
    {"prefetch_wasted", &StoreCounters::prefetch_wasted},
};
constexpr std::pair<const char*, double StoreCounters::*> kStoreTimes[] = {
    {"stall_seconds", &StoreCounters::stall_seconds},
    {"read_seconds", &StoreCounters::read_seconds},
};

template <class Operation>
EngineCounters combined(EngineCounters all, const EngineCounters& other, Operation operation) {
    for (const auto& [name, count] : kCounts) all.*count = operation(all.*count, other.*count);
    for (const auto& [name, time] : kTimes) all.*time = operation(all.*time, other.*time);
    for (const auto& [name, count] : kStoreCounts) all.store.*count = operation(all.store.*count, other.store.*count);
    for (const auto& [name, time] : kStoreTimes) all.store.*time = operation(all.store.*time, other.store.*time);
    return all;
}

// What the experts of a layer saw and made, and the logits [wanted, vocab].
struct LayerRecord {
    py::array_t<float> inputs;
    py::array_t<int32_t> picks;
    py::array_t<float> weights, hidden, peaks, energies, logits;
};

struct RoutingArrays {
    py::array_t<uint16_t> picks;
    py::array_t<float> weights;
    py::array_t<uint16_t> predicted;
};

std::span<const int32_t> view(const Integers& array) { return {array.data(), static_cast<size_t>(array.size())}; }

// Ends a pass between two layers. May be set from any thread, and stays set.
struct Cancel {
    std::atomic<bool> set{false};
};

struct Cancelled : std::runtime_error {
    Cancelled() : std::runtime_error("the pass was cancelled") {}
};

unsigned long main_thread = 0;  // the only one that Python handles signals in

// Called between layers, without the interpreter's lock: Ctrl-C ends the pass.
void check_signals() {
    if (PyThread_get_thread_ident() != main_thread) return;
    const py::gil_scoped_acquire acquire;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

// An engine with what Python sets once instead of with every batch.
struct BoundEngine {
    Engine engine;
    Quality quality;
    std::optional<edgemoe::RoutingRecorder> recorder{};

    edgemoe::SequenceState& sequence(int id) { return engine.sequence(id); }
};

// Whether every expert works with all levels that it has, whatever the router says.
bool use_all_levels(const PackIndex& index, const Quality& quality) {
    return quality.thresholds.empty() && std::ranges::all_of(index.experts, [&](const auto& layer) {
               return static_cast<int>(layer.second.levels.size()) <= quality.level_cap + 1;
           });
}

MemoryPlan plan(const py::object& index, const py::object& options) {
    const auto facts = edgemoe::python::read_index(index);
    auto chosen = edgemoe::python::read_options(options);
    chosen.engine.store.all_levels = use_all_levels(facts.index, chosen.quality);
    return Engine::plan(facts.spec, facts.index, chosen.engine);
}

std::unique_ptr<BoundEngine> make_engine(const py::object& index, const py::object& options, const py::object& with) {
    std::shared_ptr<edgemoe::Device> device = edgemoe::python::device_of(with);
    auto facts = edgemoe::python::read_index(index);
    auto chosen = edgemoe::python::read_options(options);
    chosen.engine.store.all_levels = use_all_levels(facts.index, chosen.quality);
    const py::gil_scoped_release release;
    return std::unique_ptr<BoundEngine>(new BoundEngine{
        Engine(std::move(facts.spec), std::move(facts.index), std::move(chosen.engine), std::move(device)),
        std::move(chosen.quality)});
}

// qualities: Quality objects, none for the engine's own. quality: the number of each row's, or nothing for the first.
py::array_t<float> forward(BoundEngine& bound, const Integers& tokens, const Integers& positions,
                           const Integers& sequence_ids, const Integers& wanted, const Cancel* cancel,
                           const py::sequence& qualities, const std::optional<Numbers>& quality) {
    Engine& engine = bound.engine;
    std::vector<Quality> own;
    for (const py::handle item : qualities) own.push_back(edgemoe::python::read_quality(item));
    std::span<const uint8_t> rows;
    if (quality) rows = {quality->data(), static_cast<size_t>(quality->size())};
    py::array_t<float> logits({wanted.size(), static_cast<py::ssize_t>(engine.spec().vocab_size)});
    float* out = logits.mutable_data();
    const edgemoe::Batch batch{.tokens = view(tokens),
                               .positions = view(positions),
                               .sequences = view(sequence_ids),
                               .wanted = view(wanted),
                               .qualities = own.empty() ? std::span(&bound.quality, 1) : own,
                               .quality = rows};
    const auto check = [cancel] {
        if (cancel && cancel->set) throw Cancelled();
        check_signals();
    };
    const py::gil_scoped_release release;
    engine.forward(batch, out, check, bound.recorder ? &*bound.recorder : nullptr);
    return logits;
}

// The residual stream is changed in place. The tokens are those of sequence 0 from its first on, and it is empty
// afterwards.
LayerRecord forward_layer(BoundEngine& bound, int layer, const Integers& tokens, py::array_t<float> residual,
                          bool embed, const Integers& wanted) {
    Engine& engine = bound.engine;
    const auto& spec = engine.spec();
    if (layer < 0 || layer >= static_cast<int>(spec.layers.size()))
        throw py::value_error("there is no layer " + std::to_string(layer));
    const py::ssize_t count = tokens.size(), hidden = spec.hidden_size, vocab = spec.vocab_size;
    const py::ssize_t top_k = spec.layers[layer].top_k, ffn = spec.layers[layer].ffn_dim;
    if (!(residual.flags() & py::array::c_style) || residual.ndim() != 2 || residual.shape(0) != count ||
        residual.shape(1) != hidden)
        throw py::value_error("the residual stream is not a contiguous [tokens, hidden] array");
    using Shape = std::vector<py::ssize_t>;
    const Shape pairs{count, top_k};
    LayerRecord record{
        py::array_t<float>(Shape{top_k ? count : 0, hidden}), py::array_t<int32_t>(pairs), py::array_t<float>(pairs),
        py::array_t<float>(Shape{count, top_k, ffn}),         py::array_t<float>(pairs),   py::array_t<float>(pairs),
        py::array_t<float>(Shape{wanted.size(), vocab})};
    edgemoe::LayerRecorder recorder({.residual = residual.mutable_data(),
                                     .inputs = record.inputs.mutable_data(),
                                     .picks = record.picks.mutable_data(),
                                     .weights = record.weights.mutable_data(),
                                     .hidden = record.hidden.mutable_data(),
                                     .peaks = record.peaks.mutable_data(),
                                     .energies = record.energies.mutable_data()});
    float* logits = record.logits.mutable_data();

    std::vector<int32_t> positions(count), sequences(count, 0), rows(count, edgemoe::Batch::kEmbedding);
    std::iota(positions.begin(), positions.end(), 0);
    edgemoe::Batch batch{.tokens = view(tokens),
                         .positions = positions,
                         .sequences = sequences,
                         .wanted = view(wanted),
                         .qualities = {&bound.quality, 1}};
    if (!embed) {
        batch.tokens = rows;
        batch.embeddings = {residual.data(), static_cast<size_t>(count * hidden)};
    }
    const py::gil_scoped_release release;
    struct EmptyBeforeAndAfter {
        edgemoe::SequenceState& state;
        explicit EmptyBeforeAndAfter(edgemoe::SequenceState& of) : state(of) { state.truncate(0); }
        ~EmptyBeforeAndAfter() { state.truncate(0); }
    };
    const EmptyBeforeAndAfter emptied(engine.sequence(0));
    engine.forward(batch, {layer, layer + 1}, logits, check_signals, &recorder);
    return record;
}

void record_routing(BoundEngine& bound, bool on) {
    if (on)
        bound.recorder.emplace(bound.engine.spec());
    else
        bound.recorder.reset();
}

RoutingArrays take_routing(BoundEngine& bound) {
    const edgemoe::RoutingRecord record = bound.recorder ? bound.recorder->take() : edgemoe::RoutingRecord{};
    const auto width = static_cast<py::ssize_t>(record.width);
    const auto tokens = width ? static_cast<py::ssize_t>(record.picks.size()) / width : 0;
    const std::vector<py::ssize_t> shape{tokens, width};
    return {py::array_t<uint16_t>(shape, record.picks.data()), py::array_t<float>(shape, record.weights.data()),
            py::array_t<uint16_t>(shape, record.predicted.data())};
}

py::array_t<uint8_t> snapshot(BoundEngine& engine, int id) {
    const edgemoe::SequenceState& state = engine.sequence(id);
    py::array_t<uint8_t> target(static_cast<py::ssize_t>(state.snapshot_bytes()));
    const std::span<std::byte> bytes(reinterpret_cast<std::byte*>(target.mutable_data()), state.snapshot_bytes());
    {
        const py::gil_scoped_release release;
        state.snapshot(bytes);
    }
    return target;
}

// (levels, reads), each [layers, experts].
py::tuple residency(const BoundEngine& bound) {
    const edgemoe::Residency found = bound.engine.residency();
    const std::vector<py::ssize_t> shape{found.layers, found.experts};
    return py::make_tuple(py::array_t<uint8_t>(shape, found.levels.data()),
                          py::array_t<uint64_t>(shape, found.reads.data()));
}

void restore(BoundEngine& engine, int id, const py::buffer& source) {
    const py::buffer_info info = source.request();
    const auto bytes = bytes_of(info);
    edgemoe::SequenceState& state = engine.sequence(id);
    const py::gil_scoped_release release;
    state.restore(bytes);
}

void bind_records(py::module_& module) {
    py::class_<MemoryPlan>(module, "MemoryPlan")
        .def_readonly("dense", &MemoryPlan::dense)
        .def_readonly("state", &MemoryPlan::state)
        .def_readonly("scratch", &MemoryPlan::scratch)
        .def_readonly("slot", &MemoryPlan::slot)
        .def_readonly("experts", &MemoryPlan::experts)
        .def_readonly("minimum_slots", &MemoryPlan::minimum_slots)
        .def_readonly("device_dense", &MemoryPlan::device_dense)
        .def_readonly("device_state", &MemoryPlan::device_state)
        .def_readonly("device_scratch", &MemoryPlan::device_scratch)
        .def_readonly("device_slot", &MemoryPlan::device_slot)
        .def_readonly("device_experts", &MemoryPlan::device_experts);

    py::class_<EngineCounters> counters(module, "EngineCounters");
    for (const auto& [name, count] : kCounts) counters.def_readonly(name, count);
    for (const auto& [name, time] : kTimes) counters.def_readonly(name, time);
    for (const auto& [name, member] : kStoreCounts)
        counters.def_property_readonly(name, [count = member](const EngineCounters& all) { return all.store.*count; });
    for (const auto& [name, member] : kStoreTimes)
        counters.def_property_readonly(name, [time = member](const EngineCounters& all) { return all.store.*time; });
    counters.def(py::init())
        .def("__add__", [](const EngineCounters& a, const EngineCounters& b) { return combined(a, b, std::plus<>()); })
        .def("__sub__",
             [](const EngineCounters& a, const EngineCounters& b) { return combined(a, b, std::minus<>()); });

    py::class_<LayerRecord>(module, "LayerRecord")
        .def_readonly("inputs", &LayerRecord::inputs)
        .def_readonly("picks", &LayerRecord::picks)
        .def_readonly("weights", &LayerRecord::weights)
        .def_readonly("hidden", &LayerRecord::hidden)
        .def_readonly("peaks", &LayerRecord::peaks)
        .def_readonly("energies", &LayerRecord::energies)
        .def_readonly("logits", &LayerRecord::logits);

    py::class_<RoutingArrays>(module, "RoutingRecord")
        .def_readonly("picks", &RoutingArrays::picks)
        .def_readonly("weights", &RoutingArrays::weights)
        .def_readonly("predicted", &RoutingArrays::predicted);
}

}  // namespace

void bind_engine(py::module_& module) {
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    py::register_exception<Cancelled>(module, "Cancelled");
    py::class_<Cancel>(module, "Cancel")
        .def(py::init())
        .def("set", [](Cancel& cancel) { cancel.set = true; })
        .def("is_set", [](const Cancel& cancel) { return cancel.set.load(); });
    bind_records(module);
    module.def("plan", &plan, py::arg("index"), py::arg("options"));
    py::class_<BoundEngine>(module, "Engine")
        .def(py::init(&make_engine), py::arg("index"), py::arg("options"), py::arg("device") = py::none())
        .def("forward", &forward, py::arg("tokens"), py::arg("positions"), py::arg("sequence_ids"), py::arg("wanted"),
             py::arg("cancel") = nullptr, py::arg("qualities") = py::tuple(), py::arg("quality") = std::nullopt)
        .def("forward_layer", &forward_layer, py::arg("layer"), py::arg("tokens"), py::arg("residual").noconvert(),
             py::arg("embed"), py::arg("wanted"))
        .def("add_sequence", [](BoundEngine& bound) { return bound.engine.add_sequence(); })
        .def("fork", [](BoundEngine& bound, int id, int length) { return bound.engine.fork_sequence(id, length); })
        .def("remove_sequence", [](BoundEngine& bound, int id) { bound.engine.remove_sequence(id); })
        .def("free_positions", [](BoundEngine& bound) { return bound.engine.free_positions(); })
        .def("held_positions", [](BoundEngine& engine, int id) { return engine.sequence(id).held_positions(); })
        .def("length", [](BoundEngine& engine, int id) { return engine.sequence(id).length(); })
        .def("truncate", [](BoundEngine& engine, int id, int length) { engine.sequence(id).truncate(length); })
        .def("mark", [](BoundEngine& engine, int id) { engine.sequence(id).mark(); })
        .def("marked", [](BoundEngine& engine, int id) { return engine.sequence(id).marked(); })
        .def("has_constants", [](BoundEngine& engine, int id) { return engine.sequence(id).has_constants(); })
        .def("snapshot", &snapshot)
        .def("restore", &restore)
        .def("record_routing", &record_routing)
        .def("take_routing", &take_routing)
        .def("counters", [](const BoundEngine& bound) { return bound.engine.counters(); })
        .def("residency", &residency)
        .def_property_readonly("isa", [](const BoundEngine& bound) { return std::string(bound.engine.isa()); })
        .def_property_readonly("direct_io", [](const BoundEngine& bound) { return bound.engine.direct_io(); });
}
