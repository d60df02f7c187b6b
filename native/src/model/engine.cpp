#include "edgemoe/engine.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <limits>
#include <map>
#include <numeric>
#include <optional>
#include <utility>

#include "edgemoe/crc32c.h"
#include "engine_parts.h"

namespace edgemoe {
namespace {

// Work of one loop item, in weight bytes times token tiles: some ten microseconds, enough to hide the hand-out.
constexpr size_t kItemBytes = size_t{96} << 10;
constexpr int kTileTokens = 8;

std::string prefix(int layer) { return "layers." + std::to_string(layer) + "."; }

uint64_t lead(const Extent& extent) { return extent.offset % kDiskBlock; }
uint64_t whole_disk_blocks(uint64_t bytes) { return (bytes + kDiskBlock - 1) / kDiskBlock * kDiskBlock; }
uint64_t span_bytes(const Extent& extent) { return whole_disk_blocks(lead(extent) + extent.length); }

bool is_row_major(const DenseTensor& tensor) {
    return tensor.layout != "vector" && stored_layout(tensor.layout).row_major;
}

// Memory of each dense section: the block-aligned span around its one extent, or what its row-major matrix takes once
// it is interleaved, if that is more.
std::map<uint32_t, uint64_t> dense_sections(const PackIndex& index) {
    std::map<uint32_t, uint64_t> sections;
    for (const auto& [name, tensor] : index.dense) {
        const Section& section = index.sections[tensor.section];
        if (section.extents.size() != 1)
            throw std::invalid_argument("dense section " + std::to_string(tensor.section) + " is not one extent");
        uint64_t& bytes = sections[tensor.section];
        bytes = std::max(bytes, span_bytes(section.extents[0]));
        if (is_row_major(tensor))
            bytes = std::max(
                bytes, whole_disk_blocks(matrix_bytes(stored_layout(tensor.layout).layout, tensor.rows, tensor.cols)));
    }
    return sections;
}

// A row-major matrix that shares its memory with others can be interleaved where it stands only if it needs no padding.
void require_in_place(const std::string& name, int rows, uint64_t place) {
    if (rows % kRowBlock != 0 || place % kAlignment != 0)
        throw std::invalid_argument(name +
                                    " is row-major and neither alone in its extent nor in whole, aligned blocks");
}

// Whether every expert works with all levels that it has, whatever the router says.
bool use_all_levels(const PackIndex& index, const EngineOptions& options) {
    return options.thresholds.empty() && std::ranges::all_of(index.experts, [&](const auto& layer) {
               return static_cast<int>(layer.second.levels.size()) <= options.level_cap + 1;
           });
}

std::vector<KvShape> kv_shapes(const ModelSpec& spec, const EngineOptions& options) {
    std::vector<KvShape> shapes;
    for (const LayerSpec& layer : spec.layers) {
        const AttentionSpec& a = layer.attention;
        KvShape shape{0, 0, options.key_type, options.value_type, a.window};
        switch (a.kind) {
            case AttentionKind::full:
                shape.kv_heads = a.kv_heads;
                shape.head_dim = a.head_dim;
                break;
            case AttentionKind::mla:
                shape.kv_heads = 1;
                shape.head_dim = a.kv_rank + a.rope_dim;
                shape.latent = true;
                break;
            case AttentionKind::gated_delta:
                shape.recurrence = size_t(a.heads) * a.head_dim * a.value_dim;
                [[fallthrough]];
            case AttentionKind::short_conv:
                shape.convolution = size_t(a.channels()) * a.conv_size;
                break;
        }
        shapes.push_back(shape);
    }
    return shapes;
}

}  // namespace

// Row blocks per loop item. With many tokens a product arranges its activations first, once per item: too few rows
// would not pay for it.
int blocks_per_item(const Matrix& matrix, int tokens) {
    const size_t tiles = static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens);
    const size_t bytes = block_bytes(matrix) * std::max<size_t>(tiles, 1);
    const bool arranges = is_ggml(matrix.layout) || matrix.layout == Layout::nested;
    const size_t least = tokens <= kTileTokens ? 1 : arranges ? 8 : 2;
    return static_cast<int>(std::max(kItemBytes / bytes, least));
}

