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

namespace edgemoe {
namespace {

constexpr size_t kAlignment = 64;
// Work of one loop item, in weight bytes times token tiles: some ten microseconds, enough to hide the hand-out.
constexpr size_t kItemBytes = size_t{96} << 10;
constexpr int kTileTokens = 8;

int blocks(int rows) { return (rows + kRowBlock - 1) / kRowBlock; }
int groups(int cols) { return (cols + kGroup - 1) / kGroup; }
size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

// Row blocks per loop item. With many tokens a product arranges its activations first, once per item: too few rows
// would not pay for it.
int blocks_per_item(const Matrix& matrix, int tokens) {
    const size_t tiles = static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens);
    const size_t bytes = block_bytes(matrix.layout, matrix.cols) * std::max<size_t>(tiles, 1);
    const size_t least = tokens <= kTileTokens ? 1 : is_ggml(matrix.layout) ? 8 : 2;
    return static_cast<int>(std::max(kItemBytes / bytes, least));
}

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

std::vector<KvShape> kv_shapes(const ModelSpec& spec, const EngineOptions& options) {
    std::vector<KvShape> shapes;
    for (const LayerSpec& layer : spec.layers)
        shapes.push_back({layer.attention.kv_heads, layer.attention.head_dim, options.key_type, options.value_type});
    return shapes;
}

// int8 inputs of a product.
struct Codes {
    int8_t* codes;
    float* scales;
    float* sums;
};

}  // namespace

// Weights of one layer; pointers into the dense arena.
struct Engine::Layer {
    const float* attention_norm;
    Matrix q, k, v, o;
    const float* q_norm;
    const float* k_norm;
    const float* ffn_norm;
    Matrix router;          // [experts, hidden], of a mixture of experts
    Matrix gate, up, down;  // of a dense layer; of a mixture their shapes and layouts, data comes from the store
};

// Activations of one chunk of T tokens. P = T * top_k pairs of (token, slot), numbered token * top_k + slot.
struct Engine::Scratch {
    // Walks the buffers in one fixed order: first to measure, then to place them.
    struct Layout {
        std::byte* base;
        size_t used = 0;
        template <class T>
        void place(T*& pointer, size_t count) {
            pointer = base ? reinterpret_cast<T*>(base + used) : nullptr;
            used += aligned(count * sizeof(T));
        }
    };

    Scratch(const ModelSpec& spec, int chunk) {
        arena = Arena(layout({nullptr}, spec, chunk));
        layout({arena.data()}, spec, chunk);
    }

    static size_t bytes(const ModelSpec& spec, int chunk) {
        Scratch measured;
        return measured.layout({nullptr}, spec, chunk);
    }

    float* x;                 // [T, hidden] the residual stream
    float* normed;            // [T, hidden]
    float* projected;         // [T, hidden] output of attention or of a dense FFN
    Codes input;              // [T, widest input of a product]
    float* queries;           // [T, heads * head_dim]
    float* keys;              // [T, kv_heads * head_dim]
    float* values;            // [T, kv_heads * head_dim]
    float* attended;          // [T, heads * head_dim]
    float* maximum;           // [T, heads] online softmax
    float* sum;               // [T, heads]
    float* cosine;            // [ropes, T, pairs]
    float* sine;              // [ropes, T, pairs]
    float* scores;            // [T, experts] router
    float* weights;           // [T, top_k]
    int32_t* picks;           // [T, top_k]
    int32_t* order;           // [max experts of a layer] scratch of the selection, per token: [T, experts]
    int32_t* pairs;           // [P] pair numbers, sorted by expert
    int32_t* tokens;          // [P] their tokens
    float* gate;              // [P, ffn] or [T, ffn]
    float* up;                // [P, ffn] or [T, ffn]
    Codes hidden;             // [P, ffn] or [T, ffn]
    float* outputs;           // [P, hidden] each expert's output for each of its tokens
    size_t widest_pairs = 0;  // cosine and sine: floats per token and rope
    Arena arena;

  private:
    Scratch() = default;

