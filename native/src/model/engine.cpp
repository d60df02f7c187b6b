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

std::vector<KvShape> kv_shapes(const ModelSpec& spec, const EngineOptions& options) {
    std::vector<KvShape> shapes;
    for (const LayerSpec& layer : spec.layers)
        shapes.push_back({layer.attention.kv_heads, layer.attention.head_dim, options.key_type, options.value_type});
    return shapes;
}

}  // namespace

// Row blocks per loop item. With many tokens a product arranges its activations first, once per item: too few rows
// would not pay for it.
int blocks_per_item(const Matrix& matrix, int tokens) {
    const size_t tiles = static_cast<size_t>((tokens + kTileTokens - 1) / kTileTokens);
    const size_t bytes = block_bytes(matrix.layout, matrix.cols) * std::max<size_t>(tiles, 1);
    const size_t least = tokens <= kTileTokens ? 1 : is_ggml(matrix.layout) ? 8 : 2;
    return static_cast<int>(std::max(kItemBytes / bytes, least));
}

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

}  // namespace edgemoe
