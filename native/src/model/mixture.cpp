#include "model/mixture.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <numeric>
#include <stdexcept>

#include "model/quality.h"

namespace edgemoe {
namespace {

// Whether every level of the experts has the layer's shapes. The store has checked that levels go together, and where
// they lie.
void check_experts(const HalfSetting& setting, const ExpertLayer& experts) {
    const int hidden = setting.model.hidden_size, ffn = setting.spec.ffn_dim;
    const std::string which = "an expert of layer " + std::to_string(setting.layer);
    for (const ExpertLevel& level : experts.levels)
        for (int part = 0; part < 3; ++part) {
            const ExpertPart& matrix = level.parts[part];
            const int rows = part < 2 ? ffn : hidden, cols = part < 2 ? hidden : ffn;
            if (matrix.rows != rows || matrix.cols != cols)
                throw std::invalid_argument(which + " has a matrix [" + std::to_string(matrix.rows) + ", " +
                                            std::to_string(matrix.cols) + "] instead of [" + std::to_string(rows) +
                                            ", " + std::to_string(cols) + "]");
        }
}

}  // namespace

const ExpertLayer& find_experts(const HalfSetting& setting) {
    const auto found = setting.index.experts.find(setting.layer);
    if (found == setting.index.experts.end() || found->second.sections.size() != size_t(setting.spec.experts))
        throw std::invalid_argument("layer " + std::to_string(setting.layer) + " lacks experts");
    check_experts(setting, found->second);
    return found->second;
}

namespace {

// Shape and layout of one of the three matrices; its data comes and goes.
Matrix shape_of(const ExpertLayer& experts, int part, int rows, int cols) {
    const StoredLayout& first = experts.levels[0].parts[part].stored;
    Matrix matrix{first.layout, rows, cols, nullptr};
    matrix.levels.later = first.later;
    for (size_t level = 0; matrix.layout == Layout::nested && level < experts.levels.size(); ++level)
        matrix.levels.bits[level] = static_cast<uint8_t>(experts.levels[level].parts[part].stored.level_bits);
    return matrix;
}

}  // namespace

void Mixture::Buffers::place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows) {
    const size_t count = rows, hidden_size = model.hidden_size, pairs = count * spec.top_k;
    router.place(places, model, spec, rows);
    places.place(picks, pairs);
    places.place(weights, pairs);
    shared.place(places, spec.shared_dim, rows);
    places.place(shared_out, spec.shared_dim ? count * hidden_size : 0);
    places.place(input, spec.branch_norms ? count * hidden_size : 0);
    places.place(pair_rows, pairs);
    places.place(this->places, pairs);
    places.place(hidden, pairs * spec.ffn_dim);
    places.place(up, pairs * spec.ffn_dim);
    places.place(outputs, pairs * hidden_size);
    places.place(sum, spec.branch_norms || spec.output_norms ? count * hidden_size : 0);
}

void Mixture::AheadBuffers::place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows) {
    const size_t count = rows;
    router.place(places, model, spec, rows);
    places.place(x, count * model.hidden_size);
    places.place(normed, count * model.hidden_size);
    places.place(picks, count * spec.top_k);
    places.place(weights, count * spec.top_k);
}

void Mixture::HostBuffers::place(Places& places, const ModelSpec& model, const LayerSpec& spec, int rows) {
    const size_t hidden_size = model.hidden_size, pairs = size_t(rows) * spec.top_k;
    places.place(input, rows * hidden_size);
    places.place(pair_rows, pairs);
    places.place(hidden, pairs * spec.ffn_dim);
    places.place(up, pairs * spec.ffn_dim);
    places.place(outputs, pairs * hidden_size);
}

namespace {

void load_biases(ExpertShapes& shapes, const PlacedWeights& weights, const LayerSpec& spec, int hidden) {
    shapes.gate_bias = weights.vector("expert_gate_bias", spec.experts * spec.ffn_dim);
    shapes.up_bias = weights.vector("expert_up_bias", spec.experts * spec.ffn_dim);
    shapes.down_bias = weights.vector("expert_down_bias", spec.experts * hidden);
}

}  // namespace