    size_t layout(Layout place, const ModelSpec& spec, int chunk) {
        const size_t t = chunk, hidden = spec.hidden_size;
        size_t heads = 0, query = 0, key = 0, experts = 0, top_k = 0, pair_count = 0, ffn = 0, ffn_codes = 0,
               ffn_groups = 0;
        for (const LayerSpec& layer : spec.layers) {
            const AttentionSpec& a = layer.attention;
            heads = std::max<size_t>(heads, a.heads);
            query = std::max<size_t>(query, size_t(a.heads) * a.head_dim);
            key = std::max<size_t>(key, size_t(a.kv_heads) * a.head_dim);
            experts = std::max<size_t>(experts, layer.experts);
            top_k = std::max<size_t>(top_k, layer.top_k);
            const size_t rows = t * std::max(layer.top_k, 1);
            if (layer.experts) pair_count = std::max(pair_count, rows);
            ffn = std::max(ffn, rows * layer.ffn_dim);
            ffn_groups = std::max(ffn_groups, rows * groups(layer.ffn_dim));
        }
        for (const RopeSpec& rope : spec.ropes) widest_pairs = std::max(widest_pairs, rope.inverse_frequencies.size());
        ffn_codes = ffn_groups * kGroup;
        const size_t input_groups = groups(static_cast<int>(std::max(hidden, query)));
        place.place(x, t * hidden);
        place.place(normed, t * hidden);
        place.place(projected, t * hidden);
        place.place(input.codes, t * input_groups * kGroup);
        place.place(input.scales, t * input_groups);
        place.place(input.sums, t * input_groups);
        place.place(queries, t * query);
        place.place(keys, t * key);
        place.place(values, t * key);
        place.place(attended, t * query);
        place.place(maximum, t * heads);
        place.place(sum, t * heads);
        place.place(cosine, spec.ropes.size() * t * widest_pairs);
        place.place(sine, spec.ropes.size() * t * widest_pairs);
        place.place(scores, t * experts);
        place.place(weights, t * top_k);
        place.place(picks, t * top_k);
        place.place(order, t * experts);
        place.place(pairs, pair_count);
        place.place(tokens, pair_count);
        place.place(gate, ffn);
        place.place(up, ffn);
        place.place(hidden_codes(), ffn_codes);
        place.place(this->hidden.scales, ffn_groups);
        place.place(this->hidden.sums, ffn_groups);
        place.place(outputs, pair_count * hidden);
        return place.used;
    }

    int8_t*& hidden_codes() { return hidden.codes; }
};

