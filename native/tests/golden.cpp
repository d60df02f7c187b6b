// Checksums of logits that are the same on every machine, with every instruction set and C library, and on hardware
// that flushes subnormal numbers to zero. The models' weights are made of integers by a rule that is written here, so
// that nothing else can change them.
//
// A change that is meant to change logits changes the numbers below: the failure says what they are now.
#include <algorithm>
#include <array>
#include <cstdint>
#include <functional>
#include <memory>
#include <numeric>
#include <optional>

#include "check.h"
#include "edgemoe/crc32c.h"
#include "edgemoe/engine.h"

#if defined(__SSE2__)
#include <xmmintrin.h>
#endif

namespace edgemoe::tests {
namespace {

constexpr int kVocabulary = 96, kHidden = 64, kExperts = 8, kFfn = 64, kCount = 150, kContext = 192;

// Knuth's linear congruential generator; the upper half of its state.
class Numbers {
  public:
    uint32_t next() {
        state_ = state_ * 6364136223846793005u + 1442695040888963407u;
        return static_cast<uint32_t>(state_ >> 32);
    }
    // A multiple of 2^-15 in [-1, 1).
    float number() { return (static_cast<float>(next() >> 16) - 32768.0f) / 32768.0f; }

  private:
    uint64_t state_ = 1;
};

uint16_t half_or_bfloat(float x, bool half) {  // of a multiple of 2^-6 in [-1, 1)
    const auto bits = std::bit_cast<uint32_t>(x);
    if (!half) return static_cast<uint16_t>(bits >> 16);
    if (x == 0) return 0;
    return static_cast<uint16_t>((bits >> 16 & 0x8000u) | (((bits >> 23 & 0xFFu) - 112u) << 10) |
                                 (bits >> 13 & 0x3FFu));
}

// Weights for all that a spec asks for, in a file.
class Model {
  public:
    Model(ModelSpec made, std::string dense, std::string expert)
        : spec(std::move(made)), dense_(std::move(dense)), expert_(std::move(expert)) {
        matrix("embedding", kVocabulary, kHidden);
        if (!spec.tied_embeddings) matrix("head", kVocabulary, kHidden);
        if (spec.head_bias) vector("head_bias", kVocabulary, 0);
        norm("final_norm");
        for (size_t number = 0; number < spec.layers.size(); ++number) layer(static_cast<int>(number));
        file = std::make_unique<TemporaryFile>(content_);
        index.files = {file->path()};
    }

    ModelSpec spec;
    PackIndex index;
    std::unique_ptr<TemporaryFile> file;

  private:
    void layer(int number) {
        const LayerSpec& l = spec.layers[number];
        const AttentionSpec& a = l.attention;
        const std::string p = "layers." + std::to_string(number) + ".";
        norm(p + "attention_norm");
        norm(p + "ffn_norm");
        const int queries = a.heads * a.head_dim, keys = a.kv_heads * a.head_dim, values = a.heads * a.value_dim;
        switch (a.kind) {
            case AttentionKind::full:
                matrix(p + "q", a.output_gate ? 2 * queries : queries, kHidden);
                matrix(p + "k", keys, kHidden);
                matrix(p + "v", keys, kHidden);
                if (a.bias) {
                    vector(p + "q_bias", queries, 0);
                    vector(p + "k_bias", keys, 0);
                    vector(p + "v_bias", keys, 0);
                }
                if (a.qk_norm != QkNorm::none) {
                    vector(p + "q_norm", a.qk_norm == QkNorm::full ? queries : a.head_dim, 1);
                    vector(p + "k_norm", a.qk_norm == QkNorm::full ? keys : a.head_dim, 1);
                }
                if (a.sinks) vector(p + "sinks", a.heads, 0);
                break;
            case AttentionKind::mla:
                matrix(p + "q_down", a.q_rank, kHidden);
                vector(p + "q_norm", a.q_rank, 1);
                matrix(p + "q", queries, a.q_rank);
                matrix(p + "kv_down", a.kv_rank + a.rope_dim, kHidden);
                vector(p + "kv_norm", a.kv_rank, 1);
                matrix(p + "k_up", a.heads * a.kv_rank, a.head_dim - a.rope_dim);
                matrix(p + "v_up", values, a.kv_rank);
                break;
            case AttentionKind::gated_delta:
                matrix(p + "mixed", a.channels(), kHidden);
                matrix(p + "output_gate", values, kHidden);
                matrix(p + "beta", a.heads, kHidden);
                matrix(p + "alpha", a.heads, kHidden);
                convolution(p + "conv", a);
                vector(p + "decay_rate", a.heads, -2);
                vector(p + "step_bias", a.heads, -1);
                vector(p + "head_norm", a.value_dim, 1);
                break;
            case AttentionKind::short_conv:
                matrix(p + "mixed", 3 * a.channels(), kHidden);
                convolution(p + "conv", a);
                break;
        }
        matrix(p + "o", kHidden, values);
        if (a.output_bias) vector(p + "o_bias", kHidden, 0);
        if (l.output_norms) {
            norm(p + "attention_output_norm");
            norm(p + "ffn_output_norm");
        }
        if (l.output_scale) vector(p + "output_scale", 1, 1);
        if (!l.experts) return feed_forward(p + "ffn.", l.ffn_dim);
        matrix(p + "router", l.experts, kHidden);
        if (l.router.bias) vector(p + "router_bias", l.experts, 0);
        if (l.router.selection_bias) vector(p + "selection_bias", l.experts, 0);
        if (l.router.expert_scale) vector(p + "expert_scale", l.experts, 1);
        if (l.shared_dim) feed_forward(p + "shared.", l.shared_dim);
        if (l.shared_gate) vector(p + "shared_gate", kHidden, 0);
        if (l.expert_bias) {
            vector(p + "expert_gate_bias", l.experts * l.ffn_dim, 0);
            vector(p + "expert_up_bias", l.experts * l.ffn_dim, 0);
            vector(p + "expert_down_bias", l.experts * kHidden, 0);
        }
        experts(number);
    }

