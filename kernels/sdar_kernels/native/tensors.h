// How attention reads and writes its tensors: in the dtype that it computes in, padded to whole
// vectors, transposed where a product needs it.

#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "tiles.h"
#include "vectors.h"

namespace sdar {

struct Shape {
  int64_t queries, keys, heads, kv_heads, head_dim;
  int64_t groups() const { return heads / kv_heads; }
};

// Keys, values or their gradients: rows of padded head_dim.
template <typename A>
struct Rows {
  A* data;
  int64_t stride, head_stride;
  A* at(int64_t head, int64_t key) const { return data + head * head_stride + key * stride; }
};

// T is the dtype of the tensors, A the one of the arithmetic. Queries are [queries, heads,
// head_dim], keys and values [keys, kv_heads, head_dim], contiguous.
template <typename T, typename A>
class Tensors {
 public:
  explicit Tensors(const Shape& shape)
      : shape_(shape),
        depth_(round_up(shape.head_dim, Vector<A>::size)),
        // Products read whole vectors behind the last key that they need.
        stride_(round_up(shape.keys, Vector<A>::size) + 5 * Vector<A>::size) {}

  // Keys of all heads are copied in so many parts, which threads share.
  int64_t num_parts() const { return shape_.kv_heads * kParts; }
  // head_dim of rows, in whole vectors.
  int64_t depth() const { return depth_; }
  // Keys of a row of a transposed head, and elements of all of them.
  int64_t stride() const { return stride_; }
  int64_t turned_size() const { return shape_.kv_heads * depth_ * stride_; }
  int64_t turned_at(int64_t head) const { return head * depth_ * stride_; }

  // Rows that can be read and added to where they are need no copies.
  int64_t copies_size() const {
    return in_place() ? 0 : shape_.kv_heads * shape_.keys * depth_;
  }
  Rows<A> rows_of(const T* tensor, A* copies) const {
    if (in_place())
      return {reinterpret_cast<A*>(const_cast<T*>(tensor)), shape_.kv_heads * depth_, depth_};
    return {copies, depth_, shape_.keys * depth_};
  }

  void pack(const T* from, int64_t part, const Rows<A>& to) const {
    if (in_place()) return;
    in_part(part, [&](int64_t head, int64_t key) {
      const T* in = from + (key * shape_.kv_heads + head) * shape_.head_dim;
      A* row = to.at(head, key);
      for (int64_t i = 0; i < shape_.head_dim; ++i) row[i] = widen(in[i]);
      std::fill(row + shape_.head_dim, row + depth_, A(0));
    });
  }

  void unpack(const Rows<A>& from, int64_t part, T* to) const {
    if (in_place()) return;
    in_part(part, [&](int64_t head, int64_t key) {
      const A* in = from.at(head, key);
      T* row = to + (key * shape_.kv_heads + head) * shape_.head_dim;
      for (int64_t i = 0; i < shape_.head_dim; ++i) narrow(in[i], row + i);
    });
  }

  void clear(int64_t part, const Rows<A>& to) const {
    in_part(part, [&](int64_t head, int64_t key) {
      std::fill(to.at(head, key), to.at(head, key) + depth_, A(0));
    });
  }

  // [head_dim, stride] per head; what lies behind the last key is 0.
  void turn(const T* from, int64_t part, A* to) const {
    const int64_t head = part / kParts, begin = part_begin(part), end = part_begin(part, 1);
    A* out = to + turned_at(head);
    for (int64_t key = begin; key < end; key += Vector<A>::size)
      for (int64_t i = 0; i < shape_.head_dim; i += Vector<A>::size)
        turn_square(from, head, key, std::min(key + Vector<A>::size, end), i, out);
    if (end < shape_.keys) return;
    for (int64_t i = 0; i < shape_.head_dim; ++i)
      std::fill(out + i * stride_ + end, out + (i + 1) * stride_, A(0));
  }

