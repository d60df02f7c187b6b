// edgemoe._core.kernels: every kernel by itself, for tests and benchmarks. Sizes are checked, inputs are copied into
// aligned memory; nothing here is on the engine's path.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "device_headers.h"
#include "edgemoe/kernel_speed.h"
#include "edgemoe/kernels.h"

namespace py = pybind11;

void bind_kernels(py::module_& module);

namespace {

using edgemoe::Activations;
using edgemoe::Kernels;
using edgemoe::kGroup;
using edgemoe::kKvBlock;
using edgemoe::kKvGroup;
using edgemoe::kRowBlock;
using edgemoe::KvType;
using edgemoe::Layout;
using edgemoe::Matrix;
using Floats = py::array_t<float, py::array::c_style | py::array::forcecast>;
using Bytes = py::array_t<uint8_t, py::array::c_style>;
using Integers = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;

constexpr std::align_val_t kAlignment{64};

struct AlignedDelete {
    void operator()(std::byte* data) const { ::operator delete[](data, kAlignment); }
};

// `size` bytes, 64-byte aligned, copied from `source` if there is one. Padded to whole vectors with a NaN pattern.
class Buffer {
  public:
    explicit Buffer(size_t size, const void* source = nullptr)
        : data_(static_cast<std::byte*>(::operator new[](size + 64, kAlignment))) {
        std::memset(data_.get(), 0xFF, size + 64);
        if (source && size) std::memcpy(data_.get(), source, size);
    }
    template <class T>
    T* as() const {
        return reinterpret_cast<T*>(data_.get());
    }

  private:
    std::unique_ptr<std::byte[], AlignedDelete> data_;
};

void require(bool condition, const std::string& message) {
    if (!condition) throw py::value_error(message);
}

void require_dimensions(const py::array& array, int dimensions, const char* name) {
    require(array.ndim() == dimensions, std::string(name) + " must have " + std::to_string(dimensions) +
                                            " dimensions, it has " + std::to_string(array.ndim()));
}

void require_length(const py::array& array, py::ssize_t length, const char* name) {
    require_dimensions(array, 1, name);
    require(array.shape(0) == length, std::string(name) + " must have " + std::to_string(length) +
                                          " elements, it has " + std::to_string(array.shape(0)));
}

size_t size_of(const py::array& array) { return static_cast<size_t>(array.size()); }

std::span<const float> span_of(const Floats& array) { return {array.data(), size_of(array)}; }

KvType kv_type(const std::string& name) {
    if (name == "f32") return KvType::f32;
    if (name == "f16") return KvType::f16;
    if (name == "q8_0") return KvType::q8_0;
    throw py::value_error("unknown cache type '" + name + "'; known: f32, f16, q8_0");
}

Matrix make_matrix(const std::string& layout, const Bytes& data, int rows, int cols, const Buffer& buffer) {
    require(rows > 0 && cols > 0, "rows and cols must be positive");
    require_dimensions(data, 1, "data");
    const Layout found = edgemoe::layout_from_name(layout);
    const size_t bytes = edgemoe::matrix_bytes(found, rows, cols);
    require(size_of(data) == bytes, "data must have " + std::to_string(bytes) + " bytes for " + layout + " [" +
                                        std::to_string(rows) + ", " + std::to_string(cols) + "], it has " +
                                        std::to_string(data.size()));
    return {found, rows, cols, buffer.as<std::byte>()};
}

py::tuple quantize(const std::string& isa, const Floats& x) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    const auto groups = (x.size() + kGroup - 1) / kGroup;
    Buffer codes(static_cast<size_t>(groups) * kGroup);
    Floats scales(groups);
    Floats sums(groups);
    kernels.quantize(span_of(x), codes.as<int8_t>(), scales.mutable_data(), sums.mutable_data());
    py::array_t<int8_t> result(groups * kGroup);
    std::memcpy(result.mutable_data(), codes.as<int8_t>(), size_of(result));
    return py::make_tuple(result, scales, sums);
}

