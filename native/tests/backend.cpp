// The pass against its backend: it looks behind no buffer, takes rows of every kind, and shows observers what happens.
#include "edgemoe/backend.h"

#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <memory>
#include <numeric>
#include <vector>

#include "backend/cpu/cpu_backend.h"
#include "check.h"
#include "edgemoe/recorders.h"
#include "small_model.h"

namespace edgemoe::tests {
namespace {

// Memory behind addresses that cannot be read. Weights stay where they are.
class ForeignMemory final : public Memory {
  public:
    explicit ForeignMemory(Memory& own) : own_(own) {}
    ~ForeignMemory() override {
        for (const Piece& piece : pieces_) ::munmap(piece.shown, piece.bytes);
    }

    bool is_hosts() const override { return true; }
    std::byte* allocate(size_t bytes) override {
        void* shown = ::mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        check(shown != MAP_FAILED, "there are no addresses");
        pieces_.push_back({static_cast<std::byte*>(shown), own_.allocate(bytes), bytes});
        return pieces_.back().shown;
    }
    void write(std::byte* to, std::span<const std::byte> from) override { own_.write(real(to), from); }
    void read(std::span<std::byte> to, const std::byte* from) override { own_.read(to, real(from)); }
    void copy(std::byte* to, const std::byte* from, size_t bytes) override { own_.copy(real(to), real(from), bytes); }
    const std::byte* keep(std::span<const std::byte> bytes) override { return bytes.data(); }

    // What lies behind an address; null if it is none of this memory.
    std::byte* real(const void* shown) const {
        const auto* address = static_cast<const std::byte*>(shown);
        for (const Piece& piece : pieces_)
            if (address >= piece.shown && address < piece.shown + piece.bytes)
                return piece.real + (address - piece.shown);
        return nullptr;
    }

  private:
    struct Piece {
        std::byte* shown;
        std::byte* real;
        size_t bytes;
    };

    Memory& own_;
    std::vector<Piece> pieces_;
};

// The CPU's backend behind addresses that cannot be read: whoever but the backend looks behind a buffer is caught.
class ForeignBackend final : public Backend {
  public:
    explicit ForeignBackend(std::unique_ptr<CpuBackend> own) : own_(std::move(own)), memory_(own_->memory()) {}

    std::string_view name() const override { return "foreign"; }
    Memory& memory() override { return memory_; }

    void begin(const Rows& rows) override {
        own_->begin(rows);
        finished = false;
    }
    void embed(const Matrix& embedding, float multiplier, Floats out) override {
        own_->embed(embedding, multiplier, at(out));
    }
    void normalize(const Norm& norm, ConstFloats x, int count, Floats out) override {
        own_->normalize(norm, at(x), count, at(out));
    }
    void product(std::span<const Matrix> matrices, ConstFloats x, int count, std::span<const Floats> outputs) override {
        std::vector<Floats> found;
        for (const Floats output : outputs) found.push_back(at(output));
        own_->product(matrices, at(x), count, found);
        finished = false;
    }
    void add_vector(ConstFloats vector, Floats x, int size, int count) override {
        own_->add_vector(vector, at(x), size, count);
    }
    void add(float factor, ConstFloats values, Floats x, int size, int count) override {
        own_->add(factor, at(values), at(x), size, count);
    }
    void scale(ConstFloats factor, Floats x, int size, int count) override { own_->scale(factor, at(x), size, count); }
    void gather(ConstFloats x, std::span<const int32_t> rows, int size, Floats out) override {
        own_->gather(at(x), rows, size, at(out));
    }
    void multiply(ConstFloats a, size_t a_stride, ConstFloats b, size_t b_stride, int size, int count, Floats out,
                  size_t out_stride) override {
        own_->multiply(at(a), a_stride, at(b), b_stride, size, count, at(out), out_stride);
    }
    void store(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) override {
        own_->store(heads, layer, at(buffers));
    }
    void attend(const AttentionHeads& heads, int layer, const AttentionBuffers& buffers) override {
        own_->attend(heads, layer, at(buffers));
    }
    void store_latents(const LatentHeads& heads, int layer, Floats queries, Floats latents) override {
        own_->store_latents(heads, layer, at(queries), at(latents));
    }
    void attend_latents(const LatentHeads& heads, int layer, const LatentBuffers& b) override {
        own_->attend_latents(heads, layer, {b.first, b.heads, at(b.queries), at(b.asked), at(b.found)});
    }
    void products_by_head(const HeadProducts& products, int count) override {
        HeadProducts found = products;
        found.values = at(products.values);
        found.out = at(products.out);
        own_->products_by_head(found, count);
    }
    void convolve(const Matrix& weights, int layer, ConstFloats in, bool silu, Floats out) override {
        own_->convolve(weights, layer, at(in), silu, at(out));
    }
    void gated_delta(const DeltaHeads& heads, int layer, const DeltaBuffers& b) override {
        own_->gated_delta(heads, layer, {at(b.mixed), at(b.gates), at(b.beta), at(b.alpha), at(b.out)});
    }
    void feed_forward(const FeedForward& part, ConstFloats x, int count, Floats inner, Floats up, Floats out) override {
        own_->feed_forward(part, at(x), count, at(inner), at(up), at(out));
    }
    void gate_rows(ConstFloats weights, ConstFloats x, int size, int count, Floats out) override {
        own_->gate_rows(weights, at(x), size, count, at(out));
    }
    void choose(const Choice& choice, Floats scores, int count, Buffer<int32_t> picks, Floats weights) override {
        own_->choose(choice, at(scores), count, at(picks), at(weights));
    }
    void begin_experts(const ExpertShapes& shapes, ConstFloats x, int count) override {
        own_->begin_experts(shapes, at(x), count);
    }
    void experts(const ExpertShapes& shapes, std::span<const ExpertWork> work, const ExpertBuffers& b) override {
        own_->experts(shapes, work, {at(b.rows), at(b.hidden), at(b.up), at(b.outputs)});
        ++rounds;
        experts_at_work = true;
        finished = false;
    }
    void combine(const Combination& combination, int size, int count) override {
        Combination found = combination;
        found.shared = at(combination.shared);
        found.weights = at(combination.weights);
        found.picks = at(combination.picks);
        found.places = at(combination.places);
        found.outputs = at(combination.outputs);
        found.sum = at(combination.sum);
        own_->combine(found, size, count);
        experts_left |= experts_at_work;
        finished = false;
    }
    void head(const Head& head, ConstFloats x, int count, float* logits) override {
        own_->head(head, at(x), count, logits);
        finished = false;
    }
    std::span<const float> read(ConstFloats buffer, size_t count) override { return own_->read(at(buffer), count); }
    std::span<const int32_t> read(Buffer<const int32_t> buffer, size_t count) override {
        return own_->read(at(buffer), count);
    }
    void wait() override {
        experts_at_work = false;
        finished = true;
    }

