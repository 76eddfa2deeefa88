// libhccl: the collectives that the data path uses. Each is done when the call returns.
#include <cstdio>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "communicator.h"

namespace {

constexpr uint32_t kDefaultBufferMb = 200;

Communicator &of(HcclComm comm) { return *static_cast<Communicator *>(comm); }

size_t item_bytes(HcclDataType type) {
  switch (type) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT32: case HCCL_DATA_TYPE_UINT32: case HCCL_DATA_TYPE_FP32: return 4;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: fprintf(stderr, "[emulated HCCL] type %d is not emulated\n", type); throw HCCL_E_NOT_SUPPORT;
  }
}

// Run a collective's body; what it throws is its result.
HcclResult run(const std::function<void()> &body) {
  try {
    body();
    return HCCL_SUCCESS;
  } catch (HcclResult result) {
    return result;
  }
}

Call call_of(const char *name, uint64_t count, HcclDataType type, int reduction = -1, uint64_t root = 0) {
  Call call{};
  strncpy(call.name, name, sizeof call.name - 1);
  call.count = count;
  call.dtype = type;
  call.reduction = reduction;
  call.root = root;
  return call;
}

template <class T>
void add(void *sum, const void *part, uint64_t count) {
  for (uint64_t i = 0; i < count; i++) static_cast<T *>(sum)[i] += static_cast<const T *>(part)[i];
}

// The upper half of a float32, rounded to the nearest even.
struct BFloat16 {
  uint16_t bits;
  float wide() const {
    const uint32_t whole = uint32_t{bits} << 16;
    float value;
    memcpy(&value, &whole, sizeof value);
    return value;
  }
  BFloat16 &operator+=(const BFloat16 &other) {
    const float value = wide() + other.wide();
    uint32_t whole;
    memcpy(&whole, &value, sizeof whole);
    if (value == value) whole += 0x7FFF + ((whole >> 16) & 1);
    bits = whole >> 16;
    return *this;
  }
};

void accumulate(void *sum, const void *part, uint64_t count, HcclDataType type, HcclReduceOp op) {
  if (op == HCCL_REDUCE_SUM && type == HCCL_DATA_TYPE_FP32) return add<float>(sum, part, count);
  if (op == HCCL_REDUCE_SUM && type == HCCL_DATA_TYPE_FP16) return add<_Float16>(sum, part, count);
  if (op == HCCL_REDUCE_SUM && type == HCCL_DATA_TYPE_BFP16) return add<BFloat16>(sum, part, count);
  if (op == HCCL_REDUCE_SUM && type == HCCL_DATA_TYPE_INT32) return add<int32_t>(sum, part, count);
  if (op == HCCL_REDUCE_SUM && type == HCCL_DATA_TYPE_INT64) return add<int64_t>(sum, part, count);
  fprintf(stderr, "[emulated HCCL] reduction %d of type %d is not emulated\n", op, type);
  throw HCCL_E_NOT_SUPPORT;
}

// `count` items at `offset` of every rank's room, added up in the order of ranks.
void sum_rooms(Communicator &comm, uint64_t offset, void *out, uint64_t count, HcclDataType type, HcclReduceOp op) {
  const uint64_t bytes = count * item_bytes(type);
  std::vector<char> sum(comm.room(0) + offset, comm.room(0) + offset + bytes);
  for (uint32_t rank = 1; rank < comm.size(); rank++) {
    accumulate(sum.data(), comm.room(rank) + offset, count, type, op);
  }
  comm.barrier();
  memcpy(out, sum.data(), bytes);
}

// What a rank sends to one peer in an all-to-all: where it lies in the sender's room, and how much it is.
struct Parcel {
  uint64_t offset, bytes;
};

void exchange(Communicator &comm, const char *send, const uint64_t *send_counts, const uint64_t *send_offsets,
              char *receive, const uint64_t *receive_counts, const uint64_t *receive_offsets, HcclDataType type) {
  const size_t item = item_bytes(type);
  const uint32_t size = comm.size();
  uint64_t used = size * sizeof(Parcel);
  for (uint32_t peer = 0; peer < size; peer++) {
    const Parcel parcel{used, send_counts[peer] * item};
    used += parcel.bytes;
    char *room = comm.room(comm.rank(), used);
    reinterpret_cast<Parcel *>(room)[peer] = parcel;
    memcpy(room + parcel.offset, send + send_offsets[peer] * item, parcel.bytes);
  }
  comm.agree(call_of("AlltoAllV", 0, type));
  bool fits = true;
  for (uint32_t peer = 0; peer < size; peer++) {
    const Parcel parcel = reinterpret_cast<const Parcel *>(comm.room(peer))[comm.rank()];
    if (parcel.bytes != receive_counts[peer] * item) {
      fprintf(stderr, "[emulated HCCL] rank %u expects %llu bytes of rank %u, which sends %llu\n", comm.rank(),
              (unsigned long long)(receive_counts[peer] * item), peer, (unsigned long long)parcel.bytes);
      fits = false;
      continue;
    }
    memcpy(receive + receive_offsets[peer] * item, comm.room(peer) + parcel.offset, parcel.bytes);
  }
  comm.barrier();
  if (!fits) throw HCCL_E_PARA;
}

}  // namespace