Floats multiply(const Kernels& kernels, const Matrix& matrix, const Floats& x, const std::optional<Integers>& tokens,
                int first_block, std::optional<int> last_block) {
    const int rows = matrix.rows, cols = matrix.cols;
    require_dimensions(x, 2, "x");
    require(x.shape(1) == cols,
            "x must have " + std::to_string(cols) + " columns, it has " + std::to_string(x.shape(1)));
    const int blocks = (rows + kRowBlock - 1) / kRowBlock;
    const int end = last_block.value_or(blocks);
    require(0 <= first_block && first_block <= end && end <= blocks, "blocks must lie in 0.." + std::to_string(blocks));
    auto count = static_cast<int>(x.shape(0));
    std::span<const int32_t> indices;
    if (tokens) {
        require_dimensions(*tokens, 1, "tokens");
        require(tokens->size() > 0, "tokens must not be empty; None takes all of them");
        indices = {tokens->data(), size_of(*tokens)};
        for (const int32_t token : indices)
            require(token >= 0 && token < count,
                    "token " + std::to_string(token) + " is not one of the " + std::to_string(count) + " rows of x");
        count = static_cast<int>(indices.size());
    }

    const size_t groups = (static_cast<size_t>(cols) + kGroup - 1) / kGroup;
    const auto all = static_cast<size_t>(x.shape(0));
    const Buffer values(size_of(x) * sizeof(float), x.data());
    const Buffer codes(all * groups * kGroup);
    const Buffer scales(all * groups * sizeof(float));
    const Buffer sums(all * groups * sizeof(float));
    for (size_t i = 0; i < all; ++i)
        kernels.quantize({values.as<float>() + i * cols, static_cast<size_t>(cols)},
                         codes.as<int8_t>() + i * groups * kGroup, scales.as<float>() + i * groups,
                         sums.as<float>() + i * groups);
    const Activations activations{values.as<float>(), cols, codes.as<int8_t>(), scales.as<float>(), sums.as<float>()};
    Floats out({py::ssize_t{count}, py::ssize_t{rows}});
    std::memset(out.mutable_data(), 0, size_of(out) * sizeof(float));
    kernels.matmul(matrix, activations, indices, count, first_block, end, out.mutable_data(), rows);
    return out;
}

Floats matmul(const std::string& isa, const std::string& layout, const Bytes& data, int rows, int cols, const Floats& x,
              const std::optional<Integers>& tokens, int first_block, std::optional<int> last_block) {
    const Buffer weights(size_of(data), data.data());
    const Matrix matrix = make_matrix(layout, data, rows, cols, weights);
    return multiply(edgemoe::select_kernels(isa), matrix, x, tokens, first_block, last_block);
}

// levels: (bits that the level adds, its bytes), coarse to fine.
// later: how many later levels level 0 has parameters of; those given may be fewer.
Floats nested_matmul(const std::string& isa, const std::vector<std::pair<int, Bytes>>& levels, int later, int rows,
                     int cols, const Floats& x, const std::optional<Integers>& tokens, int first_block,
                     std::optional<int> last_block) {
    require(rows > 0 && cols > 0, "rows and cols must be positive");
    require(!levels.empty(), "a nested matrix has at least one level");
    require(later >= 0 && later < edgemoe::kMaxLevels && levels.size() - 1 <= static_cast<size_t>(later),
            "later must be the number of levels after the first, 0 to 7");
    Matrix matrix{Layout::nested, rows, cols, nullptr};
    matrix.levels.later = later;
    std::vector<Buffer> buffers;
    int total = 0;
    for (const auto& [bits, data] : levels) {
        require(bits >= 1 && (total += bits) <= 8, "levels have 1 to 8 bits in all");
        require_dimensions(data, 1, "data");
        const size_t bytes = edgemoe::stored_bytes({Layout::nested, false, bits, !buffers.empty(), later}, rows, cols);
        require(size_of(data) == bytes, "level " + std::to_string(buffers.size()) + " must have " +
                                            std::to_string(bytes) + " bytes, it has " + std::to_string(data.size()));
        buffers.emplace_back(bytes, data.data());
        matrix.levels.bits[matrix.levels.count] = static_cast<uint8_t>(bits);
        matrix.levels.data[matrix.levels.count++] = buffers.back().as<std::byte>();
    }
    return multiply(edgemoe::select_kernels(isa), matrix, x, tokens, first_block, last_block);
}

