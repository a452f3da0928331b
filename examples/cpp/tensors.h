// Arrays of the host that ONNX Runtime reads and writes in place, .npy files, and rows of the embedding table.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>
#if __has_include(<onnxruntime_c_api.h>)
#include <onnxruntime_c_api.h>
#else
#include "ort_abi.h"
#endif

#ifdef __aarch64__
using Half = __fp16;
#else
using Half = _Float16;
#endif
inline const OrtApi& ort = *OrtGetApiBase()->GetApi(1);

inline void check(OrtStatus* status) {
  if (status == nullptr) return;
  std::string message = ort.GetErrorMessage(status);
  ort.ReleaseStatus(status);
  throw std::runtime_error(message);
}

inline const OrtMemoryInfo* host_memory() {
  static OrtMemoryInfo* memory = nullptr;
  if (memory == nullptr) check(ort.CreateCpuMemoryInfo(OrtDeviceAllocator, OrtMemTypeDefault, &memory));
  return memory;
}

// An array of the host, which ONNX Runtime reads and writes in place.
struct Tensor {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
  std::vector<int64_t> shape;
  std::vector<char> bytes;
  std::shared_ptr<OrtValue> value;

  Tensor() = default;
  Tensor(Tensor&&) = default;  // moved, never copied: `value` has the address of `bytes`
  Tensor& operator=(Tensor&&) = default;
  Tensor(ONNXTensorElementDataType type, std::vector<int64_t> shape) : type(type), shape(std::move(shape)) {
    size_t width = type == ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64     ? 8
                   : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2
                   : type == ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8   ? 1
                                                                   : 4;
    for (int64_t extent : this->shape) width *= extent;
    bytes.resize(width);
    OrtValue* made = nullptr;
    check(ort.CreateTensorWithDataAsOrtValue(host_memory(), bytes.data(), width, this->shape.data(),
                                             this->shape.size(), type, &made));
    value = {made, ort.ReleaseValue};
  }
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(bytes.data());
  }
  size_t row_bytes() const { return bytes.size() / shape[0]; }
  const char* row(size_t index) const { return bytes.data() + index * row_bytes(); }
};

// An .npy file in C order, of <i8, <f4, <f2 or |u1.
inline Tensor read_npy(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  char start[10] = {};
  if (!file.read(start, 10) || std::memcmp(start, "\x93NUMPY\x01", 7) != 0) throw std::runtime_error("cannot read " + path);
  std::string header(static_cast<unsigned char>(start[8]) | static_cast<unsigned char>(start[9]) << 8, ' ');
  file.read(header.data(), header.size());
  auto has = [&](const char* text) { return header.find(text) != std::string::npos; };
  if (!has("'fortran_order': False") || !(has("<i8") || has("<f4") || has("<f2") || has("|u1")))
    throw std::runtime_error(path + " is of another type: " + header);
  std::vector<int64_t> shape;
  std::string extents = header.substr(header.find('(') + 1);
  for (const char* at = extents.c_str(); *at != ')'; ++at)
    if (*at >= '0' && *at <= '9') shape.push_back(std::strtoll(at, const_cast<char**>(&at), 10)), --at;
  Tensor read(has("<i8")   ? ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64
              : has("<f2") ? ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16
              : has("|u1") ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8
                           : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT,
              shape);
  if (!file.read(read.bytes.data(), read.bytes.size())) throw std::runtime_error(path + " is truncated");
  return read;
}

// Rows of the embedding table, which has the type of the checkpoint, in the type of the bundle.
struct Embedding {
  std::ifstream file;
  int64_t stored, width;
  bool narrow;  // to float16

  void read(int64_t row, char* to) {
    const size_t item = stored == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT ? 4 : 2;
    std::vector<char> raw(width * item);
    if (!file.seekg(row * raw.size()) || !file.read(raw.data(), raw.size()))
      throw std::runtime_error("embedding.bin has no row " + std::to_string(row));
    for (int64_t i = 0; i < width; ++i) {
      uint32_t bits = 0;
      float value = 0;
      std::memcpy(reinterpret_cast<char*>(&bits) + (item == 2 && stored != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16 ? 2 : 0),
                  raw.data() + i * item, item);
      if (stored == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        Half half;
        std::memcpy(&half, &bits, 2);
        value = static_cast<float>(half);
      } else {
        std::memcpy(&value, &bits, 4);  // a bfloat16 is the upper half of a float
      }
      if (narrow)
        reinterpret_cast<Half*>(to)[i] = static_cast<Half>(value);
      else
        reinterpret_cast<float*>(to)[i] = value;
    }
  }
};
