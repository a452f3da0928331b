// An answer about a film by a bundle of the fixed reduction, with ONNX Runtime's C API and nothing else:
//
//   framefusion BUNDLE REQUEST [THREADS [LOGITS]]
//
// tower -> rows put among those of the text -> one static prefill, which merges and prunes inside -> greedy decode.
// REQUEST is a folder of .npy files that request.py writes; docs/cpp.md says what each holds. Token ids go to stdout,
// the logits of each, as raw floats, to the file LOGITS.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "tensors.h"

using Tensors = std::map<std::string, Tensor*>;

// A graph of the bundle. Outputs are written into the tensors that are given, which may be inputs: so caches stay put.
struct Graph {
  OrtSession* session = nullptr;
  std::vector<std::string> inputs;

  Graph(const OrtEnv* env, const OrtSessionOptions* options, const std::string& path) {
    check(ort.CreateSession(env, path.c_str(), options, &session));
    OrtAllocator* allocator = nullptr;
    check(ort.GetAllocatorWithDefaultOptions(&allocator));
    size_t count = 0;
    check(ort.SessionGetInputCount(session, &count));
    for (size_t i = 0; i < count; ++i) {
      char* name = nullptr;
      check(ort.SessionGetInputName(session, i, allocator, &name));
      inputs.emplace_back(name);
      check(ort.AllocatorFree(allocator, name));
    }
  }
  Graph(const Graph&) = delete;
  ~Graph() { ort.ReleaseSession(session); }

  void run(const Tensors& given, const Tensors& wanted) const {
    std::vector<const char*> in, out;
    std::vector<const OrtValue*> values;
    std::vector<OrtValue*> results;
    for (const std::string& name : inputs) {
      if (given.count(name) == 0) throw std::runtime_error("the request has no " + name);
      in.push_back(name.c_str());
      values.push_back(given.at(name)->value.get());
    }
    for (const auto& [name, tensor] : wanted) {
      out.push_back(name.c_str());
      results.push_back(tensor->value.get());
    }
    check(ort.Run(session, nullptr, in.data(), values.data(), in.size(), out.data(), out.size(), results.data()));
  }
};

double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

std::string text_of(const std::string& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file) throw std::runtime_error("cannot read " + path);
  return {std::istreambuf_iterator<char>(file), {}};
}