MemoryPlan Engine::plan(const ModelSpec& spec, const PackIndex& index, const EngineOptions& options) {
    MemoryPlan plan;
    for (const auto& [section, bytes] : dense_sections(index)) plan.dense += bytes;
    plan.state = StatePool::bytes(kv_shapes(spec, options), options.sequences, options.context, options.chunk);
    plan.scratch = Scratch::bytes(spec, options.chunk);
    const StoreLayout experts(index, use_all_levels(index, options));
    plan.slot = experts.slot_bytes();
    plan.experts = experts.slots();
    for (const LayerSpec& layer : spec.layers) plan.minimum_slots = std::max(plan.minimum_slots, layer.top_k);
    return plan;
}

Engine::Engine(ModelSpec spec, PackIndex index, EngineOptions options)
    : spec_(std::move(spec)),
      index_(std::move(index)),
      options_(std::move(options)),
      kernels_(select_kernels(options_.isa)),
      pool_(options_.threads) {
    for (const std::string& path : index_.files) files_.push_back(std::make_unique<DirectFile>(path));
    load_dense();

    const int hidden = spec_.hidden_size;
    embedding_ = matrix("embedding", spec_.vocab_size, hidden);
    head_ = spec_.tied_embeddings ? embedding_ : matrix("head", spec_.vocab_size, hidden);
    if (spec_.head_bias) head_bias_ = vector("head_bias", spec_.vocab_size);
    final_norm_ = std::make_unique<Norm>(norm("final_norm", hidden));
    for (int number = 0; number < static_cast<int>(spec_.layers.size()); ++number) {
        const LayerSpec& spec_of = spec_.layers[number];
        const AttentionSpec& a = spec_of.attention;
        const RouterSpec& router = spec_of.router;
        const std::string p = prefix(number);
        Layer layer{};
        layer.attention_norm = norm(p + "attention_norm", hidden);
        switch (a.kind) {
            case AttentionKind::full:
                load_attention(layer, a, p);
                break;
            case AttentionKind::mla:
                load_latent_attention(layer, a, p);
                break;
            case AttentionKind::gated_delta:
                load_gated_delta(layer, a, p);
                break;
            case AttentionKind::short_conv:
                load_short_convolution(layer, a, p);
                break;
        }
        layer.o = matrix(p + "o", hidden, a.heads * a.value_dim);
        if (a.output_bias) layer.o_bias = vector(p + "o_bias", hidden);
        layer.ffn_norm = norm(p + "ffn_norm", hidden);
        if (spec_of.output_norms) {
            layer.attention_output_norm = norm(p + "attention_output_norm", hidden);
            layer.ffn_output_norm = norm(p + "ffn_output_norm", hidden);
        }
        if (spec_of.branch_norms) {
            layer.expert_norm = norm(p + "expert_norm", hidden);
            layer.expert_output_norm = norm(p + "expert_output_norm", hidden);
            layer.shared_output_norm = norm(p + "shared_output_norm", hidden);
        }
        if (spec_of.output_scale) layer.output_scale = vector(p + "output_scale", 1);
        if (spec_of.experts) {
            layer.router = matrix(p + "router", spec_of.experts, hidden);
            if (router.bias) layer.router_bias = vector(p + "router_bias", spec_of.experts);
            if (router.selection_bias) layer.selection_bias = vector(p + "selection_bias", spec_of.experts);
            if (router.expert_scale) layer.expert_scale = vector(p + "expert_scale", spec_of.experts);
            if (router.input_norm) {
                float* weight = vector(p + "router_norm", hidden);
                for (int i = 0; i < hidden; ++i) weight[i] *= router.input_scale;
                layer.router_norm = weight;
            }
            if (spec_of.shared_dim) layer.dense = feed_forward(p + "shared.", spec_of.shared_dim, spec_of.ffn_bias);
            if (spec_of.shared_gate) layer.shared_gate = vector(p + "shared_gate", hidden);
            if (spec_of.expert_bias) {
                layer.gate_bias = vector(p + "expert_gate_bias", spec_of.experts * spec_of.ffn_dim);
                layer.up_bias = vector(p + "expert_up_bias", spec_of.experts * spec_of.ffn_dim);
                layer.down_bias = vector(p + "expert_down_bias", spec_of.experts * hidden);
            }
            const auto found = index_.experts.find(number);
            if (found == index_.experts.end() || found->second.sections.size() != size_t(spec_of.experts))
                throw std::invalid_argument("layer " + std::to_string(number) + " lacks experts");
            const ExpertLayer& experts = found->second;
            check_experts(number, experts);
            const auto shape = [&](int part, int rows, int cols) {
                const StoredLayout& first = experts.levels[0].parts[part].stored;
                Matrix matrix{first.layout, rows, cols, nullptr};
                matrix.levels.later = first.later;
                for (size_t level = 0; matrix.layout == Layout::nested && level < experts.levels.size(); ++level)
                    matrix.levels.bits[level] =
                        static_cast<uint8_t>(experts.levels[level].parts[part].stored.level_bits);
                return matrix;
            };
            layer.gate = shape(0, spec_of.ffn_dim, hidden);
            layer.up = shape(1, spec_of.ffn_dim, hidden);
            layer.down = shape(2, hidden, spec_of.ffn_dim);
            for (const auto& sections : experts.sections)
                layer.finest.push_back(static_cast<uint8_t>(sections.size() - 1));
            for (const ExpertLevel& level : experts.levels) layer.bits.push_back(level.bits);
        } else {
            layer.dense = feed_forward(p + "ffn.", spec_of.ffn_dim, spec_of.ffn_bias);
        }
        layers_.push_back(std::move(layer));
    }
    scratch_ = std::make_unique<Scratch>(spec_, options_.chunk);
    options_.store.all_levels = use_all_levels(index_, options_);
    if (!index_.experts.empty()) store_ = std::make_unique<ExpertStore>(index_, files_, options_.store);
    states_ =
        std::make_unique<StatePool>(kv_shapes(spec_, options_), options_.sequences, options_.context, options_.chunk);
    add_sequence();
}