Mixture::Mixture(const HalfSetting& setting, const ExpertLayer& experts, const PlacedWeights& weights,
                 const HalfMemory& memory)
    : backend_(setting.backend),
      host_(setting.host),
      model_(setting.model),
      spec_(setting.spec),
      layer_(setting.layer),
      store_(*setting.store),
      tier_(&setting.backend != &setting.host ? setting.tier : nullptr),
      layer_norm_(setting.norm),
      router_(setting.model, setting.spec, weights) {
    const int hidden = model_.hidden_size, ffn = spec_.ffn_dim;
    if (spec_.output_norms) output_norm_ = weights.norm("ffn_output_norm", hidden);
    if (spec_.branch_norms) {
        expert_norm_ = weights.norm("expert_norm", hidden);
        expert_output_norm_ = weights.norm("expert_output_norm", hidden);
        shared_output_norm_ = weights.norm("shared_output_norm", hidden);
    }
    if (spec_.shared_dim) shared_.emplace(model_, spec_, weights, "shared.", spec_.shared_dim);
    if (spec_.shared_gate) shared_gate_ = weights.vector("shared_gate", hidden);
    shapes_.gate = shape_of(experts, 0, ffn, hidden);
    shapes_.up = shape_of(experts, 1, ffn, hidden);
    shapes_.down = shape_of(experts, 2, hidden, ffn);
    shapes_.activation = activation_of(spec_);
    host_shapes_ = shapes_;
    if (spec_.expert_bias) {
        if (is_apart()) load_biases(host_shapes_, weights.copied_to(host_.memory()), spec_, hidden);
        load_biases(shapes_, weights, spec_, hidden);
    }
    size_t bytes = 0;
    for (const auto& level : expert_bytes(experts)) {
        for (const size_t part : level) bytes += part;
        bytes_.push_back(bytes);
    }
    for (const auto& sections : experts.sections) finest_.push_back(static_cast<uint8_t>(sections.size() - 1));
    for (const ExpertLevel& level : experts.levels) bits_.push_back(level.bits);
    Places places(memory.half), ahead_places(memory.ahead);
    buffers_.place(places, model_, spec_, memory.rows);
    ahead_.place(ahead_places, model_, spec_, memory.rows);
    if (is_apart()) {
        Places host_places(memory.host);
        host_buffers_.place(host_places, model_, spec_, memory.rows);
    }
}

struct Mixture::Grouping {
    std::vector<int32_t> begins;     // [experts * levels + 1] of a group's pairs
    std::vector<int32_t> pair_rows;  // [pairs]
    std::vector<int32_t> places;     // [pairs]
    std::vector<ExpertStream::Need> needs;
};

// Experts are asked for in the order of their rows, most first; for a single row that is its pick order, the router's
// first choice first.
Mixture::Grouping Mixture::demand(std::span<const int32_t> picks, std::span<const float> weights,
                                  const HalfInput& input) const {
    const size_t top_k = spec_.top_k, pairs = picks.size();
    const int experts = spec_.experts, levels = static_cast<int>(bits_.size());
    std::vector<int32_t> level_of(pairs);
    for (int t = 0; t < input.count; ++t)
        choose_levels(*input.qualities[t], finest_, picks.subspan(t * top_k, top_k), weights.subspan(t * top_k, top_k),
                      std::span(level_of).subspan(t * top_k, top_k));
    const auto group_of = [&](size_t pair) { return size_t(picks[pair]) * levels + level_of[pair]; };

    Grouping found;
    found.begins.assign(size_t(experts) * levels + 1, 0);
    std::vector<int32_t> uses(experts, 0), active;
    std::vector<float> group_weights(size_t(experts) * levels, 0.0f);
    for (size_t pair = 0; pair < pairs; ++pair) {
        if (uses[picks[pair]]++ == 0) active.push_back(picks[pair]);
        ++found.begins[group_of(pair) + 1];
        group_weights[group_of(pair)] += weights[pair];
        input.counters.expert_bits += static_cast<uint64_t>(bits_[level_of[pair]]);
    }
    input.counters.expert_uses += pairs;
    std::stable_sort(active.begin(), active.end(),
                     [&](int32_t left, int32_t right) { return uses[left] > uses[right]; });
    std::partial_sum(found.begins.begin(), found.begins.end(), found.begins.begin());
    std::vector<int32_t> cursor(found.begins.begin(), found.begins.end() - 1);
    found.pair_rows.resize(pairs);
    found.places.resize(pairs);
    for (size_t pair = 0; pair < pairs; ++pair) {
        const int32_t place = cursor[group_of(pair)]++;
        found.places[pair] = place;
        found.pair_rows[place] = static_cast<int32_t>(pair / top_k);
    }
    for (const int32_t expert : active)
        for (int level = 0; level < levels; ++level) {
            const size_t group = size_t(expert) * levels + level;
            const int first = found.begins[group], end = found.begins[group + 1];
            if (first < end)
                found.needs.push_back({expert, level, found.pair_rows[end - 1], end - first, group_weights[group]});
        }
    return found;
}

