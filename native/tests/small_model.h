// A small mixture of experts with random weights, in a file.
#pragma once

#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "check.h"
#include "edgemoe/crc32c.h"
#include "edgemoe/engine.h"

namespace edgemoe::tests {

inline constexpr int kVocabulary = 80, kHidden = 128, kHeads = 4, kKvHeads = 2, kHeadDim = 32, kFfn = 96, kExperts = 8,
                     kTopK = 3, kLayerCount = 3, kContext = 200;

// A model in a file, of the given layouts; `gguf`: experts row by row, in an extent for each matrix that begins
// anywhere.
class Model {
  public:
    Model(const char* dense, const char* expert, bool gguf,
          std::vector<AttentionKind> mixers = {kLayerCount, AttentionKind::full}, bool layer_norm = false)
        : dense_(dense), expert_(expert), gguf_(gguf) {
        spec.layer_norm = layer_norm;
        spec.vocab_size = kVocabulary;
        spec.hidden_size = kHidden;
        spec.context = kContext;
        spec.norm_epsilon = 1e-6f;
        spec.ropes.push_back({});
        for (int i = 0; i < kHeadDim / 2; ++i)
            spec.ropes[0].inverse_frequencies.push_back(std::pow(1e4f, -2.0f * i / kHeadDim));
        add_matrix("embedding", kVocabulary, kHidden);
        add_matrix("head", kVocabulary, kHidden);
        add_norm("final_norm");
        for (int number = 0; number < static_cast<int>(mixers.size()); ++number) {
            LayerSpec layer;
            const std::string p = "layers." + std::to_string(number) + ".";
            for (const char* name : {"attention_norm", "ffn_norm"}) add_norm(p + name);
            layer.attention = mixers[number] == AttentionKind::full          ? attention(p, number == 2 ? 40 : 0)
                              : mixers[number] == AttentionKind::mla         ? latent_attention(p)
                              : mixers[number] == AttentionKind::gated_delta ? gated_delta(p)
                                                                             : short_convolution(p);
            add_matrix(p + "o", kHidden, layer.attention.heads * layer.attention.value_dim);
            layer.ffn_dim = kFfn;
            if (number == 0) {
                add_matrix(p + "ffn.gate", kFfn, kHidden);
                add_matrix(p + "ffn.up", kFfn, kHidden);
                add_matrix(p + "ffn.down", kHidden, kFfn);
            } else {
                layer.experts = kExperts;
                layer.top_k = kTopK;
                layer.router.renormalize = true;
                add_floats(p + "router", kExperts, kHidden);
                add_experts(number);
            }
            spec.layers.push_back(layer);
        }
        file = std::make_unique<TemporaryFile>(content);
        index.files = {file->path()};
    }

    ModelSpec spec;
    PackIndex index;
    std::vector<std::byte> content;
    std::unique_ptr<TemporaryFile> file;

  private:
    AttentionSpec attention(const std::string& p, int window) {
        AttentionSpec a{.heads = kHeads, .kv_heads = kKvHeads, .head_dim = kHeadDim, .value_dim = kHeadDim};
        a.scale = 0.2f;
        a.qk_norm = QkNorm::head;
        a.rope = 0;
        a.window = window;
        for (const char* name : {"q_norm", "k_norm"}) add_vector(p + name, kHeadDim);
        add_matrix(p + "q", kHeads * kHeadDim, kHidden);
        add_matrix(p + "k", kKvHeads * kHeadDim, kHidden);
        add_matrix(p + "v", kKvHeads * kHeadDim, kHidden);
        return a;
    }

    AttentionSpec latent_attention(const std::string& p) {
        AttentionSpec a{.kind = AttentionKind::mla, .heads = kHeads, .head_dim = 64, .value_dim = kHeadDim};
        a.scale = 0.2f;
        a.rope = 0;
        a.q_rank = 48;
        a.kv_rank = 64;
        a.rope_dim = kHeadDim;
        a.latent_norm_epsilon = 1e-6f;
        add_vector(p + "q_norm", a.q_rank);
        add_vector(p + "kv_norm", a.kv_rank);
        add_matrix(p + "q_down", a.q_rank, kHidden);
        add_matrix(p + "q", kHeads * a.head_dim, a.q_rank);
        add_matrix(p + "kv_down", a.kv_rank + a.rope_dim, kHidden);
        add_matrix(p + "k_up", kHeads * a.kv_rank, a.head_dim - a.rope_dim);
        add_matrix(p + "v_up", kHeads * a.value_dim, a.kv_rank);
        return a;
    }

    AttentionSpec gated_delta(const std::string& p) {
        AttentionSpec a{.kind = AttentionKind::gated_delta, .heads = kHeads, .kv_heads = kKvHeads};
        a.head_dim = a.value_dim = kHeadDim;
        a.conv_size = 4;
        add_matrix(p + "mixed", a.channels(), kHidden);
        add_matrix(p + "output_gate", kHeads * kHeadDim, kHidden);
        add_matrix(p + "beta", kHeads, kHidden);
        add_matrix(p + "alpha", kHeads, kHidden);
        add_floats(p + "conv", a.channels(), a.conv_size);
        add_vector(p + "decay_rate", kHeads, -1.0f);
        add_vector(p + "step_bias", kHeads);
        add_vector(p + "head_norm", kHeadDim);
        return a;
    }