    void norm(const std::string& name) {
        vector(name, kHidden, 1);
        if (spec.layer_norm) vector(name + "_bias", kHidden, 0);
    }

    void feed_forward(const std::string& p, int dim) {
        matrix(p + "gate", dim, kHidden);
        matrix(p + "up", dim, kHidden);
        matrix(p + "down", kHidden, dim);
    }

    void convolution(const std::string& name, const AttentionSpec& a) {
        const std::string dense = std::exchange(dense_, "f32");
        matrix(name, a.channels(), a.conv_size);
        dense_ = dense;
    }

    // Numbers that differ from `middle` by less than 1 / 4.
    void vector(const std::string& name, int size, float middle) {
        std::vector<float> values(size);
        for (float& value : values) value = middle + numbers_.number() / 4;
        const auto bytes = std::as_bytes(std::span(values));
        index.dense[name] = {section({bytes.begin(), bytes.end()}), 0, "vector", size, 1};
    }

    void matrix(const std::string& name, int rows, int cols) {
        index.dense[name] = {section(weights(dense_, rows, cols)), 0, dense_, rows, cols};
    }

    void experts(int number) {
        ExpertLayer& layer = index.experts[number];
        auto& parts = layer.levels.emplace_back(ExpertLevel{4, {}}).parts;
        const int shapes[3][2] = {{kFfn, kHidden}, {kFfn, kHidden}, {kHidden, kFfn}};
        for (int expert = 0; expert < kExperts; ++expert) {
            std::vector<std::byte> all;
            for (int part = 0; part < 3; ++part) {
                all.resize((all.size() + 63) / 64 * 64);
                parts[part] = {stored_layout(expert_), 0, all.size(), shapes[part][0], shapes[part][1]};
                const auto bytes = weights(expert_, shapes[part][0], shapes[part][1]);
                all.insert(all.end(), bytes.begin(), bytes.end());
            }
            layer.sections.push_back({section(all)});
        }
    }

    uint32_t section(const std::vector<std::byte>& bytes) {
        content_.resize((content_.size() + kDiskBlock - 1) / kDiskBlock * kDiskBlock);
        index.sections.push_back({{{0, content_.size(), bytes.size()}}, crc32c(bytes)});
        content_.insert(content_.end(), bytes.begin(), bytes.end());
        return static_cast<uint32_t>(index.sections.size() - 1);
    }

    // Weights of about 1 / 8.
    std::vector<std::byte> weights(const std::string& layout, int rows, int cols) {
        std::vector<std::byte> bytes(stored_bytes(stored_layout(layout), rows, cols));
        const auto put = [&](size_t at, uint16_t half) { std::memcpy(bytes.data() + at, &half, sizeof half); };
        if (layout == "f32") {
            for (size_t at = 0; at < bytes.size(); at += sizeof(float)) {
                const float value = numbers_.number() / 4;
                std::memcpy(bytes.data() + at, &value, sizeof value);
            }
            return bytes;
        }
        if (layout == "f16" || layout == "bf16") {
            for (size_t at = 0; at < bytes.size(); at += sizeof(uint16_t))
                put(at, half_or_bfloat((static_cast<float>(numbers_.next() >> 25) - 64) / 64 / 4, layout == "f16"));
            return bytes;
        }
        for (std::byte& byte : bytes) byte = static_cast<std::byte>(numbers_.next() >> 24);
        if (layout == "q4g64" || layout == "q8g64") {  // scales and offsets that put the codes' middle at zero
            const bool eight = layout == "q8g64";
            const size_t group = kRowBlock * kGroup / (eight ? 1 : 2) + 2 * kRowBlock * sizeof(uint16_t);
            for (size_t at = group; at <= bytes.size(); at += group)
                for (size_t i = 0; i < kRowBlock; ++i) {
                    put(at - 64 + 2 * i, static_cast<uint16_t>(eight ? 0x1400 : 0x2400));  // 2^-10, 2^-6
                    put(at - 32 + 2 * i, static_cast<uint16_t>(eight ? 0xB000 : 0xB000));  // -1/8
                }
        } else {
            const size_t block = layout == "ggml.q4_0" ? 18 : 34;
            check(layout == "ggml.q4_0" || layout == "ggml.q8_0", "there are no " + layout + " weights");
            for (size_t at = 0; at < bytes.size(); at += block) put(at, block == 18 ? 0x2400 : 0x1400);
        }
        return bytes;
    }

