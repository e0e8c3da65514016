// Block-diffusion attention on a CPU, forward and backward, as FlashAttention-2 (arXiv 2307.08691)
// without its blocks of keys: a tile of queries has all its scores at once, up to kMostColumns.
//
// A tile computes the hulls of its queries' two ranges and hides per row what its query may not
// see. The query heads of one key head are further rows of a tile. What comes out depends on the
// number of threads in nothing: only one of them adds to a key's gradients.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "tensors.h"
#include "tiles.h"
#include "vectors.h"

namespace sdar {
namespace {

template <typename T, typename A>
class Attention {
 public:
  Attention(const Shape& shape, const int32_t* intervals, const Tile* tiles, int64_t num_tiles,
            int threads)
      : shape_(shape),
        tensors_(shape),
        intervals_(intervals),
        tiles_(tiles),
        num_tiles_(num_tiles),
        scale_(A(1.0 / std::sqrt(double(shape.head_dim)))),
        threads_(threads) {
    for (int64_t i = 0; i < num_tiles; ++i)
      rows_ = std::max<int64_t>(rows_, (tiles[i].end - tiles[i].begin) * shape.groups());
  }

  void forward(const T* q, const T* k, const T* v, T* out, A* lse) {
    const int64_t kv_heads = shape_.kv_heads;
    Buffer<A> copies(tensors_.copies_size()), keys_turned(tensors_.turned_size());
    const Rows<A> values = tensors_.rows_of(v, copies);
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(static)
      for (int64_t part = 0; part < tensors_.num_parts(); ++part) {
        tensors_.pack(v, part, values);
        tensors_.turn(k, part, keys_turned);
      }
      Buffer<A> queries(rows_ * tensors_.depth()), scores(rows_ * kMostColumns),
          sums(rows_ * tensors_.depth()), state(2 * rows_);
#pragma omp for schedule(dynamic, 4)
      for (int64_t work = 0; work < kv_heads * num_tiles_; ++work)
        forward_tile(tiles_[work / kv_heads], work % kv_heads, q, values, keys_turned, out, lse,
                     queries, scores, sums, state);
    }
  }

  void backward(const T* q, const T* k, const T* v, const T* out, const T* grad, const A* lse,
                T* grad_q, T* grad_k, T* grad_v) {
    const int64_t kv_heads = shape_.kv_heads;
    Buffer<A> copies(tensors_.copies_size()), keys_copies(tensors_.copies_size()),
        values_copies(tensors_.copies_size()), keys_turned(tensors_.turned_size()),
        values_turned(tensors_.turned_size()), delta(shape_.queries * shape_.heads);
    const Gradients all{lse, delta, tensors_.rows_of(k, copies), keys_turned, values_turned,
                         tensors_.rows_of(grad_k, keys_copies),
                         tensors_.rows_of(grad_v, values_copies)};
    const std::vector<std::vector<int64_t>> components = by_component(tiles_, num_tiles_);
#pragma omp parallel num_threads(threads_)
    {
#pragma omp for schedule(static) nowait
      for (int64_t part = 0; part < tensors_.num_parts(); ++part) {
        tensors_.pack(k, part, all.keys);
        tensors_.turn(k, part, keys_turned);
        tensors_.turn(v, part, values_turned);
        tensors_.clear(part, all.grad_keys);
        tensors_.clear(part, all.grad_values);
      }
#pragma omp for schedule(static)
      for (int64_t row = 0; row < shape_.queries * shape_.heads; ++row)
        delta[row] = tensors_.inner_product(out + row * shape_.head_dim,
                                            grad + row * shape_.head_dim);
      Buffer<A> queries(rows_ * tensors_.depth()), upstream(rows_ * tensors_.depth()),
          grad_queries(rows_ * tensors_.depth()), scores(rows_ * kMostColumns),
          products(rows_ * kMostColumns);
#pragma omp for schedule(dynamic, 1)
      for (int64_t work = 0; work < kv_heads * int64_t(components.size()); ++work)
        for (int64_t tile : components[size_t(work / kv_heads)])
          backward_tile(tiles_[tile], work % kv_heads, q, grad, all, grad_q, queries, upstream,
                        grad_queries, scores, products);
#pragma omp for schedule(static)
      for (int64_t part = 0; part < tensors_.num_parts(); ++part) {
        tensors_.unpack(all.grad_keys, part, grad_k);
        tensors_.unpack(all.grad_values, part, grad_v);
      }
    }
  }