    AttentionSpec short_convolution(const std::string& p) {
        AttentionSpec a{.kind = AttentionKind::short_conv, .heads = 1};
        a.head_dim = a.value_dim = kHidden;
        a.conv_size = 3;
        add_matrix(p + "mixed", 3 * kHidden, kHidden);
        add_floats(p + "conv", kHidden, a.conv_size);
        return a;
    }

    // A matrix that is float32 whatever the others are.
    void add_floats(const std::string& name, int rows, int cols) {
        const std::string others = std::exchange(dense_, gguf_ ? "ggml.f32" : "f32");
        add_matrix(name, rows, cols);
        dense_ = others;
    }

    uint32_t add_section(std::vector<std::vector<std::byte>> extents) {
        Section section;
        uint32_t checksum = 0;
        for (const auto& bytes : extents) {
            if (gguf_)
                content.resize(content.size() + 32);
            else
                content.resize((content.size() + kDiskBlock - 1) / kDiskBlock * kDiskBlock);
            section.extents.push_back({0, content.size(), bytes.size()});
            content.insert(content.end(), bytes.begin(), bytes.end());
            checksum = crc32c(bytes, checksum);
        }
        if (!gguf_) section.checksum = checksum;
        index.sections.push_back(section);
        return static_cast<uint32_t>(index.sections.size() - 1);
    }

    void add_norm(const std::string& name) {  // of the stream
        add_vector(name, kHidden);
        if (spec.layer_norm) add_vector(name + "_bias", kHidden, 0.0f);
    }

    void add_vector(const std::string& name, int size, float mean = 1.0f) {
        std::vector<float> values(size);
        for (float& value : values) value = mean + 0.1f * normal_(random_);
        const std::span bytes = std::as_bytes(std::span(values));
        index.dense[name] = {add_section({{bytes.begin(), bytes.end()}}), 0, "vector", size, 1};
    }

    void add_matrix(const std::string& name, int rows, int cols) {
        index.dense[name] = {add_section({matrix(dense_, rows, cols)}), 0, dense_, rows, cols};
    }

    void add_experts(int number) {
        ExpertLayer& layer = index.experts[number];
        auto& parts = layer.levels.emplace_back(ExpertLevel{4, {}}).parts;
        const StoredLayout stored = stored_layout(expert_);
        const int shapes[3][2] = {{kFfn, kHidden}, {kFfn, kHidden}, {kHidden, kFfn}};
        for (int part = 0; part < 3; ++part)
            parts[part] = {stored, gguf_ ? static_cast<uint32_t>(part) : 0, 0, shapes[part][0], shapes[part][1]};
        for (int expert = 0; expert < kExperts; ++expert) {
            std::vector<std::vector<std::byte>> extents;
            for (int part = 0; part < 3; ++part) {
                auto bytes = matrix(expert_, shapes[part][0], shapes[part][1]);
                if (gguf_ || part == 0) {
                    extents.push_back(std::move(bytes));
                } else {
                    extents[0].resize((extents[0].size() + 63) / 64 * 64);
                    parts[part].offset = extents[0].size();
                    extents[0].insert(extents[0].end(), bytes.begin(), bytes.end());
                }
            }
            layer.sections.push_back({add_section(std::move(extents))});
        }
    }

    // Weights of about 1 / sqrt(cols).
    std::vector<std::byte> matrix(const std::string& layout, int rows, int cols) {
        std::vector<std::byte> bytes(stored_bytes(stored_layout(layout), rows, cols));
        const auto put = [&](size_t at, uint16_t value) { std::memcpy(bytes.data() + at, &value, sizeof value); };
        if (layout == "f32" || layout == "ggml.f32") {
            for (size_t i = 0; i < bytes.size(); i += sizeof(float)) {
                const float value = normal_(random_) / std::sqrt(static_cast<float>(cols));
                std::memcpy(bytes.data() + i, &value, sizeof value);
            }
            return bytes;
        }
        for (std::byte& byte : bytes) byte = static_cast<std::byte>(random_());
        if (layout == "q4g64") {
            const size_t group = kRowBlock * kGroup / 2 + 2 * kRowBlock * sizeof(uint16_t);
            for (size_t at = group; at <= bytes.size(); at += group)
                for (size_t i = 0; i < kRowBlock; ++i) {
                    put(at - 64 + 2 * i, 0x2400);  // 0.0156
                    put(at - 32 + 2 * i, 0xAF80);  // -0.117
                }
        } else {
            check(layout == "ggml.q4_0", "the test makes no " + layout);
            for (size_t at = 0; at < bytes.size(); at += 18) put(at, 0x2400);
        }
        return bytes;
    }

    std::string dense_, expert_;
    bool gguf_;
    Random random_{3};
    std::normal_distribution<float> normal_;
};

}  // namespace edgemoe::tests