void answer(const std::string& bundle, const std::string& request, int threads, const char* logits_file) {
  // 1. The graphs, opened once; their weights are mapped from the files beside them.
  OrtEnv* env = nullptr;
  OrtSessionOptions* options = nullptr;
  check(ort.CreateEnv(ORT_LOGGING_LEVEL_ERROR, "framefusion", &env));
  check(ort.CreateSessionOptions(&options));
  check(ort.SetIntraOpNumThreads(options, threads));
  Graph tower(env, options, bundle + "/vision/graph.onnx");
  Graph prefill(env, options, bundle + "/segments/decoder/graph.onnx");
  Graph decode(env, options, bundle + "/segments/decoder/decode.onnx");

  // 2. The request, which is one bundle's, and the embedding table.
  const std::string digest = text_of(request + "/bundle.txt");
  if (digest.size() != 64 || text_of(bundle + "/manifest.json").find('"' + digest + '"') == std::string::npos)
    throw std::runtime_error("the request was made for another bundle");
  auto load = [&](const std::string& name) { return read_npy(request + "/" + name + ".npy"); };
  std::map<std::string, Tensor> given;
  for (const std::string& name : tower.inputs) given["vision/" + name] = load("vision/" + name);
  for (const char* name : {"cos", "sin", "kv_len", "last", "label", "order", "drops"})
    given[std::string("prefill/") + name] = load(std::string("prefill/") + name);
  Tensor sizes = load("sizes"), embedded = load("embedded"), places = load("places"), ends = load("ends");
  Tensor capacities = load("capacities"), lengths = load("lengths"), cos = load("decode_cos"), sin = load("decode_sin");
  const int64_t size = sizes.as<int64_t>()[0], width = sizes.as<int64_t>()[1], kv_heads = sizes.as<int64_t>()[2];
  const int64_t head_dim = sizes.as<int64_t>()[3], vocabulary = sizes.as<int64_t>()[4], left = sizes.as<int64_t>()[5];
  const int64_t known = sizes.as<int64_t>()[6];  // a head may have more rows than there are tokens
  const auto type = cos.type;
  if (cos.shape[0] < 1 || known < 1 || known > vocabulary) throw std::runtime_error("the request asks for no token");
  Embedding table{std::ifstream(bundle + "/embedding.bin", std::ios::binary), load("table_type").as<int64_t>()[0], width,
                  type == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16};

  // 3. Film to rows, and those among the rows of the text. What is behind the prompt stays zero.
  double start = seconds();
  Tensor rows(type, {places.shape[0], width});
  Tensors inputs;
  for (const std::string& name : tower.inputs) inputs[name] = &given["vision/" + name];
  tower.run(inputs, {{"tokens", &rows}});
  Tensor hidden(type, {1, size, width});
  const size_t row_bytes = rows.row_bytes();
  for (int64_t i = 0; i < embedded.shape[0]; ++i)
    if (embedded.as<int64_t>()[i] >= 0) table.read(embedded.as<int64_t>()[i], hidden.bytes.data() + i * row_bytes);
  for (int64_t i = 0; i < places.shape[0]; ++i)  // request.py has refused what the graph has no room for
    std::memcpy(hidden.bytes.data() + places.as<int64_t>()[i] * row_bytes, rows.row(i), row_bytes);
  double towered = seconds();

  // 4. The prefill: which tokens merge and which are pruned is decided inside. Caches are read and written in place.
  std::vector<Tensor> caches(2 * capacities.shape[0]);
  Tensors past, present;
  for (int64_t layer = 0; layer < capacities.shape[0]; ++layer)
    for (int side = 0; side < 2; ++side) {
      Tensor& cache = caches[2 * layer + side];
      cache = Tensor(type, {1, kv_heads, capacities.as<int64_t>()[layer], head_dim});
      const std::string name = std::string(side == 0 ? "_key_" : "_value_") + std::to_string(layer);
      past["past" + name] = present["present" + name] = &cache;
    }
  Tensor logits(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, {1, vocabulary}), origin(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {left});
  inputs = past;
  inputs["hidden"] = &hidden;
  for (const char* name : {"cos", "sin", "kv_len", "last", "label", "order", "drops"})
    inputs[name] = &given[std::string("prefill/") + name];
  Tensors outputs = present;
  outputs["logits"] = &logits;
  outputs["origin"] = &origin;
  prefill.run(inputs, outputs);
  double prefilled = seconds();

  // 5. One token at a time, the likeliest, until one that ends the answer. Each layer's cache has its own length.
  Tensor step_hidden(type, {1, 1, width}), step_cos(type, {1, 1, cos.shape[1]}), step_sin(type, {1, 1, cos.shape[1]});
  Tensor last(ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64, {1});
  inputs = past;
  outputs.erase("origin");
  inputs.insert({{"hidden", &step_hidden}, {"cos", &step_cos}, {"sin", &step_sin}, {"kv_len", &lengths}, {"last", &last}});
  std::ofstream kept(logits_file == nullptr ? "" : logits_file, std::ios::binary);
  int64_t steps = 0;
  for (;; ++steps) {
    const float* scores = logits.as<float>();
    if (logits_file != nullptr) kept.write(logits.bytes.data(), logits.bytes.size());
    if (!std::all_of(scores, scores + known, [](float score) { return std::isfinite(score); }))
      throw std::runtime_error("the logits are not numbers");
    const int64_t token = std::max_element(scores, scores + known) - scores;
    std::printf(steps == 0 ? "%lld" : " %lld", static_cast<long long>(token));
    const int64_t* end = ends.as<int64_t>() + ends.shape[0];
    if (steps + 1 == cos.shape[0] || std::find(ends.as<int64_t>(), const_cast<int64_t*>(end), token) != end) break;
    table.read(token, step_hidden.bytes.data());
    std::memcpy(step_cos.bytes.data(), cos.row(steps), cos.row_bytes());
    std::memcpy(step_sin.bytes.data(), sin.row(steps), sin.row_bytes());
    for (int64_t layer = 0; layer < lengths.shape[0]; ++layer) ++lengths.as<int64_t>()[layer];  // with this token
    decode.run(inputs, outputs);
  }
  std::printf("\n");
  std::fflush(stdout);
  std::fprintf(stderr, "tower %.3f s, prefill %.3f s, %lld steps %.3f s\n", towered - start, prefilled - towered,
               static_cast<long long>(steps), seconds() - prefilled);
}

int main(int count, char** arguments) {
  if (count < 3) return std::fprintf(stderr, "framefusion BUNDLE REQUEST [THREADS [LOGITS]]\n"), 2;
  try {
    answer(arguments[1], arguments[2], count > 3 ? std::atoi(arguments[3]) : 0, count > 4 ? arguments[4] : nullptr);
  } catch (const std::exception& error) {
    return std::fprintf(stderr, "error: %s\n", error.what()), 1;
  }
}
