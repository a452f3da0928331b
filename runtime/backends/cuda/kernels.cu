// What is done to rows of hidden states between two segments. runtime/backends/cuda/kernels.py compiles and launches it.
//
// Needs no header: bf16 and fp16 travel as 16-bit words and are summed in fp32. The tests compile this very file with
// g++ (tests/runtime/backends/cuda/emulated/shim.hpp) and run it thread by thread.
//
// A row is `width` elements; V of them are read at once, 16 bytes or one element, as the host found the addresses to
// allow. Indices are int32 (a prompt has far fewer tokens), products of them with the width are 64 bits wide. A block
// is blockDim.x threads along a row and blockDim.y rows.

typedef long long wide;

struct bf16 { unsigned short bits; };
struct fp16 { unsigned short bits; };

#ifdef __CUDACC__
__device__ inline float half_to_float(unsigned short bits) {
  float value;
  asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(bits));
  return value;
}
__device__ inline unsigned short float_to_half(float value) {
  unsigned short bits;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(bits) : "f"(value));
  return bits;
}
#define KERNEL(name, parameters, call) \
  extern "C" __global__ void name parameters { call; }
#endif  // else the shim has them

__device__ inline float widen(fp16 value) { return half_to_float(value.bits); }
__device__ inline void narrow(float value, fp16& narrower) { narrower.bits = float_to_half(value); }

__device__ inline float widen(float value) { return value; }
__device__ inline void narrow(float value, float& same) { same = value; }

__device__ inline float widen(bf16 value) { return __uint_as_float((unsigned)value.bits << 16); }
// To nearest, ties to even; in integers, because GPUs before compute capability 8.0 have no instruction for it.
__device__ inline void narrow(float value, bf16& narrower) {
  const unsigned bits = __float_as_uint(value);
  const bool is_nan = (bits & 0x7fffffffu) > 0x7f800000u;
  narrower.bits = (unsigned short)((is_nan ? bits | 0x400000u : bits + 0x7fffu + (bits >> 16 & 1u)) >> 16);
}

// V elements of T in registers, moved with one instruction.
template <typename T, int V>
struct Pack {
  static const int per_word = 4 / sizeof(T);
  unsigned word[V / per_word];

  __device__ static Pack load(const T* place) {
    const uint4 read = *reinterpret_cast<const uint4*>(place);
    return {{read.x, read.y, read.z, read.w}};
  }
  __device__ void store(T* place) const {
    *reinterpret_cast<uint4*>(place) = make_uint4(word[0], word[1], word[2], word[3]);
  }
  __device__ float get(int i) const;
  __device__ void set(int i, float value);
};

template <typename T>
struct Pack<T, 1> {
  T element;

  __device__ static Pack load(const T* place) { return {*place}; }
  __device__ void store(T* place) const { *place = element; }
  __device__ float get(int) const { return widen(element); }
  __device__ void set(int, float value) { narrow(value, element); }
};

template <typename T, int V>
__device__ float Pack<T, V>::get(int i) const {
  const T element = {(unsigned short)(word[i / per_word] >> 16 * (i % per_word))};
  return widen(element);
}

template <typename T, int V>
__device__ void Pack<T, V>::set(int i, float value) {
  T element;
  narrow(value, element);
  const unsigned shift = 16 * (i % per_word);
  unsigned& into = word[i / per_word];
  into = (into & ~(0xffffu << shift)) | (unsigned)element.bits << shift;
}

template <>
__device__ float Pack<float, 4>::get(int i) const { return __uint_as_float(word[i]); }
template <>
__device__ void Pack<float, 4>::set(int i, float value) { word[i] = __float_as_uint(value); }

// out = row, `width` elements. Eight reads are under way before the first is written.
template <typename T, int V>
__device__ void copy_row(const T* __restrict__ row, T* __restrict__ out, wide width) {
#pragma unroll 8
  for (wide column = (wide)threadIdx.x * V; column < width; column += (wide)blockDim.x * V)
    Pack<T, V>::load(row + column).store(out + column);
}