MemoryPlan Engine::plan(const ModelSpec& spec, const PackIndex& index, const EngineOptions& options) {
    MemoryPlan plan;
    for (const auto& [section, bytes] : dense_sections(index)) plan.dense += bytes;
    plan.state = SequenceState::bytes(kv_shapes(spec, options), options.context);
    plan.scratch = Scratch::bytes(spec, options.chunk);
    plan.slot = ExpertStore::slot_bytes(index);
    for (const LayerSpec& layer : spec.layers) {
        plan.experts += layer.experts;
        plan.minimum_slots = std::max(plan.minimum_slots, layer.top_k);
    }
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
    final_norm_ = vector("final_norm", hidden);
    for (int number = 0; number < static_cast<int>(spec_.layers.size()); ++number) {
        const LayerSpec& spec_of = spec_.layers[number];
        const AttentionSpec& a = spec_of.attention;
        const std::string p = prefix(number);
        Layer layer{};
        layer.attention_norm = vector(p + "attention_norm", hidden);
        layer.q = matrix(p + "q", a.heads * a.head_dim, hidden);
        layer.k = matrix(p + "k", a.kv_heads * a.head_dim, hidden);
        layer.v = matrix(p + "v", a.kv_heads * a.head_dim, hidden);
        layer.o = matrix(p + "o", hidden, a.heads * a.head_dim);
        if (a.head_norm) {
            layer.q_norm = vector(p + "q_norm", a.head_dim);
            layer.k_norm = vector(p + "k_norm", a.head_dim);
        }
        layer.ffn_norm = vector(p + "ffn_norm", hidden);
        if (spec_of.experts) {
            layer.router = matrix(p + "router", spec_of.experts, hidden);
            const auto found = index_.experts.find(number);
            if (found == index_.experts.end() || found->second.sections.size() != size_t(spec_of.experts))
                throw std::invalid_argument("layer " + std::to_string(number) + " lacks experts");
            const ExpertLayer& experts = found->second;
            layer.gate = {experts.parts[0].stored.layout, spec_of.ffn_dim, hidden, nullptr};
            layer.up = {experts.parts[1].stored.layout, spec_of.ffn_dim, hidden, nullptr};
            layer.down = {experts.parts[2].stored.layout, hidden, spec_of.ffn_dim, nullptr};
            const Matrix* shapes[] = {&layer.gate, &layer.up, &layer.down};
            for (const uint32_t section : experts.sections)
                for (int part = 0; part < 3; ++part) {
                    const ExpertPart& place = experts.parts[part];
                    const auto& extents = index_.sections.at(section).extents;
                    const size_t bytes = stored_bytes(place.stored, shapes[part]->rows, shapes[part]->cols);
                    if (place.rows != shapes[part]->rows || place.cols != shapes[part]->cols ||
                        extents.size() > experts.parts.size() || place.extent >= extents.size() ||
                        place.offset > extents[place.extent].length ||
                        bytes > extents[place.extent].length - place.offset)
                        throw std::invalid_argument("an expert of layer " + std::to_string(number) +
                                                    " does not fit into its section");
                    const bool shares_extent = std::ranges::count(experts.parts, place.extent, &ExpertPart::extent) > 1;
                    if (place.stored.row_major && shares_extent)
                        require_in_place("an expert of layer " + std::to_string(number), place.rows,
                                         lead(extents[0]) + place.offset);
                }
        } else {
            layer.gate = matrix(p + "ffn.gate", spec_of.ffn_dim, hidden);
            layer.up = matrix(p + "ffn.up", spec_of.ffn_dim, hidden);
            layer.down = matrix(p + "ffn.down", hidden, spec_of.ffn_dim);
        }
        layers_.push_back(layer);
    }
    scratch_ = std::make_unique<Scratch>(spec_, options_.chunk);
    if (!index_.experts.empty()) store_ = std::make_unique<ExpertStore>(index_, files_, options_.store);
    add_sequence();
}

Engine::~Engine() = default;

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

const float* Engine::vector(const std::string& name, int size) const {
    const auto found = index_.dense.find(name);
    if (found == index_.dense.end()) throw std::invalid_argument("tensor " + name + " is missing");
    const DenseTensor& tensor = found->second;
    const Extent& extent = index_.sections[tensor.section].extents[0];
    if (tensor.layout != "vector" || tensor.rows != size || (lead(extent) + tensor.offset) % sizeof(float) != 0 ||
        tensor.offset > extent.length || size * sizeof(float) > extent.length - tensor.offset)
        throw std::invalid_argument("tensor " + name + " is not a vector of " + std::to_string(size));
    return reinterpret_cast<const float*>(dense_sections_[tensor.section] + tensor.offset);
}

int Engine::add_sequence() {
    sequences_.push_back(std::make_unique<SequenceState>(kv_shapes(spec_, options_), options_.context));
    return static_cast<int>(sequences_.size()) - 1;
}

