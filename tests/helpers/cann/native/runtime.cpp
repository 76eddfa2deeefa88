// libascendcl: device memory is host memory, and a stream is done with a task as soon as it has been given it.
// What the wheel calls and is not here becomes a stub that fails and says its name (see build.py).
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <string>

#include "acl/acl.h"
#include "acl/acl_rt.h"

namespace {

constexpr size_t kAlignment = 512;
constexpr int kMostDevices = 64;
constexpr size_t kMemoryBytes = size_t{8} << 30;

thread_local int32_t current_device = -1;
int contexts[kMostDevices];  // only their addresses matter: one a device
std::string last_error = "no error message";

struct Event {
  double recorded_ms = 0;
};

int32_t device_count() {
  const char *count = getenv("EMULATED_NPU_COUNT");
  const int32_t there = count ? atoi(count) : 1;
  const char *visible = getenv("ASCEND_RT_VISIBLE_DEVICES");  // a list; which ones they are makes no difference here
  if (!visible) return there;
  const int32_t named = *visible ? 1 + std::count(visible, visible + strlen(visible), ',') : 0;
  return std::min(there, named);
}

void *allocate(size_t bytes) {
  // One unit more than asked for, as CANN does for kernels that read past the end.
  return aligned_alloc(kAlignment, (bytes + 2 * kAlignment - 1) / kAlignment * kAlignment);
}

double now_ms() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(now).count();
}

void (*tell_wait)(const char *) = nullptr;

aclError waited(const char *call) {
  if (tell_wait) tell_wait(call);
  return ACL_SUCCESS;
}

aclError copy(void *target, size_t room, const void *source, size_t bytes) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  memmove(target, source, bytes);
  return ACL_SUCCESS;
}

}  // namespace

extern "C" {

// What the Python side says when it refuses a call; torch_npu puts it into the exception.
void emulation_set_error(const char *message) { last_error = message; }
// Python is told of each call for which the host stops until the device has come so far.
void emulation_tell_waits(void (*tell)(const char *)) { tell_wait = tell; }
const char *aclGetRecentErrMsg() { return last_error.c_str(); }

aclError aclInit(const char *) { return ACL_SUCCESS; }
aclError aclFinalize() { return ACL_SUCCESS; }
// From this one on torch_npu 2.13 changes layouts by an aclnn operator.
aclError aclsysGetCANNVersion(aclCANNPackageName, aclCANNPackageVersion *version) {
  strcpy(version->version, "9.1.0");
  return ACL_SUCCESS;
}
const char *aclrtGetSocName() {
  const char *chip = getenv("EMULATED_NPU_CHIP");
  return chip ? chip : "Ascend910_9391";
}

// Devices and contexts
aclError aclrtGetDeviceCount(uint32_t *count) { *count = device_count(); return ACL_SUCCESS; }
aclError aclrtSetDevice(int32_t device) {
  if (device < 0 || device >= device_count()) return ACL_ERROR_INVALID_PARAM;
  current_device = device;
  return ACL_SUCCESS;
}
aclError aclrtGetDevice(int32_t *device) {
  if (current_device < 0) return ACL_ERROR_RT_CONTEXT_NULL;
  *device = current_device;
  return ACL_SUCCESS;
}
// Of an A2, or of half of an A3; torch.npu.get_device_properties asks.
aclError aclGetDeviceCapability(uint32_t, aclDeviceInfo what, int64_t *value) {
  *value = what == ACL_DEVICE_INFO_AI_CORE_NUM ? 24 : what == ACL_DEVICE_INFO_VECTOR_CORE_NUM ? 48 : int64_t{192} << 20;
  return ACL_SUCCESS;
}
aclError aclrtResetDevice(int32_t) { return ACL_SUCCESS; }
aclError aclrtGetCurrentContext(aclrtContext *context) {
  *context = &contexts[current_device < 0 ? 0 : current_device];
  return ACL_SUCCESS;
}
aclError aclrtSetCurrentContext(aclrtContext context) {
  current_device = static_cast<int *>(context) - contexts;
  return ACL_SUCCESS;
}
aclError aclrtGetPrimaryCtxState(int32_t, uint32_t *flags, int32_t *active) {
  if (flags) *flags = 0;
  if (active) *active = 1;
  return ACL_SUCCESS;
}
aclError aclrtSynchronizeDevice() { return waited(__func__); }
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return waited(__func__); }
aclError aclrtDeviceCanAccessPeer(int32_t *can, int32_t, int32_t) { *can = 1; return ACL_SUCCESS; }
aclError aclrtDeviceEnablePeerAccess(int32_t, uint32_t) { return ACL_SUCCESS; }
aclError aclrtGetLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtPeekAtLastError(aclrtLastErrLevel) { return ACL_SUCCESS; }
aclError aclrtSetOpWaitTimeout(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetOpExecuteTimeOut(uint32_t) { return ACL_SUCCESS; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode) { return ACL_SUCCESS; }

// Memory
aclError aclrtMalloc(void **memory, size_t bytes, aclrtMemMallocPolicy) {
  *memory = allocate(bytes);
  return *memory ? ACL_SUCCESS : ACL_ERROR_RT_MEMORY_ALLOCATION;
}
aclError aclrtMallocAlign32(void **memory, size_t bytes, aclrtMemMallocPolicy policy) {
  return aclrtMalloc(memory, bytes, policy);
}
aclError aclrtMallocHost(void **memory, size_t bytes) {
  return aclrtMalloc(memory, bytes, ACL_MEM_MALLOC_HUGE_FIRST);
}
aclError aclrtFree(void *memory) { free(memory); return ACL_SUCCESS; }
aclError aclrtFreeHost(void *memory) { free(memory); return ACL_SUCCESS; }
aclError aclrtGetMemInfo(aclrtMemAttr, size_t *free_bytes, size_t *total_bytes) {
  *free_bytes = *total_bytes = kMemoryBytes;
  return ACL_SUCCESS;
}
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind) {
  return copy(to, room, from, bytes);
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t bytes, aclrtMemcpyKind, aclrtStream) {
  return copy(to, room, from, bytes);
}
aclError aclrtMemset(void *memory, size_t room, int32_t value, size_t bytes) {
  if (bytes > room) return ACL_ERROR_INVALID_PARAM;
  memset(memory, value, bytes);
  return ACL_SUCCESS;
}
aclError aclrtMemsetAsync(void *memory, size_t room, int32_t value, size_t bytes, aclrtStream) {
  return aclrtMemset(memory, room, value, bytes);
}