    int rounds = 0;
    bool experts_at_work = false;  // experts() was not waited for
    bool experts_left = false;     // ... before their layer was done
    bool finished = true;          // everything was waited for

  private:
    template <class T>
    Buffer<T> at(Buffer<T> buffer) const {
        if (T* real = reinterpret_cast<T*>(memory_.real(buffer.address()))) return Buffer<T>(real);
        check(!buffer, "an activation lies outside the backend's memory");
        return buffer;
    }
    AttentionBuffers at(const AttentionBuffers& b) const {
        return {at(b.projected), at(b.queries), at(b.keys), at(b.values), at(b.attended)};
    }

    std::unique_ptr<CpuBackend> own_;
    ForeignMemory memory_;
};

constexpr int kCount = 70;
constexpr AttentionKind kFull = AttentionKind::full;
const std::vector<AttentionKind> kAllMixers{kFull, AttentionKind::gated_delta, AttentionKind::short_conv,
                                            AttentionKind::mla};

EngineOptions some_options() {
    return {.threads = 2, .context = kContext, .chunk = 16, .store = {.slots = kTopK + 2}, .isa = ""};
}

std::vector<int32_t> some_tokens() {
    std::vector<int32_t> tokens(kCount);
    Random random(6);
    for (int32_t& token : tokens) token = pick(random, 0, kVocabulary - 1);
    return tokens;
}

std::vector<int32_t> ascending() {
    std::vector<int32_t> numbers(kCount);
    std::iota(numbers.begin(), numbers.end(), 0);
    return numbers;
}

// Logits [kCount, vocabulary] of a whole pass, or of one that goes on with embeddings.
Aligned<float> logits(Engine& engine, std::span<const int32_t> tokens, std::span<const float> embeddings = {},
                      int first_layer = 0, Observer* observer = nullptr) {
    const std::vector<int32_t> positions = ascending(), ids(kCount, 0);
    Aligned<float> result(size_t{kCount} * kVocabulary);
    engine.sequence(0).truncate(0);
    Batch batch{.tokens = tokens, .positions = positions, .sequences = ids, .wanted = positions};
    batch.embeddings = embeddings;
    engine.forward(batch, {first_layer, static_cast<int>(engine.spec().layers.size())}, result.data(), [] {}, observer);
    return result;
}

void test_buffers_are_handles(const Model& model, const std::string& name) {
    const std::vector<int32_t> tokens = some_tokens();
    Engine engine(model.spec, model.index, some_options());
    const auto expected = logits(engine, tokens);
    check(std::ranges::all_of(expected.span(), [](float logit) { return std::isfinite(logit); }),
          name + " has logits that are not numbers");
    ForeignBackend* backend = nullptr;
    Engine foreign(model.spec, model.index, some_options(), nullptr,
                   [&](const EngineOptions& options, const BackendSizes& sizes) {
                       auto made = std::make_unique<ForeignBackend>(
                           std::make_unique<CpuBackend>(select_kernels(options.isa), options.threads, sizes));
                       backend = made.get();
                       return made;
                   });
    check(foreign.isa() == "foreign", "the engine uses another backend than it was given");
    check_same(expected, logits(foreign, tokens), name + " behind addresses that cannot be read");
    check(backend->rounds > 0 && !backend->experts_left,
          "experts were not waited for before their memory was given back");
    check(backend->finished, "a pass ended before its backend had finished");
    foreign.sequence(0).truncate(0);
    const auto give_up = [calls = 0]() mutable {
        if (++calls == 2) throw std::runtime_error("given up");
    };
    const std::vector<int32_t> positions = ascending(), ids(kCount, 0);
    check_throws<std::runtime_error>(
        [&] { foreign.forward({.tokens = tokens, .positions = positions, .sequences = ids}, nullptr, give_up); },
        "a check that gives up");
    check(backend->finished, "a state was given back before the backend had finished with it");
    RoutingRecorder recorder(model.spec);
    check_same(expected, logits(foreign, tokens, {}, 0, &recorder), name + ", observed");
    check(recorder.take().picks.size() == size_t{kCount} * kTopK * (model.spec.layers.size() - 1),
          "a record of other picks than were made");
}

// Takes the residual stream of every layer.
class Streams final : public Observer {
  public:
    void begin(int /*rows*/) override {}
    void finish() override {}
    bool wants_residuals() const override { return true; }
    void residual(int layer, std::span<const float> stream) override {
        if (static_cast<int>(layers.size()) <= layer) layers.resize(layer + 1);
        layers[layer].insert(layers[layer].end(), stream.begin(), stream.end());
    }