Engine::~Engine() = default;

// Whether every level of every expert has the layer's shapes, lies within its section, and goes with the others.
void Engine::check_experts(int number, const ExpertLayer& experts) const {
    const LayerSpec& spec = spec_.layers[number];
    const std::string which = "an expert of layer " + std::to_string(number);
    const size_t levels = experts.levels.size();
    if (levels < 1 || levels > kMaxLevels) throw std::invalid_argument(which + " has no or too many levels");
    for (int part = 0; part < 3; ++part) {
        int bits = 0;
        for (size_t level = 0; level < levels; ++level) {
            const StoredLayout& stored = experts.levels[level].parts[part].stored;
            bits += stored.level_bits;
            if ((levels > 1 && stored.layout != Layout::nested) || stored.refines != (level > 0) || bits > 8 ||
                (level == 0 && stored.later != static_cast<int>(levels) - 1))
                throw std::invalid_argument(which + " has levels that are not nested");
        }
    }
    for (const std::vector<uint32_t>& sections : experts.sections) {
        if (sections.empty() || sections.size() > levels)
            throw std::invalid_argument(which + " has other levels than its layer");
        for (size_t level = 0; level < sections.size(); ++level)
            for (int part = 0; part < 3; ++part) {
                const auto& parts = experts.levels[level].parts;
                const ExpertPart& place = parts[part];
                const int rows = part < 2 ? spec.ffn_dim : spec_.hidden_size;
                const int cols = part < 2 ? spec_.hidden_size : spec.ffn_dim;
                const auto& extents = index_.sections.at(sections[level]).extents;
                const size_t bytes = stored_bytes(place.stored, rows, cols);
                if (place.rows != rows || place.cols != cols || place.extent >= extents.size() ||
                    place.offset > extents[place.extent].length || bytes > extents[place.extent].length - place.offset)
                    throw std::invalid_argument(which + " does not fit into its section");
                const bool shares_extent = std::ranges::count(parts, place.extent, &ExpertPart::extent) > 1;
                if (place.stored.row_major && shares_extent)
                    require_in_place(which, place.rows, lead(extents[0]) + place.offset);
            }
    }
}

