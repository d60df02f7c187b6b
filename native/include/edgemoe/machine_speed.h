// How fast this machine reads memory and disk.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

namespace edgemoe {

struct Throughput {
    uint64_t bytes = 0;
    double seconds = 0;

    double bytes_per_second() const { return seconds > 0 ? double(bytes) / seconds : 0; }
};

// Reads `size` bytes of ordinary memory over and over with so many threads, each its own part, for `seconds`. A thread
// reads `streams` places of its part in turns: some processors are faster with several.
Throughput memory_read_speed(size_t size, int threads, double seconds, int streams = 1);

// Reads blocks at random places of a file (as direct reads where the filesystem takes them), `depth` threads with one
// read each under way, for `seconds` or until `limit` bytes were read. `block` is a multiple of the disk block and at
// most the file's size. Throws IoError.
Throughput disk_read_speed(const std::string& path, size_t block, int depth, double seconds, uint64_t limit);

}  // namespace edgemoe