// out[i] = mean of rows[members[starts[i]]] ... rows[members[starts[i + 1] - 1]], summed in fp32 in that order; a single
// row is copied as it is. Each row that is kept or merged is read once. `plan` is starts, count + 1 of them, and behind
// them the members. blockIdx.y 0 are the hidden states, and beside them the rotary tables, of which the first member's
// row is taken; blockIdx.y from 1 on are tables of features that follow a token by mean.
template <typename T, int V>
__device__ void reduce(const T* __restrict__ rows, T* __restrict__ out, wide width, const T* __restrict__ features,
                       T* __restrict__ features_out, wide stride, wide stride_out, const T* __restrict__ cos,
                       const T* __restrict__ sin, T* __restrict__ cos_out, T* __restrict__ sin_out, wide half,
                       const int* __restrict__ plan, int count) {
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= count) return;
  const int start = plan[i], end = plan[i + 1];
  const int* members = plan + count + 1;
  const wide head = members[start];
  if (blockIdx.y == 0 && half > 0) {
    copy_row<T, V>(cos + head * half, cos_out + i * half, half);
    copy_row<T, V>(sin + head * half, sin_out + i * half, half);
  }
  if (blockIdx.y > 0) {
    rows = features + (blockIdx.y - 1) * stride;
    out = features_out + (blockIdx.y - 1) * stride_out;
  }
  out += i * width;
  if (end - start == 1) {
    copy_row<T, V>(rows + head * width, out, width);
    return;
  }
  const float length = (float)(end - start);
  for (wide column = (wide)threadIdx.x * V; column < width; column += (wide)blockDim.x * V) {
    Pack<T, V> pack = Pack<T, V>::load(rows + head * width + column);
    float sum[V];
#pragma unroll
    for (int v = 0; v < V; ++v) sum[v] = pack.get(v);
#pragma unroll 4
    for (int member = start + 1; member < end; ++member) {
      pack = Pack<T, V>::load(rows + members[member] * width + column);
#pragma unroll
      for (int v = 0; v < V; ++v) sum[v] += pack.get(v);
    }
#pragma unroll
    for (int v = 0; v < V; ++v) pack.set(v, sum[v] / length);
    pack.store(out + column);
  }
}

// out[i] = sum over k of weight[i, k] * rows[index[i, k]], in fp32, product and sum each rounded.
template <typename T, int V>
__device__ void mix(const T* __restrict__ rows, const int* __restrict__ index, const float* __restrict__ weight,
                    T* __restrict__ out, int count, int terms, wide width) {
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= count) return;
  index += (wide)i * terms;
  weight += (wide)i * terms;
  for (wide column = (wide)threadIdx.x * V; column < width; column += (wide)blockDim.x * V) {
    Pack<T, V> pack;
    float sum[V] = {};
    for (int k = 0; k < terms; ++k) {
      pack = Pack<T, V>::load(rows + index[k] * width + column);
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float term = __fmul_rn(weight[k], pack.get(v));
        sum[v] = k == 0 ? term : __fadd_rn(sum[v], term);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) pack.set(v, sum[v]);
    pack.store(out + i * width + column);
  }
}

// out[i] = rows[index[i]], in words of any element type.
template <typename W>
__device__ void take(const W* __restrict__ rows, const int* __restrict__ index, W* __restrict__ out, int count,
                     wide width) {
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= count) return;
  for (wide column = threadIdx.x; column < width; column += blockDim.x)
    out[i * width + column] = rows[index[i] * width + column];
}

// out[index[i]] = rows[i]. No place may be named twice.
template <typename W>
__device__ void put(const W* __restrict__ rows, const int* __restrict__ index, W* __restrict__ out, int count,
                    wide width) {
  const int i = blockIdx.x * blockDim.y + threadIdx.y;
  if (i >= count) return;
  for (wide column = threadIdx.x; column < width; column += blockDim.x)
    out[index[i] * width + column] = rows[i * width + column];
}

// Rows [heads, S, width] behind what a cache [heads, C, width] holds: at kv_len - S, where there is room for them. A table
// says for each blockIdx.y where rows and cache begin, C, S, and which length counts; nothing is written beyond C.
template <typename W>
__device__ void append(const wide* __restrict__ table, const wide* __restrict__ kv_len, int heads, wide width) {
  const wide* entry = table + 5 * blockIdx.y;
  const W* rows = (const W*)entry[0];
  W* cache = (W*)entry[1];
  const wide slots = entry[2];
  const wide count = entry[3];
  const wide row = (wide)blockIdx.x * blockDim.y + threadIdx.y;
  if (row >= heads * count) return;
  const wide slot = kv_len[entry[4]] - count + row % count;
  if (slot < 0 || slot >= slots) return;
  W* out = cache + (row / count * slots + slot) * width;
  for (wide column = threadIdx.x; column < width; column += blockDim.x) out[column] = rows[row * width + column];
}

template <typename From, typename To>
__device__ void cast(const From* __restrict__ in, To* __restrict__ out, wide count) {
  for (wide i = (wide)blockIdx.x * blockDim.x + threadIdx.x; i < count; i += (wide)gridDim.x * blockDim.x)
    narrow(widen(in[i]), out[i]);
}

const int SPAN = 8;  // tokens of a warp, in track order: each row is read once and one row in SPAN twice
const int WARP = 32;
const unsigned ALL = 0xffffffffu;
const float DISSIMILAR = -2.0f;  // tracks.DISSIMILAR

