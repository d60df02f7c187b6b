#include "edgemoe/sequence_state.h"

#include <cstring>
#include <stdexcept>
#include <string>
#include <utility>

namespace edgemoe {
namespace {

int blocks(int positions) { return (positions + kKvBlock - 1) / kKvBlock; }

struct SnapshotHeader {
    uint64_t magic;
    int64_t length;
    uint64_t bytes;
};

constexpr uint64_t kMagic = 0x31544154534d45ull;  // "EMSTAT1"

}  // namespace

size_t SequenceState::bytes(std::span<const KvShape> layers, int context) {
    size_t total = 0;
    for (const KvShape& shape : layers) total += shape.block_bytes() * blocks(context);
    return total;
}

SequenceState::SequenceState(std::vector<KvShape> layers, int context)
    : shapes_(std::move(layers)), context_(context), arena_(bytes(shapes_, context)) {
    size_t begin = 0;
    for (const KvShape& shape : shapes_) {
        begins_.push_back(begin);
        begin += shape.block_bytes() * blocks(context);
    }
}

std::byte* SequenceState::keys(int layer, int block, int kv_head) {
    const KvShape& shape = shapes_[layer];
    return arena_.data() + begins_[layer] + shape.block_bytes() * block + shape.head_bytes() * kv_head;
}

void SequenceState::truncate(int length) {
    if (length < 0 || length > length_)
        throw std::invalid_argument("cannot truncate a sequence of " + std::to_string(length_) + " positions to " +
                                    std::to_string(length));
    length_ = length;
}

size_t SequenceState::used_bytes(int layer, int length) const { return shapes_[layer].block_bytes() * blocks(length); }

size_t SequenceState::snapshot_bytes() const {
    size_t total = sizeof(SnapshotHeader);
    for (size_t layer = 0; layer < shapes_.size(); ++layer) total += used_bytes(static_cast<int>(layer), length_);
    return total;
}

void SequenceState::snapshot(std::span<std::byte> target) const {
    if (target.size() != snapshot_bytes()) throw std::invalid_argument("a snapshot buffer of the wrong size");
    const SnapshotHeader header{kMagic, length_, target.size()};
    std::memcpy(target.data(), &header, sizeof header);
    std::byte* out = target.data() + sizeof header;
    for (size_t layer = 0; layer < shapes_.size(); ++layer) {
        const size_t count = used_bytes(static_cast<int>(layer), length_);
        std::memcpy(out, arena_.data() + begins_[layer], count);
        out += count;
    }
}

void SequenceState::restore(std::span<const std::byte> source) {
    SnapshotHeader header{};
    if (source.size() >= sizeof header) std::memcpy(&header, source.data(), sizeof header);
    if (header.magic != kMagic || header.bytes != source.size() || header.length < 0 || header.length > context_)
        throw std::invalid_argument("not a snapshot of this model's state");
    const int length = static_cast<int>(header.length);
    size_t total = sizeof header;
    for (size_t layer = 0; layer < shapes_.size(); ++layer) total += used_bytes(static_cast<int>(layer), length);
    if (total != source.size()) throw std::invalid_argument("a snapshot of a state of another shape");
    const std::byte* in = source.data() + sizeof header;
    for (size_t layer = 0; layer < shapes_.size(); ++layer) {
        const size_t count = used_bytes(static_cast<int>(layer), length);
        std::memcpy(arena_.data() + begins_[layer], in, count);
        in += count;
    }
    length_ = length;
}

}  // namespace edgemoe
