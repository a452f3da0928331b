// The emulated driver of the tests, and what cuda.core calls beyond it: tools/bench/cuda_core.py builds both as one.
//
// DRIVER is the driver.cpp of those tests. cuda.core destroys what it makes and asks for the default stream; the runtime
// does neither.
#define cuStreamSynchronize synchronize
#include DRIVER
#undef cuStreamSynchronize

namespace {

void* const CONTEXT = (void*)16;
void* const POOL = (void*)32;

struct LaunchConfig {  // CUlaunchConfig
  unsigned gx, gy, gz, bx, by, bz, shared;
  Stream* stream;
  void* attributes;
  unsigned count;
};

}  // namespace

// --- Contexts, streams, events ---------------------------------------------------------------------------------------

CUDA cuCtxGetCurrent(void** context) { return *context = entered ? CONTEXT : nullptr, success; }
CUDA cuCtxGetDevice(int* device) { return *device = 0, success; }
CUDA cuCtxGetStreamPriorityRange(int* least, int* greatest) { return *least = 0, *greatest = -5, success; }
CUDA cuDevicePrimaryCtxRelease_v2(int) { return success; }
CUDA cuGetErrorName(int result, const char** name) {
  *name = result == out_of_memory ? "CUDA_ERROR_OUT_OF_MEMORY" : "CUDA_ERROR";
  return success;
}
CUDA cuStreamSynchronize(Stream* stream) {  // 0, 1 and 2 are the default streams, which nothing is enqueued on
  return (uintptr_t)stream < 3 ? (int)success : synchronize(stream);
}
CUDA cuStreamCreateWithPriority(Stream** stream, unsigned, int) { return *stream = new Stream, success; }
CUDA cuStreamDestroy_v2(Stream* stream) { return drain(stream), delete stream, success; }
CUDA cuStreamGetCtx(Stream*, void** context) { return *context = CONTEXT, success; }
CUDA cuStreamGetFlags(Stream*, unsigned* flags) { return *flags = 1, success; }
CUDA cuStreamGetPriority(Stream*, int* priority) { return *priority = 0, success; }
CUDA cuEventDestroy_v2(Event* event) { return delete event, success; }

// --- Memory ----------------------------------------------------------------------------------------------------------

CUDA cuMemPoolDestroy(void*) { return success; }
CUDA cuMemPoolGetAttribute(void*, int, uint64_t* value) { return *value = 0, success; }
CUDA cuMemPoolSetAccess(void*, const void*, size_t) { return success; }
CUDA cuDeviceGetMemPool(void** pool, int) { return *pool = POOL, success; }
CUDA cuMemAllocHost_v2(void** address, size_t size) { return cuMemHostAlloc(address, size, 0); }
CUDA cuMemFreeHost(void* address) {
  pinned_memory.erase((uintptr_t)address);
  return std::free(address), success;
}
CUDA cuMemcpyAsync(uintptr_t target, uintptr_t source, size_t size, Stream* stream) {
  const bool there = inside(device_memory, target, size), from_there = inside(device_memory, source, size);
  if (there && from_there) return cuMemcpyDtoDAsync_v2(target, source, size, stream);
  if (there) return cuMemcpyHtoDAsync_v2(target, (void*)source, size, stream);
  return cuMemcpyDtoHAsync_v2((void*)target, source, size, stream);
}
CUDA cuPointerGetAttributes(unsigned count, const int* which, void** values, uintptr_t address) {
  for (unsigned i = 0; i < count; ++i)
    *(unsigned*)values[i] = which[i] == 2 ? (inside(device_memory, address, 1) ? 2 : 1) : 0;  // 2: where it lies
  return success;
}

// --- Kernels ---------------------------------------------------------------------------------------------------------

CUDA cuLibraryLoadData(void** library, const void* image, void*, void*, unsigned, void*, void*, unsigned) {
  return cuModuleLoadData(library, image);
}
CUDA cuLibraryUnload(void*) { return success; }
CUDA cuLibraryGetKernel(const KernelEntry** kernel, void* library, const char* name) {
  return cuModuleGetFunction(kernel, library, name);
}
CUDA cuLaunchKernelEx(const LaunchConfig* launch, const KernelEntry* kernel, void** values, void** extra) {
  if (launch->count) return invalid_value;
  return cuLaunchKernel(kernel, launch->gx, launch->gy, launch->gz, launch->bx, launch->by, launch->bz, launch->shared,
                        launch->stream, values, extra);
}

// --- Graphs ----------------------------------------------------------------------------------------------------------

CUDA cuStreamIsCapturing(Stream* stream, int* status) { return *status = stream->capture ? 1 : 0, success; }
CUDA cuStreamGetCaptureInfo_v2(Stream* stream, int* status, uint64_t*, Graph** graph, const void**, size_t* count) {
  *status = !stream->capture ? 0 : stream->spoiled ? 2 : 1;
  if (graph) *graph = stream->capture;
  if (count) *count = 0;
  return success;
}
CUDA cuStreamGetCaptureInfo_v3(Stream* stream, int* status, uint64_t* number, Graph** graph, const void** nodes,
                               const void**, size_t* count) {
  return cuStreamGetCaptureInfo_v2(stream, status, number, graph, nodes, count);
}
CUDA cuGraphInstantiateWithParams(Graph** executable, Graph* graph, void*) {
  return cuGraphInstantiateWithFlags(executable, graph, 0);
}
CUDA cuUserObjectCreate(void** object, void*, void (*)(void*), unsigned, unsigned) {
  return *object = (void*)64, success;
}
CUDA cuUserObjectRelease(void*, unsigned) { return success; }
CUDA cuGraphRetainUserObject(void*, void*, unsigned, unsigned) { return success; }
CUDA cuGraphReleaseUserObject(void*, void*, unsigned) { return success; }