__device__ inline int token_of(int entry) { return entry < 0 ? ~entry : entry; }

// Sum over the warp, in its first thread.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = WARP / 2; offset > 0; offset /= 2) value += __shfl_down_sync(ALL, value, offset);
  return value;
}

// out[p] = cosine of the p-th visual token in track order to the one before it. order[p] is the token, ~token for the
// first of a track. A block is one warp, so nothing waits for a barrier, and SPAN + 1 reads of each thread are under way
// at a time. A row's sums are the same in whatever warp they are made, so identical rows have a cosine of 1.
template <typename T, int V>
__device__ void similarity(const T* __restrict__ rows, const int* __restrict__ order, float* __restrict__ out,
                           int count, wide width) {
  const int first = blockIdx.x * SPAN;
  const T* row[SPAN + 1];
  row[0] = rows + token_of(order[order[first] < 0 ? first : first - 1]) * width;
#pragma unroll
  for (int t = 0; t < SPAN; ++t) {
    const int place = first + t < count ? first + t : count - 1;  // past the end the last row is read again, for nothing
    row[t + 1] = rows + token_of(order[place]) * width;
  }
  float dot[SPAN] = {}, square[SPAN + 1] = {};
  for (wide column = (wide)threadIdx.x * V; column < width; column += WARP * V) {
    Pack<T, V> pack[SPAN + 1];
#pragma unroll
    for (int t = 0; t <= SPAN; ++t) pack[t] = Pack<T, V>::load(row[t] + column);
    float before[V] = {};
#pragma unroll
    for (int t = 0; t <= SPAN; ++t) {
#pragma unroll
      for (int v = 0; v < V; ++v) {
        const float now = pack[t].get(v);
        if (t > 0) dot[t - 1] = __fmaf_rn(before[v], now, dot[t - 1]);
        square[t] = __fmaf_rn(now, now, square[t]);
        before[v] = now;
      }
    }
  }
#pragma unroll
  for (int t = 0; t <= SPAN; ++t) {
    square[t] = warp_sum(square[t]);
    if (t > 0) dot[t - 1] = warp_sum(dot[t - 1]);
  }
  if (threadIdx.x != 0) return;
#pragma unroll
  for (int t = 0; t < SPAN; ++t) {
    if (first + t >= count) break;
    const float scale = sqrtf(square[t]) * sqrtf(square[t + 1]);
    out[first + t] = order[first + t] >= 0 && scale > 0.0f ? dot[t] / scale : DISSIMILAR;
  }
}

// --- A decode step: its token, and what the next step is fed ---------------------------------------------------------

// Whether a logit comes before another one: not a number before any, which the host refuses, then the largest, then the
// first, as numpy's argmax has it.
__device__ inline bool precedes(float value, int place, float other, int other_place) {
  if (value != value || other != other) return value != value && (other == other || place < other_place);
  return value > other || (value == other && place < other_place);
}

// The first of a warp, in its first thread.
__device__ inline void first_of_warp(float& value, int& place) {
  for (int offset = WARP / 2; offset > 0; offset /= 2) {
    const float other = __shfl_down_sync(ALL, value, offset);
    const int other_place = (int)__float_as_uint(__shfl_down_sync(ALL, __uint_as_float((unsigned)place), offset));
    if (precedes(other, other_place, value, place)) value = other, place = other_place;
  }
}

const int MAX_WARPS = 8;

// The first of a block, in thread 0. Every thread of whole warps takes part.
__device__ inline void first_of_block(float& value, int& place) {
  __shared__ float values[MAX_WARPS];
  __shared__ int places[MAX_WARPS];
  first_of_warp(value, place);
  if (threadIdx.x % WARP == 0) values[threadIdx.x / WARP] = value, places[threadIdx.x / WARP] = place;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int warp = 1; warp < (int)blockDim.x / WARP; ++warp)
    if (precedes(values[warp], places[warp], value, place)) value = values[warp], place = places[warp];
}

__device__ inline void choose_parts_of(const float* __restrict__ logits, int limit, float* values, int* places) {
  float value = -__uint_as_float(0x7f800000u);
  int place = 0x7fffffff;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < limit; i += gridDim.x * blockDim.x)
    if (precedes(logits[i], i, value, place)) value = logits[i], place = i;
  first_of_block(value, place);
  if (threadIdx.x == 0) values[blockIdx.x] = value, places[blockIdx.x] = place;
}