void Engine::load_dense() {
    const auto sections = dense_sections(index_);
    size_t total = 0;
    for (const auto& [number, bytes] : sections) total += bytes;
    dense_ = Arena(total);
    dense_sections_.assign(index_.sections.size(), nullptr);
    std::byte* target = dense_.data();
    for (const auto& [number, bytes] : sections) {
        const Section& section = index_.sections[number];
        const Extent& extent = section.extents[0];
        const DirectFile& file = *files_.at(extent.file);
        file.read(extent.offset - lead(extent), {target, span_bytes(extent)}, lead(extent) + extent.length);
        if (section.checksum && crc32c({target + lead(extent), extent.length}) != *section.checksum)
            throw IoError(file.path() + ": section " + std::to_string(number) + " at offset " +
                          std::to_string(extent.offset) + " is damaged (its checksum differs)");
        dense_sections_[number] = target + lead(extent);
        target += bytes;
    }
    std::vector<int> users(index_.sections.size(), 0);
    for (const auto& [name, tensor] : index_.dense) ++users[tensor.section];
    std::vector<std::byte> scratch;
    for (const auto& [name, tensor] : index_.dense) {
        if (!is_row_major(tensor)) continue;
        const StoredLayout stored = stored_layout(tensor.layout);
        const Extent& extent = index_.sections[tensor.section].extents[0];
        if (tensor.offset > extent.length ||
            stored_bytes(stored, tensor.rows, tensor.cols) > extent.length - tensor.offset)
            throw std::invalid_argument("tensor " + name + " does not fit into its section");
        std::byte*& data = dense_sections_[tensor.section];
        std::byte* source = data + tensor.offset;
        // Alone in its section (GGUF): to the beginning of the section's memory. In company (a pack): where it stands.
        if (users[tensor.section] == 1)
            data -= lead(extent) + tensor.offset;
        else
            require_in_place("tensor " + name, tensor.rows, lead(extent) + tensor.offset);
        scratch.resize(std::max(scratch.size(), block_bytes(stored.layout, tensor.cols)));
        interleave(stored.layout, tensor.rows, tensor.cols, source, data + tensor.offset, scratch.data());
    }
}

Matrix Engine::matrix(const std::string& name, int rows, int cols) const {
    const auto found = index_.dense.find(name);
    if (found == index_.dense.end()) throw std::invalid_argument("tensor " + name + " is missing");
    const DenseTensor& tensor = found->second;
    const StoredLayout stored = stored_layout(tensor.layout);
    const uint64_t length = index_.sections[tensor.section].extents[0].length;
    if (tensor.rows != rows || tensor.cols != cols || tensor.offset > length ||
        stored_bytes(stored, rows, cols) > length - tensor.offset)
        throw std::invalid_argument("tensor " + name + " does not fit into its section");
    return {stored.layout, rows, cols, dense_sections_[tensor.section] + tensor.offset};
}

float* Engine::vector(const std::string& name, int size) const {
    const auto found = index_.dense.find(name);
    if (found == index_.dense.end()) throw std::invalid_argument("tensor " + name + " is missing");
    const DenseTensor& tensor = found->second;
    const Extent& extent = index_.sections[tensor.section].extents[0];
    if (tensor.layout != "vector" || tensor.rows != size || (lead(extent) + tensor.offset) % sizeof(float) != 0 ||
        tensor.offset > extent.length || size * sizeof(float) > extent.length - tensor.offset)
        throw std::invalid_argument("tensor " + name + " is not a vector of " + std::to_string(size));
    return reinterpret_cast<float*>(dense_sections_[tensor.section] + tensor.offset);
}

// Weights of a convolution [channels, taps]; they are small, and never quantized.
Matrix Engine::convolution(const std::string& name, int channels, int taps) const {
    const Matrix weights = matrix(name, channels, taps);
    if (weights.layout != Layout::f32)
        throw std::invalid_argument("tensor " + name + " is of type " + std::string(layout_name(weights.layout)) +
                                    ": convolutions are f32");
    return weights;
}

Norm Engine::norm(const std::string& name, int size) const {
    float* weight = vector(name, size);
    if (spec_.norm_offset != 0)
        for (int i = 0; i < size; ++i) weight[i] += spec_.norm_offset;
    return {weight, spec_.layer_norm ? vector(name + "_bias", size) : nullptr};
}

FeedForward Engine::feed_forward(const std::string& name, int dim, bool bias) const {
    const int hidden = spec_.hidden_size;
    FeedForward part{};
    part.gate = matrix(name + "gate", dim, hidden);
    part.up = matrix(name + "up", dim, hidden);
    part.down = matrix(name + "down", hidden, dim);
    if (bias) {
        part.gate_bias = vector(name + "gate_bias", dim);
        part.up_bias = vector(name + "up_bias", dim);
        part.down_bias = vector(name + "down_bias", hidden);
    }
    return part;
}

