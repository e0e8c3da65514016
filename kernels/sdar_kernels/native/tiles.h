// What attention computes together: tiles of queries, and the columns of scores that each needs.

#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <utility>
#include <vector>

#include "vectors.h"

namespace sdar {

// Columns of scores that are held at once.
constexpr int64_t kMostColumns = 512;

// Query tokens [begin, end), the hulls of their two ranges of keys, and which tiles share keys.
struct Tile {
  int32_t begin, end, low[2], high[2], component;
};

// Keys [key, key + count) as columns of the scores from `column` on.
struct Part {
  int range;
  int64_t key, count, column;
};

// The columns of a tile in groups of at most kMostColumns. Parts begin at whole vectors.
template <typename A>
std::vector<std::vector<Part>> column_groups(const Tile& tile) {
  static_assert(kMostColumns % Vector<A>::size == 0, "a group ends where a vector does");
  std::vector<std::vector<Part>> groups(1);
  int64_t column = 0;
  for (int range = 0; range < 2; ++range) {
    for (int64_t key = tile.low[range]; key < tile.high[range];) {
      if (column == kMostColumns) {
        groups.emplace_back();
        column = 0;
      }
      const int64_t count = std::min<int64_t>(tile.high[range] - key, kMostColumns - column);
      groups.back().push_back({range, key, count, column});
      column += round_up(count, Vector<A>::size);
      key += count;
    }
  }
  return groups;
}

// Columns of a group, whole vectors.
template <typename A>
int64_t width_of(const std::vector<Part>& parts) {
  return round_up(parts.back().column + parts.back().count, Vector<A>::size);
}

// Disjoint sets of keys.
class Sets {
 public:
  explicit Sets(int64_t size) : parent_(size_t(size)) {
    std::iota(parent_.begin(), parent_.end(), 0);
  }
  int32_t find(int32_t x) {
    while (parent_[size_t(x)] != x) x = parent_[size_t(x)] = parent_[size_t(parent_[size_t(x)])];
    return x;
  }
  // The set of `from` becomes part of that of `into`, whose representative stays.
  void join(int32_t from, int32_t into) { parent_[size_t(find(from))] = find(into); }

 private:
  std::vector<int32_t> parent_;
};

// Cuts queries into tiles of at most `most` tokens, and where the document or the copy changes.
// Any intervals are computed correctly; these cuts keep hulls of usual rows tight.
inline int64_t cut_tiles(const int32_t* intervals, int64_t queries, int64_t most, Tile* tiles) {
  int64_t count = 0;
  for (int64_t token = 0; token < queries; ++token) {
    const int32_t* range = intervals + 4 * token;
    const int32_t* before = range - 4;
    const bool joins = token > 0 && token - tiles[count - 1].begin < most &&
                       range[0] == before[0] && (range[2] < range[3]) == (before[2] < before[3]);
    if (!joins) tiles[count++] = {int32_t(token), 0, {0, 0}, {0, 0}, 0};
    Tile& tile = tiles[count - 1];
    tile.end = int32_t(token + 1);
    for (int i = 0; i < 2; ++i) {
      const int32_t low = range[2 * i], high = range[2 * i + 1];
      if (low == high) continue;
      const bool empty = tile.low[i] == tile.high[i];
      tile.low[i] = empty ? low : std::min(tile.low[i], low);
      tile.high[i] = empty ? high : std::max(tile.high[i], high);
    }
  }
  return count;
}

// Numbers the components: tiles that share keys, directly or over others, add to the same sums in
// backward, so one thread computes them one after the other.
inline void number_components(Tile* tiles, int64_t count, int64_t keys) {
  // `last` knows where a run of joined keys ends, so that none is joined twice.
  Sets joined(keys), last(keys);
  for (int64_t i = 0; i < count; ++i) {
    for (int range = 0; range < 2; ++range) {
      const int32_t low = tiles[i].low[range], high = tiles[i].high[range];
      if (low == high) continue;
      for (int32_t key = last.find(low); key + 1 < high; key = last.find(key)) {
        last.join(key, key + 1);
        joined.join(key, key + 1);
      }
    }
    if (tiles[i].low[0] < tiles[i].high[0] && tiles[i].low[1] < tiles[i].high[1])
      joined.join(tiles[i].low[0], tiles[i].low[1]);
  }
  std::vector<int32_t> number(size_t(keys), -1);
  int32_t components = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int range = tiles[i].low[0] < tiles[i].high[0] ? 0 : 1;
    int32_t& own = number[size_t(joined.find(tiles[i].low[range]))];
    if (own < 0) own = components++;
    tiles[i].component = own;
  }
}

// Tile numbers by component, the most work first.
inline std::vector<std::vector<int64_t>> by_component(const Tile* tiles, int64_t count) {
  std::vector<std::vector<int64_t>> components;
  std::vector<int64_t> work;
  for (int64_t i = 0; i < count; ++i) {
    const size_t number = size_t(tiles[i].component);
    if (number >= components.size()) {
      components.resize(number + 1);
      work.resize(number + 1);
    }
    components[number].push_back(i);
    for (int range = 0; range < 2; ++range)
      work[number] += int64_t(tiles[i].end - tiles[i].begin) *
                      (tiles[i].high[range] - tiles[i].low[range]);
  }
  std::vector<size_t> order(components.size());
  std::iota(order.begin(), order.end(), size_t(0));
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t left, size_t right) { return work[left] > work[right]; });
  std::vector<std::vector<int64_t>> sorted;
  for (size_t number : order) sorted.push_back(std::move(components[number]));
  return sorted;
}

}  // namespace sdar
