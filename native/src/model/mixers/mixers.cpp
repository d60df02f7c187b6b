#include "model/mixers/mixer.h"

namespace edgemoe {

const MixerKind& mixer_kind(AttentionKind kind) {
    switch (kind) {
        case AttentionKind::full:
            return kAttention;
        case AttentionKind::mla:
            return kLatentAttention;
        case AttentionKind::gated_delta:
            return kGatedDelta;
        case AttentionKind::short_conv:
            return kShortConvolution;
    }
    throw std::invalid_argument("unknown kind of layer number " + std::to_string(static_cast<int>(kind)));
}

}  // namespace edgemoe