// `shift`: the target begins so many bytes behind the source (before it, if negative) in one buffer; otherwise in
// another one.
Bytes interleave(const std::string& name, const Bytes& data, int rows, int cols, std::optional<int> shift) {
    require(rows > 0 && cols > 0, "rows and cols must be positive");
    require_dimensions(data, 1, "data");
    const edgemoe::StoredLayout stored = edgemoe::stored_layout(name);
    require(stored.row_major, "layout " + name + " is interleaved as it is stored");
    const size_t bytes = edgemoe::stored_bytes(stored, rows, cols);
    require(size_of(data) == bytes,
            "data must have " + std::to_string(bytes) + " bytes, it has " + std::to_string(data.size()));
    const size_t size = edgemoe::matrix_bytes(stored.layout, rows, cols);
    const Buffer scratch(edgemoe::block_bytes(stored.layout, cols));
    const size_t distance = static_cast<size_t>(std::abs(shift.value_or(static_cast<int>(bytes))));
    const Buffer buffer(size + distance);
    std::byte* source = buffer.as<std::byte>() + (shift.value_or(1) < 0 ? distance : 0);
    std::byte* target = buffer.as<std::byte>() + (shift.value_or(1) < 0 ? 0 : distance);
    std::memcpy(source, data.data(), bytes);
    edgemoe::interleave(stored.layout, rows, cols, source, target, scratch.as<std::byte>());
    Bytes out(static_cast<py::ssize_t>(size));
    std::memcpy(out.mutable_data(), target, size);
    return out;
}

Floats dequantize_row(const std::string& layout, const Bytes& data, int rows, int cols, int row) {
    const Buffer weights(size_of(data), data.data());
    const Matrix matrix = make_matrix(layout, data, rows, cols, weights);
    require(row >= 0 && row < rows, "row " + std::to_string(row) + " is not one of " + std::to_string(rows));
    Floats out(cols);
    edgemoe::dequantize_row(matrix, row, out.mutable_data());
    return out;
}

Floats rms_norm(const std::string& isa, const Floats& x, const Floats& weight, float epsilon) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    require(x.size() > 0, "x must not be empty");
    require_length(weight, x.size(), "weight");
    Floats out(x.size());
    kernels.rms_norm(span_of(x), weight.data(), epsilon, out.mutable_data());
    return out;
}

Floats layer_norm(const std::string& isa, const Floats& x, const Floats& weight, const Floats& bias, float epsilon) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    require(x.size() > 0, "x must not be empty");
    require_length(weight, x.size(), "weight");
    require_length(bias, x.size(), "bias");
    Floats out(x.size());
    kernels.layer_norm(span_of(x), weight.data(), bias.data(), epsilon, out.mutable_data());
    return out;
}

Floats gelu_multiply(const std::string& isa, const Floats& gate, const Floats& up) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(gate, 1, "gate");
    require_length(up, gate.size(), "up");
    Floats out(gate.size());
    kernels.gelu_multiply(span_of(gate), up.data(), out.mutable_data());
    return out;
}

Floats clamped_swiglu(const std::string& isa, const Floats& gate, const Floats& up, float alpha, float limit) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(gate, 1, "gate");
    require_length(up, gate.size(), "up");
    Floats out(gate.size());
    kernels.clamped_swiglu(span_of(gate), up.data(), alpha, limit, out.mutable_data());
    return out;
}

Floats silu_multiply(const std::string& isa, const Floats& gate, const Floats& up) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(gate, 1, "gate");
    require_length(up, gate.size(), "up");
    Floats out(gate.size());
    kernels.silu_multiply(span_of(gate), up.data(), out.mutable_data());
    return out;
}

Floats copy_of(const Floats& x) {
    Floats out(std::vector<py::ssize_t>(x.shape(), x.shape() + x.ndim()));
    std::memcpy(out.mutable_data(), x.data(), size_of(x) * sizeof(float));
    return out;
}

Floats softmax(const std::string& isa, const Floats& x) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    Floats out = copy_of(x);
    kernels.softmax({out.mutable_data(), size_of(out)});
    return out;
}

Floats sigmoid(const std::string& isa, const Floats& x) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    Floats out = copy_of(x);
    kernels.sigmoid({out.mutable_data(), size_of(out)});
    return out;
}

Floats softplus_decay(const std::string& isa, const Floats& x, const Floats& bias, const Floats& rate) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    require_length(bias, x.size(), "bias");
    require_length(rate, x.size(), "rate");
    Floats out = copy_of(x);
    kernels.softplus_decay({out.mutable_data(), size_of(out)}, bias.data(), rate.data());
    return out;
}

// Cosine and sine.
py::tuple rotary(const Floats& inverse_frequencies, int position, float factor) {
    require_dimensions(inverse_frequencies, 1, "inverse_frequencies");
    Floats cosine(inverse_frequencies.size()), sine(inverse_frequencies.size());
    edgemoe::rotary(span_of(inverse_frequencies), position, factor, cosine.mutable_data(), sine.mutable_data());
    return py::make_tuple(cosine, sine);
}