 private:
  // What all tiles of backward share. lse, delta: [queries, heads].
  struct Gradients {
    const A *lse, *delta;
    Rows<A> keys;
    const A *keys_turned, *values_turned;
    Rows<A> grad_keys, grad_values;
  };

  int64_t num_rows(const Tile& tile) const { return (tile.end - tile.begin) * shape_.groups(); }

  // Of a row of a tile in tensors [queries, heads].
  int64_t place(const Tile& tile, int64_t row, int64_t head) const {
    const int64_t groups = shape_.groups();
    return (tile.begin + row / groups) * shape_.heads + head * groups + row % groups;
  }

  // Rows times keys or values, for the columns of a group.
  void score(const std::vector<Part>& parts, int64_t rows, int64_t head, const A* left,
             const A* turned, A* scores) const {
    for (const Part& part : parts)
      multiply<A, false>(rows, part.count, shape_.head_dim, left, tensors_.depth(), 1,
                         turned + tensors_.turned_at(head) + part.key, tensors_.stride(),
                         scores + part.column, width_of<A>(parts));
  }

  // Scores of what a row may not see become minus infinity.
  void hide(const Tile& tile, const std::vector<Part>& parts, A* scores) const {
    const A hidden = -std::numeric_limits<A>::infinity();
    const int64_t groups = shape_.groups(), width = width_of<A>(parts);
    for (const Part& part : parts) {
      const int64_t columns = round_up(part.count, Vector<A>::size);
      for (int64_t token = tile.begin; token < tile.end; ++token) {
        const int32_t* range = intervals_ + 4 * token + 2 * part.range;
        const int64_t begin = std::clamp<int64_t>(range[0] - part.key, 0, part.count);
        const int64_t end = std::clamp<int64_t>(range[1] - part.key, begin, part.count);
        if (begin == 0 && end == columns) continue;
        for (int64_t group = 0; group < groups; ++group) {
          A* row = scores + ((token - tile.begin) * groups + group) * width + part.column;
          std::fill(row, row + begin, hidden);
          std::fill(row + end, row + columns, hidden);
        }
      }
    }
  }

  void forward_tile(const Tile& tile, int64_t head, const T* q, const Rows<A>& values,
                    const A* keys_turned, T* out, A* lse, A* queries, A* scores, A* sums,
                    A* state) const {
    const int64_t rows = num_rows(tile), depth = tensors_.depth();
    A *top = state, *total = state + rows;
    tensors_.load(q, tile, head, scale_, queries);
    std::fill(sums, sums + rows * depth, A(0));
    std::fill(top, top + rows, -std::numeric_limits<A>::infinity());
    std::fill(total, total + rows, A(0));
    for (const std::vector<Part>& parts : column_groups<A>(tile)) {
      const int64_t width = width_of<A>(parts);
      score(parts, rows, head, queries, keys_turned, scores);
      hide(tile, parts, scores);
      for (int64_t row = 0; row < rows; ++row)
        softmax_row(scores + row * width, width, top + row, total + row, sums + row * depth);
      for (const Part& part : parts)
        multiply<A, true>(rows, depth, part.count, scores + part.column, width, 1,
                          values.at(head, part.key), values.stride, sums, depth);
    }
    for (int64_t row = 0; row < rows; ++row) {
      const A share = 1 / total[row];
      for (int64_t i = 0; i < depth; ++i) sums[row * depth + i] *= share;
      lse[place(tile, row, head)] = top[row] + std::log(total[row]);
    }
    tensors_.store(sums, tile, head, out);
  }

  // Scores become e^(score - top) for the largest score so far, which may be a new one.
  void softmax_row(A* scores, int64_t width, A* top, A* total, A* sums) const {
    Vec<A>* line = reinterpret_cast<Vec<A>*>(scores);
    const int64_t vectors = width / Vector<A>::size;
    Vec<A> most = line[0];
    for (int64_t i = 1; i < vectors; ++i) most = line[i] > most ? line[i] : most;
    const A before = *top, now = std::max(before, largest_of<A>(most));
    if (now == -std::numeric_limits<A>::infinity()) {
      std::fill(scores, scores + width, A(0));  // nothing is seen of this group yet
      return;
    }
    if (now > before && *total > 0) {
      const A share = std::exp(before - now);
      *total *= share;
      for (int64_t i = 0; i < tensors_.depth(); ++i) sums[i] *= share;
    }
    Vec<A> sum{};
    for (int64_t i = 0; i < vectors; ++i) sum += line[i] = exponential<A>(line[i] - now);
    *total += sum_of<A>(sum);
    *top = now;
  }