    std::string dense_, expert_;
    std::vector<std::byte> content_;
    Numbers numbers_;
};

RopeSpec rope(int pairs, float attention_factor, bool interleaved) {
    RopeSpec rope{{}, attention_factor, interleaved};
    for (int i = 0; i < pairs; ++i) rope.inverse_frequencies.push_back(1.0f / static_cast<float>(1 + 3 * i * i));
    return rope;
}

ModelSpec base() {
    ModelSpec spec;
    spec.vocab_size = kVocabulary;
    spec.hidden_size = kHidden;
    spec.context = kContext;
    spec.norm_epsilon = 0x1p-20f;
    spec.ropes = {rope(16, 1.0f, false), rope(8, 1.25f, true)};
    return spec;
}

LayerSpec layer(AttentionKind kind) {
    LayerSpec l;
    l.attention.kind = kind;
    l.attention.heads = 4;
    l.attention.kv_heads = 2;
    l.attention.head_dim = l.attention.value_dim = 32;
    l.attention.scale = 0.25f;
    l.attention.rope = 0;
    l.attention.conv_size = 4;
    l.ffn_dim = kFfn;
    l.experts = kExperts;
    l.top_k = 3;
    l.router.renormalize = true;
    return l;
}

struct Golden {
    const char* name;
    std::function<ModelSpec()> spec;
    const char* dense;
    const char* expert;
    KvType state;
    uint32_t checksum;
};

const std::array<Golden, 6> kGolden{{
    {"windows",
     [] {
         ModelSpec spec = base();
         spec.layers.assign(3, layer(AttentionKind::full));
         spec.layers[1].attention.window = 40;
         for (LayerSpec& l : spec.layers) l.attention.qk_norm = QkNorm::head;
         return spec;
     },
     "q8g64", "q4g64", KvType::f16, 2040797575u},
    {"sinks and biases",
     [] {
         ModelSpec spec = base();
         LayerSpec l = layer(AttentionKind::full);
         l.attention.sinks = l.attention.bias = l.attention.output_bias = true;
         l.attention.rope = 1;
         l.router.scores = RouterScores::softmax_topk;
         l.router.bias = l.expert_bias = true;
         l.activation = Activation::clamped_swiglu;
         l.swiglu_alpha = 1.75f;
         l.swiglu_limit = 0.5f;
         spec.layers.assign(2, l);
         spec.head_bias = true;
         return spec;
     },
     "bf16", "ggml.q8_0", KvType::q8_0, 4009982877u},
    {"latents",
     [] {
         ModelSpec spec = base();
         LayerSpec l = layer(AttentionKind::mla);
         l.attention.kv_heads = 1;
         l.attention.q_rank = 48;
         l.attention.kv_rank = 48;
         l.attention.rope_dim = 16;
         l.attention.rope = 1;
         l.attention.latent_norm_epsilon = 0x1p-20f;
         l.router.scores = RouterScores::sigmoid;
         l.router.selection_bias = true;
         l.router.groups = 4;
         l.router.groups_kept = 2;
         l.router.weight_scale = 1.5f;
         l.shared_dim = 64;
         spec.layers.assign(2, l);
         spec.layers[0].experts = spec.layers[0].top_k = spec.layers[0].shared_dim = 0;
         return spec;
     },
     "f32", "ggml.q4_0", KvType::f16, 2528339575u},
    {"recurrences",
     [] {
         ModelSpec spec = base();
         spec.layers.assign(3, layer(AttentionKind::gated_delta));
         spec.layers[2] = layer(AttentionKind::full);
         spec.layers[2].attention.output_gate = true;
         for (LayerSpec& l : spec.layers) {
             l.shared_dim = 64;
             l.shared_gate = true;
         }
         return spec;
     },
     "f16", "q8g64", KvType::f32, 1316000535u},
    {"convolutions",
     [] {
         ModelSpec spec = base();
         LayerSpec l = layer(AttentionKind::short_conv);
         l.attention.heads = l.attention.kv_heads = 1;
         l.attention.head_dim = l.attention.value_dim = kHidden;
         l.attention.conv_size = 3;
         spec.layers.assign(3, l);
         spec.layers[1] = layer(AttentionKind::full);
         spec.layers[1].attention.qk_norm = QkNorm::full;
         for (LayerSpec& each : spec.layers) {
             each.activation = Activation::gelu_tanh;
             each.output_norms = each.output_scale = true;
         }
         spec.logits_softcap = 8;
         spec.tied_embeddings = true;
         return spec;
     },
     "f32", "f32", KvType::f16, 2302300984u},
    {"sparse mixers",
     [] {
         ModelSpec spec = base();
         LayerSpec l = layer(AttentionKind::full);
         l.top_k = 2;
         l.router.scores = RouterScores::sparsemixer;
         l.router.renormalize = false;
         l.router.mask_threshold = 0.25f;
         l.attention.clip_qkv = 1.0f;
         spec.layers.assign(2, l);
         spec.layer_norm = true;
         spec.residual_multiplier = 0.5f;
         spec.embedding_multiplier = 4;
         spec.logits_divisor = 3;
         return spec;
     },
     "q4g64", "f16", KvType::q8_0, 4266297768u},
}};

uint32_t checksum(const Model& model, KvType state, std::string_view isa, int threads, int step) {
    const EngineOptions options{.threads = threads,
                                .context = kContext,
                                .chunk = step,
                                .store = {.slots = kExperts},
                                .key_type = state,
                                .value_type = state,
                                .isa = std::string(isa)};
    Engine engine(model.spec, model.index, options);
    std::vector<int32_t> tokens(kCount), positions(kCount), ids(kCount, 0);
    Numbers numbers;
    for (int32_t& token : tokens) token = static_cast<int32_t>(numbers.next() % kVocabulary);
    std::iota(positions.begin(), positions.end(), 0);
    std::vector<float> logits(size_t{kCount} * kVocabulary);
    engine.forward({.tokens = tokens, .positions = positions, .sequences = ids, .wanted = positions}, logits.data(),
                   [] {});
    for (const float logit : logits) check(logit == logit, "a logit is not a number");
    return crc32c(std::as_bytes(std::span(logits)));
}

// While it lives, this thread's subnormal operands and results are zeros.
class FlushSubnormals {
  public:
#if defined(__SSE2__)
    static constexpr bool kCan = true;
    FlushSubnormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040u); }
    ~FlushSubnormals() { _mm_setcsr(before_); }

