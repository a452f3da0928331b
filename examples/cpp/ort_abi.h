// The fifteen functions of ONNX Runtime's C API that main.cpp calls, for machines that have the library without its
// headers, as pip installs it. The release archives have onnxruntime_c_api.h, which is taken where it is found.
//
// The API is one table of function pointers. Its first 102 entries have been the same in every release since 1.0: ONNX
// Runtime asserts so when it is compiled, and hands the table out by version. `unused` are entries that nobody here calls.
#pragma once
#include <cstddef>
#include <cstdint>

extern "C" {
enum ONNXTensorElementDataType {
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 = 2,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 = 10,
  ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16 = 16
};
enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtDeviceAllocator = 0 };
enum OrtMemType { OrtMemTypeDefault = 0 };
struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtValue;
struct OrtMemoryInfo;
struct OrtAllocator;
using Unused = void (*)();

struct OrtApi {
  Unused unused_0[2];
  const char* (*GetErrorMessage)(const OrtStatus*);  // entry 2
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**);
  Unused unused_4[3];
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**);  // 7
  Unused unused_8[1];
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                    size_t num_inputs, const char* const* output_names, size_t num_outputs, OrtValue** outputs);  // 9
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**);
  Unused unused_11[13];
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int);  // 24
  Unused unused_25[5];
  OrtStatus* (*SessionGetInputCount)(const OrtSession*, size_t*);  // 30
  Unused unused_31[5];
  OrtStatus* (*SessionGetInputName)(const OrtSession*, size_t index, OrtAllocator*, char**);  // 36
  Unused unused_37[12];
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, size_t bytes, const int64_t* shape,
                                               size_t rank, ONNXTensorElementDataType, OrtValue**);  // 49
  Unused unused_50[19];
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**);  // 69
  Unused unused_70[6];
  OrtStatus* (*AllocatorFree)(OrtAllocator*, void*);  // 76
  Unused unused_77[1];
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**);  // 78
  Unused unused_79[14];
  void (*ReleaseStatus)(OrtStatus*);  // 93
  Unused unused_94[1];
  void (*ReleaseSession)(OrtSession*);  // 95
  void (*ReleaseValue)(OrtValue*);      // 96
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};
const OrtApiBase* OrtGetApiBase();
}
static_assert(offsetof(OrtApi, ReleaseValue) == 96 * sizeof(void*), "an entry is missing");