    std::vector<std::vector<float>> layers;
};

// A pass can begin with embeddings in place of tokens, at any layer, for all rows or some.
void test_embeddings() {
    const Model model("q4g64", "q4g64", false);
    Engine engine(model.spec, model.index, some_options());
    const std::vector<int32_t> tokens = some_tokens();
    Streams streams;
    const auto expected = logits(engine, tokens, {}, 0, &streams);
    const std::vector<int32_t> none(kCount, Batch::kEmbedding);
    for (int layer = 1; layer < kLayerCount; ++layer)
        check_same(expected, logits(engine, none, streams.layers[layer - 1], layer),
                   "on from layer " + std::to_string(layer));
    std::vector<float> embeddings(size_t{kCount} * kHidden);
    std::vector<int32_t> mixed = tokens;
    for (int row = 0; row < kCount; row += 3) {
        // A row of the embedding matrix, as a one-layer pass over its token would begin.
        const DenseTensor& tensor = model.index.dense.at("embedding");
        const Extent& extent = model.index.sections[tensor.section].extents[0];
        Aligned<std::byte> weights(extent.length);
        std::copy_n(model.content.data() + extent.offset, extent.length, weights.data());
        dequantize_row({Layout::q4g64, kVocabulary, kHidden, weights.data()}, tokens[row],
                       embeddings.data() + size_t(row) * kHidden);
        mixed[row] = Batch::kEmbedding;
    }
    check_same(expected, logits(engine, mixed, embeddings), "embeddings in place of tokens");
}

// What an engine cannot compute is refused before anything is, and leaves the sequence alone.
void test_refusals() {
    const Model model("f32", "f32", false);
    Engine engine(model.spec, model.index, some_options());
    const std::vector<int32_t> tokens = some_tokens(), positions = ascending(), ids(kCount, 0), overlays(kCount, 1);
    const std::vector<float> embeddings(kHidden);
    const std::vector<uint8_t> quality(kCount, 1);
    const std::array<Quality, 1> qualities{};
    Aligned<float> result(size_t{kCount} * kVocabulary);
    const Batch good{.tokens = tokens, .positions = positions, .sequences = ids, .wanted = positions};
    const auto refuse = [&](const Batch& batch, LayerRange layers, const std::string& what) {
        check_throws<std::invalid_argument>([&] { engine.forward(batch, layers, result.data(), [] {}); }, what);
        check(engine.sequence(0).length() == 0, what + " was computed");
    };
    const LayerRange all{0, kLayerCount};
    Batch bad = good;
    bad.overlays = overlays;
    refuse(bad, all, "an overlay that does not exist");
    bad = good;
    bad.quality = quality;
    bad.qualities = qualities;
    refuse(bad, all, "a quality that was not given");
    bad = good;
    bad.embeddings = embeddings;
    refuse(bad, all, "embeddings of one row only");
    const std::vector<int32_t> none(kCount, Batch::kEmbedding);
    bad = good;
    bad.tokens = none;
    refuse(bad, all, "rows without tokens and embeddings");
    refuse(good, {0, kLayerCount + 1}, "more layers than there are");
    refuse(good, {1, 1}, "no layers");
    refuse(good, {0, 1}, "logits after the first layer");
    PackIndex index = model.index;
    index.experts.clear();
    check_throws<std::invalid_argument>([&] { Engine(model.spec, index, some_options()); }, "an index without experts");
}

}  // namespace

void test_backend() {
    test_buffers_are_handles(Model("q4g64", "q4g64", false), "attention");
    test_buffers_are_handles(Model("f32", "q4g64", false, kAllMixers), "a model of all mixers");
    // Norms of the stream have biases there, those of heads and latents have not.
    test_buffers_are_handles(Model("f32", "q4g64", false, kAllMixers, true), "a model with LayerNorms");
    test_embeddings();
    test_refusals();
}

}  // namespace edgemoe::tests