  private:
    unsigned before_;
#elif defined(__aarch64__)
    static constexpr bool kCan = true;
    FlushSubnormals() {
        __asm__ __volatile__("mrs %0, fpcr" : "=r"(before_));
        const uint64_t flushing = before_ | uint64_t{1} << 24;
        __asm__ __volatile__("msr fpcr, %0" ::"r"(flushing));
    }
    ~FlushSubnormals() { __asm__ __volatile__("msr fpcr, %0" ::"r"(before_)); }

  private:
    uint64_t before_;
#else
    static constexpr bool kCan = false;
#endif
};

void test_models() {
    std::string changed;
    for (const Golden& golden : kGolden) {
        const Model model(golden.spec(), golden.dense, golden.expert);
        const uint32_t found = checksum(model, golden.state, "scalar", 2, 64);
        if (found != golden.checksum) changed += std::string(golden.name) + " " + std::to_string(found) + "u; ";
        for (const std::string_view isa : available_isas())
            check(checksum(model, golden.state, isa, 1, 19) == found,
                  std::string(golden.name) + ": " + std::string(isa) + " has other logits than scalar");
        if (FlushSubnormals::kCan) {
            const FlushSubnormals flush;
            for (const std::string_view isa : available_isas())
                check(checksum(model, golden.state, isa, 1, 64) == found,
                      std::string(golden.name) + ": flushing subnormal numbers changes " + std::string(isa));
        }
    }
    check(changed.empty(), "logits have other checksums than are written in golden.cpp: " + changed);
}

void test_rotary_tables() {
    const RopeSpec spec = rope(64, 1.0f, false);
    std::array<float, 64> cosine{}, sine{};
    uint32_t found = 0;
    for (const int position : {0, 1, 2, 3, 100, 4095, 131071, 1048575, 16777216, 2147483647}) {
        rotary(spec.inverse_frequencies, position, 1.0f, cosine.data(), sine.data());
        found = crc32c(std::as_bytes(std::span(sine)), crc32c(std::as_bytes(std::span(cosine)), found));
    }
    check(found == 3626694433u, "rotary tables have the checksum " + std::to_string(found));
}

}  // namespace

void test_golden() {
    test_rotary_tables();
    test_models();
}

}  // namespace edgemoe::tests