ExpertWork Mixture::work_of(const Grouping& demanded, const ExpertStream::Need& need, const ExpertParts& parts) const {
    const size_t group = size_t(need.expert) * bits_.size() + need.level;
    return {need.expert,
            at_level(shapes_.gate, parts[0], need.level),
            at_level(shapes_.up, parts[1], need.level),
            at_level(shapes_.down, parts[2], need.level),
            demanded.begins[group],
            demanded.begins[group + 1] - demanded.begins[group]};
}

// A matrix of an expert that works at a level, with what is in memory of it.
Matrix Mixture::at_level(const Matrix& shape, const std::array<const std::byte*, kMaxLevels>& data, int level) const {
    Matrix matrix = shape;
    matrix.data = data[0];
    if (matrix.layout == Layout::nested) {
        matrix.levels.count = level + 1;
        matrix.levels.data = data;
    }
    return matrix;
}

void Mixture::run(const HalfInput& input) {
    const Buffers& b = buffers_;
    const int count = input.count, hidden = model_.hidden_size;
    const size_t pairs = size_t(count) * spec_.top_k;
    router_.route(backend_, b.router, input.x, input.normed, count, b.picks, b.weights);
    const std::span picks = backend_.read(Buffer<const int32_t>(b.picks), pairs);
    const std::span weights = backend_.read(ConstFloats(b.weights), pairs);
    const Grouping demanded = demand(picks, weights, input);
    std::vector<ExpertWork> resident;  // the device has them
    std::vector<ExpertStream::Need> needs;
    if (tier_) tier_->begin_turn();
    for (const ExpertStream::Need& need : demanded.needs) {
        const auto parts = tier_ ? tier_->find(layer_, need.expert, need.level) : std::nullopt;
        if (parts)
            resident.push_back(work_of(demanded, need, *parts));
        else
            needs.push_back(need);
    }
    for (const ExpertWork& work : resident) input.counters.device_hits += work.count;
    ExpertStream stream(store_, layer_, {count, input.steps}, needs);
    // Also where something throws: the stream gives memory back that the host may still be reading; a device has
    // copies.
    struct Finish {
        Backend& host;
        ~Finish() {
            try {
                host.wait();
            } catch (...) {  // what failed first is on its way already
            }
        }
    } const finish{host_};
    if (input.observer) input.observer->routed(layer_, picks, weights);
    if (input.next) input.next->expect(input);

    if (shared_) {  // while missing experts are read
        shared_->run(backend_, b.shared, input.normed, count, b.shared_out);
        if (shared_gate_) backend_.gate_rows(shared_gate_, input.normed, hidden, count, b.shared_out);
    }
    ConstFloats experts_input = input.normed;
    if (expert_norm_) {
        backend_.normalize(expert_norm_, input.x, count, b.input);
        experts_input = b.input;
    }
    backend_.write(std::span<const int32_t>(demanded.pair_rows), b.pair_rows);
    backend_.write(std::span<const int32_t>(demanded.places), b.places);
    const ExpertBuffers here{b.pair_rows, b.hidden, b.up, b.outputs};
    if (is_apart()) {
        // First what the host waits for: the device computes its own experts meanwhile.
        if (!needs.empty()) backend_.take(experts_input, size_t(count) * hidden, host_, host_buffers_.input);
        if (tier_) {
            backend_.begin_experts(shapes_, experts_input, count);
            if (!resident.empty()) backend_.experts(shapes_, resident, here);
        }
        run_apart(input, demanded, stream, needs);
    } else {
        backend_.begin_experts(shapes_, experts_input, count);
        std::vector<ExpertWork> work;
        for (auto ready = stream.next(); !ready.empty(); ready = stream.next()) {
            work.clear();
            for (const ExpertStream::Item& item : ready)
                work.push_back(work_of(demanded, needs[item.position], item.weights.parts));
            backend_.experts(shapes_, work, here);
            backend_.wait();
            // Now that they are computed. Holding them until the layer ends would leave less room for what comes: where
            // a prompt's experts do not all fit, others would leave memory, and fewer would be found there.
            stream.release();
        }
    }
    if (stream.blocked()) throw std::logic_error("experts were left out of a pass");
    if (input.observer && input.observer->wants_experts()) observe(input, demanded, experts_input);
    add_up(input);
}