SequenceState& Engine::sequence(int id) {
    if (id < 0 || id >= static_cast<int>(sequences_.size()))
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
    for (const auto& state : sequences_) lengths.push_back(state->length());
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
        forward_chunk(tokens.subspan(done, size), positions.subspan(done, size), sequence_ids.subspan(done, size),
                      local, logits + first_wanted * spec_.vocab_size, check);
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

template <class Body>
void Engine::each_token(int count, Body&& body) {
    constexpr int kBatch = 4;
    pool_.run((count + kBatch - 1) / kBatch, [&](int item) {
        for (int t = item * kBatch; t < std::min(count, (item + 1) * kBatch); ++t) body(t);
    });
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

    each_token(count, [&](int t) {
        dequantize_row(embedding_, tokens[t], s.x + size_t(t) * hidden);
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

    for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
        check();
        attention(layer, count, positions, sequence_ids);
        each_token(count, [&](int t) {
            const size_t row = size_t(t) * hidden;
            kernels_.rms_norm({s.x + row, size_t(hidden)}, layers_[layer].ffn_norm, spec_.norm_epsilon, s.normed + row);
        });
        if (spec_.layers[layer].experts)
            expert_ffn(layer, count);
        else
            dense_ffn(layer, count);
    }

    if (wanted.empty()) return;
    const int rows = static_cast<int>(wanted.size());
    each_token(rows, [&](int i) {
        kernels_.rms_norm({s.x + size_t(wanted[i]) * hidden, size_t(hidden)}, final_norm_, spec_.norm_epsilon,
                          s.normed + size_t(i) * hidden);
    });
    const Activations input = prepare(s.normed, rows, hidden, {&head_, 1});
    product({&head_, 1}, input, rows, {&logits, 1});
}

void Engine::attention(int number, int count, std::span<const int32_t> positions,
                       std::span<const int32_t> sequence_ids) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const AttentionSpec& a = spec_.layers[number].attention;
    const int hidden = spec_.hidden_size, dim = a.head_dim, group = a.heads / a.kv_heads;
    const size_t query_size = size_t(a.heads) * dim, key_size = size_t(a.kv_heads) * dim;

    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.rms_norm({s.x + row, size_t(hidden)}, layer.attention_norm, spec_.norm_epsilon, s.normed + row);
    });
    const std::array<Matrix, 3> projections{layer.q, layer.k, layer.v};
    const Activations input = prepare(s.normed, count, hidden, projections);
    product(projections, input, count, std::array{s.queries, s.keys, s.values});

    // Every token's key and value are stored before any token of the chunk attends, so a token sees the stored form
    // (rounded to the state's type) of its own chunk just as of earlier ones.
    each_token(count, [&](int t) {
        SequenceState& state = *sequences_[sequence_ids[t]];
        const int block = positions[t] / kKvBlock, slot = positions[t] % kKvBlock;
        const float* cosine = nullptr;
        const float* sine = nullptr;
        int pairs = 0;
        if (a.rope >= 0) {
            const size_t place = (size_t(a.rope) * count + t) * s.widest_pairs;
            cosine = s.cosine + place;
            sine = s.sine + place;
            pairs = static_cast<int>(spec_.ropes[a.rope].inverse_frequencies.size());
        }
        const auto turn = [&](float* head, const float* norm) {
            if (a.head_norm) kernels_.rms_norm({head, size_t(dim)}, norm, spec_.norm_epsilon, head);
            if (pairs) kernels_.rope(head, cosine, sine, pairs);
        };
        for (int h = 0; h < a.heads; ++h) turn(s.queries + t * query_size + size_t(h) * dim, layer.q_norm);
        for (int h = 0; h < a.kv_heads; ++h) {
            float* key = s.keys + t * key_size + size_t(h) * dim;
            const float* value = s.values + t * key_size + size_t(h) * dim;
            turn(key, layer.k_norm);
            kernels_.store_key(options_.key_type, {key, size_t(dim)}, slot, state.keys(number, block, h));
            kernels_.store_value(options_.value_type, {value, size_t(dim)}, slot, state.values(number, block, h));
        }
    });

    pool_.run(count * a.kv_heads, [&](int item) {
        const int t = item / a.kv_heads, kv_head = item % a.kv_heads;
        SequenceState& state = *sequences_[sequence_ids[t]];
        const size_t first_head = size_t(kv_head) * group;
        float* maximum = s.maximum + t * size_t(a.heads) + first_head;
        float* sum = s.sum + t * size_t(a.heads) + first_head;
        float* out = s.attended + t * query_size + first_head * dim;
        std::fill_n(maximum, group, -std::numeric_limits<float>::infinity());
        std::fill_n(sum, group, 0.0f);
        std::fill_n(out, size_t(group) * dim, 0.0f);
        const int length = positions[t] + 1;
        for (int begin = 0; begin < length; begin += kKvBlock) {
            const int block = begin / kKvBlock;
            kernels_.attend(options_.key_type, options_.value_type, s.queries + t * query_size + first_head * dim,
                            group, dim, a.scale, state.keys(number, block, kv_head),
                            state.values(number, block, kv_head), 0, std::min(kKvBlock, length - begin), maximum, sum,
                            out);
        }
        for (int h = 0; h < group; ++h)
            for (int d = 0; d < dim; ++d) out[size_t(h) * dim + d] /= sum[h];
    });

    const Activations attended = prepare(s.attended, count, static_cast<int>(query_size), {&layer.o, 1});
    product({&layer.o, 1}, attended, count, {&s.projected, 1});
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.add_scaled(1.0f, s.projected + row, {s.x + row, size_t(hidden)});
    });
}