Floats softcap(const std::string& isa, float cap, const Floats& x) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(x, 1, "x");
    Floats out = copy_of(x);
    kernels.softcap(cap, {out.mutable_data(), size_of(out)});
    return out;
}

Floats add_scaled(const std::string& isa, float a, const Floats& x, const Floats& y) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(y, 1, "y");
    require_length(x, y.size(), "x");
    Floats out = copy_of(y);
    kernels.add_scaled(a, x.data(), {out.mutable_data(), size_of(out)});
    return out;
}

Floats rope(const std::string& isa, const Floats& head, const Floats& cosine, const Floats& sine) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(head, 1, "head");
    require_dimensions(cosine, 1, "cosine");
    require_length(sine, cosine.size(), "sine");
    require(2 * cosine.size() <= head.size(), "head is shorter than the pairs to rotate");
    Floats out = copy_of(head);
    kernels.rope(out.mutable_data(), cosine.data(), sine.data(), static_cast<int>(cosine.size()));
    return out;
}

void require_kv(KvType type, py::ssize_t dim) {
    require(dim > 0, "vectors must not be empty");
    require(type != KvType::q8_0 || dim % kKvGroup == 0, "q8_0 needs a dimension that is a multiple of " +
                                                             std::to_string(kKvGroup) + ", not " + std::to_string(dim));
}

// One sequence's positions `start` ... in blocks of a pool; what is not stored keeps a NaN pattern. values: none where
// keys are all there is. table: where in the pool the sequence's blocks are, one after the other if there is none;
// entries of blocks without stored positions may be anything.
class Cache {
  public:
    Cache(const Kernels& kernels, KvType key_type, KvType value_type, const Floats& keys, const Floats* values,
          int start, const std::optional<std::vector<int32_t>>& table) {
        const auto dim = static_cast<int>(keys.shape(1)), positions = static_cast<int>(keys.shape(0));
        const int count = (positions + kKvBlock - 1) / kKvBlock;
        require(start >= 0 && start <= positions, "start must lie in 0.." + std::to_string(positions));
        for (int number = 0; number < count; ++number) table_.push_back(number);
        if (table) table_ = *table;
        require(static_cast<int>(table_.size()) == count,
                "table must have " + std::to_string(count) + " entries, it has " + std::to_string(table_.size()));
        std::vector<int32_t> used(table_.begin() + std::min(start / kKvBlock, count), table_.end());
        std::sort(used.begin(), used.end());
        require(std::adjacent_find(used.begin(), used.end()) == used.end(), "table names a block twice");
        require(used.empty() || (used.front() >= 0 && used.back() < 1 << 12), "table must name blocks 0..4095");
        const size_t key_bytes = edgemoe::kv_block_bytes(key_type, dim);
        const size_t bytes = key_bytes + (values ? edgemoe::kv_block_bytes(value_type, dim) : 0);
        pool_.emplace(bytes * (used.empty() ? 0 : static_cast<size_t>(used.back()) + 1));
        for (int position = start; position < positions; ++position) {
            kernels.store_key(key_type, {keys.data(position, 0), static_cast<size_t>(dim)}, position,
                              blocks(bytes, key_bytes));
            if (values)
                kernels.store_value(value_type, {values->data(position, 0), static_cast<size_t>(dim)}, position,
                                    blocks(bytes, key_bytes));
        }
        blocks_ = blocks(bytes, key_bytes);
    }

    const edgemoe::KvBlocks& blocks() const { return blocks_; }

  private:
    edgemoe::KvBlocks blocks(size_t stride, size_t values) const {
        return {pool_->as<std::byte>(), stride, values, table_.data()};
    }

    std::vector<int32_t> table_;
    std::optional<Buffer> pool_;
    edgemoe::KvBlocks blocks_{};
};

