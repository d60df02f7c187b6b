#include "edgemoe/sequence_state.h"

#include <algorithm>
#include <cstring>
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

size_t aligned(size_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

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

// Blocks of a layer, or of a group of layers. Each of the sequences leaves kKvBlock - 1 positions of its last block
// empty at most; a window's blocks are as many as those of all positions, or fewer.
int pool_blocks(const KvShape& shape, const StateRoom& room) {
    const int64_t kept = int64_t{shape.kept_blocks(room.context, room.chunk)} * room.sequences,
                  shared = (room.positions + int64_t{kKvBlock - 1} * room.sequences) / kKvBlock;
    return static_cast<int>(std::min(kept, shared));
}

StateRoom completed(StateRoom room) {
    if (room.positions == 0) room.positions = room.context;
    if (room.positions < room.context)
        throw std::invalid_argument("there are " + std::to_string(room.positions) +
                                    " positions for all sequences, and one may have " + std::to_string(room.context));
    return room;
}

int constant_copies(const StateRoom& room) { return room.sequences > 1 ? 3 : 2; }

}  // namespace

int KvShape::kept_blocks(int context, int chunk) const {
    if (!window) return block_count(context);
    // A run of n positions lies in at most block_count(n - 1) + 1 blocks.
    return static_cast<int>(std::min<int64_t>(block_count(context), (int64_t{window} + chunk - 2) / kKvBlock + 2));
}

size_t StatePool::bytes(std::span<const KvShape> layers, const StateRoom& room) {
    return bytes(layers, room, std::vector<bool>(layers.size(), true));
}

size_t StatePool::bytes(std::span<const KvShape> layers, const StateRoom& asked, const std::vector<bool>& chosen) {
    const StateRoom room = completed(asked);
    size_t blocks = 0, constants = 0;
    for (size_t layer = 0; layer < layers.size(); ++layer) {
        if (!chosen[layer]) continue;
        blocks += layers[layer].block_bytes() * pool_blocks(layers[layer], room);
        constants += layers[layer].constant_bytes();
    }
    return blocks + constant_copies(room) * aligned(constants) * room.sequences;
}

StatePool::StatePool(std::vector<KvShape> layers, const StateRoom& room, std::vector<Memory*> memories)
    : layers_(std::move(layers)), room_(completed(room)), pieces_{{&own_}}, copies_(constant_copies(room)) {
    memories.resize(layers_.size());
    for (size_t layer = 0; layer < layers_.size(); ++layer) {
        const KvShape& shape = layers_[layer];
        Memory* memory = memories[layer] ? memories[layer] : &own_;
        const auto known = std::ranges::find(pieces_, memory, &Piece::memory);
        piece_of_.push_back(known - pieces_.begin());
        if (known == pieces_.end()) pieces_.push_back({memory});
        Piece& piece = pieces_[piece_of_.back()];
        constant_begins_.push_back(piece.constant_bytes);
        piece.constant_bytes += shape.constant_bytes();
        has_constants_ |= shape.constant_bytes() > 0;
        layer_groups_.push_back(-1);
        if (shape.block_bytes() == 0) continue;
        const auto found = std::ranges::find(groups_, shape.window, &Group::window);
        layer_groups_.back() = static_cast<int>(found - groups_.begin());
        if (found == groups_.end())
            groups_.push_back(
                {shape.window, shape.kept_blocks(room_.context, room_.chunk), pool_blocks(shape, room_), {}, {}});
    }
    // One piece of each memory: large ones have fewer, larger pages.
    begins_.resize(layers_.size());
    for (size_t number = 0; number < pieces_.size(); ++number) {
        Piece& piece = pieces_[number];
        piece.constant_bytes = aligned(piece.constant_bytes);
        std::vector<bool> own(layers_.size());
        for (size_t layer = 0; layer < layers_.size(); ++layer) own[layer] = piece_of_[layer] == number;
        const size_t all = bytes(layers_, room_, own);
        std::byte* begin = all ? piece.memory->allocate(all) : nullptr;
        for (size_t layer = 0; layer < layers_.size(); ++layer) {
            if (!own[layer]) continue;
            begins_[layer] = begin;
            if (begin) begin += layers_[layer].block_bytes() * pool_blocks(layers_[layer], room_);
        }
        piece.constants = begin;
    }
    // The first blocks, and places, are taken first.
    for (Group& group : groups_) {
        group.references.assign(group.blocks, 0);
        for (int block = group.blocks - 1; block >= 0; --block) group.free.push_back(block);
    }
    for (int place = room_.sequences - 1; place >= 0; --place) free_constants_.push_back(place);
    for (int group = 0; group < static_cast<int>(groups_.size()); ++group) {
        const Group& of = groups_[group];
        const bool can_run_out = !of.window || of.blocks < int64_t{of.kept} * room_.sequences;
        if (can_run_out && (scarcest_ < 0 || of.kept > groups_[scarcest_].kept)) scarcest_ = group;
    }
}

