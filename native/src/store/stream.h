// One layer's walk over the experts it needs.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "store/expert_store.h"

namespace edgemoe {

// Gives the experts that a layer needs, as they come to be in memory. What is not released stays where it is until the
// stream goes, so whoever computes must have finished by then.
class ExpertStream {
  public:
    // What tokens need of an expert at one level.
    struct Need {
        int32_t expert;      // of the layer
        int32_t level;       // it and all coarser ones
        int32_t last_token;  // the last of the turn's tokens that uses it at this level
        int32_t uses;        // tokens that use it at this level
        float weight;        // the sum of their router weights
    };
    struct Item {
        int position;  // in the `needs` given
        ExpertWeights weights;
    };

    // `needs` of a layer's turn: an expert's needs stand together, in ascending order of level. Reading of
    // what is missing begins at once, in the order of ReadQueue.
    ExpertStream(ExpertStore& store, int layer, const Turn& turn, std::span<const Need> needs);
    ~ExpertStream();
    ExpertStream(const ExpertStream&) = delete;
    ExpertStream& operator=(const ExpertStream&) = delete;

    // Gives needs whose levels are in memory now and that were not given before, waiting for at least one: all of them,
    // or, where reading waits for what will be released, some, so that it goes on meanwhile. Their weights stay where
    // they are until they are released. Empty once every need has been given, or where blocked()
    // says so. Throws IoError where a section could not be read.
    std::span<const Item> next();

    // All that was given so far has been used: whoever computes it, a device perhaps, has finished. The next call of
    // next() gives its memory to what waits for room, before anything else can take it.
    void release();

    // Whether the last call of next() gave nothing because there is no room for what remains: release() comes first.
    // next() without it throws std::logic_error then.
    bool blocked() const { return blocked_; }

  private:
    // How far an expert, demands_[i], has come.
    struct Progress {
        int first, end;    // its needs
        int given = 0;     // of them
        int released = 0;  // of these

        int needs() const { return end - first; }
    };
    static constexpr size_t kSome = 8;

    ExpertStore& store_;
    int most_awaited_;
    std::vector<Need> needs_;
    std::vector<uint8_t> is_given_;  // [needs]
    std::vector<Demand> demands_;    // of experts
    std::vector<Progress> progress_;
    std::vector<Item> items_;
    size_t given_ = 0;
    bool blocked_ = false;
};

}  // namespace edgemoe
