// A libcuda.so.1 for machines without a GPU: the part of the driver API that framefusion.runtime.cuda uses.
//
// Memory of the "GPU" is the host's, filled with NaNs, each allocation right in front of a page that cannot be touched.
// A stream is a queue that nobody works on: what is enqueued runs when the host waits for it, and not before, together
// with what it must wait for, and nothing else. So a copy that is not waited for, a buffer that is changed too early and
// an event that is missing give wrong numbers here every time, not sometimes. What one thread of the host does not order,
// this does not find.
//
// EMULATED_CUDA (13000), EMULATED_CAPABILITY (87), EMULATED_MEMORY (bytes, 1 GiB), EMULATED_POOLS (1): the machine.
#include "shim.hpp"
#include KERNELS

#include <dlfcn.h>
#include <sys/mman.h>

#include <chrono>
#include <deque>

namespace {

enum Result {
  success = 0, invalid_value = 1, out_of_memory = 2, no_device = 100, invalid_image = 200, invalid_context = 201,
  not_found = 500, illegal_address = 700, capture_unsupported = 900, capture_invalidated = 901,
};

struct Event;
struct Stream;

struct Operation {
  std::function<void()> work;  // or a wait:
  Event* event = nullptr;
  unsigned long ticket = 0;
};
struct Event {
  unsigned long recorded = 0, reached = 0;
  Stream* last = nullptr;
  std::chrono::steady_clock::time_point when;
};
struct Graph {
  std::vector<Operation> operations;
};
struct Stream {
  std::deque<Operation> queue;
  Graph* capture = nullptr;
  bool spoiled = false;
};

std::map<uintptr_t, size_t> device_memory, pinned_memory;  // by the first byte
std::map<uintptr_t, std::pair<void*, size_t>> mapped;      // what to unmap
size_t used = 0;
thread_local bool entered = false;  // a context is current
const size_t PAGE = 4096;

size_t setting(const char* name, size_t otherwise) {
  const char* told = std::getenv(name);
  return told ? std::strtoull(told, nullptr, 10) : otherwise;
}

bool inside(const std::map<uintptr_t, size_t>& memory, uintptr_t address, size_t size) {
  auto next = memory.upper_bound(address);
  if (next == memory.begin()) return false;
  auto found = std::prev(next);
  return address + size <= found->first + found->second;
}

void advance(Stream* stream) {
  Operation operation = std::move(stream->queue.front());
  stream->queue.pop_front();
  if (operation.event == nullptr) return operation.work();
  Event* event = operation.event;
  while (event->reached < operation.ticket && event->last && !event->last->queue.empty()) advance(event->last);
}
void drain(Stream* stream) {
  while (!stream->queue.empty()) advance(stream);
}

Result enqueue(Stream* stream, Operation operation) {
  if (!entered) return invalid_context;
  if (stream->capture) stream->capture->operations.push_back(std::move(operation));
  else stream->queue.push_back(std::move(operation));
  return success;
}

// Waiting on a stream that is captured is an error, and spoils the capture.
Result refuse_in_capture(Stream* stream) {
  if (!stream->capture) return success;
  stream->spoiled = true;
  return capture_unsupported;
}

Result allocate(uintptr_t* address, size_t size) {
  if (!entered) return invalid_context;
  const size_t total = setting("EMULATED_MEMORY", 1u << 30);
  if (used + size > total) return out_of_memory;
  const size_t whole = (size + PAGE - 1) / PAGE * PAGE, aligned = (size + 15) / 16 * 16;
  char* block = (char*)mmap(nullptr, whole + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  mprotect(block + whole, PAGE, PROT_NONE);
  std::memset(block, 0xff, whole);
  *address = (uintptr_t)(block + whole - aligned);
  device_memory[*address] = size;
  mapped[*address] = {block, whole + PAGE};
  used += size;
  return success;
}

void give_up(uintptr_t address) {
  if (!device_memory.count(address)) undefined_on_a_gpu("memory is freed twice");
  used -= device_memory[address];
  device_memory.erase(address);
  munmap(mapped[address].first, mapped[address].second);
  mapped.erase(address);
}

Result copy(Stream* stream, uintptr_t target, uintptr_t source, size_t size) {
  return enqueue(stream, {[=] { std::memmove((void*)target, (const void*)source, size); }});
}

}  // namespace

#define CUDA extern "C" __attribute__((visibility("default"))) int

CUDA cuInit(unsigned) { return success; }
CUDA cuDriverGetVersion(int* version) { return *version = (int)setting("EMULATED_CUDA", 13000), success; }
CUDA cuDeviceGetCount(int* count) { return *count = 1, success; }
CUDA cuDeviceGet(int* device, int ordinal) { return *device = ordinal, ordinal ? 101 : success; }
CUDA cuDeviceGetName(char* name, int size, int) { return std::snprintf(name, size, "Emulated GPU"), success; }
CUDA cuDeviceTotalMem_v2(size_t* bytes, int) { return *bytes = setting("EMULATED_MEMORY", 1u << 30), success; }
CUDA cuDeviceGetAttribute(int* value, int which, int) {
  const int capability = (int)setting("EMULATED_CAPABILITY", 87);
  switch (which) {
    case 75: *value = capability / 10; break;
    case 76: *value = capability % 10; break;
    case 115: *value = (int)setting("EMULATED_POOLS", 1); break;
    default: undefined_on_a_gpu("an attribute that the emulated GPU does not know");
  }
  return success;
}
CUDA cuDevicePrimaryCtxRetain(void** context, int) { return *context = (void*)16, success; }
CUDA cuCtxSetCurrent(void* context) { return entered = context == (void*)16, success; }
CUDA cuGetErrorString(int, const char** words) { return *words = "said by the emulated driver", success; }
CUDA cuMemGetInfo_v2(size_t* available, size_t* total) {
  *total = setting("EMULATED_MEMORY", 1u << 30);
  *available = *total - used;
  return success;
}

CUDA cuStreamCreate(Stream** stream, unsigned) { return *stream = new Stream, success; }
CUDA cuEventCreate(Event** event, unsigned) { return *event = new Event, success; }
CUDA cuEventRecord(Event* event, Stream* stream) {
  const unsigned long ticket = ++event->recorded;
  event->last = stream;
  return enqueue(stream, {[=] {
                   event->reached = std::max(event->reached, ticket);
                   event->when = std::chrono::steady_clock::now();
                 }});
}
CUDA cuEventElapsedTime_v2(float* milliseconds, Event* start, Event* end) {  // of the CPU: for trying out, not for figures
  return *milliseconds = std::chrono::duration<float, std::milli>(end->when - start->when).count(), success;
}
CUDA cuStreamWaitEvent(Stream* stream, Event* event, unsigned) {
  return event->recorded ? enqueue(stream, {nullptr, event, event->recorded}) : success;
}
CUDA cuEventSynchronize(Event* event) {
  if (!entered) return invalid_context;
  if (event->last && event->last->capture) return refuse_in_capture(event->last);
  while (event->reached < event->recorded) advance(event->last);
  return success;
}
CUDA cuStreamSynchronize(Stream* stream) {
  if (!entered) return invalid_context;
  if (Result refused = refuse_in_capture(stream)) return refused;
  return drain(stream), success;
}

struct PoolProperties {  // CUmemPoolProps
  int allocation, handles;
  struct { int type, id; } location;
};
CUDA cuMemPoolCreate(void** pool, const PoolProperties* wanted) {
  const bool fits = wanted->allocation == 1 && wanted->location.type == 1 && wanted->location.id == 0;
  return *pool = (void*)32, fits ? success : invalid_value;
}
CUDA cuMemPoolSetAttribute(void* pool, int attribute, const uint64_t* value) {
  return pool == (void*)32 && attribute == 4 && *value == ~0ull ? success : invalid_value;
}
CUDA cuMemPoolTrimTo(void* pool, size_t) { return pool == (void*)32 ? success : invalid_value; }
CUDA cuMemAllocFromPoolAsync(uintptr_t* address, size_t size, void* pool, Stream* stream) {
  if (pool != (void*)32) return invalid_value;
  if (Result refused = refuse_in_capture(stream)) return refused;
  return allocate(address, size);
}
CUDA cuMemAlloc_v2(uintptr_t* address, size_t size) { return allocate(address, size); }
CUDA cuMemFreeAsync(uintptr_t address, Stream* stream) {
  if (!device_memory.count(address)) return invalid_value;
  return enqueue(stream, {[=] { give_up(address); }});
}
CUDA cuMemFree_v2(uintptr_t address) {
  if (!device_memory.count(address)) return invalid_value;
  return give_up(address), success;
}
CUDA cuMemHostAlloc(void** address, size_t size, unsigned) {
  if (!entered) return invalid_context;
  *address = std::aligned_alloc(PAGE, (size + PAGE - 1) / PAGE * PAGE);
  std::memset(*address, 0xff, size);
  pinned_memory[(uintptr_t)*address] = size;
  return success;
}

CUDA cuMemcpyHtoDAsync_v2(uintptr_t target, const void* source, size_t size, Stream* stream) {
  if (!inside(device_memory, target, size)) return invalid_value;
  if (inside(pinned_memory, (uintptr_t)source, size)) return copy(stream, target, (uintptr_t)source, size);
  if (Result refused = refuse_in_capture(stream)) return refused;
  const std::vector<char> staged((const char*)source, (const char*)source + size);
  return enqueue(stream, {[=] { std::memcpy((void*)target, staged.data(), size); }});
}
CUDA cuMemcpyDtoHAsync_v2(void* target, uintptr_t source, size_t size, Stream* stream) {
  if (!inside(device_memory, source, size)) return invalid_value;
  if (inside(pinned_memory, (uintptr_t)target, size)) return copy(stream, (uintptr_t)target, source, size);
  if (Result refused = refuse_in_capture(stream)) return refused;
  const Result enqueued = copy(stream, (uintptr_t)target, source, size);
  return drain(stream), enqueued;
}
CUDA cuMemcpyDtoDAsync_v2(uintptr_t target, uintptr_t source, size_t size, Stream* stream) {
  if (!inside(device_memory, target, size) || !inside(device_memory, source, size)) return invalid_value;
  if (target < source + size && source < target + size) return invalid_value;
  return copy(stream, target, source, size);
}
CUDA cuMemsetD8Async(uintptr_t target, unsigned char value, size_t size, Stream* stream) {
  if (!inside(device_memory, target, size)) return invalid_value;
  return enqueue(stream, {[=] { std::memset((void*)target, value, size); }});
}

// Machine code is looked at no further than this; its kernels are those that g++ compiled from the same source.
CUDA cuModuleLoadData(void** module, const void* image) {
  const bool known = std::memcmp(image, "\x7f" "ELF", 4) == 0 || std::strstr((const char*)image, ".version");
  return *module = (void*)48, known ? success : invalid_image;
}
CUDA cuModuleGetFunction(const KernelEntry** function, void* module, const char* name) {
  auto found = kernels().find(name);
  if (module != (void*)48 || found == kernels().end()) return not_found;
  return *function = &found->second, success;
}
CUDA cuLaunchKernel(const KernelEntry* kernel, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by,
                    unsigned bz, unsigned shared, Stream* stream, void** values, void** extra) {
  const bool fits = gx && gy && gy <= 65535 && gz == 1 && bx && by && bz == 1 && bx * by <= 1024;
  if (!fits || shared || extra) return invalid_value;
  const std::function<void()> thread = kernel->prepare(values);
  const bool barriers = kernel->barriers;
  return enqueue(stream, {[=] { run_grid({gx, gy, 1}, {bx, by, 1}, barriers, thread); }});
}

CUDA cuStreamBeginCapture_v2(Stream* stream, int) {
  if (!entered) return invalid_context;
  return stream->capture = new Graph, stream->spoiled = false, success;
}
CUDA cuStreamEndCapture(Stream* stream, Graph** graph) {
  *graph = stream->capture;
  stream->capture = nullptr;
  if (!stream->spoiled) return success;
  delete *graph;
  return *graph = nullptr, capture_invalidated;
}
CUDA cuGraphInstantiateWithFlags(Graph** executable, Graph* graph, unsigned long long) {
  return *executable = new Graph(*graph), success;
}
CUDA cuGraphDestroy(Graph* graph) { return delete graph, success; }
CUDA cuGraphExecDestroy(Graph* graph) { return delete graph, success; }
CUDA cuGraphLaunch(Graph* graph, Stream* stream) {
  for (const Operation& operation : graph->operations)
    if (Result refused = enqueue(stream, operation)) return refused;
  return success;
}

CUDA cuLaunchHostFunc(Stream* stream, void (*function)(void*), void* told) {
  return enqueue(stream, {[=] { function(told); }});
}

CUDA cuGetExportTable(const void** table, const void*) { return *table = nullptr, not_found; }  // NVRTC asks for one
CUDA cuGetProcAddress_v2(const char* symbol, void** function, int, uint64_t, int* found) {
  static void* self = dlopen("libcuda.so.1", RTLD_NOW | RTLD_NOLOAD);
  *function = nullptr;
  for (const char* suffix : {"_v2", "WithFlags", ""}) {
    if (!*function) *function = dlsym(self, (std::string(symbol) + suffix).c_str());
  }
  if (found) *found = *function ? 0 : 1;
  return *function ? success : not_found;
}
