// The Python module edgemoe._core: checksums, the engine, and (for tests) the kernels.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <atomic>
#include <map>
#include <memory>
#include <numeric>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>

#include "edgemoe/crc32c.h"
#include "edgemoe/engine.h"
#include "edgemoe/recorders.h"

namespace py = pybind11;

void bind_kernels(py::module_& module);
void bind_profiling(py::module_& module);

namespace {

using edgemoe::Engine;
using edgemoe::EngineOptions;
using edgemoe::MemoryPlan;
using edgemoe::ModelSpec;
using edgemoe::PackIndex;
using Integers = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

template <class T>
T field(const py::handle& map, const char* name) {
    return map[py::str(name)].cast<T>();
}

using edgemoe::Activation;
using edgemoe::GroupScore;
using edgemoe::QkNorm;
using edgemoe::RouterScores;

const std::map<std::string, QkNorm> kQkNorms{{"none", QkNorm::none}, {"head", QkNorm::head}, {"full", QkNorm::full}};
const std::map<std::string, RouterScores> kRouterScores{{"softmax", RouterScores::softmax},
                                                        {"softmax_topk", RouterScores::softmax_topk},
                                                        {"sigmoid", RouterScores::sigmoid},
                                                        {"sparsemixer", RouterScores::sparsemixer}};
const std::map<std::string, GroupScore> kGroupScores{{"largest", GroupScore::largest},
                                                     {"two_largest", GroupScore::two_largest}};
const std::map<std::string, Activation> kActivations{
    {"silu", Activation::silu}, {"gelu_tanh", Activation::gelu_tanh}, {"clamped_swiglu", Activation::clamped_swiglu}};

template <class T>
T choice(const py::handle& map, const char* name, const std::map<std::string, T>& known) {
    const auto value = field<std::string>(map, name);
    const auto found = known.find(value);
    if (found == known.end()) throw std::invalid_argument(std::string(name) + " = " + value + " is not known");
    return found->second;
}

const std::map<std::string, edgemoe::AttentionKind> kAttentionKinds{
    {"full", edgemoe::AttentionKind::full},
    {"mla", edgemoe::AttentionKind::mla},
    {"gated_delta", edgemoe::AttentionKind::gated_delta},
    {"short_conv", edgemoe::AttentionKind::short_conv}};

edgemoe::AttentionSpec make_attention(const py::handle& data, std::vector<edgemoe::RopeSpec>& ropes) {
    edgemoe::AttentionSpec attention;
    attention.kind = choice(data, "kind", kAttentionKinds);
    attention.heads = field<int>(data, "heads");
    attention.kv_heads = field<int>(data, "kv_heads");
    attention.head_dim = field<int>(data, "head_dim");
    attention.value_dim = field<int>(data, "value_dim");
    attention.scale = field<float>(data, "scale");
    attention.qk_norm = choice(data, "qk_norm", kQkNorms);
    attention.window = field<std::optional<int>>(data, "window").value_or(0);
    attention.sinks = field<bool>(data, "sinks");
    attention.bias = field<bool>(data, "bias");
    attention.output_bias = field<bool>(data, "output_bias");
    attention.value_norm = field<bool>(data, "value_norm");
    attention.values_are_keys = field<bool>(data, "values_are_keys");
    attention.clip_qkv = field<float>(data, "clip_qkv");
    attention.output_gate = field<bool>(data, "output_gate");
    attention.q_rank = field<int>(data, "q_rank");
    attention.kv_rank = field<int>(data, "kv_rank");
    attention.rope_dim = field<int>(data, "rope_dim");
    attention.latent_norm_epsilon = field<float>(data, "latent_norm_epsilon");
    attention.conv_size = field<int>(data, "conv_size");
    attention.tiled_heads = field<bool>(data, "tiled_heads");
    attention.fused_beta_alpha = field<bool>(data, "fused_beta_alpha");
    if (const py::handle rope = data["rope"]; !rope.is_none()) {
        const edgemoe::RopeSpec found{field<std::vector<float>>(rope, "inverse_frequencies"),
                                      field<float>(rope, "attention_factor"), field<bool>(rope, "interleaved")};
        const auto known = std::find(ropes.begin(), ropes.end(), found);
        attention.rope = static_cast<int>(known - ropes.begin());
        if (known == ropes.end()) ropes.push_back(found);
    }
    return attention;
}

edgemoe::RouterSpec make_router(const py::handle& data) {
    edgemoe::RouterSpec router;
    router.scores = choice(data, "scores", kRouterScores);
    router.renormalize = field<bool>(data, "renormalize");
    router.renormalize_epsilon = field<float>(data, "renormalize_epsilon");
    router.renormalize_least = field<float>(data, "renormalize_least");
    router.selection_bias = field<bool>(data, "selection_bias");
    router.bias = field<bool>(data, "bias");
    router.groups = field<int>(data, "groups");
    router.groups_kept = field<int>(data, "groups_kept");
    router.group_score = choice(data, "group_score", kGroupScores);
    router.weight_scale = field<float>(data, "weight_scale");
    router.mask_threshold = field<float>(data, "mask_threshold");
    router.input_norm = field<bool>(data, "input_norm");
    router.input_scale = field<float>(data, "input_scale");
    router.expert_scale = field<bool>(data, "expert_scale");
    return router;
}

// From ModelSpec.to_dict(); edgemoe/spec.py has checked every value.
ModelSpec make_spec(const py::dict& data) {
    ModelSpec spec;
    spec.vocab_size = field<int>(data, "vocab_size");
    spec.hidden_size = field<int>(data, "hidden_size");
    spec.context = field<int>(data, "context");
    spec.norm_epsilon = field<float>(data, "norm_epsilon");
    spec.layer_norm = field<std::string>(data, "norm") == "layer";
    spec.norm_offset = field<float>(data, "norm_offset");
    spec.tied_embeddings = field<bool>(data, "tied_embeddings");
    spec.head_bias = field<bool>(data, "head_bias");
    spec.embedding_multiplier = field<float>(data, "embedding_multiplier");
    spec.residual_multiplier = field<float>(data, "residual_multiplier");
    spec.logits_divisor = field<float>(data, "logits_divisor");
    spec.logits_softcap = field<float>(data, "logits_softcap");
    for (const py::handle item : data["layers"]) {
        edgemoe::LayerSpec layer;
        layer.attention = make_attention(item["attention"], spec.ropes);
        layer.ffn_dim = field<int>(item, "ffn_dim");
        layer.experts = field<int>(item, "experts");
        layer.top_k = field<int>(item, "top_k");
        if (const py::handle router = item["router"]; !router.is_none()) layer.router = make_router(router);
        layer.shared_dim = field<int>(item, "shared_dim");
        layer.shared_gate = field<bool>(item, "shared_gate");
        layer.ffn_bias = field<bool>(item, "ffn_bias");
        layer.expert_bias = field<bool>(item, "expert_bias");
        layer.activation = choice(item, "activation", kActivations);
        layer.swiglu_alpha = field<float>(item, "swiglu_alpha");
        layer.swiglu_limit = field<float>(item, "swiglu_limit");
        layer.output_norms = field<bool>(item, "output_norms");
        layer.branch_norms = field<bool>(item, "branch_norms");
        layer.output_scale = field<bool>(item, "output_scale");
        spec.layers.push_back(layer);
    }
    return spec;
}

// From edgemoe.model: the pack's index with everything checked and resolved.
PackIndex make_index(const py::dict& data) {
    PackIndex index;
    index.files = field<std::vector<std::string>>(data, "files");
    for (const py::handle item : data["sections"]) {
        const auto pair = item.cast<py::tuple>();
        edgemoe::Section section{{}, pair[1].cast<std::optional<uint32_t>>()};
        for (const py::handle extent : pair[0]) {
            const auto [file, offset, length] = extent.cast<std::tuple<uint32_t, uint64_t, uint64_t>>();
            if (file >= index.files.size()) throw std::invalid_argument("an extent names an unknown file");
            section.extents.push_back({file, offset, length});
        }
        if (section.extents.empty()) throw std::invalid_argument("a section without extents");
        index.sections.push_back(std::move(section));
    }
    for (const auto& [name, value] : data["dense"].cast<py::dict>()) {
        const auto [section, offset, layout, rows, cols] =
            value.cast<std::tuple<uint32_t, uint64_t, std::string, int, int>>();
        if (section >= index.sections.size()) throw std::invalid_argument("a tensor names an unknown section");
        index.dense[name.cast<std::string>()] = {section, offset, layout, rows, cols};
    }
    for (const auto& [number, value] : data["experts"].cast<py::dict>()) {
        edgemoe::ExpertLayer layer;
        using Parts = std::vector<std::tuple<std::string, uint32_t, uint64_t, int, int>>;
        for (const auto& [bits, parts] : field<std::vector<std::pair<int, Parts>>>(value, "levels")) {
            edgemoe::ExpertLevel level{bits, {}};
            if (parts.size() != level.parts.size()) throw std::invalid_argument("an expert has three parts");
            for (size_t i = 0; i < parts.size(); ++i) {
                const auto& [layout, extent, offset, rows, cols] = parts[i];
                level.parts[i] = {edgemoe::stored_layout(layout), extent, offset, rows, cols};
            }
            layer.levels.push_back(level);
        }
        layer.sections = field<std::vector<std::vector<uint32_t>>>(value, "sections");
        for (const auto& sections : layer.sections) {
            if (sections.empty() || sections.size() > layer.levels.size())
                throw std::invalid_argument("an expert has other levels than its layer");
            for (const uint32_t section : sections) {
                if (section >= index.sections.size()) throw std::invalid_argument("an expert names an unknown section");
                if (index.sections[section].extents.size() > layer.levels[0].parts.size())
                    throw std::invalid_argument("the section of an expert has more than three extents");
            }
        }
        index.experts[number.cast<int>()] = std::move(layer);
    }
    return index;
}

edgemoe::KvType make_kv_type(const std::string& name) {
    if (name == "f32") return edgemoe::KvType::f32;
    if (name == "f16") return edgemoe::KvType::f16;
    if (name == "q8_0") return edgemoe::KvType::q8_0;
    throw std::invalid_argument("cache type " + name + " is not one of f32, f16, q8_0");
}

// How exactly rows are computed unless they say otherwise.
edgemoe::Quality make_quality(const py::dict& data) {
    edgemoe::Quality quality;
    if (data.contains("thresholds")) quality.thresholds = field<std::vector<float>>(data, "thresholds");
    if (data.contains("level_cap")) quality.level_cap = field<int>(data, "level_cap");
    if (quality.level_cap < 0) throw std::invalid_argument("level_cap is negative");
    return quality;
}

// Whether every expert works with all levels that it has, whatever the router says.
bool use_all_levels(const PackIndex& index, const edgemoe::Quality& quality) {
    return quality.thresholds.empty() && std::ranges::all_of(index.experts, [&](const auto& layer) {
               return static_cast<int>(layer.second.levels.size()) <= quality.level_cap + 1;
           });
}

EngineOptions make_options(const py::dict& data) {
    EngineOptions options;
    options.threads = field<int>(data, "threads");
    if (data.contains("sequences")) options.sequences = field<int>(data, "sequences");
    options.context = field<int>(data, "context");
    options.chunk = field<int>(data, "chunk");
    options.store.slots = field<int>(data, "expert_slots");
    options.store.readers = field<int>(data, "readers");
    options.store.eviction = edgemoe::eviction_from_name(field<std::string>(data, "eviction"));
    options.store.prefetch = field<bool>(data, "prefetch");
    if (data.contains("arrival_jitter_us"))
        options.store.arrival_jitter = std::chrono::microseconds(field<int>(data, "arrival_jitter_us"));
    options.key_type = make_kv_type(field<std::string>(data, "cache_type_k"));
    options.value_type = make_kv_type(field<std::string>(data, "cache_type_v"));
    if (options.threads < 1 || options.sequences < 1 || options.context < 1 || options.chunk < 1 ||
        options.store.readers < 1)
        throw std::invalid_argument("threads, sequences, context, chunk and readers are at least 1");
    return options;
}

std::span<const int32_t> view(const Integers& array) { return {array.data(), static_cast<size_t>(array.size())}; }

std::span<const std::byte> bytes_of(const py::buffer_info& info) {
    py::ssize_t stride = info.itemsize;
    for (py::ssize_t axis = info.ndim; axis-- > 0; stride *= info.shape[axis])
        if (info.shape[axis] > 1 && info.strides[axis] != stride) throw py::value_error("the buffer is not contiguous");
    return {static_cast<const std::byte*>(info.ptr), static_cast<size_t>(info.size * info.itemsize)};
}

// Raises the Python class edgemoe.errors.<name>.
void raise(const char* name, const std::exception& error) {
    const py::object type = py::module_::import("edgemoe.errors").attr(name);
    PyErr_SetString(type.ptr(), error.what());
}

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
    edgemoe::Quality quality;
    std::optional<edgemoe::RoutingRecorder> recorder{};

