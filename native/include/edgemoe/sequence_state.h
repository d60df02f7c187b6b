// What sequences leave behind for their next tokens.
//
// Each layer has a state of one kind. "full": keys and values of all positions. "window": those of the last positions
// only. "latent": one vector per position that is key and value of all heads. "recurrence" and "convolution": the
// matrices that all positions have been added to, and the inputs of the last positions; these do not grow, and cannot
// go back except to a copy of them.
//
// Keys and values lie in blocks of kKvBlock positions, from one pool for all sequences. Layers that keep the same
// positions share block numbers, so a sequence has one table for all layers without a window, and one for each size of
// window. Sequences that begin alike share the blocks of their beginning: a block has as many references as there are
// tables with it, and who writes into one that others have, too, takes a copy first. Recurrences and convolutions
// belong to one sequence each.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <stdexcept>
#include <vector>

#include "edgemoe/arena.h"
#include "edgemoe/kernels.h"
#include "edgemoe/memory.h"

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

// What there is to be room for.
struct StateRoom {
    int sequences = 1;  // at a time
    int context = 0;    // positions that one of them may have
    int positions = 0;  // positions of all sequences together, at least `context`; 0 for that
    int chunk = 1;      // rows of a pass, at most
};

class SequenceState;

// The memory of all sequences' states. It is charged as positions are written; what is given back is used again before
// what was never touched.
class StatePool {
  public:
    // Layers that share block numbers.
    struct Group {
        int window;
        int kept;                         // blocks that a sequence has at most
        int blocks;                       // that there are
        std::vector<int32_t> free;        // the next one to take is the last
        std::vector<int32_t> references;  // [blocks]
    };

    // Sequences of together `room.positions` positions always fit: there are blocks for these, and for what the last
    // blocks of the sequences leave empty.
    // memories: where each layer's blocks and constants lie, null for the host's, as are those that are left out; they
    // must outlive this.
    StatePool(std::vector<KvShape> layers, const StateRoom& room, std::vector<Memory*> memories = {});

    static size_t bytes(std::span<const KvShape> layers, const StateRoom& room);
    // Of those layers that are chosen: in a memory of their own.
    static size_t bytes(std::span<const KvShape> layers, const StateRoom& room, const std::vector<bool>& chosen);

    std::span<const KvShape> layers() const { return layers_; }
    std::span<const Group> groups() const { return groups_; }
    // Of a layer's blocks; -1 where it has none.
    int group(int layer) const { return layer_groups_[layer]; }
    int context() const { return room_.context; }
    // Positions for which blocks are free, a multiple of kKvBlock; StateRoom::positions where every layer has blocks
    // for all that so many sequences can keep.
    int64_t free_positions() const;
    // The group whose blocks are used up first; -1 for none.
    int scarcest_group() const { return scarcest_; }

    // A sequence and the end of the positions that are to be written to it.
    struct Writing {
        SequenceState* sequence;
        int end;
    };
    // Throws StateError where there are not enough free blocks for all of these, in as many passes as it takes. Each
    // sequence is there once.
    void require_room(std::span<const Writing> all);
    // To be called before these positions are written in one pass: takes blocks for them, copies those that would be
    // written into and are another sequence's, too. Throws StateError as above, and has changed nothing then.
    void begin_writing(std::span<const Writing> all);

    // The keys of a layer's first block: block n begins layers()[layer].block_bytes() * n bytes behind them.
    std::byte* blocks(int layer) { return begins_[layer]; }
    Memory& memory(int layer) { return *pieces_[piece_of_[layer]].memory; }
    // Throws StateError where fewer are free.
    void require_free(int group, int64_t blocks) const;
    // One without other references; there must be a free one.
    int32_t take_block(int group);
    void share_block(int group, int32_t block) { ++groups_[group].references[block]; }
    void give_back_block(int group, int32_t block) {
        if (--groups_[group].references[block] == 0) groups_[group].free.push_back(block);
    }
    bool is_shared(int group, int32_t block) const { return groups_[group].references[block] > 1; }
    // What all layers of the group keep in a block.
    void copy_block(int group, int32_t from, int32_t to);

    // Recurrences and convolutions of one sequence: all layers' of a memory one after the other, several times.
    std::byte* constants(int place, int copy, int layer) {
        const Piece& piece = pieces_[piece_of_[layer]];
        return piece.constants + piece.constant_bytes * (copies_ * place + copy) + constant_begins_[layer];
    }
    bool has_constants() const { return has_constants_; }
    void copy_constants(int to_place, int to, int from_place, int from);
    // The constants themselves, what mark() keeps, and, where there are several sequences, those before the last pass:
    // a pass that fails must not take the states of all its sequences with it.
    int copies() const { return copies_; }
    // Throws StateError where there are `sequences` already.
    int take_constants();
    void give_back_constants(int place) { free_constants_.push_back(place); }