int Engine::add_sequence() {
    auto state = std::make_unique<SequenceState>(*states_);
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
    EngineCounters counters = counters_;
    if (store_) counters.store = store_->counters();
    return counters;
}

void Engine::forward(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                     std::span<const int32_t> sequence_ids, std::span<const int32_t> wanted, float* logits,
                     const std::function<void()>& check) {
    const auto begin = std::chrono::steady_clock::now();
    const size_t count = tokens.size();
    if (positions.size() != count || sequence_ids.size() != count)
        throw std::invalid_argument("tokens, positions and sequence_ids differ in length");
    std::vector<int> lengths;
    for (const auto& state : sequences_) lengths.push_back(state ? state->length() : 0);
    for (size_t i = 0; i < count; ++i) {
        sequence(sequence_ids[i]);
        if (tokens[i] < 0 || tokens[i] >= spec_.vocab_size)
            throw std::invalid_argument("token " + std::to_string(tokens[i]) + " is not in the vocabulary of " +
                                        std::to_string(spec_.vocab_size));
        int& length = lengths[sequence_ids[i]];
        if (positions[i] != length)
            throw ContextError("position " + std::to_string(positions[i]) + " does not follow the " +
                               std::to_string(length) + " positions of its sequence");
        if (++length > options_.context)
            throw ContextError(std::to_string(length) + " positions do not fit into the context of " +
                               std::to_string(options_.context));
    }
    for (size_t i = 0; i < wanted.size(); ++i)
        if (wanted[i] < 0 || wanted[i] >= static_cast<int64_t>(count) || (i > 0 && wanted[i] <= wanted[i - 1]))
            throw std::invalid_argument("wanted indexes must ascend within the tokens");

    size_t first_wanted = 0;
    for (size_t done = 0; done < count; done += options_.chunk) {
        const size_t size = std::min<size_t>(options_.chunk, count - done);
        size_t end_wanted = first_wanted;
        std::vector<int32_t> local;
        while (end_wanted < wanted.size() && wanted[end_wanted] < static_cast<int64_t>(done + size))
            local.push_back(wanted[end_wanted++] - static_cast<int32_t>(done));
        try {
            forward_chunk(tokens.subspan(done, size), positions.subspan(done, size), sequence_ids.subspan(done, size),
                          local, logits + first_wanted * spec_.vocab_size, check);
        } catch (...) {
            for (const auto& state : sequences_)
                if (state) state->give_up_writing();
            if (store_) store_->hint(0, {});  // what was expected will not come
            throw;
        }
        for (size_t i = 0; i < size; ++i) {
            SequenceState& state = *sequences_[sequence_ids[done + i]];
            state.set_length(positions[done + i] + 1);
        }
        first_wanted = end_wanted;
        if (recording_) {
            const auto append = [](auto& all, const auto& chunk) { all.insert(all.end(), chunk.begin(), chunk.end()); };
            append(routing_.picks, chunk_routing_.picks);
            append(routing_.weights, chunk_routing_.weights);
            append(routing_.predicted, chunk_routing_.predicted);
        }
        counters_.tokens += size;
    }
    counters_.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

void Engine::forward_layer(const LayerPass& pass, std::span<const int32_t> tokens, std::span<const int32_t> wanted,
                           float* logits, const std::function<void()>& check) {
    if (pass.layer < 0 || pass.layer >= static_cast<int>(layers_.size()))
        throw std::invalid_argument("there is no layer " + std::to_string(pass.layer));
    if (!wanted.empty() && pass.layer + 1 < static_cast<int>(layers_.size()))
        throw std::invalid_argument("there are no logits after layer " + std::to_string(pass.layer));
    std::vector<int32_t> positions(tokens.size()), ids(tokens.size(), 0);
    std::iota(positions.begin(), positions.end(), 0);
    sequence(0).truncate(0);
    pass_ = pass;
    const auto finish = [&] {
        pass_.reset();
        sequence(0).truncate(0);
    };
    try {
        forward(tokens, positions, ids, wanted, logits, check);
    } catch (...) {
        finish();
        throw;
    }
    finish();
}

// Where a layer's picks begin in a token's row of a RoutingRecord; of the layer after the last: the row's width.
int Engine::routing_column(int layer) const {
    int column = 0;
    for (int i = 0; i < layer; ++i) column += spec_.layers[i].top_k;
    return column;
}

RoutingRecord Engine::take_routing() {
    routing_.width = routing_column(static_cast<int>(layers_.size()));
    return std::exchange(routing_, {});
}

Activations Engine::prepare(const float* values, int count, int cols, std::span<const Matrix> users) {
    const Codes& codes = scratch_->input;
    const Activations input{values, cols, codes.codes, codes.scales, codes.sums};
    const bool quantized =
        std::any_of(users.begin(), users.end(), [](const Matrix& m) { return reads_codes(m.layout); });
    if (quantized) {
        const size_t per_token = groups(cols);
        each_token(count, [&](int t) {
            kernels_.quantize({values + size_t(t) * cols, size_t(cols)}, codes.codes + t * per_token * kGroup,
                              codes.scales + t * per_token, codes.sums + t * per_token);
        });
    }
    return input;
}

void Engine::product(std::span<const Matrix> matrices, const Activations& input, int count,
                     std::span<float* const> outputs) {
    struct Part {
        int first_item;
        int step;
    };
    std::array<Part, 4> parts{};
    int items = 0;
    for (size_t m = 0; m < matrices.size(); ++m) {
        parts[m] = {items, blocks_per_item(matrices[m], count)};
        items += (blocks(matrices[m].rows) + parts[m].step - 1) / parts[m].step;
    }
    pool_.run(items, [&](int item) {
        size_t m = matrices.size() - 1;
        while (parts[m].first_item > item) --m;
        const int first = (item - parts[m].first_item) * parts[m].step;
        const int last = std::min(first + parts[m].step, blocks(matrices[m].rows));
        kernels_.matmul(matrices[m], input, {}, count, first, last, outputs[m], matrices[m].rows);
    });
}

// The last layer's feed-forward part changes nothing but logits: the tokens that nobody wants logits of need not go
// through it, unless their routing is recorded or a single layer's pass asks for what it makes of them.
bool Engine::computes_wanted_only(int layer) const {
    return layer + 1 == static_cast<int>(layers_.size()) && !pass_ && !recording_;
}

void Engine::forward_chunk(std::span<const int32_t> tokens, std::span<const int32_t> positions,
                           std::span<const int32_t> sequence_ids, std::span<const int32_t> wanted, float* logits,
                           const std::function<void()>& check) {
    Scratch& s = *scratch_;
    const int count = static_cast<int>(tokens.size());
    const int hidden = spec_.hidden_size;
    if (recording_) {
        const size_t size = size_t(count) * routing_column(static_cast<int>(layers_.size()));
        chunk_routing_.picks.assign(size, 0);
        chunk_routing_.weights.assign(size, 0);
        chunk_routing_.predicted.assign(size, RoutingRecord::kNoPrediction);
    }

    for (int t = 0; t < count; ++t) sequences_[sequence_ids[t]]->begin_writing(positions[t] + 1);
    const int first_layer = pass_ ? pass_->layer : 0;
    const int end_layer = pass_ ? pass_->layer + 1 : static_cast<int>(layers_.size());
    each_token(count, [&](int t) {
        float* x = s.x + size_t(t) * hidden;
        if (pass_ && !pass_->embed) {
            std::copy_n(pass_->residual + size_t(t) * hidden, hidden, x);
        } else {
            dequantize_row(embedding_, tokens[t], x);
            if (spec_.embedding_multiplier != 1.0f)
                for (int i = 0; i < hidden; ++i) x[i] *= spec_.embedding_multiplier;
        }
        for (size_t r = 0; r < spec_.ropes.size(); ++r) {
            const RopeSpec& rope = spec_.ropes[r];
            float* cosine = s.cosine + (r * count + t) * s.widest_pairs;
            float* sine = s.sine + (r * count + t) * s.widest_pairs;
            for (size_t pair = 0; pair < rope.inverse_frequencies.size(); ++pair) {
                // The product is rounded to float32 as in the reference implementations; cos and sin of it are not.
                const double angle = static_cast<float>(positions[t]) * rope.inverse_frequencies[pair];
                cosine[pair] = static_cast<float>(std::cos(angle)) * rope.attention_factor;
                sine[pair] = static_cast<float>(std::sin(angle)) * rope.attention_factor;
            }
        }
    });

    const int rows = static_cast<int>(wanted.size());
    const auto keep_wanted = [&] {  // rows move to the front, in their order
        for (int i = 0; i < rows; ++i)
            std::memmove(s.x + size_t(i) * hidden, s.x + size_t(wanted[i]) * hidden, hidden * sizeof(float));
    };
    for (int layer = first_layer; layer < end_layer; ++layer) {
        check();
        mix(layer, count, positions, sequence_ids);
        int active = count;
        if (computes_wanted_only(layer)) {
            keep_wanted();
            active = rows;
            if (active == 0) break;
        }
        normalize(layers_[layer].ffn_norm, s.x, active, s.normed);
        if (spec_.layers[layer].experts)
            expert_ffn(layer, active, wanted);
        else
            dense_ffn(layer, active);
        if (const float* scale = layers_[layer].output_scale)
            each_token(active, [&](int t) {
                float* x = s.x + size_t(t) * hidden;
                for (int i = 0; i < hidden; ++i) x[i] *= *scale;
            });
    }

    if (pass_) {
        const LayerSpec& layer = spec_.layers[first_layer];
        std::copy_n(s.x, size_t(count) * hidden, pass_->residual);
        const size_t pairs = size_t(count) * layer.top_k;
        pass_->residual += size_t(count) * hidden;
        if (pairs) pass_->inputs += size_t(count) * hidden;
        pass_->picks += pairs;
        pass_->weights += pairs;
        pass_->hidden += pairs * layer.ffn_dim;
        pass_->peaks += pairs;
        pass_->energies += pairs;
    }
    if (rows == 0) return;
    if (!computes_wanted_only(end_layer - 1)) keep_wanted();
    normalize(*final_norm_, s.x, rows, s.normed);
    const Activations input = prepare(s.normed, rows, hidden, {&head_, 1});
    product({&head_, 1}, input, rows, {&logits, 1});
    if (!head_bias_ && spec_.logits_divisor == 1.0f && spec_.logits_softcap == 0) return;
    each_token(rows, [&](int i) {
        const std::span<float> row{logits + size_t(i) * spec_.vocab_size, size_t(spec_.vocab_size)};
        if (head_bias_) kernels_.add_scaled(1.0f, head_bias_, row);
        if (spec_.logits_divisor != 1.0f)
            for (float& logit : row) logit /= spec_.logits_divisor;
        if (spec_.logits_softcap != 0) kernels_.softcap(spec_.logits_softcap, row);
    });
}

// The token-mixing part of a layer.
void Engine::mix(int number, int count, std::span<const int32_t> positions, std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const size_t hidden = spec_.hidden_size;
    normalize(layer.attention_norm, s.x, count, s.normed);
    switch (spec_.layers[number].attention.kind) {
        case AttentionKind::full:
            attention(number, count, positions, sequence_ids);
            break;
        case AttentionKind::mla:
            latent_attention(number, count, positions, sequence_ids);
            break;
        case AttentionKind::gated_delta:
            gated_delta(number, count, positions, sequence_ids);
            break;
        case AttentionKind::short_conv:
            short_convolution(number, count, positions, sequence_ids);
            break;
    }
    product({&layer.o, 1}, prepare(s.attended, count, layer.o.cols, {&layer.o, 1}), count, {&s.projected, 1});
    if (layer.o_bias)
        each_token(count, [&](int t) { kernels_.add_scaled(1.0f, layer.o_bias, {s.projected + t * hidden, hidden}); });
    add_to_stream(s.projected, layer.attention_output_norm, count);
}

// out may be x.
void Engine::normalize(const Norm& norm, const float* x, int count, float* out) {
    const size_t hidden = spec_.hidden_size;
    each_token(count, [&](int t) {
        const std::span<const float> row{x + t * hidden, hidden};
        if (norm.bias)
            kernels_.layer_norm(row, norm.weight, norm.bias, spec_.norm_epsilon, out + t * hidden);
        else
            kernels_.rms_norm(row, norm.weight, spec_.norm_epsilon, out + t * hidden);
    });
}

void Engine::add_to_stream(float* output, const Norm& norm, int count) {
    const size_t hidden = spec_.hidden_size;
    if (norm) normalize(norm, output, count, output);
    each_token(count, [&](int t) {
        kernels_.add_scaled(spec_.residual_multiplier, output + t * hidden, {scratch_->x + t * hidden, hidden});
    });
}

}  // namespace edgemoe