int64_t StatePool::free_positions() const {
    return scarcest_ < 0 ? room_.positions : int64_t{kKvBlock} * static_cast<int64_t>(groups_[scarcest_].free.size());
}

void StatePool::require_free(int group, int64_t blocks) const {
    const Group& of = groups_[group];
    const auto free = static_cast<int64_t>(of.free.size());
    if (blocks > free)
        throw StateError("there is room for " + std::to_string(int64_t{kKvBlock} * free) +
                         " more positions of sequences, and " + std::to_string(int64_t{kKvBlock} * blocks) +
                         " are needed: truncate or remove a sequence, or plan for more than " +
                         std::to_string(room_.positions) + " positions");
}

void StatePool::require_room(std::span<const Writing> all) {
    for (int group = 0; group < static_cast<int>(groups_.size()); ++group) {
        int64_t needed = 0;
        parted_.clear();
        for (const auto& [sequence, end] : all) needed += sequence->count_blocks(group, end, parted_);
        // Whoever parts with a block last keeps it.
        std::ranges::sort(parted_);
        for (auto first = parted_.begin(); first != parted_.end();) {
            const auto end = std::upper_bound(first, parted_.end(), *first);
            needed += end - first - (end - first == groups_[group].references[*first]);
            first = end;
        }
        require_free(group, needed);
    }
}

void StatePool::begin_writing(std::span<const Writing> all) {
    require_room(all);
    for (const auto& [sequence, end] : all) sequence->begin_writing(end);
}

int32_t StatePool::take_block(int group) {
    require_free(group, 1);
    const int32_t block = groups_[group].free.back();
    groups_[group].free.pop_back();
    groups_[group].references[block] = 1;
    return block;
}

void StatePool::copy_block(int group, int32_t from, int32_t to) {
    for (int layer = 0; layer < static_cast<int>(layers_.size()); ++layer) {
        if (layer_groups_[layer] != group) continue;
        const size_t bytes = layers_[layer].block_bytes();
        memory(layer).copy(blocks(layer) + bytes * to, blocks(layer) + bytes * from, bytes);
    }
}

void StatePool::copy_constants(int to_place, int to, int from_place, int from) {
    if (to_place == from_place && to == from) return;
    for (const Piece& piece : pieces_)
        if (piece.constant_bytes)
            piece.memory->copy(piece.constants + piece.constant_bytes * (copies_ * to_place + to),
                               piece.constants + piece.constant_bytes * (copies_ * from_place + from),
                               piece.constant_bytes);
}

int StatePool::take_constants() {
    if (free_constants_.empty())
        throw StateError("there is room for " + std::to_string(room_.sequences) +
                         (room_.sequences == 1 ? " sequence" : " sequences") +
                         ", and all of it is in use: remove one, or plan for more");
    const int place = free_constants_.back();
    free_constants_.pop_back();
    return place;
}