void Mixture::run_apart(const HalfInput& input, const Grouping& demanded, ExpertStream& stream,
                        std::span<const ExpertStream::Need> needs) {
    // With more rows most experts are at work: to bring them all would push out those that single tokens use.
    constexpr int kFewRows = 8;
    const Buffers& b = buffers_;
    const HostBuffers& h = host_buffers_;
    const size_t hidden = model_.hidden_size, ffn = spec_.ffn_dim;
    const ExpertBuffers here{b.pair_rows, b.hidden, b.up, b.outputs}, there{h.pair_rows, h.hidden, h.up, h.outputs};
    const bool fills = tier_ && input.count <= kFewRows;
    const bool observed = input.observer && input.observer->wants_experts();
    if (!needs.empty()) {
        host_.write(std::span<const int32_t>(demanded.pair_rows), h.pair_rows);
        host_.begin_experts(host_shapes_, h.input, input.count);
    }
    std::vector<ExpertWork> work, brought;
    for (auto ready = stream.next(); !ready.empty(); ready = stream.next()) {
        work.clear();
        brought.clear();
        size_t host_bytes = 0;
        int to_bring = fills ? tier_->rule().moved(static_cast<int>(ready.size())) : 0;
        for (const ExpertStream::Item& item : ready) {
            const ExpertStream::Need& need = needs[item.position];
            if (to_bring > 0)
                if (const auto parts = tier_->bring(layer_, need.expert, need.level, item.weights.parts)) {
                    brought.push_back(work_of(demanded, need, *parts));
                    --to_bring;
                    continue;
                }
            work.push_back(work_of(demanded, need, item.weights.parts));
            host_bytes += bytes_[need.level];
        }
        const auto begin = std::chrono::steady_clock::now();
        host_.experts(host_shapes_, work, there);
        host_.wait();
        if (fills && !work.empty())
            tier_->rule().host_took(host_bytes,
                                    std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count());
        for (const ExpertWork& done : work) {
            backend_.write(host_.read(there.outputs + done.first * hidden, done.count * hidden),
                           here.outputs + done.first * hidden);
            if (observed)
                backend_.write(host_.read(there.hidden + done.first * ffn, done.count * ffn),
                               here.hidden + done.first * ffn);
        }
        if (!brought.empty()) {
            tier_->wait();
            backend_.experts(shapes_, brought, here);
        }
        if (fills)
            for (const ExpertStream::Item& item : ready) {
                const ExpertStream::Need& need = needs[item.position];
                tier_->offer(layer_, need.expert, need.level, item.weights.parts);
            }
        stream.release();
    }
}

void Mixture::observe(const HalfInput& input, const Grouping& demanded, ConstFloats experts_input) const {
    const size_t count = input.count, hidden = model_.hidden_size, pairs = count * spec_.top_k;
    input.observer->experts(layer_, {.top_k = spec_.top_k,
                                     .picks = backend_.read(Buffer<const int32_t>(buffers_.picks), pairs),
                                     .weights = backend_.read(ConstFloats(buffers_.weights), pairs),
                                     .places = demanded.places,
                                     .inputs = backend_.read(experts_input, count * hidden),
                                     .hidden = backend_.read(ConstFloats(buffers_.hidden), pairs * spec_.ffn_dim),
                                     .outputs = backend_.read(ConstFloats(buffers_.outputs), pairs * hidden)});
}