// Streams
aclError aclrtCreateStream(aclrtStream *stream) { *stream = new char; return ACL_SUCCESS; }
aclError aclrtCreateStreamWithConfig(aclrtStream *stream, uint32_t, uint32_t) { return aclrtCreateStream(stream); }
aclError aclrtDestroyStream(aclrtStream stream) { delete static_cast<char *>(stream); return ACL_SUCCESS; }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return aclrtDestroyStream(stream); }
aclError aclrtSynchronizeStream(aclrtStream) { return waited(__func__); }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream, int32_t) { return waited(__func__); }
aclError aclrtStreamQuery(aclrtStream, aclrtStreamStatus *status) {
  *status = ACL_STREAM_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtStreamGetId(aclrtStream, int32_t *id) { *id = 0; return ACL_SUCCESS; }
aclError aclrtSetStreamFailureMode(aclrtStream, uint64_t) { return ACL_SUCCESS; }
aclError aclrtSetStreamOverflowSwitch(aclrtStream, uint32_t) { return ACL_SUCCESS; }

// Events
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t) { *event = new Event; return ACL_SUCCESS; }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t) { *event = new Event; return ACL_SUCCESS; }
aclError aclrtDestroyEvent(aclrtEvent event) { delete static_cast<Event *>(event); return ACL_SUCCESS; }
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream) {
  static_cast<Event *>(event)->recorded_ms = now_ms();
  return ACL_SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent) { return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent) { return waited(__func__); }
aclError aclrtResetEvent(aclrtEvent, aclrtStream) { return ACL_SUCCESS; }
aclError aclrtQueryEventStatus(aclrtEvent, aclrtEventRecordedStatus *status) {
  *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent, aclrtEventWaitStatus *status) {
  *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
  return ACL_SUCCESS;
}
aclError aclrtEventElapsedTime(float *ms, aclrtEvent first, aclrtEvent last) {
  *ms = static_cast<Event *>(last)->recorded_ms - static_cast<Event *>(first)->recorded_ms;
  return ACL_SUCCESS;
}

}  // extern "C"
