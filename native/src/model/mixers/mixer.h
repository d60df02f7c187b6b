// What lets a position see others: the first half of a layer. One file for each kind: its weights, its buffers, its
// state and how it runs. A kind is added by such a file, its name in AttentionKind, and its row here and in mixers.cpp
// (docs/architecture.md says what changes beside it).
#pragma once

#include <memory>

#include "edgemoe/backend.h"
#include "edgemoe/model_spec.h"
#include "edgemoe/sequence_state.h"
#include "model/weights.h"

namespace edgemoe {

class Mixer {
  public:
    virtual ~Mixer() = default;

    // x [rows, hidden], normalized -> [rows, heads * value_dim], which the output projection reads.
    virtual ConstFloats run(Backend& backend, ConstFloats x, int count) = 0;
};

struct MixerSetting {
    const ModelSpec& model;
    const AttentionSpec& spec;
    int layer;
    KvType key_type, value_type;
};

inline constexpr int kHeadsAtATime = 16;  // of a latent, so that buffers stay small

struct MixerKind {
    // What a sequence keeps of a layer.
    KvShape (*state)(const AttentionSpec& spec, KvType key_type, KvType value_type);
    // Groups of kGroup columns of the widest input of a product, for one row, beside that of the layer itself.
    size_t (*input_groups)(const AttentionSpec& spec);
    // Bytes of the buffers for so many rows.
    size_t (*buffer_bytes)(const AttentionSpec& spec, int rows);
    std::unique_ptr<Mixer> (*load)(const MixerSetting& setting, const PlacedWeights& weights, int rows,
                                   std::byte* buffers);
};

extern const MixerKind kAttention, kLatentAttention, kGatedDelta, kShortConvolution;

const MixerKind& mixer_kind(AttentionKind kind);

// What the rows of MixerKind have in common. The buffers of a kind are a struct with a function place(Places&, spec,
// rows).
template <class Buffers>
size_t mixer_buffer_bytes(const AttentionSpec& spec, int rows) {
    Places measured;
    Buffers{}.place(measured, spec, rows);
    return measured.used();
}

inline size_t no_wider_input(const AttentionSpec& /*spec*/) { return 0; }

template <class Kind>
std::unique_ptr<Mixer> load_mixer(const MixerSetting& setting, const PlacedWeights& weights, int rows,
                                  std::byte* buffers) {
    return std::make_unique<Kind>(setting, weights, rows, buffers);
}

}  // namespace edgemoe