  void backward_tile(const Tile& tile, int64_t head, const T* q, const T* grad,
                     const Gradients& all, T* grad_q, A* queries, A* upstream, A* grad_queries,
                     A* scores, A* products) const {
    const int64_t rows = num_rows(tile), depth = tensors_.depth();
    tensors_.load(q, tile, head, scale_, queries);
    tensors_.load(grad, tile, head, A(1), upstream);
    std::fill(grad_queries, grad_queries + rows * depth, A(0));
    for (const std::vector<Part>& parts : column_groups<A>(tile)) {
      const int64_t width = width_of<A>(parts);
      score(parts, rows, head, queries, all.keys_turned, scores);
      score(parts, rows, head, upstream, all.values_turned, products);
      hide(tile, parts, scores);
      for (int64_t row = 0; row < rows; ++row) {
        const A lse = all.lse[place(tile, row, head)], delta = all.delta[place(tile, row, head)];
        Vec<A>* line = reinterpret_cast<Vec<A>*>(scores + row * width);
        Vec<A>* other = reinterpret_cast<Vec<A>*>(products + row * width);
        for (int64_t i = 0; i < width / Vector<A>::size; ++i) {
          line[i] = exponential<A>(line[i] - lse);
          other[i] = line[i] * (other[i] - delta);
        }
      }
      for (const Part& part : parts) {
        multiply<A, true>(part.count, depth, rows, scores + part.column, 1, width, upstream, depth,
                          all.grad_values.at(head, part.key), all.grad_values.stride);
        multiply<A, true>(part.count, depth, rows, products + part.column, 1, width, queries,
                          depth, all.grad_keys.at(head, part.key), all.grad_keys.stride);
        multiply<A, true>(rows, depth, part.count, products + part.column, width, 1,
                          all.keys.at(head, part.key), all.keys.stride, grad_queries, depth);
      }
    }
    for (int64_t i = 0; i < rows * depth; ++i) grad_queries[i] *= scale_;
    tensors_.store(grad_queries, tile, head, grad_q);
  }

  Shape shape_;
  Tensors<T, A> tensors_;
  const int32_t* intervals_;
  const Tile* tiles_;
  int64_t num_tiles_, rows_ = 0;
  A scale_;
  int threads_;
};

}  // namespace
}  // namespace sdar

// What native_attention.py calls. Tensors are contiguous; lse is [queries, heads] in the dtype of
// the arithmetic; `tiles` is what sdar_attention_tiles wrote.
extern "C" {

// `tiles` has room for 7 numbers per query. Returns how many tiles there are.
int64_t sdar_attention_tiles(const int32_t* intervals, int64_t queries, int64_t keys, int64_t most,
                             int32_t* tiles) {
  sdar::Tile* out = reinterpret_cast<sdar::Tile*>(tiles);
  const int64_t count = sdar::cut_tiles(intervals, queries, most, out);
  sdar::number_components(out, count, keys);
  return count;
}

#define SDAR_ATTENTION(name, T, A)                                                                \
  void sdar_attention_forward_##name(                                                             \
      const int32_t* intervals, const int32_t* tiles, int64_t num_tiles, int64_t queries,         \
      int64_t keys, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t threads,           \
      const T* q, const T* k, const T* v, T* out, A* lse) {                                       \
    sdar::Attention<T, A>({queries, keys, heads, kv_heads, head_dim}, intervals,                  \
                          reinterpret_cast<const sdar::Tile*>(tiles), num_tiles, int(threads))    \
        .forward(q, k, v, out, lse);                                                              \
  }                                                                                               \
  void sdar_attention_backward_##name(                                                            \
      const int32_t* intervals, const int32_t* tiles, int64_t num_tiles, int64_t queries,         \
      int64_t keys, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t threads,           \
      const T* q, const T* k, const T* v, const T* out, const T* grad, const A* lse, T* grad_q,   \
      T* grad_k, T* grad_v) {                                                                     \
    sdar::Attention<T, A>({queries, keys, heads, kv_heads, head_dim}, intervals,                  \
                          reinterpret_cast<const sdar::Tile*>(tiles), num_tiles, int(threads))    \
        .backward(q, k, v, out, grad, lse, grad_q, grad_k, grad_v);                               \
  }

SDAR_ATTENTION(float32, float, float)
SDAR_ATTENTION(float64, double, double)
SDAR_ATTENTION(bfloat16, sdar::Bf16, float)
}