void Engine::dense_ffn(int number, int count) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const int hidden = spec_.hidden_size, ffn = spec_.layers[number].ffn_dim;
    const size_t per_token = groups(ffn);

    const std::array<Matrix, 2> matrices{layer.gate, layer.up};
    const Activations input = prepare(s.normed, count, hidden, matrices);
    product(matrices, input, count, std::array{s.gate, s.up});
    each_token(count, [&](int t) {
        float* row = s.gate + size_t(t) * ffn;
        kernels_.silu_multiply({row, size_t(ffn)}, s.up + size_t(t) * ffn, row);
        if (reads_codes(layer.down.layout))
            kernels_.quantize({row, size_t(ffn)}, s.hidden.codes + t * per_token * kGroup,
                              s.hidden.scales + t * per_token, s.hidden.sums + t * per_token);
    });
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};
    product({&layer.down, 1}, hidden_input, count, {&s.projected, 1});
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.add_scaled(1.0f, s.projected + row, {s.x + row, size_t(hidden)});
    });
}

// Sorts the first top_k of order [count, experts] by descending score; equal scores by ascending expert number.
void Engine::choose(const LayerSpec& spec, int count) {
    Scratch& s = *scratch_;
    each_token(count, [&](int t) {
        const float* scores = s.scores + size_t(t) * spec.experts;
        int32_t* order = s.order + size_t(t) * spec.experts;
        std::iota(order, order + spec.experts, 0);
        // A score that is not a number sorts last, to keep the order a strict one; it still shows in the weights.
        const auto key = [&](int32_t e) {
            return std::isnan(scores[e]) ? -std::numeric_limits<float>::infinity() : scores[e];
        };
        std::partial_sort(order, order + spec.top_k, order + spec.experts, [&](int32_t left, int32_t right) {
            return key(left) != key(right) ? key(left) > key(right) : left < right;
        });
    });
}

// Fills picks and weights [count, top_k], in descending weight.
void Engine::route(const LayerSpec& spec, const Layer& layer, int count) {
    Scratch& s = *scratch_;
    const Activations input{s.normed, spec_.hidden_size, nullptr, nullptr, nullptr};
    product({&layer.router, 1}, input, count, {&s.scores, 1});
    each_token(count, [&](int t) { kernels_.softmax({s.scores + size_t(t) * spec.experts, size_t(spec.experts)}); });
    choose(spec, count);
    each_token(count, [&](int t) {
        float* weights = s.weights + size_t(t) * spec.top_k;
        int32_t* picks = s.picks + size_t(t) * spec.top_k;
        float total = 0;
        for (int slot = 0; slot < spec.top_k; ++slot) {
            picks[slot] = s.order[size_t(t) * spec.experts + slot];
            weights[slot] = s.scores[size_t(t) * spec.experts + picks[slot]];
            total += weights[slot];
        }
        if (spec.renormalize)
            for (int slot = 0; slot < spec.top_k; ++slot) weights[slot] /= total;
    });
}