extern "C" {

// For Python (hccl.py)
void *emulation_communicator(const char *name) { return find_communicator(name); }
uint32_t emulation_buffer_mb(HcclComm comm) { return of(comm).buffer_mb(); }

HcclResult HcclGetRootInfo(HcclRootInfo *info) {
  std::random_device random;
  memset(info, 0, sizeof *info);
  snprintf(info->internal, 64, "%08x%08x", random(), random());
  return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t size, const HcclRootInfo *info, uint32_t rank, HcclComm *comm) {
  return run([&] { *comm = new Communicator(size, rank, info->internal, "", kDefaultBufferMb); });
}
HcclResult HcclCommInitRootInfoConfig(uint32_t size, const HcclRootInfo *info, uint32_t rank,
                                      const HcclCommConfig *config, HcclComm *comm) {
  const uint32_t asked_mb = config->hcclBufferSize;
  const uint32_t buffer_mb = asked_mb == HCCL_COMM_BUFFSIZE_CONFIG_NOT_SET ? kDefaultBufferMb : asked_mb;
  return run([&] { *comm = new Communicator(size, rank, info->internal, config->hcclCommName, buffer_mb); });
}
uint32_t HcclGetCommConfigCapability() { return HCCL_COMM_CONFIG_RESERVED; }
HcclResult HcclCommDestroy(HcclComm comm) { delete &of(comm); return HCCL_SUCCESS; }
HcclResult HcclGetCommName(HcclComm comm, char *name) {
  snprintf(name, COMM_NAME_MAX_LENGTH, "%s", of(comm).name().c_str());
  return HCCL_SUCCESS;
}
HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *error) { *error = HCCL_SUCCESS; return HCCL_SUCCESS; }
const char *HcclGetErrorString(HcclResult) { return "the emulated HCCL refused; its reason is on stderr"; }
HcclResult HcclGetRankSize(HcclComm comm, uint32_t *size) { *size = of(comm).size(); return HCCL_SUCCESS; }
HcclResult HcclGetRankId(HcclComm comm, uint32_t *rank) { *rank = of(comm).rank(); return HCCL_SUCCESS; }
HcclResult HcclSetConfig(HcclConfig, HcclConfigValue) { return HCCL_SUCCESS; }

HcclResult HcclBarrier(HcclComm comm, aclrtStream) {
  return run([&] { of(comm).agree(call_of("Barrier", 0, HCCL_DATA_TYPE_INT8)); of(comm).barrier(); });
}

HcclResult HcclAllGather(void *send, void *receive, uint64_t count, HcclDataType type, HcclComm handle, aclrtStream) {
  return run([&] {
    auto &comm = of(handle);
    const uint64_t bytes = count * item_bytes(type);
    memcpy(comm.room(comm.rank(), bytes), send, bytes);
    comm.agree(call_of("AllGather", count, type));
    for (uint32_t rank = 0; rank < comm.size(); rank++) {
      memcpy(static_cast<char *>(receive) + rank * bytes, comm.room(rank), bytes);
    }
    comm.barrier();
  });
}

HcclResult HcclAllReduce(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                         HcclComm handle, aclrtStream) {
  return run([&] {
    auto &comm = of(handle);
    const uint64_t bytes = count * item_bytes(type);
    memcpy(comm.room(comm.rank(), bytes), send, bytes);
    comm.agree(call_of("AllReduce", count, type, op));
    sum_rooms(comm, 0, receive, count, type, op);
  });
}

HcclResult HcclReduceScatter(void *send, void *receive, uint64_t count, HcclDataType type, HcclReduceOp op,
                             HcclComm handle, aclrtStream) {
  return run([&] {
    auto &comm = of(handle);
    const uint64_t bytes = count * item_bytes(type);
    memcpy(comm.room(comm.rank(), bytes * comm.size()), send, bytes * comm.size());
    comm.agree(call_of("ReduceScatter", count, type, op));
    sum_rooms(comm, comm.rank() * bytes, receive, count, type, op);
  });
}

HcclResult HcclBroadcast(void *data, uint64_t count, HcclDataType type, uint32_t root, HcclComm handle, aclrtStream) {
  return run([&] {
    auto &comm = of(handle);
    const uint64_t bytes = count * item_bytes(type);
    if (comm.rank() == root) memcpy(comm.room(root, bytes), data, bytes);
    comm.agree(call_of("Broadcast", count, type, -1, root));
    memcpy(data, comm.room(root), bytes);
    comm.barrier();
  });
}

HcclResult HcclAlltoAllV(const void *send, const void *send_counts, const void *send_offsets, HcclDataType type,
                         const void *receive, const void *receive_counts, const void *receive_offsets, HcclDataType,
                         HcclComm handle, aclrtStream) {
  const auto numbers = [](const void *values) { return static_cast<const uint64_t *>(values); };
  return run([&] {
    exchange(of(handle), static_cast<const char *>(send), numbers(send_counts), numbers(send_offsets),
             static_cast<char *>(const_cast<void *>(receive)), numbers(receive_counts), numbers(receive_offsets), type);
  });
}

HcclResult HcclAlltoAll(const void *send, uint64_t count, HcclDataType type, const void *receive, uint64_t,
                        HcclDataType, HcclComm handle, aclrtStream stream) {
  std::vector<uint64_t> counts(of(handle).size(), count), offsets(of(handle).size());
  for (size_t rank = 0; rank < offsets.size(); rank++) offsets[rank] = rank * count;
  return HcclAlltoAllV(send, counts.data(), offsets.data(), type, receive, counts.data(), offsets.data(), type, handle,
                       stream);
}

}  // extern "C"
