// The memory that a backend computes in, as the host sees it.
#pragma once

#include <cstddef>
#include <span>
#include <vector>

#include "edgemoe/arena.h"

namespace edgemoe {

// What is asked for here comes in order with the backend's operations: it sees what they wrote before, and they see
// what it writes.
class Memory {
  public:
    virtual ~Memory() = default;

    // Whether the host may look behind its addresses.
    virtual bool is_hosts() const = 0;
    // 64-byte aligned, of any content but on the host, where it is zeros; as long as the memory lives.
    virtual std::byte* allocate(size_t bytes) = 0;
    virtual void write(std::byte* to, std::span<const std::byte> from) = 0;
    virtual void read(std::span<std::byte> to, const std::byte* from) = 0;
    virtual void copy(std::byte* to, const std::byte* from, size_t bytes) = 0;  // the two do not overlap
    // Where operations find bytes of the host, 64-byte aligned, that stay as they are: there, or a copy.
    virtual const std::byte* keep(std::span<const std::byte> bytes) = 0;
};

// The processor's own.
class HostMemory final : public Memory {
  public:
    bool is_hosts() const override { return true; }
    std::byte* allocate(size_t bytes) override { return arenas_.emplace_back(bytes).data(); }
    void write(std::byte* to, std::span<const std::byte> from) override;
    void read(std::span<std::byte> to, const std::byte* from) override;
    void copy(std::byte* to, const std::byte* from, size_t bytes) override;
    const std::byte* keep(std::span<const std::byte> bytes) override { return bytes.data(); }

  private:
    std::vector<Arena> arenas_;
};

}  // namespace edgemoe