// Tells the store what the next layer with experts will probably want: its router's choice on today's residual stream,
// which the experts of this layer have not been added to yet. The choice of most tokens first.
void Engine::predict(int number, int count) {
    Scratch& s = *scratch_;
    int next = (number + 1) % static_cast<int>(layers_.size());
    while (!spec_.layers[next].experts) next = (next + 1) % static_cast<int>(layers_.size());
    if (next <= number) return;  // the next pass begins with another token
    const LayerSpec& spec = spec_.layers[next];
    const int hidden = spec_.hidden_size;
    each_token(count, [&](int t) {
        const size_t row = size_t(t) * hidden;
        kernels_.rms_norm({s.x + row, size_t(hidden)}, layers_[next].ffn_norm, spec_.norm_epsilon, s.projected + row);
    });
    const Activations input{s.projected, hidden, nullptr, nullptr, nullptr};
    product({&layers_[next].router, 1}, input, count, {&s.scores, 1});
    choose(spec, count);
    std::vector<int32_t> uses(spec.experts, 0), expected;
    for (int t = 0; t < count; ++t)
        for (int slot = 0; slot < spec.top_k; ++slot) {
            const int32_t expert = s.order[size_t(t) * spec.experts + slot];
            if (uses[expert]++ == 0) expected.push_back(expert);
        }
    std::stable_sort(expected.begin(), expected.end(),
                     [&](int32_t left, int32_t right) { return uses[left] > uses[right]; });
    if (store_->wants_hints()) store_->hint(next, expected);
    if (recording_) {
        const size_t width = routing_column(static_cast<int>(layers_.size())), column = routing_column(next);
        for (int t = 0; t < count; ++t)
            for (int slot = 0; slot < spec.top_k; ++slot)
                chunk_routing_.predicted[t * width + column + slot] =
                    static_cast<uint16_t>(s.order[size_t(t) * spec.experts + slot]);
    }
}

