// A communicator: ranks that are processes of one machine, and a piece of shared memory between them.
#pragma once

#include <atomic>
#include <cstdint>
#include <string>

#include "hccl/hccl.h"

// What a rank says of the collective it is in. All ranks must say the same (see Communicator::agree).
struct Call {
  char name[24];
  uint64_t count;
  int32_t dtype, reduction;
  uint64_t root;  // as wide as count, so that no padding is compared
};

class Communicator {
 public:
  // Attach rank `rank` of `size` to the memory called `id`; every rank does so. Throws HcclResult when one is missing.
  Communicator(uint32_t size, uint32_t rank, const std::string &id, const std::string &name, uint32_t buffer_mb);
  ~Communicator();

  uint32_t size() const { return size_; }
  uint32_t rank() const { return rank_; }
  const std::string &name() const { return name_; }
  uint32_t buffer_mb() const { return buffer_mb_; }  // what the fused operators have for what they send

  // The room in which a rank leaves what it sends; what does not fit throws HCCL_E_MEMORY.
  char *room(uint32_t rank, uint64_t bytes = 0) const;

  // Wait for every rank; throws HCCL_E_TIMEOUT.
  void barrier();

  // Publish `call` and compare it with every other rank's; throws HCCL_E_PARA when they differ.
  void agree(const Call &call);

 private:
  struct Header {
    std::atomic<uint32_t> arrived, generation;
    Call calls[64];
  };
  size_t bytes() const;

  const uint32_t size_, rank_, buffer_mb_;
  const std::string name_;
  Header *header_;
  char *rooms_;
};

// The communicator that torch_npu knows by this name; null if there is none.
Communicator *find_communicator(const std::string &name);
