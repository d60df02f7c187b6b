#include "device_backend.h"

#include <algorithm>
#include <stdexcept>
#include <utility>

#include "../../../gpu/shapes.h"
#include "edgemoe/batch.h"

namespace edgemoe {
namespace {

using gpu::i32;
using gpu::u64;

constexpr size_t kPiece = size_t{4} << 20;  // of memory that small weights share
constexpr size_t kAlignment = 256;

template <class T>
u64 number(Buffer<T> buffer) {
    return reinterpret_cast<uintptr_t>(buffer.address());
}

Kernel product_kernel(Layout layout) {
    switch (layout) {
        case Layout::f32:
            return Kernel::product_f32;
        case Layout::bf16:
            return Kernel::product_bf16;
        case Layout::f16:
            return Kernel::product_f16;
        case Layout::q8g64:
            return Kernel::product_q8g64;
        case Layout::q4g64:
            return Kernel::product_q4g64;
        case Layout::ggml_q4_0:
            return Kernel::product_q4_0;
        case Layout::ggml_q4_1:
            return Kernel::product_q4_1;
        case Layout::ggml_q5_0:
            return Kernel::product_q5_0;
        case Layout::ggml_q5_1:
            return Kernel::product_q5_1;
        case Layout::ggml_q8_0:
            return Kernel::product_q8_0;
        case Layout::ggml_q2_k:
            return Kernel::product_q2_k;
        case Layout::ggml_q3_k:
            return Kernel::product_q3_k;
        case Layout::ggml_q4_k:
            return Kernel::product_q4_k;
        case Layout::ggml_q5_k:
            return Kernel::product_q5_k;
        case Layout::ggml_q6_k:
            return Kernel::product_q6_k;
        case Layout::ggml_iq4_nl:
            return Kernel::product_iq4_nl;
        case Layout::ggml_iq4_xs:
            return Kernel::product_iq4_xs;
        case Layout::ggml_mxfp4:
            return Kernel::product_mxfp4;
        case Layout::nested:
            return Kernel::product_nested;
    }
    throw std::logic_error("a layout without a kernel");
}

[[noreturn]] void refuse(const char* what) {
    throw std::logic_error(std::string(what) + " is the host's, and a device was asked for it");
}

}  // namespace

DeviceMemory::~DeviceMemory() {
    for (std::byte* piece : pieces_) {
        try {
            device_.release(piece);
        } catch (...) {  // a device that has failed has nothing to give back
        }
    }
}

void DeviceMemory::reserve(size_t bytes) {
    reserved_ = pieces_.emplace_back(device_.allocate(bytes));
    reserved_left_ = bytes;
}

std::byte* DeviceMemory::allocate(size_t bytes) {
    bytes = (std::max<size_t>(bytes, 1) + kAlignment - 1) / kAlignment * kAlignment;
    if (bytes > left_ && bytes > kPiece / 4) return pieces_.emplace_back(device_.allocate(bytes));
    if (bytes > left_) {
        piece_ = pieces_.emplace_back(device_.allocate(kPiece));
        left_ = kPiece;
    }
    std::byte* found = piece_;
    piece_ += bytes;
    left_ -= bytes;
    return found;
}

const std::byte* DeviceMemory::keep(std::span<const std::byte> bytes) {
    const size_t size = (bytes.size() + kAlignment - 1) / kAlignment * kAlignment;
    std::byte* copy = size <= reserved_left_ ? reserved_ : allocate(bytes.size());
    if (copy == reserved_) {
        reserved_ += size;
        reserved_left_ -= size;
    }
    device_.write(copy, bytes);
    return copy;
}

void DeviceBackend::Codes::place(Places& places, size_t groups) {
    places.place(codes, groups * kGroup);
    places.place(scales, groups);
    places.place(sums, groups);
}

DeviceBackend::Codes DeviceBackend::Codes::from(size_t groups) const {
    return {codes + groups * kGroup, scales + groups, sums + groups};
}

void DeviceBackend::Workspace::place(Places& places, const BackendSizes& sizes, int vocabulary) {
    const size_t rows_count = sizes.rows;
    size_t pairs = 0;
    for (const RopeSpec& rope : sizes.ropes) pairs = std::max(pairs, rope.inverse_frequencies.size());
    input.place(places, rows_count * sizes.input_groups);
    inner.place(places, sizes.inner_groups);
    places.place(cosine, sizes.ropes.size() * rows_count * pairs);
    places.place(sine, sizes.ropes.size() * rows_count * pairs);
    places.place(positions, rows_count);
    places.place(sequences, rows_count);
    places.place(rows, rows_count);
    places.place(gathered, rows_count * sizes.hidden);
    places.place(choice, rows_count * sizes.experts);
    places.place(order, rows_count * sizes.experts);
    places.place(pair_experts, rows_count * sizes.experts);
    places.place(by_head, rows_count * sizes.by_head);
    places.place(of_heads, rows_count * sizes.by_head);
    places.place(states, rows_count);
    places.place(before, rows_count);
    places.place(logits, std::min<size_t>(rows_count, kHeadRows) * vocabulary);
}

size_t DeviceBackend::workspace_bytes(const BackendSizes& sizes, int vocabulary) {
    Places measured;
    Workspace{}.place(measured, sizes, vocabulary);
    return measured.used();
}

DeviceBackend::DeviceBackend(std::shared_ptr<Device> device, const BackendSizes& sizes, int vocabulary, size_t weights)
    : device_(std::move(device)), name_(device_->facts().name), memory_(*device_), ropes_(sizes.ropes) {
    for (const RopeSpec& rope : ropes_) widest_pairs_ = std::max(widest_pairs_, rope.inverse_frequencies.size());
    Places places(memory_.allocate(workspace_bytes(sizes, vocabulary)));
    work_.place(places, sizes, vocabulary);
    // With what aligning each of them takes.
    if (weights > 0) memory_.reserve(weights + kPiece / 4);
}

DeviceBackend::~DeviceBackend() {
    for (const Tables& tables : tables_) {
        try {
            if (tables.room) device_->release(reinterpret_cast<std::byte*>(tables.tables.address()));
        } catch (...) {  // as in ~DeviceMemory
        }
    }
}

int DeviceBackend::groups_for(Kernel kernel, size_t elements) {
    const size_t threads = kernel_threads(kernel), groups = (elements + threads - 1) / threads;
    if (groups > size_t{INT32_MAX}) throw DeviceError("a kernel of more groups than there can be");
    return static_cast<int>(groups);
}

void DeviceBackend::begin(const Rows& rows) {
    rows_ = rows;
    const int count = rows.count();
    sequences_.clear();
    std::vector<int32_t> numbers(count);
    for (int t = 0; t < count; ++t) {
        auto known = std::ranges::find(sequences_, rows.states[t]);
        if (known == sequences_.end()) known = sequences_.insert(known, rows.states[t]);
        numbers[t] = static_cast<int32_t>(known - sequences_.begin());
    }
    for (Tables& of_group : tables_) of_group.is_current = false;
    write(rows.positions, work_.positions);
    write(std::span<const int32_t>(numbers), work_.sequences);
    std::vector<float> cosine(size_t(count) * widest_pairs_), sine(cosine.size());
    for (size_t r = 0; r < ropes_.size(); ++r) {
        const size_t pairs = ropes_[r].inverse_frequencies.size(), place = r * count * widest_pairs_;
        for (int t = 0; t < count; ++t)
            rotary(ropes_[r].inverse_frequencies, rows.positions[t], ropes_[r].attention_factor,
                   cosine.data() + t * pairs, sine.data() + t * pairs);
        const size_t used = count * pairs;
        write(std::span<const float>(cosine).first(used), work_.cosine + place);
        write(std::span<const float>(sine).first(used), work_.sine + place);
    }
}

void DeviceBackend::embed(const Matrix& /*embedding*/, float /*multiplier*/, Floats /*out*/) {
    refuse("looking up embeddings");
}

void DeviceBackend::normalize(const Norm& norm, ConstFloats x, int count, Floats out) {
    const gpu::NormShape shape{norm.size, norm.epsilon};
    if (norm.bias)
        device_->launch(Kernel::layer_norm, count, x, norm.weight, norm.bias, out, shape);
    else
        device_->launch(Kernel::rms_norm, count, x, norm.weight, out, shape);
}

DeviceBackend::Codes DeviceBackend::quantize(ConstFloats x, int count, int cols, const Codes& codes) {
    const size_t groups = count * column_groups(cols);
    const gpu::QuantizeShape shape{cols, cols};
    const i32 rows = count;
    device_->launch(Kernel::quantize_rows, static_cast<int>((groups + 3) / 4), x, codes.codes, codes.scales, codes.sums,
                    shape, rows);
    return codes;
}

DeviceBackend::Input DeviceBackend::prepare(ConstFloats x, int count, int cols, std::span<const Matrix> users) {
    if (std::ranges::any_of(users, [](const Matrix& matrix) { return reads_codes(matrix.layout); }))
        quantize(x, count, cols, work_.input);
    return {x, work_.input};
}

// Those of one layout at a time, as many as a launch takes.
void DeviceBackend::multiply_prepared(std::span<const Product> products, const Input& input) {
    std::vector<const Product*> left;
    for (const Product& product : products)
        if (product.count > 0) left.push_back(&product);
    while (!left.empty()) {
        const Layout layout = left.front()->matrix.layout;
        gpu::Jobs jobs{};
        jobs.cols = left.front()->matrix.cols;
        int64_t groups = 0;
        std::erase_if(left, [&](const Product* product) {
            const Matrix& matrix = product->matrix;
            if (matrix.layout != layout || jobs.count == MOST_JOBS) return false;
            gpu::Job& job = jobs.job[jobs.count++];
            job.inputs = number(product->inputs);
            job.out = number(product->out);
            job.rows = matrix.rows;
            job.first = product->first;
            job.count = product->count;
            job.begin = static_cast<i32>(groups);
            if (layout == Layout::nested) {
                job.levels = matrix.levels.count;
                job.parameters = matrix.levels.later;
                std::copy_n(matrix.levels.bits.begin(), kMaxLevels, job.bits);
                job.data = number(Buffer(matrix.levels.data[0]));
                for (int level = 1; level < matrix.levels.count; ++level)
                    job.later[level - 1] = number(Buffer(matrix.levels.data[level]));
            } else {
                job.data = number(Buffer(matrix.data));
            }
            const int64_t blocks = (matrix.rows + kRowBlock - 1) / kRowBlock,
                          tiles = (product->count + TILE_PAIRS - 1) / TILE_PAIRS;
            groups += blocks * tiles;
            return true;
        });
        if (groups > INT32_MAX) throw DeviceError("a product of more groups than there can be");
        device_->launch(product_kernel(layout), static_cast<int>(groups), input.values, input.codes.codes,
                        input.codes.scales, input.codes.sums, jobs);
    }
}

void DeviceBackend::product(std::span<const Matrix> matrices, ConstFloats x, int count,
                            std::span<const Floats> outputs) {
    const Input input = prepare(x, count, matrices.front().cols, matrices);
    std::vector<Product> products;
    for (size_t i = 0; i < matrices.size(); ++i) products.push_back({matrices[i], outputs[i], {}, 0, count});
    multiply_prepared(products, input);
}

void DeviceBackend::add_vector(ConstFloats vector, Floats x, int size, int count) {
    const gpu::VectorShape shape{size, count, 1.0f};
    launch_each(Kernel::add_vector, size_t(size) * count, vector, x, shape);
}

void DeviceBackend::add(float factor, ConstFloats values, Floats x, int size, int count) {
    const gpu::VectorShape shape{size, count, factor};
    launch_each(Kernel::add_scaled, size_t(size) * count, values, x, shape);
}

void DeviceBackend::scale(ConstFloats factor, Floats x, int size, int count) {
    const gpu::VectorShape shape{size, count, 1.0f};
    launch_each(Kernel::scale_by, size_t(size) * count, factor, x, shape);
}

void DeviceBackend::gather(ConstFloats x, std::span<const int32_t> rows, int size, Floats out) {
    const int count = static_cast<int>(rows.size());
    if (count == 0) return;
    const gpu::VectorShape shape{size, count, 1.0f};
    write(rows, work_.rows);
    // By way of a copy, for out may be x.
    launch_each(Kernel::gather_rows, size_t(size) * count, x, work_.rows, work_.gathered, shape);
    device_->copy(reinterpret_cast<std::byte*>(out.address()),
                  reinterpret_cast<const std::byte*>(work_.gathered.address()), sizeof(float) * size * count);
}

void DeviceBackend::multiply(ConstFloats a, size_t a_stride, ConstFloats b, size_t b_stride, int size, int count,
                             Floats out, size_t out_stride) {
    const gpu::MultiplyShape shape{size, count, static_cast<i32>(a_stride), static_cast<i32>(b_stride),
                                   static_cast<i32>(out_stride)};
    launch_each(Kernel::multiply, size_t(size) * count, a, b, out, shape);
}

void DeviceBackend::copy_heads(ConstFloats x, size_t from_step, size_t from_stride, Floats out, size_t to_step,
                               size_t to_stride, int size, int heads, int count) {
    const gpu::CopyShape shape{size,
                               heads,
                               count,
                               static_cast<i32>(from_step),
                               static_cast<i32>(from_stride),
                               static_cast<i32>(to_step),
                               static_cast<i32>(to_stride)};
    launch_each(Kernel::copy_heads, size_t(size) * heads * count, x, out, shape);
}

void DeviceBackend::products_by_head(const HeadProducts& p, int count) {
    const int cols = p.matrix.cols;
    copy_heads(p.values, p.value_step, p.value_stride, work_.by_head, size_t(count) * cols, cols, cols, p.heads, count);
    const Input input = prepare(work_.by_head, p.heads * count, cols, {&p.matrix, 1});
    const size_t blocks = (p.rows + kRowBlock - 1) / kRowBlock, bytes = block_bytes(p.matrix.layout, cols);
    std::vector<Product> products;
    for (int h = 0; h < p.heads; ++h) {
        const Matrix own{p.matrix.layout, p.rows, cols, p.matrix.data + (p.first + h) * blocks * bytes};
        products.push_back({own, work_.of_heads, {}, h * count, count});
    }
    multiply_prepared(products, input);
    copy_heads(work_.of_heads, size_t(count) * p.rows, p.rows, p.out, p.out_step, p.out_stride, p.rows, p.heads, count);
}

template <class State, class Before>
void DeviceBackend::write_states(State&& state, Before&& before) {
    std::vector<uint64_t> states, earlier;
    for (int t = 0; t < rows_.count(); ++t) {
        SequenceState& sequence = *rows_.states[t];
        states.push_back(reinterpret_cast<uintptr_t>(state(sequence)));
        const float* other = before(sequence);
        earlier.push_back(other && rows_.positions[t] == sequence.length() ? reinterpret_cast<uintptr_t>(other) : 0);
    }
    write(std::span<const uint64_t>(states), work_.states);
    write(std::span<const uint64_t>(earlier), work_.before);
}

void DeviceBackend::convolve(const Matrix& weights, int layer, ConstFloats in, bool silu, Floats out) {
    write_states([&](SequenceState& sequence) { return sequence.convolution(layer); },
                 [&](SequenceState& sequence) { return sequence.convolution_before(layer); });
    const gpu::ConvolveShape shape{weights.rows, weights.cols, rows_.count(), silu};
    launch_each(Kernel::convolve, weights.rows, ConstFloats(reinterpret_cast<const float*>(weights.data)), in,
                work_.states, work_.before, work_.positions, out, shape);
}

void DeviceBackend::gated_delta(const DeltaHeads& a, int layer, const DeltaBuffers& b) {
    const int count = rows_.count();
    const gpu::DeltaShape shape{a.heads,       a.kv_heads,         a.key_dim, a.value_dim,
                                a.tiled_heads, a.fused_beta_alpha, count,     a.norm_epsilon};
    device_->launch(Kernel::prepare_delta, (2 * a.kv_heads + 1) * count, b.mixed, b.beta, b.alpha, a.query_norm,
                    a.key_norm, a.decay_rate, a.step_bias, shape);
    write_states([&](SequenceState& sequence) { return sequence.recurrence(layer); },
                 [&](SequenceState& sequence) { return sequence.recurrence_before(layer); });
    device_->launch(Kernel::gated_delta, a.heads * ((a.value_dim + 31) / 32), b.mixed, b.beta, b.alpha, work_.states,
                    work_.before, work_.positions, b.out, shape);
    device_->launch(Kernel::finish_delta, count * a.heads, b.out, b.gates, a.head_norm, shape);
}

void DeviceBackend::activate(const GatedActivation& activation, int size, int first, int count, Floats gate,
                             ConstFloats up, ConstFloats gate_bias, ConstFloats up_bias,
                             Buffer<const int32_t> experts) {
    const gpu::ActivateShape shape{
        size, count, static_cast<i32>(activation.kind), first, activation.alpha, activation.limit};
    launch_each(Kernel::activate, size_t(size) * count, gate, up, gate_bias, up_bias, experts, shape);
}

void DeviceBackend::feed_forward(const FeedForward& part, ConstFloats x, int count, Floats inner, Floats up,
                                 Floats out) {
    const int ffn = part.gate.rows;
    const std::array matrices{part.gate, part.up};
    const std::array targets{inner, up};
    product(matrices, x, count, targets);
    activate(part.activation, ffn, 0, count, inner, up, part.gate_bias, part.up_bias, {});
    if (reads_codes(part.down.layout)) quantize(inner, count, ffn, work_.inner);
    const Product down{part.down, out, {}, 0, count};
    multiply_prepared({&down, 1}, {inner, work_.inner});
    if (part.down_bias) add_vector(part.down_bias, out, part.down.rows, count);
}

void DeviceBackend::gate_rows(ConstFloats weights, ConstFloats x, int size, int count, Floats out) {
    const gpu::VectorShape shape{size, count, 1.0f};
    device_->launch(Kernel::gate_rows, count, weights, x, out, shape);
}

void DeviceBackend::choose(const Choice& of, Floats scores, int count, Buffer<int32_t> picks, Floats weights) {
    const RouterSpec& router = *of.router;
    const gpu::ChooseShape shape{of.experts,
                                 of.top_k,
                                 static_cast<i32>(router.scores),
                                 router.groups,
                                 router.groups_kept,
                                 static_cast<i32>(router.group_score),
                                 router.renormalize,
                                 router.renormalize_least,
                                 router.renormalize_epsilon,
                                 router.weight_scale,
                                 router.mask_threshold};
    device_->launch(Kernel::choose, count, scores, of.selection_bias, of.expert_scale, picks, weights, work_.choice,
                    work_.order, shape);
}

void DeviceBackend::begin_experts(const ExpertShapes& shapes, ConstFloats x, int count) {
    const std::array matrices{shapes.gate, shapes.up};
    expert_input_ = prepare(x, count, shapes.gate.cols, matrices);
}

void DeviceBackend::experts(const ExpertShapes& shapes, std::span<const ExpertWork> work,
                            const ExpertBuffers& buffers) {
    const int ffn = shapes.gate.rows;
    std::vector<Product> products;
    int first = INT32_MAX, end = 0;  // of the pairs at work
    for (const ExpertWork& w : work) {
        products.push_back({w.gate, buffers.hidden, buffers.rows, w.first, w.count});
        products.push_back({w.up, buffers.up, buffers.rows, w.first, w.count});
        first = std::min(first, w.first);
        end = std::max(end, w.first + w.count);
    }
    if (end == 0) return;
    multiply_prepared(products, expert_input_);
    if (shapes.gate_bias) {
        std::vector<int32_t> experts(end - first, 0);
        for (const ExpertWork& w : work) std::fill_n(experts.begin() + (w.first - first), w.count, w.expert);
        write(std::span<const int32_t>(experts), work_.pair_experts + first);
    }
    const size_t per_pair = column_groups(ffn);
    products.clear();
    for (size_t i = 0; i < work.size();) {
        // Experts whose pairs follow each other are dealt with as one.
        const int begin = work[i].first;
        int next = begin;
        for (; i < work.size() && work[i].first == next; ++i) {
            products.push_back({work[i].down, buffers.outputs, {}, work[i].first, work[i].count});
            next += work[i].count;
        }
        const Floats hidden = buffers.hidden + size_t(begin) * ffn;
        activate(shapes.activation, ffn, begin, next - begin, hidden, buffers.up + size_t(begin) * ffn,
                 shapes.gate_bias, shapes.up_bias,
                 shapes.gate_bias ? Buffer<const int32_t>(work_.pair_experts) : Buffer<const int32_t>());
        if (reads_codes(shapes.down.layout)) quantize(hidden, next - begin, ffn, work_.inner.from(begin * per_pair));
    }
    multiply_prepared(products, {buffers.hidden, work_.inner});
}

void DeviceBackend::combine(const Combination& c, int size, int count) {
    const gpu::CombineShape shape{size, c.top_k, c.from_zero, c.scale};
    const i32 rows = count;
    launch_each(Kernel::combine, size_t(size) * count, c.shared, c.weights, c.picks, c.places, c.outputs, c.down_bias,
                c.sum, shape, rows);
}

void DeviceBackend::head(const Head& head, ConstFloats x, int count, float* logits) {
    const int size = head.matrix.rows, cols = head.matrix.cols;
    for (int first = 0; first < count; first += kHeadRows) {
        const int rows = std::min(kHeadRows, count - first);
        product({&head.matrix, 1}, x + size_t(first) * cols, rows, {&work_.logits, 1});
        if (head.bias || head.divisor != 1.0f || head.softcap != 0) {
            const gpu::LogitsShape shape{size, head.divisor, head.softcap};
            const i32 all = rows;
            launch_each(Kernel::finish_logits, size_t(size) * rows, work_.logits, head.bias, shape, all);
        }
        const std::span target(logits + size_t(first) * size, size_t(rows) * size);
        device_->read(std::as_writable_bytes(target), reinterpret_cast<const std::byte*>(work_.logits.address()));
    }
}

// Several may be read before the next operation.
std::span<std::byte> DeviceBackend::staging(size_t bytes) {
    constexpr size_t kMost = 8;
    if (staging_.size() < kMost) staging_.emplace_back();
    std::vector<std::byte>& place = staging_[staged_++ % staging_.size()];
    place.resize(std::max(place.size(), bytes));
    return std::span(place).first(bytes);
}

std::span<const float> DeviceBackend::read(ConstFloats buffer, size_t count) {
    const std::span<std::byte> place = staging(count * sizeof(float));
    device_->read(place, reinterpret_cast<const std::byte*>(buffer.address()));
    return {reinterpret_cast<const float*>(place.data()), count};
}

std::span<const int32_t> DeviceBackend::read(Buffer<const int32_t> buffer, size_t count) {
    const std::span<std::byte> place = staging(count * sizeof(int32_t));
    device_->read(place, reinterpret_cast<const std::byte*>(buffer.address()));
    return {reinterpret_cast<const int32_t*>(place.data()), count};
}

}  // namespace edgemoe
