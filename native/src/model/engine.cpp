#include "edgemoe/engine.h"

#include <algorithm>
#include <charconv>
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <utility>

#include "backend/cpu/cpu_backend.h"
#include "backend/device/device_backend.h"
#include "backend/device/fail_stop.h"
#include "model/pass.h"
#include "store/device_tier.h"

namespace edgemoe {
namespace {

std::vector<KvShape> state_shapes(const ModelSpec& spec, const EngineOptions& options) {
    std::vector<KvShape> shapes;
    for (const LayerSpec& layer : spec.layers)
        shapes.push_back(mixer_kind(layer.attention.kind).state(layer.attention, options.key_type, options.value_type));
    return shapes;
}

StateRoom state_room(const EngineOptions& options) {
    return {.sequences = options.sequences,
            .context = options.context,
            .positions = options.positions,
            .chunk = options.chunk};
}

DeviceShare device_share(const ModelSpec& spec, const EngineOptions& options) {
    const auto layers = static_cast<int>(spec.layers.size());
    DeviceShare share(layers);
    for (int layer = std::max(layers - options.device_layers, 0); layer < layers; ++layer) {
        share.mixers[layer] = share.halves[layer] = true;
    }
    share.head = options.device_layers > layers;
    return share;
}

// Of the experts of layers whose second half a device computes; null for the others.
std::vector<const ExpertLayer*> device_experts(const PackIndex& index, const DeviceShare& share) {
    std::vector<const ExpertLayer*> layers(share.halves.size(), nullptr);
    for (const auto& [layer, experts] : index.experts)
        if (layer >= 0 && size_t(layer) < layers.size() && share.halves[layer]) layers[layer] = &experts;
    return layers;
}

// What a layer's mixer, and the other half of it, call their weights.
bool is_of_device(const ModelSpec& spec, const DeviceShare& share, const std::string& name) {
    if (name == "final_norm" || name == "final_norm_bias" || name == "head" || name == "head_bias") return share.head;
    if (!name.starts_with("layers.")) return false;
    size_t layer = spec.layers.size();
    std::from_chars(name.data() + 7, name.data() + name.size(), layer);
    if (layer >= spec.layers.size()) return false;
    return Pass::is_of_mixer(name.substr(name.find('.', 7) + 1)) ? share.mixers[layer] : share.halves[layer];
}

// The sequences of a chunk, or of a batch, and where they end after it: positions of a sequence ascend.
void find_ends(std::span<SequenceState* const> states, std::span<const int32_t> positions,
               std::vector<StatePool::Writing>& ends) {
    ends.clear();
    for (size_t i = 0; i < states.size(); ++i) {
        // Rows of one sequence often stand together.
        auto known = std::find_if(ends.rbegin(), ends.rend(),
                                  [&](const StatePool::Writing& writing) { return writing.sequence == states[i]; });
        if (known == ends.rend())
            ends.push_back({states[i], positions[i] + 1});
        else
            known->end = positions[i] + 1;
    }
}

}  // namespace

MemoryPlan Engine::plan(const ModelSpec& spec, const PackIndex& index, const EngineOptions& options) {
    MemoryPlan plan;
    const DeviceShare share = device_share(spec, options);
    const BackendSizes sizes = Pass::backend_sizes(spec, options.chunk);
    const auto on_device = [&](const std::string& name) { return is_of_device(spec, share, name); };
    plan.device_dense = Weights::bytes(index, on_device);
    // The host computes experts for the device, so it has their biases, too.
    plan.dense = Weights::bytes(
        index, [&](const std::string& name) { return !on_device(name) || name.find(".expert_") != std::string::npos; });
    if (share.head && spec.tied_embeddings) {  // rows are looked up on the host
        const auto found = index.dense.find("embedding");
        if (found == index.dense.end()) throw std::invalid_argument("tensor embedding is missing");
        const DenseTensor& embedding = found->second;
        plan.device_dense += matrix_bytes(stored_layout(embedding.layout).layout, embedding.rows, embedding.cols);
    }
    const std::vector<KvShape> shapes = state_shapes(spec, options);
    const StateRoom room = state_room(options);
    plan.device_state = StatePool::bytes(shapes, room, share.mixers);
    std::vector<bool> hosts = share.mixers;
    hosts.flip();
    plan.state = StatePool::bytes(shapes, room, hosts);
    plan.scratch = Pass::buffer_bytes(spec, options.chunk, share, false) + CpuBackend::workspace_bytes(sizes);
    if (options.device_layers > 0)
        plan.device_scratch = Pass::buffer_bytes(spec, options.chunk, share, true) +
                              DeviceBackend::workspace_bytes(sizes, spec.vocab_size);
    const StoreLayout experts(index, options.store.all_levels);
    const std::vector<const ExpertLayer*> on_device_too = device_experts(index, share);
    plan.device_slot = DeviceTier::slot_bytes(on_device_too);
    for (const ExpertLayer* layer : on_device_too)
        if (layer) plan.device_experts += static_cast<int>(layer->sections.size());
    if (options.device_slots > 0) plan.scratch += DeviceTier::staging_bytes(on_device_too);
    plan.slot = experts.slot_bytes();
    plan.experts = experts.slots();
    for (const LayerSpec& layer : spec.layers) plan.minimum_slots = std::max(plan.minimum_slots, layer.top_k);
    return plan;
}

Engine::Engine(ModelSpec spec, PackIndex index, EngineOptions options, std::shared_ptr<Device> device,
               const MakeBackend& make_backend)
    : spec_(std::move(spec)), index_(std::move(index)), options_(std::move(options)) {
    if (!device && (options_.device_layers > 0 || options_.device_slots > 0))
        throw std::invalid_argument("there is no device for " + std::to_string(options_.device_layers) + " layers");
    if (device) device = std::make_shared<FailStop>(std::move(device));
    const BackendSizes sizes = Pass::backend_sizes(spec_, options_.chunk);
    if (make_backend)
        backend_ = make_backend(options_, sizes);
    else
        backend_ = std::make_unique<CpuBackend>(select_kernels(options_.isa), options_.threads, sizes);
    const DeviceShare share = device_share(spec_, options_);
    const size_t dense_there = options_.device_layers > 0 ? plan(spec_, index_, options_).device_dense : 0;
    if (options_.device_layers > 0)
        device_ = std::make_unique<DeviceBackend>(device, sizes, spec_.vocab_size, dense_there);
    for (const std::string& path : index_.files) files_.push_back(std::make_unique<DirectFile>(path));
    weights_ = std::make_unique<Weights>(index_, files_);
    if (!index_.experts.empty()) store_ = std::make_unique<ExpertStore>(index_, files_, options_.store);
    if (const auto layers = device_experts(index_, share);
        device_ && options_.device_slots > 0 && DeviceTier::slot_bytes(layers) > 0)
        tier_ = std::make_unique<DeviceTier>(*device, device_->memory(), layers, options_.device_slots);
    pass_ = std::make_unique<Pass>(Pass::Setting{spec_, index_, options_.key_type, options_.value_type, options_.chunk},
                                   *weights_, *backend_, device_.get(), share, store_.get(), tier_.get());
    std::vector<Memory*> memories;
    for (const bool on_device : share.mixers) memories.push_back(on_device ? &device_->memory() : nullptr);
    states_ = std::make_unique<StatePool>(state_shapes(spec_, options_), state_room(options_), std::move(memories));
    add_sequence();
}

Engine::~Engine() = default;

int Engine::add_sequence() { return place_sequence(std::make_unique<SequenceState>(*states_)); }

int Engine::fork_sequence(int id, int length) {
    return place_sequence(std::make_unique<SequenceState>(sequence(id), length));
}

int Engine::place_sequence(std::unique_ptr<SequenceState> state) {
    auto place = std::find(sequences_.begin(), sequences_.end(), nullptr);
    if (place == sequences_.end()) place = sequences_.emplace(place);
    *place = std::move(state);
    return static_cast<int>(place - sequences_.begin());
}

void Engine::remove_sequence(int id) {
    sequence(id);
    sequences_[id].reset();
}

SequenceState& Engine::sequence(int id) {
    if (id < 0 || id >= static_cast<int>(sequences_.size()) || !sequences_[id])
        throw std::invalid_argument("there is no sequence " + std::to_string(id));
    return *sequences_[id];
}

bool Engine::direct_io() const {
    return std::all_of(files_.begin(), files_.end(), [](const auto& file) { return file->direct(); });
}

EngineCounters Engine::counters() const {
    EngineCounters counters;
    {
        const std::lock_guard lock(counters_mutex_);
        counters = counters_;
    }
    if (store_) counters.store = store_->counters();
    return counters;
}

Residency Engine::residency() const {
    Residency found;
    found.layers = static_cast<int>(spec_.layers.size());
    for (const LayerSpec& layer : spec_.layers) found.experts = std::max(found.experts, layer.experts);
    const size_t row = found.experts;
    found.levels.assign(row * found.layers, Residency::kNone);
    found.reads.assign(row * found.layers, 0);
    for (int layer = 0; layer < found.layers; ++layer)
        if (const size_t count = spec_.layers[layer].experts)
            store_->residency(layer, std::span(found.levels).subspan(layer * row, count),
                              std::span(found.reads).subspan(layer * row, count));
    return found;
}

void Engine::add_counts(const EngineCounters& more) {
    const std::lock_guard lock(counters_mutex_);
    counters_.tokens += more.tokens;
    counters_.seconds += more.seconds;
    counters_.expert_uses += more.expert_uses;
    counters_.expert_bits += more.expert_bits;
    counters_.device_hits += more.device_hits;
    if (tier_) {
        counters_.device_uploads = tier_->counters().uploads;
        counters_.device_upload_bytes = tier_->counters().bytes;
    }
}

void Engine::wait() {
    backend_->wait();
    if (device_) device_->wait();
}

void Engine::check_batch(const Batch& batch, LayerRange layers) {
    const size_t count = batch.tokens.size();
    if (batch.positions.size() != count || batch.sequences.size() != count)
        throw std::invalid_argument("tokens, positions and sequences differ in length");
    if (!batch.quality.empty() && batch.quality.size() != count)
        throw std::invalid_argument("there are not as many qualities as tokens");
    if (!batch.overlays.empty() && batch.overlays.size() != count)
        throw std::invalid_argument("there are not as many overlays as tokens");
    for (const uint8_t quality : batch.quality)
        if (quality >= batch.qualities.size())
            throw std::invalid_argument("there is no quality " + std::to_string(quality));
    for (const int32_t overlay : batch.overlays)
        if (overlay != 0) throw std::invalid_argument("there is no overlay " + std::to_string(overlay));
    for (const Quality& quality : batch.qualities)
        if (quality.level_cap < 0) throw std::invalid_argument("a level cap is negative");
    if (!batch.embeddings.empty() && batch.embeddings.size() != count * spec_.hidden_size)
        throw std::invalid_argument("embeddings are not [rows, " + std::to_string(spec_.hidden_size) + "]");

    const auto layer_count = static_cast<int>(spec_.layers.size());
    if (layers.first < 0 || layers.first >= layers.end || layers.end > layer_count)
        throw std::invalid_argument("there are no layers " + std::to_string(layers.first) + " to " +
                                    std::to_string(layers.end));
    if (!batch.wanted.empty() && layers.end < layer_count)
        throw std::invalid_argument("there are no logits after layer " + std::to_string(layers.end - 1));

    std::vector<int> lengths(sequences_.size());
    for (size_t id = 0; id < sequences_.size(); ++id) lengths[id] = sequences_[id] ? sequences_[id]->length() : 0;
    for (size_t i = 0; i < count; ++i) {
        sequence(batch.sequences[i]);
        const int32_t token = batch.tokens[i];
        const bool embedded = token == Batch::kEmbedding && !batch.embeddings.empty();
        if (!embedded && (token < 0 || token >= spec_.vocab_size))
            throw std::invalid_argument("token " + std::to_string(token) + " is not in the vocabulary of " +
                                        std::to_string(spec_.vocab_size));
        int& length = lengths[batch.sequences[i]];
        if (batch.positions[i] != length)
            throw ContextError("position " + std::to_string(batch.positions[i]) + " does not follow the " +
                               std::to_string(length) + " positions of its sequence");
        if (++length > options_.context)
            throw ContextError(std::to_string(length) + " positions do not fit into the context of " +
                               std::to_string(options_.context));
    }
    for (size_t i = 0; i < batch.wanted.size(); ++i)
        if (batch.wanted[i] < 0 || batch.wanted[i] >= static_cast<int64_t>(count) ||
            (i > 0 && batch.wanted[i] <= batch.wanted[i - 1]))
            throw std::invalid_argument("wanted indexes must ascend within the tokens");
}

void Engine::forward(const Batch& batch, LayerRange layers, float* logits, const std::function<void()>& check,
                     Observer* observer) {
    const auto begin = std::chrono::steady_clock::now();
    check_batch(batch, layers);
    static const Quality kExact;
    const size_t count = batch.tokens.size();
    size_t first_wanted = 0;
    std::vector<int32_t> wanted;
    std::vector<SequenceState*> all_states;
    for (const int32_t id : batch.sequences) all_states.push_back(sequences_[id].get());
    std::vector<StatePool::Writing> ends;
    find_ends(all_states, batch.positions, ends);
    states_->require_room(ends);
    std::vector<const Quality*> qualities;
    for (size_t done = 0; done < count; done += options_.chunk) {
        const size_t size = std::min<size_t>(options_.chunk, count - done);
        size_t end_wanted = first_wanted;
        wanted.clear();
        while (end_wanted < batch.wanted.size() && batch.wanted[end_wanted] < static_cast<int64_t>(done + size))
            wanted.push_back(batch.wanted[end_wanted++] - static_cast<int32_t>(done));
        qualities.clear();
        for (size_t i = done; i < done + size; ++i) {
            const size_t number = batch.quality.empty() ? 0 : batch.quality[i];
            qualities.push_back(batch.qualities.empty() ? &kExact : &batch.qualities[number]);
        }
        Rows rows{batch.tokens.subspan(done, size),
                  batch.positions.subspan(done, size),
                  std::span(all_states).subspan(done, size),
                  {}};
        if (!batch.embeddings.empty())
            rows.embeddings = batch.embeddings.subspan(done * spec_.hidden_size, size * spec_.hidden_size);
        find_ends(rows.states, rows.positions, ends);
        int steps = 0;
        for (const auto& [sequence, end] : ends) steps = std::max(steps, end - sequence->length());
        EngineCounters counters;
        try {
            states_->begin_writing(ends);
            pass_->run({rows, wanted, qualities, steps}, layers, observer, counters,
                       logits + first_wanted * spec_.vocab_size, check);
            wait();  // before the rows go, and anybody looks at the states
        } catch (...) {
            try {
                wait();      // it may still be writing what the states are about to give back
            } catch (...) {  // the first failure is the one to tell
            }
            add_counts(counters);
            for (const auto& [sequence, end] : ends) {
                try {
                    sequence->give_up_writing();
                } catch (const DeviceError&) {  // it will compute nothing any more
                }
            }
            if (store_) store_->hint(0, {});  // what was expected will not come
            throw;
        }
        for (const auto& [sequence, end] : ends) sequence->set_length(end);
        first_wanted = end_wanted;
        counters.tokens = size;
        add_counts(counters);
    }
    EngineCounters time;
    time.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
    add_counts(time);
}

}  // namespace edgemoe