  // Rows of a tile: tokens, and per token the query heads of the key head; times `scale`.
  void load(const T* from, const Tile& tile, int64_t head, A scale, A* to) const {
    const int64_t groups = shape_.groups(), dim = shape_.head_dim;
    for (int64_t token = tile.begin; token < tile.end; ++token) {
      const T* in = from + query_at(token, head);
      if (token + kAhead < tile.end) fetch(from + query_at(token + kAhead, head), groups * dim);
      for (int64_t group = 0; group < groups; ++group, in += dim, to += depth_) {
        for (int64_t i = 0; i < dim; ++i) to[i] = widen(in[i]) * scale;
        for (int64_t i = dim; i < depth_; ++i) to[i] = 0;
      }
    }
  }

  void store(const A* from, const Tile& tile, int64_t head, T* to) const {
    const int64_t groups = shape_.groups(), dim = shape_.head_dim;
    for (int64_t token = tile.begin; token < tile.end; ++token) {
      T* out = to + query_at(token, head);
      for (int64_t group = 0; group < groups; ++group, out += dim, from += depth_)
        for (int64_t i = 0; i < dim; ++i) narrow(from[i], out + i);
    }
  }

  // Of one head of one token.
  A inner_product(const T* left, const T* right) const {
    Vec<A> sum{};
    int64_t i = 0;
    for (; i + Vector<A>::size <= shape_.head_dim; i += Vector<A>::size)
      sum += load_vector<A>(left + i) * load_vector<A>(right + i);
    A total = sum_of<A>(sum);
    for (; i < shape_.head_dim; ++i) total += widen(left[i]) * widen(right[i]);
    return total;
  }

 private:
  static constexpr int64_t kParts = 8;
  // Tokens lie far apart, for one key head: where a CPU looks ahead by itself, it sees no pattern.
  static constexpr int64_t kAhead = 2, kCacheLine = 64;

  bool in_place() const { return std::is_same_v<T, A> && depth_ == shape_.head_dim; }

  int64_t query_at(int64_t token, int64_t head) const {
    return (token * shape_.heads + head * shape_.groups()) * shape_.head_dim;
  }

  // First key of a part, or of the one behind it; whole squares of `turn` in between.
  int64_t part_begin(int64_t part, int64_t next = 0) const {
    const int64_t size = round_up(shape_.keys, kSquare * kParts) / kParts;
    return std::min(size * (part % kParts + next), shape_.keys);
  }
  static constexpr int64_t kSquare = 16;
  static_assert(kSquare % Vector<A>::size == 0, "a square has whole vectors");

  template <typename Function>
  void in_part(int64_t part, Function of_head_and_key) const {
    for (int64_t key = part_begin(part); key < part_begin(part, 1); ++key)
      of_head_and_key(part / kParts, key);
  }

  void turn_square(const T* from, int64_t head, int64_t key, int64_t end, int64_t i, A* out) const {
    constexpr int64_t size = Vector<A>::size;
    const int64_t step = shape_.kv_heads * shape_.head_dim;
    const int64_t keys = end - key, columns = std::min(size, shape_.head_dim - i);
    const T* in = from + key * step + head * shape_.head_dim + i;
    out += i * stride_ + key;
    if (keys == size && columns == size) {
      Vec<A> square[size];
      for (int64_t row = 0; row < size; ++row) square[row] = load_vector<A>(in + row * step);
      transpose<A>(square);
      for (int64_t row = 0; row < size; ++row)
        *reinterpret_cast<Vec<A>*>(out + row * stride_) = square[row];
      return;
    }
    for (int64_t row = 0; row < columns; ++row)
      for (int64_t column = 0; column < keys; ++column)
        out[row * stride_ + column] = widen(in[column * step + row]);
  }

  static void fetch(const T* from, int64_t count) {
    const char* line = reinterpret_cast<const char*>(from);
    for (int64_t at = 0; at < count * int64_t(sizeof(T)); at += kCacheLine)
      __builtin_prefetch(line + at);
  }

  Shape shape_;
  int64_t depth_, stride_;
};

}  // namespace sdar
