#include "communicator.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstring>
#include <ctime>
#include <map>
#include <mutex>

namespace {

constexpr size_t kRoomBytes = size_t{64} << 20;  // address space: only what is written takes memory
constexpr time_t kPatience = 300;  // a busy machine is slow at any moment

std::mutex names_lock;
std::map<std::string, Communicator *> by_name;

}  // namespace

Communicator::Communicator(uint32_t size, uint32_t rank, const std::string &id, const std::string &name,
                           uint32_t buffer_mb)
    : size_(size), rank_(rank), buffer_mb_(buffer_mb), name_(name.empty() ? "hccl_" + id : name) {
  const std::string path = "/emulated-hccl-" + id;
  const int file = shm_open(path.c_str(), O_RDWR | O_CREAT, 0600);
  if (file < 0 || ftruncate(file, bytes())) throw HCCL_E_MEMORY;
  void *memory = mmap(nullptr, bytes(), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, file, 0);
  close(file);
  if (memory == MAP_FAILED) throw HCCL_E_MEMORY;
  header_ = static_cast<Header *>(memory);
  rooms_ = static_cast<char *>(memory) + sizeof(Header);
  barrier();
  if (rank == 0) shm_unlink(path.c_str());  // every rank has it mapped
  const std::lock_guard<std::mutex> lock(names_lock);
  by_name[name_] = this;
}

Communicator::~Communicator() {
  {
    const std::lock_guard<std::mutex> lock(names_lock);
    by_name.erase(name_);
  }
  munmap(header_, bytes());
}

size_t Communicator::bytes() const { return sizeof(Header) + size_ * kRoomBytes; }

char *Communicator::room(uint32_t rank, uint64_t bytes) const {
  if (bytes > kRoomBytes) {
    fprintf(stderr, "[emulated HCCL] %llu bytes are more than its %zu\n", (unsigned long long)bytes, kRoomBytes);
    throw HCCL_E_MEMORY;
  }
  return rooms_ + rank * kRoomBytes;
}

void Communicator::barrier() {
  const uint32_t generation = header_->generation.load();
  if (header_->arrived.fetch_add(1) + 1 == size_) {
    header_->arrived = 0;
    header_->generation++;
    return;
  }
  const time_t start = time(nullptr);
  while (header_->generation.load() == generation) {
    if (time(nullptr) - start > kPatience) {
      fprintf(stderr, "[emulated HCCL] %s: rank %u waited in vain for the others\n", name_.c_str(), rank_);
      throw HCCL_E_TIMEOUT;
    }
    usleep(50);  // there may be fewer cores than ranks
  }
}

void Communicator::agree(const Call &call) {
  header_->calls[rank_] = call;
  barrier();
  for (uint32_t other = 0; other < size_; other++) {
    const Call &theirs = header_->calls[other];
    if (memcmp(&theirs, &call, sizeof call) == 0) continue;
    fprintf(stderr,
            "[emulated HCCL] %s: rank %u is in %s (count %llu, type %d, reduction %d, root %llu), "
            "rank %u in %s (count %llu, type %d, reduction %d, root %llu)\n",
            name_.c_str(), rank_, call.name, (unsigned long long)call.count, call.dtype, call.reduction,
            (unsigned long long)call.root,
            other, theirs.name, (unsigned long long)theirs.count, theirs.dtype, theirs.reduction,
            (unsigned long long)theirs.root);
    throw HCCL_E_PARA;
  }
}

Communicator *find_communicator(const std::string &name) {
  const std::lock_guard<std::mutex> lock(names_lock);
  const auto found = by_name.find(name);
  return found == by_name.end() ? nullptr : found->second;
}
