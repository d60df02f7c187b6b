#include "edgemoe/sequence_state.h"

#include <algorithm>
#include <cstring>
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

constexpr uint64_t kMagic = 0x33544154534d45ull;  // "EMSTAT3"

}  // namespace

int KvShape::kept_blocks(int context, int chunk) const {
    if (!window) return blocks(context);
    // A run of n positions lies in at most blocks(n - 1) + 1 blocks.
    return static_cast<int>(std::min<int64_t>(blocks(context), (int64_t{window} + chunk - 2) / kKvBlock + 2));
}

size_t SequenceState::bytes(std::span<const KvShape> layers, int context, int chunk) {
    size_t total = 0;
    for (const KvShape& shape : layers)
        total += shape.block_bytes() * shape.kept_blocks(context, chunk) + 2 * shape.constant_bytes();
    return total;
}

SequenceState::SequenceState(std::vector<KvShape> layers, int context, int chunk)
    : shapes_(std::move(layers)), context_(context), arena_(bytes(shapes_, context, chunk)) {
    size_t begin = 0;
    for (const KvShape& shape : shapes_) {
        kept_.push_back(shape.kept_blocks(context, chunk));
        begins_.push_back(begin);
        begin += shape.block_bytes() * kept_.back() + shape.constant_bytes();
        constant_bytes_ += shape.constant_bytes();
    }
}

void SequenceState::begin_writing(int end) {
    written_ = std::max(written_, end);
    writing_ = true;
}

void SequenceState::give_up_writing() {
    if (!std::exchange(writing_, false) || !has_constants()) return;
    try {
        go_back(marked_);
    } catch (const StateError&) {  // a window does not reach back so far
        go_back(0);
    }
}

void SequenceState::mark() {
    if (!has_constants()) return;
    std::byte* copy = arena_.data() + arena_.size() - constant_bytes_;
    for (size_t layer = 0; layer < shapes_.size(); ++layer) {
        const size_t size = shapes_[layer].constant_bytes();
        std::memcpy(copy, constants(static_cast<int>(layer)), size);
        copy += size;
    }
    marked_ = length_;
}

float* SequenceState::constants(int layer) {
    return reinterpret_cast<float*>(arena_.data() + begins_[layer] + shapes_[layer].block_bytes() * kept_[layer]);
}

std::byte* SequenceState::block(int layer, int number) {
    return arena_.data() + begins_[layer] + shapes_[layer].block_bytes() * (number % kept_[layer]);
}

std::byte* SequenceState::keys(int layer, int number, int kv_head) {
    return block(layer, number) + shapes_[layer].head_bytes() * kv_head;
}

void SequenceState::truncate(int length) {
    if (length < 0 || length > length_)
        throw std::invalid_argument("cannot truncate a sequence of " + std::to_string(length_) + " positions to " +
                                    std::to_string(length));
    if (length < length_ || length == 0) go_back(length);
}

void SequenceState::go_back(int length) {
    const auto refuse = [&](size_t layer, const std::string& why) {
        throw StateError("cannot truncate a sequence of " + std::to_string(length_) + " positions to " +
                         std::to_string(length) + ": layer " + std::to_string(layer) + why);
    };
    for (size_t layer = 0; layer < shapes_.size() && length > 0; ++layer) {
        const KvShape& shape = shapes_[layer];
        const bool overwritten = shape.first_block(length) + kept_[layer] < blocks(written_);
        if (shape.window && (overwritten || length < restored_))
            refuse(layer, " keeps a window of " + std::to_string(shape.window));
        if (shape.constant_bytes() && length != marked_)
            refuse(layer, std::string(" keeps a ") + (shape.recurrence ? "recurrence" : "convolution") +
                              ", and a copy of " + std::to_string(marked_) + " positions");
    }
    if (length > 0 && has_constants()) {
        const std::byte* copy = arena_.data() + arena_.size() - constant_bytes_;
        for (size_t layer = 0; layer < shapes_.size(); ++layer) {
            const size_t size = shapes_[layer].constant_bytes();
            std::memcpy(constants(static_cast<int>(layer)), copy, size);
            copy += size;
        }
    }
    length_ = length;
    if (length == 0) written_ = restored_ = marked_ = 0;
}

size_t SequenceState::used_bytes(int layer, int length) const {
    if (length == 0) return 0;
    const KvShape& shape = shapes_[layer];
    return shape.block_bytes() * (blocks(length) - std::min(shape.first_block(length), blocks(length))) +
           shape.constant_bytes();
}

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
        const size_t size = shapes_[layer].block_bytes();
        for (int number = shapes_[layer].first_block(length_); number < blocks(length_); ++number, out += size)
            std::memcpy(out, arena_.data() + begins_[layer] + size * (number % kept_[layer]), size);
        if (length_ == 0) continue;
        std::memcpy(out, arena_.data() + begins_[layer] + size * kept_[layer], shapes_[layer].constant_bytes());
        out += shapes_[layer].constant_bytes();
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
        const size_t size = shapes_[layer].block_bytes();
        for (int number = shapes_[layer].first_block(length); number < blocks(length); ++number, in += size)
            std::memcpy(block(static_cast<int>(layer), number), in, size);
        if (length == 0) continue;
        std::memcpy(constants(static_cast<int>(layer)), in, shapes_[layer].constant_bytes());
        in += shapes_[layer].constant_bytes();
    }
    length_ = written_ = restored_ = length;
    marked_ = 0;
}

}  // namespace edgemoe