void Engine::expert_ffn(int number, int count) {
    Scratch& s = *scratch_;
    const Layer& layer = layers_[number];
    const LayerSpec& spec = spec_.layers[number];
    const int hidden = spec_.hidden_size, ffn = spec.ffn_dim, top_k = spec.top_k;
    const size_t per_pair = groups(ffn);

    route(spec, layer, count);

    // Pairs of (token, slot) by expert. Experts are asked for in the order of their tokens, most first; for a single
    // token that is its slot order, the largest weight first.
    std::vector<int32_t> begins(spec.experts + 1, 0);
    for (int pair = 0; pair < count * top_k; ++pair) ++begins[s.picks[pair] + 1];
    std::vector<int32_t> active;
    for (int pair = 0; pair < count * top_k; ++pair) {
        const int32_t expert = s.picks[pair];
        if (begins[expert + 1] > 0) {
            active.push_back(expert);
            begins[expert + 1] = -begins[expert + 1];
        }
    }
    std::stable_sort(active.begin(), active.end(),
                     [&](int32_t left, int32_t right) { return begins[left + 1] < begins[right + 1]; });
    for (int32_t& begin : begins) begin = std::abs(begin);
    std::partial_sum(begins.begin(), begins.end(), begins.begin());
    std::vector<int32_t> cursor(begins.begin(), begins.end() - 1);
    for (int pair = 0; pair < count * top_k; ++pair) {
        const int32_t place = cursor[s.picks[pair]]++;
        s.pairs[place] = pair;
        s.tokens[place] = pair / top_k;
    }

    const std::array<Matrix, 2> inner{layer.gate, layer.up};
    const Activations input = prepare(s.normed, count, hidden, inner);
    // The hidden activations lie in the order of `pairs`: an expert's rows are contiguous.
    const Activations hidden_input{s.gate, ffn, s.hidden.codes, s.hidden.scales, s.hidden.sums};

    struct Work {
        Matrix gate, up, down;
        int first, count;  // rows of `pairs`
        int gate_item, down_item;
        int gate_step, down_step;  // row blocks per item
    };
    std::vector<Work> work;
    std::vector<ExpertStream::Need> needs;
    for (const int32_t expert : active)
        needs.push_back({expert, s.tokens[begins[expert + 1] - 1], begins[expert + 1] - begins[expert]});
    ExpertStream stream(*store_, number, count, needs);
    if (recording_) {
        const size_t width = routing_column(static_cast<int>(layers_.size())), column = routing_column(number);
        for (int pair = 0; pair < count * top_k; ++pair) {
            const size_t place = pair / top_k * width + column + pair % top_k;
            chunk_routing_.picks[place] = static_cast<uint16_t>(s.picks[pair]);
            chunk_routing_.weights[place] = s.weights[pair];
        }
    }
    if (store_->wants_hints() || recording_) predict(number, count);
    for (auto ready = stream.next(); !ready.empty(); ready = stream.next()) {
        work.clear();
        int gate_items = 0, down_items = 0;
        for (const ExpertStream::Item& item : ready) {
            const int32_t expert = active[item.position];
            Work w{};
            w.gate = layer.gate;
            w.up = layer.up;
            w.down = layer.down;
            w.gate.data = item.weights.gate;
            w.up.data = item.weights.up;
            w.down.data = item.weights.down;
            w.first = begins[expert];
            w.count = begins[expert + 1] - begins[expert];
            // Whole groups of rows, so that each item can quantize what it made for the next product.
            constexpr int kGroupBlocks = kGroup / kRowBlock;
            w.gate_step = std::max(blocks_per_item(w.gate, w.count) / 2 / kGroupBlocks, 1) * kGroupBlocks;
            w.down_step = blocks_per_item(w.down, w.count);
            w.gate_item = gate_items;
            w.down_item = down_items;
            gate_items += (blocks(ffn) + w.gate_step - 1) / w.gate_step;
            down_items += (blocks(hidden) + w.down_step - 1) / w.down_step;
            work.push_back(w);
        }
        pool_.run(gate_items, [&](int item) {
            size_t i = work.size() - 1;
            while (work[i].gate_item > item) --i;
            const Work& w = work[i];
            const int first = (item - w.gate_item) * w.gate_step, last = std::min(first + w.gate_step, blocks(ffn));
            const std::span<const int32_t> tokens(s.tokens + w.first, w.count);
            kernels_.matmul(w.gate, input, tokens, w.count, first, last, s.gate + size_t(w.first) * ffn, ffn);
            kernels_.matmul(w.up, input, tokens, w.count, first, last, s.up + size_t(w.first) * ffn, ffn);
            const size_t begin = size_t(first) * kRowBlock, size = std::min<size_t>(last * kRowBlock, ffn) - begin;
            for (int p = w.first; p < w.first + w.count; ++p) {
                float* row = s.gate + size_t(p) * ffn + begin;
                kernels_.silu_multiply({row, size}, s.up + size_t(p) * ffn + begin, row);
                if (reads_codes(w.down.layout)) {
                    const size_t group = p * per_pair + begin / kGroup;
                    kernels_.quantize({row, size}, s.hidden.codes + group * kGroup, s.hidden.scales + group,
                                      s.hidden.sums + group);
                }
            }
        });
        pool_.run(down_items, [&](int item) {
            size_t i = work.size() - 1;
            while (work[i].down_item > item) --i;
            const Work& w = work[i];
            const int first = (item - w.down_item) * w.down_step, last = std::min(first + w.down_step, blocks(hidden));
            Activations rows = hidden_input;
            rows.values += size_t(w.first) * ffn;
            rows.codes += w.first * per_pair * kGroup;
            rows.scales += w.first * per_pair;
            rows.sums += w.first * per_pair;
            kernels_.matmul(w.down, rows, {}, w.count, first, last, s.outputs + size_t(w.first) * hidden, hidden);
        });
    }

    // Each token adds its experts' outputs in slot order, whenever they were computed. `tokens` has served its purpose
    // and takes the inverse of `pairs`.
    for (int place = 0; place < count * top_k; ++place) s.tokens[s.pairs[place]] = place;
    each_token(count, [&](int t) {
        float* x = s.x + size_t(t) * hidden;
        for (int slot = 0; slot < top_k; ++slot) {
            const int pair = t * top_k + slot;
            kernels_.add_scaled(s.weights[pair], s.outputs + size_t(s.tokens[pair]) * hidden, {x, size_t(hidden)});
        }
    });
}

}  // namespace edgemoe