  private:
    std::vector<KvShape> layers_;
    StateRoom room_;
    std::vector<Group> groups_;
    std::vector<int> layer_groups_;
    // What lies in one memory.
    struct Piece {
        Memory* memory;
        std::byte* constants = nullptr;
        size_t constant_bytes = 0;  // of one copy of a sequence's
    };

    HostMemory own_;
    std::vector<Piece> pieces_;
    std::vector<size_t> piece_of_;         // [layers]
    std::vector<std::byte*> begins_;       // [layers] blocks
    std::vector<size_t> constant_begins_;  // [layers] from a sequence's first constants in that memory
    bool has_constants_ = false;
    int copies_;
    int scarcest_ = -1;
    std::vector<int> free_constants_;
    std::vector<int32_t> parted_;  // for require_room
};

// One sequence. It takes blocks from the pool before positions are written, and gives them back when it forgets the
// positions, or ends.
class SequenceState {
  public:
    // Throws StateError where the pool has room for no more sequences.
    explicit SequenceState(StatePool& pool);
    // The first `length` positions of another sequence, whose blocks it shares. Its constants are a copy of those that
    // the other one has at that length, its mark one of the other's mark if that is not behind `length`, otherwise of
    // these. Throws StateError where the other one cannot be truncated to that length, std::invalid_argument where it
    // has not so many positions.
    SequenceState(const SequenceState& other, int length);
    ~SequenceState();
    SequenceState(const SequenceState&) = delete;
    SequenceState& operator=(const SequenceState&) = delete;

    int length() const { return length_; }
    // All positions up to `length` are written.
    void set_length(int length);
    // A pass for which StatePool::begin_writing was called will not be finished: the sequence goes on where it was,
    // though its windows do not reach back as far as they did. But where the pool keeps no constants of before the
    // pass, a state with constants goes back to its mark, or to its beginning.
    void give_up_writing();

    // Keeps a copy of what truncate() could not get back otherwise, in place of the last one. Nothing to do, and free,
    // where there is neither a recurrence nor a convolution.
    void mark();
    // The length that mark() was called at; 0 if there is no copy.
    int marked() const { return marked_; }
    bool has_constants() const { return pool_.has_constants(); }

    // What a pass advances.
    float* recurrence(int layer) { return floats(written_copy(), layer); }
    float* convolution(int layer) { return recurrence(layer) + pool_.layers()[layer].recurrence; }
    // What they are advanced from by the row at length(), if that is not what lies there already: it must be copied
    // then. Otherwise null.
    const float* recurrence_before(int layer) { return advances_elsewhere() ? floats(current_, layer) : nullptr; }
    const float* convolution_before(int layer) {
        return advances_elsewhere() ? floats(current_, layer) + pool_.layers()[layer].recurrence : nullptr;
    }

    // Where the kernels find a layer's keys and values. Positions that are not kept, or not being written, have no
    // block: their entries in the table are negative.
    KvBlocks blocks(int layer, int kv_head);
    // The block of the pool for each block of the context, negative for none, of a group of layers.
    std::span<const int32_t> table(int group) const { return tables_[group]; }
    const StatePool& pool() const { return pool_; }

    // Forgets all positions from `length` on. Throws StateError, and changes nothing, where a layer does not keep what
    // the next token would see; length 0 is always possible, and with a recurrence only that, marked() and length().
    void truncate(int length);
    // Positions whose blocks are free once this sequence forgets all of them: those that no other sequence has.
    int64_t held_positions() const;

    // What the state up to length() needs to go on, as one piece of memory that restore() takes back. Layout is
    // private. Nothing of other sequences is in it.
    size_t snapshot_bytes() const;
    void snapshot(std::span<std::byte> target) const;
    // Throws std::invalid_argument where `source` is not a snapshot of a state of this shape, and StateError where the
    // pool has no blocks for it; the state is then empty.
    void restore(std::span<const std::byte> source);

  private:
    friend class StatePool;

    static constexpr int kMark = 1;  // which copy of the constants mark() makes

    // What writing up to `end` takes of a group's blocks, as StatePool::require_room counts: those it takes in any
    // case. One more for each of those added to `parted` that another sequence keeps.
    int count_blocks(int group, int end, std::vector<int32_t>& parted) const;
    void begin_writing(int end);
    void require_kept(int length) const;
    void go_back(int length);
    void give_back(int first_block);
    size_t used_bytes(int layer, int length) const;
    float* floats(int copy, int layer) { return reinterpret_cast<float*>(pool_.constants(place_, copy, layer)); }
    bool advances_elsewhere() const { return writing_ && pool_.copies() > 2; }
    int written_copy() const { return advances_elsewhere() ? 2 - current_ : current_; }
    void copy_constants(int to, const SequenceState& from, int copy);

    StatePool& pool_;
    std::vector<std::vector<int32_t>> tables_;  // [groups][blocks of the context] -> block of the pool
    int length_ = 0;
    int marked_ = 0;
    bool writing_ = false;
    int current_ = 0;  // which copy the constants at length_ are: 0, or 2 where there are three
    int place_;        // of its constants
};

}  // namespace edgemoe