SequenceState::SequenceState(StatePool& pool)
    : pool_(pool),
      tables_(pool.groups().size(), std::vector<int32_t>(block_count(pool.context()), kNoBlock)),
      place_(pool.take_constants()) {}

SequenceState::SequenceState(const SequenceState& other, int length) : SequenceState(other.pool_) {
    other.require_kept(length);
    if (length == 0) return;
    for (size_t group = 0; group < tables_.size(); ++group)
        for (int number = 0; number < block_count(length); ++number) {
            const int32_t block = tables_[group][number] = other.tables_[group][number];
            if (block != kNoBlock) pool_.share_block(static_cast<int>(group), block);
        }
    length_ = length;
    if (!has_constants()) return;
    const bool marked = other.marked_ > 0 && other.marked_ <= length;
    copy_constants(current_, other, length == other.length_ ? other.current_ : kMark);
    copy_constants(kMark, other, marked ? kMark : other.current_);
    marked_ = marked ? other.marked_ : length;
}

SequenceState::~SequenceState() {
    give_back(0);
    pool_.give_back_constants(place_);
}

void SequenceState::copy_constants(int to, const SequenceState& from, int copy) {
    pool_.copy_constants(place_, to, from.place_, copy);
}

void SequenceState::set_length(int length) {
    current_ = written_copy();
    length_ = length;
    writing_ = false;
}

// As many blocks are kept as a window needs: the oldest one becomes the new one.
int SequenceState::count_blocks(int group, int end, std::vector<int32_t>& parted) const {
    const std::vector<int32_t>& table = tables_[group];
    const int kept = pool_.groups()[group].kept, first = length_ / kKvBlock;
    int taken = 0;
    for (int number = first; number < block_count(end); ++number) {
        const int oldest = number - kept;
        if (table[number] != kNoBlock)
            parted.push_back(table[number]);
        else if (oldest < 0 || (oldest < first && table[oldest] == kNoBlock))
            ++taken;
        else if (oldest < first)
            parted.push_back(table[oldest]);
    }
    return taken;
}

void SequenceState::begin_writing(int end) {
    writing_ = true;
    for (int group = 0; group < static_cast<int>(tables_.size()); ++group) {
        std::vector<int32_t>& table = tables_[group];
        const int kept = pool_.groups()[group].kept;
        for (int number = length_ / kKvBlock; number < block_count(end); ++number) {
            int32_t& block = table[number];
            const bool is_new = block == kNoBlock;
            if (is_new && number >= kept) block = std::exchange(table[number - kept], kNoBlock);
            if (block != kNoBlock && !pool_.is_shared(group, block)) continue;
            const int32_t before = std::exchange(block, pool_.take_block(group));
            if (before == kNoBlock) continue;
            if (!is_new) pool_.copy_block(group, before, block);
            pool_.give_back_block(group, before);
        }
    }
}

void SequenceState::give_up_writing() {
    if (!writing_) return;
    const bool keeps = !has_constants() || advances_elsewhere();
    writing_ = false;
    if (keeps) return give_back(block_count(length_));
    try {
        require_kept(marked_);
        go_back(marked_);
    } catch (const StateError&) {  // a window does not reach back so far
        go_back(0);
    }
}

void SequenceState::mark() {
    if (!has_constants()) return;
    copy_constants(kMark, *this, current_);
    marked_ = length_;
}

KvBlocks SequenceState::blocks(int layer, int kv_head) {
    const KvShape& shape = pool_.layers()[layer];
    return {pool_.blocks(layer) + shape.head_bytes() * kv_head, shape.block_bytes(), shape.key_bytes(),
            tables_[pool_.group(layer)].data()};
}

void SequenceState::truncate(int length) {
    require_kept(length);
    if (length < length_ || length == 0) go_back(length);
}

