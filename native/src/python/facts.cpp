#include "facts.h"

#include <algorithm>
#include <array>
#include <map>
#include <stdexcept>
#include <string>

#include "fields.h"

namespace edgemoe::python {

namespace {

// The fields that Python keeps for itself.
constexpr std::array kIndexOfPython{"path", "generation", "quality"};
constexpr std::array kSpecOfPython{"family"};
constexpr std::array kAttentionOfPython{"softcap"};                               // spec.py refuses any but 0
constexpr std::array kRopeOfPython{"long_attention_factor", "original_context"};  // of long_inverse_frequencies

const std::map<std::string, QkNorm> kQkNorms{{"none", QkNorm::none}, {"head", QkNorm::head}, {"full", QkNorm::full}};
const std::map<std::string, RouterScores> kRouterScores{{"softmax", RouterScores::softmax},
                                                        {"softmax_topk", RouterScores::softmax_topk},
                                                        {"sigmoid", RouterScores::sigmoid},
                                                        {"sparsemixer", RouterScores::sparsemixer}};
const std::map<std::string, GroupScore> kGroupScores{{"largest", GroupScore::largest},
                                                     {"two_largest", GroupScore::two_largest}};
const std::map<std::string, Activation> kActivations{
    {"silu", Activation::silu}, {"gelu_tanh", Activation::gelu_tanh}, {"clamped_swiglu", Activation::clamped_swiglu}};
const std::map<std::string, AttentionKind> kAttentionKinds{{"full", AttentionKind::full},
                                                           {"mla", AttentionKind::mla},
                                                           {"gated_delta", AttentionKind::gated_delta},
                                                           {"short_conv", AttentionKind::short_conv}};
const std::map<std::string, bool> kLayerNorms{{"rms", false}, {"layer", true}};
const std::map<std::string, KvType> kKvTypes{{"f32", KvType::f32}, {"f16", KvType::f16}, {"q8_0", KvType::q8_0}};

void require(bool condition, const std::string& message) {
    if (!condition) throw std::invalid_argument(message);
}

// -- the specification ----------------------------------------------------------------------------------------------

RopeSpec read_rope(Fields& fields) {
    RopeSpec rope;
    rope.inverse_frequencies = fields.get<std::vector<float>>("inverse_frequencies");
    rope.attention_factor = fields.get<float>("attention_factor");
    rope.interleaved = fields.get<bool>("interleaved");
    require(fields.get<std::vector<float>>("long_inverse_frequencies").empty(),
            "a rope with two sets of frequencies: ModelSpec.for_context chooses one");
    fields.leave(kRopeOfPython);
    return rope;
}

AttentionSpec read_attention(Fields& fields, std::vector<RopeSpec>& ropes) {
    AttentionSpec attention;
    attention.kind = fields.get("kind", kAttentionKinds);
    attention.heads = fields.get<int>("heads");
    attention.kv_heads = fields.get<int>("kv_heads");
    attention.head_dim = fields.get<int>("head_dim");
    attention.value_dim = fields.get<int>("value_dim");
    attention.scale = fields.get<float>("scale");
    attention.qk_norm = fields.get("qk_norm", kQkNorms);
    attention.window = fields.get<std::optional<int>>("window").value_or(0);
    attention.sinks = fields.get<bool>("sinks");
    attention.bias = fields.get<bool>("bias");
    attention.output_bias = fields.get<bool>("output_bias");
    attention.value_norm = fields.get<bool>("value_norm");
    attention.values_are_keys = fields.get<bool>("values_are_keys");
    attention.clip_qkv = fields.get<float>("clip_qkv");
    attention.output_gate = fields.get<bool>("output_gate");
    attention.q_rank = fields.get<int>("q_rank");
    attention.kv_rank = fields.get<int>("kv_rank");
    attention.rope_dim = fields.get<int>("rope_dim");
    attention.latent_norm_epsilon = fields.get<float>("latent_norm_epsilon");
    attention.conv_size = fields.get<int>("conv_size");
    attention.tiled_heads = fields.get<bool>("tiled_heads");
    attention.fused_beta_alpha = fields.get<bool>("fused_beta_alpha");
    fields.nested_or_none("rope", [&](Fields& rope) {
        const RopeSpec found = read_rope(rope);
        const auto known = std::find(ropes.begin(), ropes.end(), found);
        attention.rope = static_cast<int>(known - ropes.begin());
        if (known == ropes.end()) ropes.push_back(found);
    });
    fields.leave(kAttentionOfPython);
    return attention;
}

RouterSpec read_router(Fields& fields) {
    RouterSpec router;
    router.scores = fields.get("scores", kRouterScores);
    router.renormalize = fields.get<bool>("renormalize");
    router.renormalize_epsilon = fields.get<float>("renormalize_epsilon");
    router.renormalize_least = fields.get<float>("renormalize_least");
    router.selection_bias = fields.get<bool>("selection_bias");
    router.bias = fields.get<bool>("bias");
    router.groups = fields.get<int>("groups");
    router.groups_kept = fields.get<int>("groups_kept");
    router.group_score = fields.get("group_score", kGroupScores);
    router.weight_scale = fields.get<float>("weight_scale");
    router.mask_threshold = fields.get<float>("mask_threshold");
    router.input_norm = fields.get<bool>("input_norm");
    router.input_scale = fields.get<float>("input_scale");
    router.expert_scale = fields.get<bool>("expert_scale");
    return router;
}

LayerSpec read_layer(Fields& fields, std::vector<RopeSpec>& ropes) {
    LayerSpec layer;
    layer.attention = fields.nested("attention", [&](Fields& attention) { return read_attention(attention, ropes); });
    layer.ffn_dim = fields.get<int>("ffn_dim");
    layer.experts = fields.get<int>("experts");
    layer.top_k = fields.get<int>("top_k");
    fields.nested_or_none("router", [&](Fields& router) { layer.router = read_router(router); });
    layer.shared_dim = fields.get<int>("shared_dim");
    layer.shared_gate = fields.get<bool>("shared_gate");
    layer.ffn_bias = fields.get<bool>("ffn_bias");
    layer.expert_bias = fields.get<bool>("expert_bias");
    layer.activation = fields.get("activation", kActivations);
    layer.swiglu_alpha = fields.get<float>("swiglu_alpha");
    layer.swiglu_limit = fields.get<float>("swiglu_limit");
    layer.output_norms = fields.get<bool>("output_norms");
    layer.branch_norms = fields.get<bool>("branch_norms");
    layer.output_scale = fields.get<bool>("output_scale");
    return layer;
}

// spec.py has checked every value.
ModelSpec read_spec(Fields& fields) {
    ModelSpec spec;
    spec.vocab_size = fields.get<int>("vocab_size");
    spec.hidden_size = fields.get<int>("hidden_size");
    spec.context = fields.get<int>("context");
    spec.norm_epsilon = fields.get<float>("norm_epsilon");
    spec.layer_norm = fields.get("norm", kLayerNorms);
    spec.norm_offset = fields.get<float>("norm_offset");
    spec.tied_embeddings = fields.get<bool>("tied_embeddings");
    spec.head_bias = fields.get<bool>("head_bias");
    spec.embedding_multiplier = fields.get<float>("embedding_multiplier");
    spec.residual_multiplier = fields.get<float>("residual_multiplier");
    spec.logits_divisor = fields.get<float>("logits_divisor");
    spec.logits_softcap = fields.get<float>("logits_softcap");
    fields.each("layers", [&](Fields& layer) { spec.layers.push_back(read_layer(layer, spec.ropes)); });
    fields.leave(kSpecOfPython);
    return spec;
}

// -- the index ------------------------------------------------------------------------------------------------------

Section read_section(Fields& fields, size_t files) {
    Section section;
    section.checksum = fields.get<std::optional<uint32_t>>("checksum");
    fields.each("extents", [&](Fields& extent) {
        section.extents.push_back(
            {extent.get<uint32_t>("file"), extent.get<uint64_t>("offset"), extent.get<uint64_t>("length")});
        require(section.extents.back().file < files, "an extent names an unknown file");
    });
    require(!section.extents.empty(), "a section without extents");
    return section;
}

// [rows, columns]; a vector is [length, 1].
std::array<int, 2> read_shape(Fields& fields) {
    const auto shape = fields.get<std::vector<int>>("shape");
    require(shape.size() == 1 || shape.size() == 2, "a tensor is neither a matrix nor a vector");
    return {shape[0], shape.size() == 2 ? shape[1] : 1};
}

ExpertPart read_part(Fields& fields) {
    ExpertPart part;
    part.stored = stored_layout(fields.get<std::string>("layout"));
    part.extent = fields.get<uint32_t>("extent");
    part.offset = fields.get<uint64_t>("offset");
    const auto [rows, cols] = read_shape(fields);
    part.rows = rows;
    part.cols = cols;
    return part;
}

ExpertLayer read_experts(Fields& fields, const std::vector<Section>& sections) {
    constexpr std::array kParts{"gate", "up", "down"};
    ExpertLayer layer;
    fields.each("levels", [&](Fields& fields) {
        ExpertLevel level{fields.get<int>("bits"), {}};
        size_t parts = 0;
        fields.each_of_map<std::string>("parts", [&](const std::string& name, Fields& part) {
            const auto place = std::find(kParts.begin(), kParts.end(), name) - kParts.begin();
            require(place < 3, "an expert has no part '" + name + "'");
            level.parts[place] = read_part(part);
            ++parts;
        });
        require(parts == kParts.size(), "an expert has three parts");
        layer.levels.push_back(level);
    });
    layer.sections = fields.get<std::vector<std::vector<uint32_t>>>("sections");
    for (const auto& expert : layer.sections) {
        require(!expert.empty() && expert.size() <= layer.levels.size(), "an expert has other levels than its layer");
        for (const uint32_t section : expert) {
            require(section < sections.size(), "an expert names an unknown section");
            require(sections[section].extents.size() <= kParts.size(),
                    "the section of an expert has more than three extents");
        }
    }
    return layer;
}

Quality read_quality_fields(Fields& fields) {
    Quality quality;
    quality.thresholds = fields.get<std::vector<float>>("thresholds");
    quality.level_cap = fields.get<std::optional<int>>("level_cap").value_or(kMaxLevels);
    require(quality.level_cap >= 0, "level_cap is negative");
    return quality;
}

}  // namespace

// What the tensors are for is the engine's to check; here it is that sections and files exist.
ModelFacts read_index(const py::handle& index) {
    return Fields::of(index, "ModelIndex", [](Fields& fields) {
        ModelFacts facts{fields.nested("spec", read_spec), {}};
        PackIndex& found = facts.index;
        found.files = fields.get<std::vector<std::string>>("files");
        fields.each("sections",
                    [&](Fields& section) { found.sections.push_back(read_section(section, found.files.size())); });
        fields.each_of_map<std::string>("dense", [&](const std::string& name, Fields& tensor) {
            const auto section = tensor.get<uint32_t>("section");
            require(section < found.sections.size(), "a tensor names an unknown section");
            const auto [rows, cols] = read_shape(tensor);
            found.dense[name] = {section, tensor.get<uint64_t>("offset"), tensor.get<std::string>("layout"), rows,
                                 cols};
        });
        fields.each_of_map<int>("experts", [&](int layer, Fields& experts) {
            found.experts[layer] = read_experts(experts, found.sections);
        });
        fields.leave(kIndexOfPython);
        return facts;
    });
}

Quality read_quality(const py::handle& quality) { return Fields::of(quality, "Quality", read_quality_fields); }

Options read_options(const py::handle& options) {
    return Fields::of(options, "EngineOptions", [](Fields& fields) {
        Options options;
        EngineOptions& found = options.engine;
        found.threads = fields.get<int>("threads");
        found.sequences = fields.get<int>("sequences");
        found.context = fields.get<int>("context");
        found.positions = fields.get<int>("positions");
        found.chunk = fields.get<int>("chunk");
        found.store.slots = fields.get<int>("expert_slots");
        found.store.readers = fields.get<int>("readers");
        found.store.eviction = eviction_from_name(fields.get<std::string>("eviction"));
        found.store.prefetch = fields.get<bool>("prefetch");
        found.store.arrival_jitter = std::chrono::microseconds(fields.get<int>("arrival_jitter_us"));
        options.quality = fields.nested("quality", read_quality_fields);
        found.key_type = fields.get("cache_type_k", kKvTypes);
        found.value_type = fields.get("cache_type_v", kKvTypes);
        found.device_layers = fields.get<int>("device_layers");
        found.device_slots = fields.get<int>("device_slots");
        found.isa = fields.get<std::optional<std::string>>("isa").value_or("");
        require(found.threads >= 1 && found.sequences >= 1 && found.context >= 1 && found.chunk >= 1 &&
                    found.store.readers >= 1,
                "threads, sequences, context, chunk and readers are at least 1");
        require(found.positions == 0 || found.positions >= found.context, "positions is less than context");
        return options;
    });
}

}  // namespace edgemoe::python
