// Vectors of a CPU, and small matrix products made of them.
//
// Nothing here is bound to one instruction set: GCC's vector types become AVX-512, AVX or NEON
// instructions, and their sizes below say how many registers there are.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <utility>

namespace sdar {

// kSums: vectors that a product sums in registers, of 32 or 16; kColumns: at most so many side by
// side.
#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
constexpr int kSums = 24, kColumns = 4;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
constexpr int kSums = 12, kColumns = 3;
#else
constexpr int kVectorBytes = 16;
constexpr int kSums = 24, kColumns = 4;
#endif
// Rows that are summed at once where so many vectors lie side by side.
constexpr int rows_beside(int vectors) { return std::min(kSums / vectors, 12); }

// What is known of float and double. e^x = 2^n e^r, r = x - n (high + low), is a sum of `terms`.
template <typename A>
struct Format;
template <>
struct Format<float> {
  typedef int32_t Bits;
  static constexpr int terms = 8, mantissa = 23, bias = 127;
  static constexpr float lowest = -87.0f, high = 0.693359375f, low = -2.12194440e-4f;
};
template <>
struct Format<double> {
  typedef int64_t Bits;
  static constexpr int terms = 14, mantissa = 52, bias = 1023;
  static constexpr double lowest = -708.0, high = 6.93145751953125e-1,
                          low = 1.42860682030941723212e-6;
};

template <typename A>
struct Vector {
  typedef A type __attribute__((vector_size(kVectorBytes), aligned(sizeof(A)), may_alias));
  typedef typename Format<A>::Bits bits __attribute__((vector_size(kVectorBytes)));
  static constexpr int64_t size = kVectorBytes / sizeof(A);
};
template <typename A>
using Vec = typename Vector<A>::type;

struct Bf16 {
  uint16_t bits;
};

inline float widen(float x) { return x; }
inline double widen(double x) { return x; }
inline float widen(Bf16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}
inline void narrow(float x, float* out) { *out = x; }
inline void narrow(double x, double* out) { *out = x; }
inline void narrow(float x, Bf16* out) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  // To nearest, ties to even; what is not a number stays so.
  out->bits = (bits & 0x7fffffff) > 0x7f800000 ? uint16_t((bits >> 16) | 0x40)
                                               : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline int64_t round_up(int64_t value, int64_t to) { return (value + to - 1) / to * to; }

// Memory of a call, not initialised.
template <typename A>
class Buffer {
 public:
  explicit Buffer(int64_t size) {
    void* data = nullptr;
    if (posix_memalign(&data, 64, size_t(size) * sizeof(A) + 64)) std::abort();
    data_ = static_cast<A*>(data);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  ~Buffer() { std::free(data_); }
  operator A*() { return data_; }

 private:
  A* data_;
};

// e^x for x at most about 0; exactly 0 below what has a normal result.
template <typename A>
inline Vec<A> exponential(Vec<A> x) {
  typedef Format<A> F;
  const Vec<A> clamped = x < A(F::lowest) ? Vec<A>{} + A(F::lowest) : x;
  const Vec<A> scaled = clamped * A(1.4426950408889634074);
  typename Vector<A>::bits power =
      __builtin_convertvector(scaled - A(0.5), typename Vector<A>::bits);  // towards zero: x <= 0
  const Vec<A> whole = __builtin_convertvector(power, Vec<A>);
  const Vec<A> rest = (clamped - whole * F::high) - whole * F::low;
  Vec<A> sum = Vec<A>{} + A(1);
  for (int term = F::terms; term >= 1; --term) sum = A(1) + sum * rest * A(1.0 / term);
  power = (power + F::bias) << F::mantissa;
  Vec<A> scale;
  std::memcpy(&scale, &power, sizeof scale);
  // Written so that what is not a number stays so.
  return x < A(F::lowest) ? Vec<A>{} : sum * scale;
}

template <typename A>
inline A largest_of(Vec<A> x) {
  A out = x[0];
  for (int i = 1; i < Vector<A>::size; ++i) out = std::max(out, x[i]);
  return out;
}
template <typename A>
inline A sum_of(Vec<A> x) {
  A out = 0;
  for (int i = 0; i < Vector<A>::size; ++i) out += x[i];
  return out;
}

template <typename A, typename T>
inline Vec<A> load_vector(const T* from) {
  Vec<A> out;
  for (int i = 0; i < Vector<A>::size; ++i) out[i] = widen(from[i]);
  return out;
}
template <>
inline Vec<float> load_vector<float, float>(const float* from) {
  return *reinterpret_cast<const Vec<float>*>(from);
}

// The first halves of two vectors element by element, and the second ones.
template <typename A, size_t... I>
inline void interleave(Vec<A> left, Vec<A> right, Vec<A>* low, Vec<A>* high,
                       std::index_sequence<I...>) {
  typedef typename Format<A>::Bits Bits;
  constexpr Bits size = Vector<A>::size;
  const typename Vector<A>::bits first = {Bits(I / 2 + (I % 2) * size)...};
  const typename Vector<A>::bits second = {Bits(I / 2 + size / 2 + (I % 2) * size)...};
  *low = __builtin_shuffle(left, right, first);
  *high = __builtin_shuffle(left, right, second);
}

// In place, as many rows as a vector has elements.
template <typename A>
inline void transpose(Vec<A>* rows) {
  constexpr int size = Vector<A>::size;
  for (int round = 1; round < size; round *= 2) {
    Vec<A> next[size];
#pragma GCC unroll 16
    for (int i = 0; i < size / 2; ++i)
      interleave<A>(rows[i], rows[i + size / 2], next + 2 * i, next + 2 * i + 1,
                    std::make_index_sequence<size>());
#pragma GCC unroll 16
    for (int i = 0; i < size; ++i) rows[i] = next[i];
  }
}

// c[i, j] (+)= sum_k a[i * row + k * step] * b[k * ldb + j], for R rows i and V vectors j.
template <typename A, int R, int V, bool add>
inline void product(const A* a, int64_t row, int64_t step, const A* b, int64_t ldb, A* c,
                    int64_t ldc, int64_t depth) {
  constexpr int64_t size = Vector<A>::size;
  Vec<A> sums[R][V];
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j)
      sums[i][j] = add ? *reinterpret_cast<const Vec<A>*>(c + i * ldc + j * size) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k) {
    Vec<A> right[V];
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j)
      right[j] = *reinterpret_cast<const Vec<A>*>(b + k * ldb + j * size);
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      const A left = a[i * row + k * step];
#pragma GCC unroll 16
      for (int j = 0; j < V; ++j) sums[i][j] += left * right[j];
    }
  }
