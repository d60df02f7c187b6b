// What sequences leave behind for their next tokens.
//
// Each layer has a state of one kind. "full": keys and values of all positions. "window": those of the last positions
// only. "latent": one vector per position that is key and value of all heads. "recurrence" and "convolution": the
// matrices that all positions have been added to, and the inputs of the last positions; these do not grow, and cannot
// go back except to a copy of them.
//
// Keys and values lie in blocks of kKvBlock positions, from one pool for all sequences. Layers that keep the same
// positions share block numbers, so a sequence has one table for all layers without a window, and one for each size of
// window. Recurrences and convolutions belong to one sequence each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/kernels.h"

namespace edgemoe {

// The state of one layer. A block of it holds kKvBlock positions that begin at an absolute multiple of that,
// [kv head][keys | values].
struct KvShape {
    int kv_heads;
    int head_dim;
    KvType key_type;
    KvType value_type;
    int window;              // positions that a token sees, itself included; 0 for all
    bool latent = false;     // there are no values but the keys
    size_t recurrence = 0;   // floats of it
    size_t convolution = 0;  // floats of it

    size_t key_bytes() const { return kv_block_bytes(key_type, head_dim); }
    size_t head_bytes() const { return key_bytes() + (latent ? 0 : kv_block_bytes(value_type, head_dim)); }
    size_t constant_bytes() const { return (recurrence + convolution) * sizeof(float); }
    size_t block_bytes() const { return head_bytes() * static_cast<size_t>(kv_heads); }

    // Blocks that a sequence keeps: of a window, what the first token of a chunk sees and the whole chunk, since the
    // keys of a chunk are stored before its first token attends.
    int kept_blocks(int context, int chunk) const;
    // The first block that holds a position which the token at `position` or a later one sees.
    int first_block(int position) const {
        return window && position >= window ? (position - window + 1) / kKvBlock : 0;
    }
};

// Positions that are asked for are not kept any more, or there is no room for more.
struct StateError : std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The memory of all sequences' states. It is charged as positions are written; what is given back is used again before
// what was never touched.
class StatePool {
  public:
    // Layers that share block numbers.
    struct Group {
        int window;
        int kept;                   // blocks that a sequence has at most
        std::vector<int32_t> free;  // the next one to take is the last
    };

    // Room for `sequences` sequences of `context` positions in every layer, written in chunks of at most `chunk`.
    StatePool(std::vector<KvShape> layers, int sequences, int context, int chunk);

    static size_t bytes(std::span<const KvShape> layers, int sequences, int context, int chunk);

    std::span<const KvShape> layers() const { return layers_; }
    std::span<const Group> groups() const { return groups_; }
    // Of a layer's blocks; -1 where it has none.
    int group(int layer) const { return layer_groups_[layer]; }
    int context() const { return context_; }

    // The keys of a layer's first block: block n begins layers()[layer].block_bytes() * n bytes behind them.
    std::byte* blocks(int layer) { return arena_.data() + begins_[layer]; }
    // Throws StateError where none is free.
    int32_t take_block(int group);
    void give_back_block(int group, int32_t block) { groups_[group].free.push_back(block); }

    // Recurrences and convolutions of one sequence: all layers' one after the other, and behind them their copy.
    std::byte* constants(int place) { return arena_.data() + first_constants_ + 2 * constant_bytes_ * place; }
    std::byte* constants(int place, int layer) { return constants(place) + constant_begins_[layer]; }
    size_t constant_bytes() const { return constant_bytes_; }  // of a sequence, without the copy
    // Throws StateError where there are `sequences` already.
    int take_constants();
    void give_back_constants(int place) { free_constants_.push_back(place); }

  private:
    std::vector<KvShape> layers_;
    int sequences_;
    int context_;
    std::vector<Group> groups_;
    std::vector<int> layer_groups_;
    std::vector<size_t> begins_;           // [layers] blocks, from the beginning of the arena
    std::vector<size_t> constant_begins_;  // [layers] from a sequence's first constants
    size_t first_constants_ = 0;
    size_t constant_bytes_ = 0;
    std::vector<int> free_constants_;
    Arena arena_;
};

// One sequence. It takes blocks from the pool before positions are written, and gives them back when it forgets the
// positions, or ends.
class SequenceState {
  public:
    // Throws StateError where the pool has room for no more sequences.
    explicit SequenceState(StatePool& pool);
    ~SequenceState();
    SequenceState(const SequenceState&) = delete;
    SequenceState& operator=(const SequenceState&) = delete;

    int length() const { return length_; }
    void set_length(int length) {
        length_ = length;
        writing_ = false;
    }
    // Before positions up to `end` are written: takes blocks for them. What they overwrite is lost, whether or not the
    // chunk is finished. Throws StateError where no block is free; give_up_writing() then gives back what was taken.
    void begin_writing(int end);
    // A chunk that was begun will not be finished. A state with a recurrence goes back to its mark, or to its
    // beginning.
    void give_up_writing();

    // Keeps a copy of what truncate() could not get back otherwise, in place of the last one. Nothing to do, and free,
    // where there is neither a recurrence nor a convolution.
    void mark();
    // The length that mark() was called at; 0 if there is no copy.
    int marked() const { return marked_; }
    bool has_constants() const { return pool_.constant_bytes() > 0; }

    float* recurrence(int layer) { return reinterpret_cast<float*>(pool_.constants(place_, layer)); }
    float* convolution(int layer) { return recurrence(layer) + pool_.layers()[layer].recurrence; }

    // Where the kernels find a layer's keys and values. Positions that are not kept, or not being written, have no
    // block: their entries in the table are negative.
    KvBlocks blocks(int layer, int kv_head);

    // Forgets all positions from `length` on. Throws StateError, and changes nothing, where a layer does not keep what
    // the next token would see; length 0 is always possible, and with a recurrence only that and marked().
    void truncate(int length);

    // What the state up to length() needs to go on, as one piece of memory that restore() takes back. Layout is
    // private. A restored state cannot be truncated within its windows. Nothing of other sequences is in it.
    size_t snapshot_bytes() const;
    void snapshot(std::span<std::byte> target) const;
    // Throws std::invalid_argument where `source` is not a snapshot of a state of this shape, and StateError where the
    // pool has no blocks for it; the state is then empty.
    void restore(std::span<const std::byte> source);

  private:
    void go_back(int length);
    void give_back(int first_block);
    size_t used_bytes(int layer, int length) const;

    StatePool& pool_;
    std::vector<std::vector<int32_t>> tables_;  // [groups][blocks of the context] -> block of the pool
    int length_ = 0;
    int written_ = 0;   // end of the positions ever written since the state was empty
    int restored_ = 0;  // length of the last restored snapshot
    int marked_ = 0;
    bool writing_ = false;
    int place_;  // of its constants
};

}  // namespace edgemoe