// Each row adds its experts' outputs in pick order, whenever they were computed: to the residual stream, or where norms
// come between, to a sum of their own.
void Mixture::add_up(const HalfInput& input) const {
    const Buffers& b = buffers_;
    const int count = input.count, hidden = model_.hidden_size;
    const bool direct = !expert_output_norm_ && !output_norm_;
    Combination combination{.from_zero = !direct,
                            .scale = direct ? model_.residual_multiplier : 1.0f,
                            .weights = b.weights,
                            .picks = b.picks,
                            .places = b.places,
                            .outputs = b.outputs,
                            .down_bias = shapes_.down_bias,
                            .top_k = spec_.top_k,
                            .sum = direct ? input.x : b.sum};
    if (shared_ && !shared_output_norm_) combination.shared = b.shared_out;
    backend_.combine(combination, hidden, count);
    if (direct) return;
    if (expert_output_norm_) backend_.normalize(expert_output_norm_, b.sum, count, b.sum);
    if (shared_output_norm_) {
        backend_.normalize(shared_output_norm_, b.shared_out, count, b.shared_out);
        backend_.add(1.0f, b.shared_out, b.sum, hidden, count);
    }
    if (output_norm_) backend_.normalize(output_norm_, b.sum, count, b.sum);
    backend_.add(model_.residual_multiplier, b.sum, input.x, hidden, count);
}

// The choice of this layer's router on the stream as it is before the experts of an earlier layer have been added to
// it: the choice of most rows first.
void Mixture::expect(const HalfInput& input) {
    const bool hints = store_.wants_hints(), shows = input.observer && input.observer->wants_predictions();
    if (!hints && !shows) return;
    const AheadBuffers& b = ahead_;
    const size_t top_k = spec_.top_k;
    const int count = input.next_rows ? static_cast<int>(input.next_rows->size()) : input.count;
    if (count == 0) return store_.hint(layer_, {});
    ConstFloats x = input.x;
    if (&input.backend != &backend_) {  // the stream is in another memory
        input.backend.take(x, size_t(input.count) * model_.hidden_size, backend_, b.x);
        x = b.x;
    }
    if (input.next_rows) {
        backend_.gather(x, *input.next_rows, model_.hidden_size, b.x);
        x = b.x;
    }
    if (!router_.reads_stream()) backend_.normalize(layer_norm_, x, count, b.normed);
    // Without thresholds levels do not depend on the weights.
    const auto quality = [&](int i) -> const Quality& {
        return *input.qualities[input.next_rows ? (*input.next_rows)[i] : i];
    };
    bool weighted = false;
    for (int i = 0; i < count; ++i) weighted |= !quality(i).thresholds.empty();
    router_.route(backend_, b.router, x, b.normed, count, b.picks, weighted ? b.weights : Floats());
    const std::span picks = backend_.read(Buffer<const int32_t>(b.picks), count * top_k);
    const std::span weights = backend_.read(ConstFloats(b.weights), weighted ? count * top_k : 0);
    if (hints) {
        std::vector<int32_t> uses(spec_.experts, 0), finest(spec_.experts, 0), levels(top_k);
        std::vector<ExpertStore::Hint> expected;
        for (int t = 0; t < count; ++t) {
            const std::span own = picks.subspan(t * top_k, top_k);
            choose_levels(quality(t), finest_, own, weighted ? weights.subspan(t * top_k, top_k) : weights, levels);
            for (size_t pick = 0; pick < top_k; ++pick) {
                if (uses[own[pick]]++ == 0) expected.push_back({own[pick], 0});
                finest[own[pick]] = std::max(finest[own[pick]], levels[pick]);
            }
        }
        for (ExpertStore::Hint& hint : expected) hint.level = finest[hint.expert];
        if (tier_)
            std::erase_if(expected,
                          [&](const ExpertStore::Hint& hint) { return tier_->has(layer_, hint.expert, hint.level); });
        std::stable_sort(expected.begin(), expected.end(),
                         [&](const ExpertStore::Hint& left, const ExpertStore::Hint& right) {
                             return uses[left.expert] > uses[right.expert];
                         });
        store_.hint(layer_, expected);
    }
    if (shows) input.observer->predicted(layer_, picks);
}

}  // namespace edgemoe
