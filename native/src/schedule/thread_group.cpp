#include "edgemoe/thread_group.h"

namespace edgemoe {

void ThreadGroup::join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void ThreadGroup::stop_and_join() {
    if (threads_.empty()) return;
    stop_();
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
}

void ThreadGroup::fail(const char* purpose, int started, int count, const std::system_error& error) {
    throw ThreadError("of " + std::to_string(count) + " threads to " + purpose + " only " + std::to_string(started) +
                      " could be started (" + error.code().message() +
                      "): ask for fewer, or allow the process more threads or memory (ulimit -u, ulimit -v, a "
                      "container's limit of tasks)");
}

}  // namespace edgemoe