    edgemoe::SequenceState& sequence(int id) { return engine.sequence(id); }
};

py::array_t<float> forward(BoundEngine& bound, const Integers& tokens, const Integers& positions,
                           const Integers& sequence_ids, const Integers& wanted, const Cancel* cancel) {
    Engine& engine = bound.engine;
    py::array_t<float> logits({wanted.size(), static_cast<py::ssize_t>(engine.spec().vocab_size)});
    float* out = logits.mutable_data();
    const edgemoe::Batch batch{.tokens = view(tokens),
                               .positions = view(positions),
                               .sequences = view(sequence_ids),
                               .wanted = view(wanted),
                               .qualities = {&bound.quality, 1}};
    const auto check = [cancel] {
        if (cancel && cancel->set) throw Cancelled();
        check_signals();
    };
    const py::gil_scoped_release release;
    engine.forward(batch, out, check, bound.recorder ? &*bound.recorder : nullptr);
    return logits;
}

// A dict of what the layer's experts saw and made, and the logits [wanted, vocab]; the residual stream is changed in
// place. The tokens are those of sequence 0 from its first on, and it is empty afterwards.
py::dict forward_layer(BoundEngine& bound, int layer, const Integers& tokens, py::array_t<float> residual, bool embed,
                       const Integers& wanted) {
    Engine& engine = bound.engine;
    const auto& spec = engine.spec();
    if (layer < 0 || layer >= static_cast<int>(spec.layers.size()))
        throw py::value_error("there is no layer " + std::to_string(layer));
    const py::ssize_t count = tokens.size(), hidden = spec.hidden_size;
    const py::ssize_t top_k = spec.layers[layer].top_k, ffn = spec.layers[layer].ffn_dim;
    if (!(residual.flags() & py::array::c_style) || residual.ndim() != 2 || residual.shape(0) != count ||
        residual.shape(1) != hidden)
        throw py::value_error("the residual stream is not a contiguous [tokens, hidden] array");
    py::dict result;
    const auto floats = [&](const char* name, std::vector<py::ssize_t> shape) {
        py::array_t<float> array(std::move(shape));
        result[name] = array;
        return array.mutable_data();
    };
    edgemoe::LayerRecorder::Arrays arrays{};
    arrays.residual = residual.mutable_data();
    arrays.inputs = floats("inputs", {top_k ? count : 0, hidden});
    py::array_t<int32_t> picks({count, top_k});
    result["picks"] = picks;
    arrays.picks = picks.mutable_data();
    arrays.weights = floats("weights", {count, top_k});
    arrays.hidden = floats("hidden", {count, top_k, ffn});
    arrays.peaks = floats("peaks", {count, top_k});
    arrays.energies = floats("energies", {count, top_k});
    float* logits = floats("logits", {wanted.size(), static_cast<py::ssize_t>(spec.vocab_size)});

    std::vector<int32_t> positions(count), sequences(count, 0), rows(count, edgemoe::Batch::kEmbedding);
    std::iota(positions.begin(), positions.end(), 0);
    edgemoe::Batch batch{.tokens = view(tokens),
                         .positions = positions,
                         .sequences = sequences,
                         .wanted = view(wanted),
                         .qualities = {&bound.quality, 1}};
    if (!embed) {
        batch.tokens = rows;
        batch.embeddings = {arrays.residual, static_cast<size_t>(count * hidden)};
    }
    edgemoe::LayerRecorder recorder(arrays);
    const py::gil_scoped_release release;
    struct EmptyBeforeAndAfter {
        edgemoe::SequenceState& state;
        explicit EmptyBeforeAndAfter(edgemoe::SequenceState& of) : state(of) { state.truncate(0); }
        ~EmptyBeforeAndAfter() { state.truncate(0); }
    };
    const EmptyBeforeAndAfter emptied(engine.sequence(0));
    engine.forward(batch, {layer, layer + 1}, logits, check_signals, &recorder);
    return result;
}

