#include "edgemoe/sequence_state.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <string>
#include <utility>

namespace edgemoe {
namespace {

constexpr int32_t kNoBlock = -1;

int block_count(int positions) { return (positions + kKvBlock - 1) / kKvBlock; }

struct SnapshotHeader {
    uint64_t magic;
    int64_t length;
    uint64_t bytes;
};

constexpr uint64_t kMagic = 0x33544154534d45ull;  // "EMSTAT3"

// A sequence's constants begin at addresses that are multiples of this.
constexpr size_t kAlignment = 64;

size_t all_constant_bytes(std::span<const KvShape> layers) {
    size_t total = 0;
    for (const KvShape& shape : layers) total += shape.constant_bytes();
    return (total + kAlignment - 1) / kAlignment * kAlignment;
}

// Zeros in place of what positions from place `first` on left in the keys (or values) of a block.
void clear_slots(KvType type, int dim, bool keys, int first, std::byte* block) {
    const auto clear = [&](std::byte* data, size_t elements, size_t size) {  // [elements][places] or [places][elements]
        if (!keys) {
            std::memset(data + first * elements * size, 0, (kKvBlock - first) * elements * size);
            return;
        }
        for (size_t i = 0; i < elements; ++i)
            std::memset(data + (i * kKvBlock + first) * size, 0, (kKvBlock - first) * size);
    };
    const auto elements = static_cast<size_t>(dim);
    switch (type) {
        case KvType::f32:
            return clear(block, elements, sizeof(float));
        case KvType::f16:
            return clear(block, elements, sizeof(uint16_t));
        case KvType::q8_0:
            clear(block, elements, 1);
            return clear(block + elements * kKvBlock, elements / kKvGroup, sizeof(uint16_t));
    }
}

}  // namespace

int KvShape::kept_blocks(int context, int chunk) const {
    if (!window) return block_count(context);
    // A run of n positions lies in at most block_count(n - 1) + 1 blocks.
    return static_cast<int>(std::min<int64_t>(block_count(context), (int64_t{window} + chunk - 2) / kKvBlock + 2));
}

size_t StatePool::bytes(std::span<const KvShape> layers, int sequences, int context, int chunk) {
    size_t total = 2 * all_constant_bytes(layers);
    for (const KvShape& shape : layers) {
        const int kept = shape.kept_blocks(context, chunk);
        if (int64_t{kept} * sequences > std::numeric_limits<int32_t>::max())
            throw std::invalid_argument(std::to_string(sequences) + " sequences of " + std::to_string(context) +
                                        " positions have more blocks than can be counted");
        total += shape.block_bytes() * kept;
    }
    return total * sequences;
}

StatePool::StatePool(std::vector<KvShape> layers, int sequences, int context, int chunk)
    : layers_(std::move(layers)),
      sequences_(sequences),
      context_(context),
      constant_bytes_(all_constant_bytes(layers_)),
      arena_(bytes(layers_, sequences, context, chunk)) {
    size_t constant_begin = 0;
    for (const KvShape& shape : layers_) {
        constant_begins_.push_back(constant_begin);
        constant_begin += shape.constant_bytes();
        begins_.push_back(first_constants_);
        layer_groups_.push_back(-1);
        if (shape.block_bytes() == 0) continue;
        const auto found = std::ranges::find(groups_, shape.window, &Group::window);
        layer_groups_.back() = static_cast<int>(found - groups_.begin());
        const int kept = shape.kept_blocks(context, chunk);
        if (found == groups_.end()) groups_.push_back({shape.window, kept, {}});
        first_constants_ += shape.block_bytes() * kept * sequences;
    }
    // The first blocks, and places, are taken first.
    for (Group& group : groups_)
        for (int block = group.kept * sequences - 1; block >= 0; --block) group.free.push_back(block);
    for (int place = sequences - 1; place >= 0; --place) free_constants_.push_back(place);
}

int32_t StatePool::take_block(int group) {
    std::vector<int32_t>& free = groups_[group].free;
    if (free.empty())
        throw StateError("all " + std::to_string(groups_[group].kept * sequences_) +
                         " blocks of the sequences' states are in use");
    const int32_t block = free.back();
    free.pop_back();
    return block;
}

int StatePool::take_constants() {
    if (free_constants_.empty())
        throw StateError("there is room for " + std::to_string(sequences_) +
                         (sequences_ == 1 ? " sequence" : " sequences") +
                         ", and all of it is in use: remove one, or plan for more");
    const int place = free_constants_.back();
    free_constants_.pop_back();
    return place;
}

SequenceState::SequenceState(StatePool& pool)
    : pool_(pool),
      tables_(pool.groups().size(), std::vector<int32_t>(block_count(pool.context()), kNoBlock)),
      place_(pool.take_constants()) {}

SequenceState::~SequenceState() {
    give_back(0);
    pool_.give_back_constants(place_);
}

void SequenceState::begin_writing(int end) {
    writing_ = true;
    const int first = length_ / kKvBlock;
    for (size_t group = 0; group < tables_.size(); ++group) {
        std::vector<int32_t>& table = tables_[group];
        const int kept = pool_.groups()[group].kept;
        for (int number = first; number < block_count(end); ++number) {
            if (table[number] != kNoBlock) continue;
            // As many blocks are kept as a window needs: the oldest one becomes the new one.
            if (number >= kept && table[number - kept] != kNoBlock)
                table[number] = std::exchange(table[number - kept], kNoBlock);
            else
                table[number] = pool_.take_block(static_cast<int>(group));
        }
    }
    written_ = std::max(written_, end);
}

void SequenceState::give_up_writing() {
    if (!std::exchange(writing_, false)) return;
    if (!has_constants()) return give_back(block_count(length_));
    try {
        go_back(marked_);
    } catch (const StateError&) {  // a window does not reach back so far
        go_back(0);
    }
}

void SequenceState::mark() {
    if (!has_constants()) return;
    std::memcpy(pool_.constants(place_) + pool_.constant_bytes(), pool_.constants(place_), pool_.constant_bytes());
    marked_ = length_;
}

KvBlocks SequenceState::blocks(int layer, int kv_head) {
    const KvShape& shape = pool_.layers()[layer];
    return {pool_.blocks(layer) + shape.head_bytes() * kv_head, shape.block_bytes(), shape.key_bytes(),
            tables_[pool_.group(layer)].data()};
}

void SequenceState::truncate(int length) {
    if (length < 0 || length > length_)
        throw std::invalid_argument("cannot truncate a sequence of " + std::to_string(length_) + " positions to " +
                                    std::to_string(length));
    if (length < length_ || length == 0) go_back(length);
}

// Gives back the blocks from `first` on. The lowest of them is taken again first.
void SequenceState::give_back(int first) {
    for (size_t group = 0; group < tables_.size(); ++group) {
        std::vector<int32_t>& table = tables_[group];
        for (auto number = static_cast<int>(table.size()); number-- > first;)
            if (table[number] != kNoBlock)
                pool_.give_back_block(static_cast<int>(group), std::exchange(table[number], kNoBlock));
    }
}

void SequenceState::go_back(int length) {
    const auto refuse = [&](size_t layer, const std::string& why) {
        throw StateError("cannot truncate a sequence of " + std::to_string(length_) + " positions to " +
                         std::to_string(length) + ": layer " + std::to_string(layer) + why);
    };
    const std::span<const KvShape> shapes = pool_.layers();
    for (size_t layer = 0; layer < shapes.size() && length > 0; ++layer) {
        const KvShape& shape = shapes[layer];
        if (shape.window && shape.block_bytes()) {
            const int kept = pool_.groups()[pool_.group(static_cast<int>(layer))].kept;
            const bool overwritten = shape.first_block(length) + kept < block_count(written_);
            if (overwritten || length < restored_) refuse(layer, " keeps a window of " + std::to_string(shape.window));
        }
        if (shape.constant_bytes() && length != marked_)
            refuse(layer, std::string(" keeps a ") + (shape.recurrence ? "recurrence" : "convolution") +
                              ", and a copy of " + std::to_string(marked_) + " positions");
    }
    if (length > 0 && has_constants())
        std::memcpy(pool_.constants(place_), pool_.constants(place_) + pool_.constant_bytes(), pool_.constant_bytes());
    give_back(block_count(length));
    length_ = length;
    if (length == 0) written_ = restored_ = marked_ = 0;
}

size_t SequenceState::used_bytes(int layer, int length) const {
    if (length == 0) return 0;
    const KvShape& shape = pool_.layers()[layer];
    const int end = block_count(length);
    return shape.block_bytes() * (end - std::min(shape.first_block(length), end)) + shape.constant_bytes();
}

size_t SequenceState::snapshot_bytes() const {
    size_t total = sizeof(SnapshotHeader);
    for (size_t layer = 0; layer < pool_.layers().size(); ++layer)
        total += used_bytes(static_cast<int>(layer), length_);
    return total;
}

void SequenceState::snapshot(std::span<std::byte> target) const {
    if (target.size() != snapshot_bytes()) throw std::invalid_argument("a snapshot buffer of the wrong size");
    const SnapshotHeader header{kMagic, length_, target.size()};
    std::memcpy(target.data(), &header, sizeof header);
    std::byte* out = target.data() + sizeof header;
    if (length_ == 0) return;
    for (size_t layer = 0; layer < pool_.layers().size(); ++layer) {
        const KvShape& shape = pool_.layers()[layer];
        const int group = pool_.group(static_cast<int>(layer)), end = block_count(length_);
        for (int number = group < 0 ? end : shape.first_block(length_); number < end; ++number) {
            std::memcpy(out, pool_.blocks(static_cast<int>(layer)) + shape.block_bytes() * tables_[group][number],
                        shape.block_bytes());
            const int used = length_ - number * kKvBlock;
            // What lies behind the last position may be another sequence's.
            for (int head = 0; used < kKvBlock && head < shape.kv_heads; ++head) {
                std::byte* keys = out + shape.head_bytes() * head;
                clear_slots(shape.key_type, shape.head_dim, true, used, keys);
                if (!shape.latent) clear_slots(shape.value_type, shape.head_dim, false, used, keys + shape.key_bytes());
            }
            out += shape.block_bytes();
        }
        std::memcpy(out, pool_.constants(place_, static_cast<int>(layer)), shape.constant_bytes());
        out += shape.constant_bytes();
    }
}

void SequenceState::restore(std::span<const std::byte> source) {
    SnapshotHeader header{};
    if (source.size() >= sizeof header) std::memcpy(&header, source.data(), sizeof header);
    if (header.magic != kMagic || header.bytes != source.size() || header.length < 0 || header.length > pool_.context())
        throw std::invalid_argument("not a snapshot of this model's state");
    const int length = static_cast<int>(header.length), end = block_count(length);
    const std::span<const KvShape> shapes = pool_.layers();
    size_t total = sizeof header;
    for (size_t layer = 0; layer < shapes.size(); ++layer) total += used_bytes(static_cast<int>(layer), length);
    if (total != source.size()) throw std::invalid_argument("a snapshot of a state of another shape");
    go_back(0);
    for (size_t group = 0; group < tables_.size(); ++group) {
        KvShape shape{};
        shape.window = pool_.groups()[group].window;
        for (int number = shape.first_block(length); number < end; ++number)
            tables_[group][number] = pool_.take_block(static_cast<int>(group));
    }
    const std::byte* in = source.data() + sizeof header;
    for (size_t layer = 0; layer < shapes.size() && length > 0; ++layer) {
        const KvShape& shape = shapes[layer];
        const int group = pool_.group(static_cast<int>(layer));
        for (int number = group < 0 ? end : shape.first_block(length); number < end; ++number) {
            std::memcpy(pool_.blocks(static_cast<int>(layer)) + shape.block_bytes() * tables_[group][number], in,
                        shape.block_bytes());
            in += shape.block_bytes();
        }
        std::memcpy(pool_.constants(place_, static_cast<int>(layer)), in, shape.constant_bytes());
        in += shape.constant_bytes();
    }
    length_ = written_ = restored_ = length;
}

}  // namespace edgemoe