Bytes store(const std::string& isa, const std::string& type_name, bool keys, const Floats& vectors) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    const KvType type = kv_type(type_name);
    require_dimensions(vectors, 2, "vectors");
    require_kv(type, vectors.shape(1));
    require(vectors.shape(0) >= 1 && vectors.shape(0) <= kKvBlock,
            "a block holds 1.." + std::to_string(kKvBlock) + " positions, not " + std::to_string(vectors.shape(0)));
    Bytes out(static_cast<py::ssize_t>(edgemoe::kv_block_bytes(type, static_cast<int>(vectors.shape(1)))));
    const Buffer block(size_of(out));
    const int32_t number = 0;
    for (py::ssize_t position = 0; position < vectors.shape(0); ++position)
        (keys ? kernels.store_key : kernels.store_value)(
            type, {vectors.data(position, 0), static_cast<size_t>(vectors.shape(1))}, static_cast<int>(position),
            {block.as<std::byte>(), size_of(out), 0, &number});
    std::memcpy(out.mutable_data(), block.as<uint8_t>(), size_of(out));
    return out;
}

py::tuple attend(const std::string& isa, const std::string& key_name, const std::string& value_name,
                 const Floats& queries, const Floats& keys, const Floats& values, float scale, int start,
                 const std::optional<std::vector<int32_t>>& table, const std::optional<Floats>& sinks) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    const KvType key_type = kv_type(key_name);
    const KvType value_type = kv_type(value_name);
    require_dimensions(queries, 2, "queries");
    require_dimensions(keys, 2, "keys");
    require_dimensions(values, 2, "values");
    const auto heads = static_cast<int>(queries.shape(0)), dim = static_cast<int>(queries.shape(1));
    require_kv(key_type, dim);
    require_kv(value_type, dim);
    require(keys.shape(1) == dim && values.shape(1) == dim, "queries, keys and values must have one dimension");
    require(keys.shape(0) == values.shape(0), "keys and values must be as many");
    const Cache cache(kernels, key_type, value_type, keys, &values, start, table);
    const std::vector<float> none(heads, -std::numeric_limits<float>::infinity()), zeros(size_t(heads) * dim);
    Floats maximum(heads, none.data()), sum(heads, zeros.data()), accumulator({heads, dim}, zeros.data());
    if (sinks) {  // scores before all others, whose values are zeros
        require_length(*sinks, heads, "sinks");
        std::copy_n(sinks->data(), heads, maximum.mutable_data());
        std::fill_n(sum.mutable_data(), heads, 1.0f);
    }
    kernels.attend(key_type, value_type, queries.data(), heads, dim, scale, cache.blocks(), start,
                   static_cast<int>(keys.shape(0)), maximum.mutable_data(), sum.mutable_data(),
                   accumulator.mutable_data());
    return py::make_tuple(maximum, sum, accumulator);
}

// Values are the first value_dim elements of the keys.
py::tuple attend_latent(const std::string& isa, const std::string& type_name, const Floats& queries, const Floats& keys,
                        int value_dim, float scale, int start, const std::optional<std::vector<int32_t>>& table) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    const KvType type = kv_type(type_name);
    require_dimensions(queries, 2, "queries");
    require_dimensions(keys, 2, "keys");
    const auto heads = static_cast<int>(queries.shape(0)), dim = static_cast<int>(queries.shape(1));
    require_kv(type, dim);
    require(keys.shape(1) == dim, "queries and keys must have one dimension");
    require(value_dim > 0 && value_dim <= dim, "value_dim must lie in 1.." + std::to_string(dim));
    const Cache cache(kernels, type, type, keys, nullptr, start, table);
    const std::vector<float> none(heads, -std::numeric_limits<float>::infinity()), zeros(size_t(heads) * value_dim);
    Floats maximum(heads, none.data()), sum(heads, zeros.data()), accumulator({heads, value_dim}, zeros.data());
    kernels.attend_latent(type, queries.data(), heads, dim, value_dim, scale, cache.blocks(), start,
                          static_cast<int>(keys.shape(0)), maximum.mutable_data(), sum.mutable_data(),
                          accumulator.mutable_data());
    return py::make_tuple(maximum, sum, accumulator);
}

Floats sigmoid_multiply(const std::string& isa, const Floats& gate, const Floats& x) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(gate, 1, "gate");
    require_length(x, gate.size(), "x");
    Floats out(gate.size());
    kernels.sigmoid_multiply(span_of(gate), x.data(), out.mutable_data());
    return out;
}