template <typename W>
__device__ void feed(const float* values, const int* places, int parts, wide* step, wide* even, wide* odd,
                     const W* table, int table_rows, W* hidden, wide width, const W* cos_rows, const W* sin_rows,
                     int rotary_rows, W* cos, W* sin, int half, wide* lengths, int count) {
  __shared__ int token;
  __shared__ wide now;
  float value = -__uint_as_float(0x7f800000u);
  int place = 0x7fffffff;
  for (int i = threadIdx.x; i < parts; i += blockDim.x)
    if (precedes(values[i], places[i], value, place)) value = values[i], place = places[i];
  first_of_block(value, place);
  if (threadIdx.x == 0) {
    token = place;
    now = *step;
    *step = now + 1;
    wide* result = now % 2 ? odd : even;
    result[0] = place;
    result[1] = __float_as_uint(value);
  }
  __syncthreads();
  if (table)
    for (wide i = threadIdx.x; i < width; i += blockDim.x) hidden[i] = token < table_rows ? table[token * width + i] : 0;
  const wide row = now + 1 < rotary_rows ? now + 1 : rotary_rows - 1;
  for (int i = threadIdx.x; i < half; i += blockDim.x) {
    cos[i] = cos_rows[row * half + i];
    sin[i] = sin_rows[row * half + i];
  }
  for (int i = threadIdx.x; i < count; i += blockDim.x) lengths[i] += 1;
}

// The first of each block's share of the logits.  [limit] -> [blocks]
KERNEL(choose_parts, (const float* logits, int limit, float* values, int* places),
       (choose_parts_of(logits, limit, values, places)))

// One block: the token among `parts` shares goes to `even` or `odd`, by the step, with the bits of its logit; and what
// the next step reads is written: the token's row of the table (zeros behind its end; no table, no row), row step + 1 of the
// rotary tables or their last one, and lengths that are one longer. W is as wide as an element of the rows.
#define FEED(W, bytes)                                                                                               \
  KERNEL(feed_##bytes,                                                                                               \
         (const float* values, const int* places, int parts, wide* step, wide* even, wide* odd, const W* table,      \
          int table_rows, W* hidden, wide width, const W* cos_rows, const W* sin_rows, int rotary_rows, W* cos,      \
          W* sin, int half, wide* lengths, int count),                                                               \
         (feed<W>(values, places, parts, step, even, odd, table, table_rows, hidden, width, cos_rows, sin_rows,      \
                  rotary_rows, cos, sin, half, lengths, count)))
FEED(unsigned short, 2)
FEED(unsigned, 4)

#define FOR_TYPE(T, suffix, V)                                                                                       \
  KERNEL(reduce_##suffix,                                                                                            \
         (const T* rows, T* out, wide width, const T* features, T* features_out, wide stride, wide stride_out,       \
          const T* cos, const T* sin, T* cos_out, T* sin_out, wide half, const int* plan, int count),                \
         (reduce<T, V>(rows, out, width, features, features_out, stride, stride_out, cos, sin, cos_out, sin_out,     \
                       half, plan, count)))                                                                          \
  KERNEL(mix_##suffix,                                                                                               \
         (const T* rows, const int* index, const float* weight, T* out, int count, int terms, wide width),           \
         (mix<T, V>(rows, index, weight, out, count, terms, width)))                                                 \
  KERNEL(similarity_##suffix, (const T* rows, const int* order, float* out, int count, wide width),                  \
         (similarity<T, V>(rows, order, out, count, width)))

FOR_TYPE(float, float32_wide, 4)
FOR_TYPE(float, float32_single, 1)
FOR_TYPE(fp16, float16_wide, 8)
FOR_TYPE(fp16, float16_single, 1)
FOR_TYPE(bf16, bfloat16_wide, 8)
FOR_TYPE(bf16, bfloat16_single, 1)

#define FOR_WORD(W, bytes)                                                                                           \
  KERNEL(take_##bytes, (const W* rows, const int* index, W* out, int count, wide width),                             \
         (take<W>(rows, index, out, count, width)))                                                                  \
  KERNEL(put_##bytes, (const W* rows, const int* index, W* out, int count, wide width),                              \
         (put<W>(rows, index, out, count, width)))                                                                  \
  KERNEL(append_##bytes, (const wide* table, const wide* kv_len, int heads, wide width),                             \
         (append<W>(table, kv_len, heads, width)))

FOR_WORD(uint4, 16)
FOR_WORD(unsigned, 4)
FOR_WORD(unsigned short, 2)

#define CAST(From, from, To, to) \
  KERNEL(cast_##from##_##to, (const From* in, To* out, wide count), (cast<From, To>(in, out, count)))

CAST(float, float32, fp16, float16)
CAST(float, float32, bf16, bfloat16)
CAST(fp16, float16, float, float32)
CAST(bf16, bfloat16, float, float32)
CAST(fp16, float16, bf16, bfloat16)
CAST(bf16, bfloat16, fp16, float16)