int64_t SequenceState::held_positions() const {
    const int group = pool_.scarcest_group();
    if (group < 0) return 0;
    const auto own = [&](int32_t block) { return block != kNoBlock && !pool_.is_shared(group, block); };
    return int64_t{kKvBlock} * std::ranges::count_if(tables_[group], own);
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

// Throws unless the state at `length` is there.
void SequenceState::require_kept(int length) const {
    const auto sequence = [this] { return "a sequence of " + std::to_string(length_) + " positions"; };
    if (length < 0 || length > length_)
        throw std::invalid_argument(sequence() + " has no beginning of " + std::to_string(length));
    if (length == 0) return;
    const auto layers = static_cast<int>(pool_.layers().size());
    for (int layer = 0; layer < layers; ++layer) {
        const KvShape& shape = pool_.layers()[layer];
        const int group = pool_.group(layer);
        const auto refuse = [&](const std::string& why) {
            throw StateError(sequence() + " has no state at " + std::to_string(length) + ": layer " +
                             std::to_string(layer) + " keeps a " + why);
        };
        for (int number = shape.first_block(length); group >= 0 && number < block_count(length); ++number)
            if (tables_[group][number] == kNoBlock) refuse("window of " + std::to_string(shape.window));
        if (shape.constant_bytes() && length != length_ && length != marked_)
            refuse((shape.recurrence ? "recurrence" : "convolution") + std::string(", and a copy of ") +
                   std::to_string(marked_) + " positions");
    }
}

void SequenceState::go_back(int length) {
    if (length > 0 && has_constants()) copy_constants(current_, *this, kMark);
    give_back(block_count(length));
    length_ = length;
    if (length == 0) marked_ = 0;
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
            pool_.memory(static_cast<int>(layer))
                .read({out, shape.block_bytes()},
                      pool_.blocks(static_cast<int>(layer)) + shape.block_bytes() * tables_[group][number]);
            const int used = length_ - number * kKvBlock;
            // What lies behind the last position may be another sequence's.
            for (int head = 0; used < kKvBlock && head < shape.kv_heads; ++head) {
                std::byte* keys = out + shape.head_bytes() * head;
                clear_slots(shape.key_type, shape.head_dim, true, used, keys);
                if (!shape.latent) clear_slots(shape.value_type, shape.head_dim, false, used, keys + shape.key_bytes());
            }
            out += shape.block_bytes();
        }
        if (shape.constant_bytes())
            pool_.memory(static_cast<int>(layer))
                .read({out, shape.constant_bytes()}, pool_.constants(place_, current_, static_cast<int>(layer)));
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
    const auto first_of = [&](int group) {
        KvShape shape{};
        shape.window = pool_.groups()[group].window;
        return std::min(shape.first_block(length), end);
    };
    const auto groups = static_cast<int>(tables_.size());
    for (int group = 0; group < groups; ++group) pool_.require_free(group, end - first_of(group));
    for (int group = 0; group < groups; ++group)
        for (int number = first_of(group); number < end; ++number) tables_[group][number] = pool_.take_block(group);
    const std::byte* in = source.data() + sizeof header;
    for (size_t layer = 0; layer < shapes.size() && length > 0; ++layer) {
        const KvShape& shape = shapes[layer];
        const int group = pool_.group(static_cast<int>(layer));
        for (int number = group < 0 ? end : shape.first_block(length); number < end; ++number) {
            pool_.memory(static_cast<int>(layer))
                .write(pool_.blocks(static_cast<int>(layer)) + shape.block_bytes() * tables_[group][number],
                       {in, shape.block_bytes()});
            in += shape.block_bytes();
        }
        if (shape.constant_bytes())
            pool_.memory(static_cast<int>(layer))
                .write(pool_.constants(place_, current_, static_cast<int>(layer)), {in, shape.constant_bytes()});
        in += shape.constant_bytes();
    }
    length_ = length;
}

}  // namespace edgemoe