py::dict counters(const BoundEngine& bound) {
    const edgemoe::EngineCounters c = bound.engine.counters();
    py::dict result;
    result["tokens"] = c.tokens;
    result["seconds"] = c.seconds;
    result["expert_uses"] = c.expert_uses;
    result["expert_bits"] = c.expert_bits;
    result["experts_requested"] = c.store.experts_requested;
    result["experts_hit"] = c.store.experts_hit;
    result["sections_read"] = c.store.sections_read;
    result["bytes_read"] = c.store.bytes_read;
    result["evictions"] = c.store.evictions;
    result["prefetch_issued"] = c.store.prefetch_issued;
    result["prefetch_used"] = c.store.prefetch_used;
    result["prefetch_late"] = c.store.prefetch_late;
    result["prefetch_wasted"] = c.store.prefetch_wasted;
    result["stall_seconds"] = c.store.stall_seconds;
    result["read_seconds"] = c.store.read_seconds;
    return result;
}

}  // namespace

PYBIND11_MODULE(_core, module) {
    module.attr("__version__") = EDGEMOE_VERSION;
    main_thread = py::module_::import("threading").attr("main_thread")().attr("ident").cast<unsigned long>();
    py::register_exception<Cancelled>(module, "Cancelled");

    py::register_exception_translator([](std::exception_ptr pointer) {
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
        }
    });

    module.def(
        "crc32c",
        [](const py::buffer& buffer, uint32_t crc) {
            const py::buffer_info info = buffer.request();
            const auto bytes = bytes_of(info);
            const py::gil_scoped_release release;
            return edgemoe::crc32c(bytes, crc);
        },
        py::arg("buffer"), py::arg("crc") = 0);

    module.def("plan", [](const py::dict& spec, const py::dict& index, const py::dict& options) {
        const PackIndex pack = make_index(index);
        EngineOptions engine = make_options(options);
        engine.store.all_levels = use_all_levels(pack, make_quality(options));
        const MemoryPlan plan = Engine::plan(make_spec(spec), pack, engine);
        py::dict result;
        result["dense"] = plan.dense;
        result["state"] = plan.state;
        result["scratch"] = plan.scratch;
        result["slot"] = plan.slot;
        result["experts"] = plan.experts;
        result["minimum_slots"] = plan.minimum_slots;
        return result;
    });

    py::class_<Cancel>(module, "Cancel")
        .def(py::init())
        .def("set", [](Cancel& cancel) { cancel.set = true; })
        .def("is_set", [](const Cancel& cancel) { return cancel.set.load(); });

    py::class_<BoundEngine>(module, "Engine")
        .def(py::init([](const py::dict& spec, const py::dict& index, const py::dict& options) {
            ModelSpec model = make_spec(spec);
            PackIndex pack = make_index(index);
            EngineOptions engine = make_options(options);
            const edgemoe::Quality quality = make_quality(options);
            engine.store.all_levels = use_all_levels(pack, quality);
            const py::gil_scoped_release release;
            return std::unique_ptr<BoundEngine>(
                new BoundEngine{Engine(std::move(model), std::move(pack), std::move(engine)), quality});
        }))
        .def("forward", &forward, py::arg("tokens"), py::arg("positions"), py::arg("sequence_ids"), py::arg("wanted"),
             py::arg("cancel") = nullptr)
        .def("forward_layer", &forward_layer, py::arg("layer"), py::arg("tokens"), py::arg("residual").noconvert(),
             py::arg("embed"), py::arg("wanted"))
        .def("add_sequence", [](BoundEngine& bound) { return bound.engine.add_sequence(); })
        .def("remove_sequence", [](BoundEngine& bound, int id) { bound.engine.remove_sequence(id); })
        .def("length", [](BoundEngine& engine, int id) { return engine.sequence(id).length(); })
        .def("truncate", [](BoundEngine& engine, int id, int length) { engine.sequence(id).truncate(length); })
        .def("mark", [](BoundEngine& engine, int id) { engine.sequence(id).mark(); })
        .def("marked", [](BoundEngine& engine, int id) { return engine.sequence(id).marked(); })
        .def("has_constants", [](BoundEngine& engine, int id) { return engine.sequence(id).has_constants(); })
        .def("snapshot",
             [](BoundEngine& engine, int id) {
                 const edgemoe::SequenceState& state = engine.sequence(id);
                 py::array_t<uint8_t> target(static_cast<py::ssize_t>(state.snapshot_bytes()));
                 state.snapshot({reinterpret_cast<std::byte*>(target.mutable_data()), state.snapshot_bytes()});
                 return target;
             })
        .def("restore",
             [](BoundEngine& engine, int id, const py::buffer& source) {
                 const py::buffer_info info = source.request();
                 engine.sequence(id).restore(bytes_of(info));
             })
        .def("record_routing",
             [](BoundEngine& bound, bool on) {
                 if (on)
                     bound.recorder.emplace(bound.engine.spec());
                 else
                     bound.recorder.reset();
             })
        .def("take_routing",
             [](BoundEngine& bound) {
                 const edgemoe::RoutingRecord record =
                     bound.recorder ? bound.recorder->take() : edgemoe::RoutingRecord{};
                 const auto width = static_cast<py::ssize_t>(record.width);
                 const auto tokens = width ? static_cast<py::ssize_t>(record.picks.size()) / width : 0;
                 const std::vector<py::ssize_t> shape{tokens, width};
                 return py::make_tuple(py::array_t<uint16_t>(shape, record.picks.data()),
                                       py::array_t<float>(shape, record.weights.data()),
                                       py::array_t<uint16_t>(shape, record.predicted.data()));
             })
        .def("counters", &counters)
        .def_property_readonly("isa", [](const BoundEngine& bound) { return std::string(bound.engine.isa()); })
        .def_property_readonly("direct_io", [](const BoundEngine& bound) { return bound.engine.direct_io(); });

    bind_kernels(module);
    bind_profiling(module);
}