// weights [taps, channels]; rows [taps, channels], of which the first `missing` are before the beginning.
Floats convolve(const std::string& isa, const Floats& weights, const Floats& rows, int missing, bool silu) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(weights, 2, "weights");
    require_dimensions(rows, 2, "rows");
    const auto taps = static_cast<int>(weights.shape(0)), channels = static_cast<int>(weights.shape(1));
    require(rows.shape(0) == taps && rows.shape(1) == channels, "weights and rows must have one shape");
    require(missing >= 0 && missing <= taps, "missing must lie in 0.." + std::to_string(taps));
    const Buffer data(edgemoe::matrix_bytes(Layout::f32, channels, taps));
    for (int channel = 0; channel < channels; ++channel)
        for (int tap = 0; tap < taps; ++tap)
            data.as<float>()[(channel / kRowBlock * taps + tap) * kRowBlock + channel % kRowBlock] =
                weights.at(tap, channel);
    std::vector<const float*> inputs;
    for (int tap = 0; tap < taps; ++tap) inputs.push_back(tap < missing ? nullptr : rows.data(tap, 0));
    Floats out(channels);
    const int blocks = (channels + kRowBlock - 1) / kRowBlock;
    kernels.convolve({Layout::f32, channels, taps, data.as<std::byte>()}, inputs.data(), 0, blocks, silu,
                     out.mutable_data());
    return out;
}

// The new state and the output.
py::tuple gated_delta(const std::string& isa, const Floats& state, const Floats& query, const Floats& key,
                      const Floats& value, float decay, float beta) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require_dimensions(state, 2, "state");
    require_length(query, state.shape(0), "query");
    require_length(key, state.shape(0), "key");
    require_length(value, state.shape(1), "value");
    require(state.shape(1) % edgemoe::kLanes == 0, "value must have a multiple of 16 elements");
    Floats after = copy_of(state), out(state.shape(1));
    kernels.gated_delta(after.mutable_data(), static_cast<int>(state.shape(0)), static_cast<int>(state.shape(1)),
                        query.data(), key.data(), value.data(), decay, beta, out.mutable_data());
    return py::make_tuple(after, out);
}

py::dict as_dict(const edgemoe::KernelSpeed& speed) {
    using namespace py::literals;
    return py::dict("bytes"_a = speed.bytes, "operations"_a = speed.operations, "seconds"_a = speed.seconds);
}

// layout: of a nested matrix the names of its levels, or of the first of them, joined by "+".
py::dict product_speed(const std::string& isa, const std::string& layout, int rows, int cols, int tokens, int threads,
                       uint64_t memory, double seconds) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require(rows > 0 && cols > 0 && tokens > 0 && threads > 0, "rows, cols, tokens and threads must be positive");
    Matrix shape{Layout::nested, rows, cols, nullptr};
    int total = 0;
    std::istringstream names(layout);
    require(!layout.empty(), "layout must not be empty");
    for (std::string name; std::getline(names, name, '+');) {
        const edgemoe::StoredLayout stored = edgemoe::stored_layout(name);
        if (stored.layout != Layout::nested && name == layout) {
            shape.layout = stored.layout;
            break;
        }
        edgemoe::NestedLevels& levels = shape.levels;
        if (levels.count == 0) levels.later = stored.later;
        require(stored.layout == Layout::nested && stored.refines == (levels.count > 0) &&
                    levels.count <= levels.later && (total += stored.level_bits) <= 8,
                layout + " is neither a layout nor the levels of one, of at most 8 bits in all");
        levels.bits[levels.count++] = static_cast<uint8_t>(stored.level_bits);
    }
    edgemoe::block_bytes(shape);
    edgemoe::KernelSpeed speed;
    {
        const py::gil_scoped_release release;
        speed = edgemoe::product_speed(kernels, shape, tokens, threads, memory, seconds);
    }
    return as_dict(speed);
}

py::dict byte_product_speed(const std::string& isa, int threads, double seconds) {
    const Kernels& kernels = edgemoe::select_kernels(isa);
    require(threads > 0, "threads must be positive");
    edgemoe::KernelSpeed speed;
    {
        const py::gil_scoped_release release;
        speed = edgemoe::byte_product_speed(kernels.name, threads, seconds);
    }
    return as_dict(speed);
}

}  // namespace