#pragma GCC unroll 16
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 16
    for (int j = 0; j < V; ++j)
      *reinterpret_cast<Vec<A>*>(c + i * ldc + j * size) = sums[i][j];
}

// For a number of rows that is known only now, at most R.
template <typename A, int V, bool add, int R = rows_beside(V)>
inline void product_rows(int64_t rows, const A* a, int64_t row, int64_t step, const A* b,
                         int64_t ldb, A* c, int64_t ldc, int64_t depth) {
  if (rows == R)
    product<A, R, V, add>(a, row, step, b, ldb, c, ldc, depth);
  else if constexpr (R > 1)
    product_rows<A, V, add, R - 1>(rows, a, row, step, b, ldb, c, ldc, depth);
}

// For any number of rows, and of vectors at most V.
template <typename A, bool add, int V = kColumns>
inline void product_panel(int64_t vectors, int64_t rows, const A* a, int64_t row, int64_t step,
                          const A* b, int64_t ldb, A* c, int64_t ldc, int64_t depth) {
  if (vectors == V) {
    constexpr int R = rows_beside(V);
    int64_t i = 0;
    for (; i + R <= rows; i += R)
      product<A, R, V, add>(a + i * row, row, step, b, ldb, c + i * ldc, ldc, depth);
    if (i < rows)
      product_rows<A, V, add>(rows - i, a + i * row, row, step, b, ldb, c + i * ldc, ldc, depth);
  } else if constexpr (V > 1) {
    product_panel<A, add, V - 1>(vectors, rows, a, row, step, b, ldb, c, ldc, depth);
  }
}

// For any number of rows and of columns, which are rounded up to whole vectors.
template <typename A, bool add>
void multiply(int64_t rows, int64_t columns, int64_t depth, const A* a, int64_t row, int64_t step,
              const A* b, int64_t ldb, A* c, int64_t ldc) {
  constexpr int64_t size = Vector<A>::size;
  const int64_t vectors = (columns + size - 1) / size;
  for (int64_t j = 0; j < vectors; j += kColumns)
    product_panel<A, add>(std::min<int64_t>(kColumns, vectors - j), rows, a, row, step,
                          b + j * size, ldb, c + j * size, ldc, depth);
}

}  // namespace sdar