void bind_kernels(py::module_& module) {
    using py::arg;
    py::module_ kernels = module.def_submodule("kernels", "The arithmetic by itself; for tests and benchmarks.");
    kernels.def("available_isas", [] {
        std::vector<std::string> names;
        for (const std::string_view name : edgemoe::available_isas()) names.emplace_back(name);
        return names;
    });
    kernels.def("device_headers", [] {
        py::dict texts;
        texts["shapes"] = edgemoe::python::kShapes;
        texts["kernel_list"] = edgemoe::python::kKernelList;
        return texts;
    });
    kernels.def(
        "selected_isa", [](const std::string& name) { return std::string(edgemoe::select_kernels(name).name); },
        arg("name") = "");
    kernels.def(
        "matrix_bytes",
        [](const std::string& layout, int rows, int cols) {
            return edgemoe::matrix_bytes(edgemoe::layout_from_name(layout), rows, cols);
        },
        arg("layout"), arg("rows"), arg("cols"));
    kernels.def(
        "kv_block_bytes", [](const std::string& type, int dim) { return edgemoe::kv_block_bytes(kv_type(type), dim); },
        arg("type"), arg("dim"));
    kernels.def("quantize", quantize, arg("isa"), arg("x"));
    kernels.def("matmul", matmul, arg("isa"), arg("layout"), arg("data"), arg("rows"), arg("cols"), arg("x"),
                arg("tokens") = py::none(), arg("first_block") = 0, arg("last_block") = py::none());
    kernels.def("product_speed", product_speed, arg("isa"), arg("layout"), arg("rows"), arg("cols"), arg("tokens"),
                arg("threads"), arg("memory"), arg("seconds"));
    kernels.def("byte_product_speed", byte_product_speed, arg("isa"), arg("threads"), arg("seconds"));
    kernels.def("nested_matmul", nested_matmul, arg("isa"), arg("levels"), arg("later"), arg("rows"), arg("cols"),
                arg("x"), arg("tokens") = py::none(), arg("first_block") = 0, arg("last_block") = py::none());
    kernels.def(
        "stored_bytes",
        [](const std::string& name, int rows, int cols) {
            return edgemoe::stored_bytes(edgemoe::stored_layout(name), rows, cols);
        },
        arg("name"), arg("rows"), arg("cols"));
    kernels.def("interleave", interleave, arg("name"), arg("data"), arg("rows"), arg("cols"),
                arg("shift") = py::none());
    kernels.def("dequantize_row", dequantize_row, arg("layout"), arg("data"), arg("rows"), arg("cols"), arg("row"));
    kernels.def("rms_norm", rms_norm, arg("isa"), arg("x"), arg("weight"), arg("epsilon"));
    kernels.def("layer_norm", layer_norm, arg("isa"), arg("x"), arg("weight"), arg("bias"), arg("epsilon"));
    kernels.def("gelu_multiply", gelu_multiply, arg("isa"), arg("gate"), arg("up"));
    kernels.def("clamped_swiglu", clamped_swiglu, arg("isa"), arg("gate"), arg("up"), arg("alpha"), arg("limit"));
    kernels.def("sigmoid", sigmoid, arg("isa"), arg("x"));
    kernels.def("softplus_decay", softplus_decay, arg("isa"), arg("x"), arg("bias"), arg("rate"));
    kernels.def("rotary", rotary, arg("inverse_frequencies"), arg("position"), arg("factor") = 1.0f);
    kernels.def("softcap", softcap, arg("isa"), arg("cap"), arg("x"));
    kernels.def("silu_multiply", silu_multiply, arg("isa"), arg("gate"), arg("up"));
    kernels.def("softmax", softmax, arg("isa"), arg("x"));
    kernels.def("add_scaled", add_scaled, arg("isa"), arg("a"), arg("x"), arg("y"));
    kernels.def("rope", rope, arg("isa"), arg("head"), arg("cosine"), arg("sine"));
    kernels.def("store", store, arg("isa"), arg("type"), arg("keys"), arg("vectors"));
    kernels.def("attend", attend, arg("isa"), arg("key_type"), arg("value_type"), arg("queries"), arg("keys"),
                arg("values"), arg("scale"), arg("start") = 0, arg("table") = py::none(), arg("sinks") = py::none());
    kernels.def("attend_latent", attend_latent, arg("isa"), arg("type"), arg("queries"), arg("keys"), arg("value_dim"),
                arg("scale"), arg("start") = 0, arg("table") = py::none());
    kernels.def("sigmoid_multiply", sigmoid_multiply, arg("isa"), arg("gate"), arg("x"));
    kernels.def("convolve", convolve, arg("isa"), arg("weights"), arg("rows"), arg("missing"), arg("silu"));
    kernels.def("gated_delta", gated_delta, arg("isa"), arg("state"), arg("query"), arg("key"), arg("value"),
                arg("decay"), arg("beta"));
}
