// What the operators of this folder are made of: planes of pictures, vectors along their rows, convolutions of them.
// README.md in this folder explains the layout and the order of the loops.
#pragma once

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "paddle/extension.h"

// How many threads share out the images of a batch; set from outside (__init__.py), 0: as OpenMP is told.
extern "C" int darts_threads;

namespace {

using paddle::Tensor;

// What the processor has: bytes of a vector, how many vectors it keeps at hand.
#ifdef __AVX512F__
constexpr int kBytes = 64, kRegisters = 32;
#else
constexpr int kBytes = 32, kRegisters = 16;
#endif
template <typename T>
constexpr int kMost = kBytes / sizeof(T);        // numbers in the widest vector
// Of a tile of a product: 6 rows of sums, a vector of the other factor for each column, and two to spare.
constexpr int kTileColumns = kRegisters / 8;

// L numbers side by side. The compiler maps them to whatever vector registers the machine has.
template <typename T, int L>
struct Vector {
  typedef T type __attribute__((vector_size(L * sizeof(T)), aligned(alignof(T)), may_alias));
};

template <typename T, int L>
inline typename Vector<T, L>::type load(const T* p) {
  return *reinterpret_cast<const typename Vector<T, L>::type*>(p);
}

template <typename T, int L>
inline void store(T* p, typename Vector<T, L>::type v) {
  *reinterpret_cast<typename Vector<T, L>::type*>(p) = v;
}

// The sum of the numbers in a vector, by halves.
template <typename T, int L>
inline T sum(typename Vector<T, L>::type v) {
  if constexpr (L == 2) {
    return v[0] + v[1];
  } else {
    typename Vector<T, L / 2>::type halves[2];
    std::memcpy(halves, &v, sizeof(v));
    return sum<T, L / 2>(halves[0] + halves[1]);
  }
}

inline int threads() { return darts_threads > 0 ? darts_threads : omp_get_max_threads(); }

// The sums of L vectors side by side in one: in each of log2 L steps two vectors become one, and what is not yet added up
// lies in runs of half the length.
template <typename T, int L>
struct Sums {
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
  typedef typename Vector<T, L>::type V;

  // to [COUNT]: the sum of the numbers of each vector. COUNT may be any number; to has room for a multiple of L.
  template <int COUNT>
  static void write(const V* vectors, T* to) {
#pragma GCC unroll 32
    for (int k = 0; k < COUNT; k += L) {
      V some[L];
#pragma GCC unroll 32
      for (int i = 0; i < L; ++i) some[i] = k + i < COUNT ? vectors[k + i] : V{};
      store<T, L>(to + k, of<L>(some));
    }
  }

 private:
  // COUNT vectors, whose numbers have been added up in runs of L / COUNT.
  template <int COUNT>
  static V of(const V* v) {
    if constexpr (COUNT == 1) {
      return v[0];
    } else {
      V halves[COUNT / 2];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT / 2; ++i) halves[i] = pair<L / COUNT>(v[2 * i], v[2 * i + 1], std::make_index_sequence<L>());
      return of<COUNT / 2>(halves);
    }
  }
  // The two halves of every run of a, then of b, added up. The places are constants: shuffles by others are several times
  // slower.
  template <int RUN, size_t... I>
  static V pair(V a, V b, std::index_sequence<I...>) {
#ifdef __clang__
    return __builtin_shufflevector(a, b, place(I, RUN)...) + __builtin_shufflevector(a, b, (place(I, RUN) + RUN)...);
#else
    typedef typename Vector<Index, L>::type Places;
    return __builtin_shuffle(a, b, Places{place(I, RUN)...}) + __builtin_shuffle(a, b, Places{(place(I, RUN) + RUN)...});
#endif
  }
  static constexpr Index place(int i, int run) { return i / run % 2 * L + i / (2 * run) * 2 * run + i % run; }
};

constexpr int64_t kLine = 64;                    // bytes of a line of the cache

// Numbers, rounded up to whole lines.
template <typename T>
inline int64_t whole_lines(int64_t size) {
  const int64_t line = kLine / sizeof(T);
  return (size + line - 1) / line * line;
}

// Memory that begins with a line of the cache, for every other vector would lie across two; and that is kept from call to
// call, for fresh memory costs more than what is computed in it.
template <typename T>
class Storage {
 public:
  // Room for `size` numbers; what was there before is lost.
  T* room(int64_t size) {
    if (size > size_) {
      numbers_.reset();
      numbers_.reset(new T[size + kLine / sizeof(T)]);
      size_ = size;
    }
    const auto at = reinterpret_cast<uintptr_t>(numbers_.get());
    return numbers_.get() + (kLine - at % kLine) % kLine / sizeof(T);
  }

 private:
  std::unique_ptr<T[]> numbers_;
  int64_t size_ = 0;
};

// Room for the numbers of one thread, handed out piece by piece, each at the start of a line.
template <typename T>
class Scratch {
 public:
  // Room for pieces of these sizes together, at most 32.
  explicit Scratch(int64_t size) {
    static thread_local Storage<T> storage;
    next_ = storage.room(size + 32 * kLine / sizeof(T));
  }
  T* take(int64_t size) {
    T* start = next_;
    next_ += whole_lines<T>(size);
    return start;
  }
  T* zeros(int64_t size) {
    T* start = take(size);
    std::fill(start, start + size, T(0));
    return start;
  }

 private:
  T* next_;
};

// The distance between planes of `size` numbers: an odd number of cache lines, for planes that are a power of two apart
// would compete for the same few places in the cache.
template <typename T>
inline int64_t apart(int64_t size) {
  const int64_t line = kLine / sizeof(T);
  return (whole_lines<T>(size) / line | 1) * line;
}

// A plane [h, w] in scratch with a border of `padding`, read with a stride: [h + 2 p, stride, phase], column c at
// [c % stride, c / stride], so that what a tap of a kernel sees along a row is contiguous whatever the stride. The
// result of a convolution is a plane [out_h, out_row] with rows rounded up to the width L of a vector.
struct Geometry {
  int64_t h, w, stride, padding, out_h, out_w, out_row;
  int64_t phase, row, plane;             // numbers in a phase of a row, in a row; from one padded plane to the next
  int64_t size, step;                    // numbers in an output plane; from one output plane to the next

  template <typename T>
  static Geometry of(int64_t h, int64_t w, int64_t stride, int64_t padding, int64_t lanes) {
    Geometry g;
    g.h = h, g.w = w, g.stride = stride, g.padding = padding;
    g.out_h = (h - 1) / stride + 1, g.out_w = (w - 1) / stride + 1;
    g.out_row = (g.out_w + lanes - 1) / lanes * lanes;
    g.phase = std::max(g.out_row + 2 * padding / stride + 1, (w + 2 * padding + stride - 1) / stride);
    g.row = stride * g.phase;
    g.plane = apart<T>(g.row * (h + 2 * padding));
    g.size = g.out_h * g.out_row;
    g.step = apart<T>(g.size);
    return g;
  }
  // Where padded row r, column c stands.
  int64_t at(int64_t r, int64_t c) const {
    return stride == 1 ? r * row + c : r * row + c % stride * phase + c / stride;
  }
  // Rows and columns of an output plane, as one long row where nothing is rounded up.
  int64_t rows() const { return out_row == out_w ? 1 : out_h; }
  int64_t columns() const { return out_row == out_w ? size : out_w; }
};

// Where the K x K taps of a kernel of this dilation stand, from the padded place of the output's row and column on.
template <int K>
struct Taps {
  int64_t at[K * K];
  Taps(const Geometry& g, int64_t dilation) {
    const int64_t first = g.padding - dilation * (K / 2);
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < K; ++j) at[i * K + j] = g.at(first + i * dilation, first + j * dilation);
  }
};

// Writes f(column) to the columns of row i of a padded plane.
template <typename T, typename F>
inline void fill_row(const Geometry& g, T* padded, int64_t i, F f) {
  T* row = padded + (i + g.padding) * g.row;
  if (g.stride == 1) {
    T* to = row + g.padding;
#pragma omp simd
    for (int64_t j = 0; j < g.w; ++j) to[j] = f(j);
  } else if (g.stride == 2 && g.padding % 2 == 0 && g.w % 2 == 0) {
    T *even = row + g.padding / 2, *odd = even + g.phase;
#pragma omp simd
    for (int64_t j = 0; j < g.w / 2; ++j) {
      even[j] = f(2 * j);
      odd[j] = f(2 * j + 1);
    }
  } else {
    for (int64_t j = 0; j < g.w; ++j) row[g.at(0, j + g.padding)] = f(j);
  }
}

// x [h, w] -> relu(x), padded; the border of `padded` has to be 0 already.
template <typename T>
void pad(const Geometry& g, const T* x, T* padded) {
  for (int64_t i = 0; i < g.h; ++i) {
    const T* from = x + i * g.w;
    fill_row(g, padded, i, [from](int64_t j) { return from[j] < 0 ? T(0) : from[j]; });      // a NaN stays one
  }
}

// ROWS x COLUMNS vectors of the output at `out`: the correlation of a padded plane with a kernel.
template <typename T, int L, int K, int ROWS, int COLUMNS, bool ADD>
inline void correlate_tile(const T* in, int64_t in_row, const Taps<K>& taps, const T* weight, T* out, int64_t out_row) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = ADD ? load<T, L>(out + r * out_row + c * L) : typename Vector<T, L>::type{};
  for (int k = 0; k < K * K; ++k) {
    const T w = weight[k];
    const T* from = in + taps.at[k];
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += w * load<T, L>(from + r * in_row + c * L);
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) store<T, L>(out + r * out_row + c * L, sums[r][c]);
}

// out [out_h, out_row] = (or +=) the correlation of a padded plane with a kernel, at every `g.stride`-th place.
template <typename T, int L, int K, bool ADD>
void correlate(const Geometry& g, const T* in, const Taps<K>& taps, const T* weight, T* out) {
  const int64_t in_row = g.stride * g.row, row = g.out_row;
  int64_t r = 0;
  if (row % (2 * L) == 0) {
    for (; r + 4 <= g.out_h; r += 4)
      for (int64_t c = 0; c < row; c += 2 * L)
        correlate_tile<T, L, K, 4, 2, ADD>(in + r * in_row + c, in_row, taps, weight, out + r * row + c, row);
  } else {
    for (; r + 8 <= g.out_h; r += 8)
      for (int64_t c = 0; c < row; c += L)
        correlate_tile<T, L, K, 8, 1, ADD>(in + r * in_row + c, in_row, taps, weight, out + r * row + c, row);
  }
  for (; r < g.out_h; ++r)
    for (int64_t c = 0; c < row; c += L)
      correlate_tile<T, L, K, 1, 1, ADD>(in + r * in_row + c, in_row, taps, weight, out + r * row + c, row);
}

// weight_gradient [K, K] += the correlation of a padded plane with the gradient of the output, from tap FIRST on: as many
// taps at a time as there are registers for their sums.
template <typename T, int L, int K, int FIRST = 0>
void correlate_weights(const Geometry& g, const T* padded, const Taps<K>& taps, const T* gradient, T* weight_gradient) {
  constexpr int TAPS = std::min(K * K - FIRST, kRegisters - 3);
  typename Vector<T, L>::type sums[TAPS];
#pragma GCC unroll 32
  for (int k = 0; k < TAPS; ++k) sums[k] = typename Vector<T, L>::type{};
  for (int64_t r = 0; r < g.out_h; ++r) {
    for (int64_t c = 0; c < g.out_row; c += L) {
      const auto d = load<T, L>(gradient + r * g.out_row + c);
      const T* from = padded + r * g.stride * g.row + c;
#pragma GCC unroll 32
      for (int k = 0; k < TAPS; ++k) sums[k] += d * load<T, L>(from + taps.at[FIRST + k]);
    }
  }
  T all[TAPS + L];
  Sums<T, L>::template write<TAPS>(sums, all);
  for (int k = 0; k < TAPS; ++k) weight_gradient[FIRST + k] += all[k];
  if constexpr (FIRST + TAPS < K * K)
    correlate_weights<T, L, K, FIRST + TAPS>(g, padded, taps, gradient, weight_gradient);
}

// padded (a gradient laid out like the padded input) += the output's gradient, spread by the kernel. For strides > 1.
template <typename T, int L, int K>
void spread(const Geometry& g, const T* gradient, const Taps<K>& taps, const T* weight, T* padded) {
  for (int64_t r = 0; r < g.out_h; ++r)
    for (int k = 0; k < K * K; ++k) {
      const T w = weight[k];
      T* to = padded + r * g.stride * g.row + taps.at[k];
      for (int64_t c = 0; c < g.out_row; c += L)
        store<T, L>(to + c, load<T, L>(to + c) + w * load<T, L>(gradient + r * g.out_row + c));
    }
}

// ROWS x COLUMNS vectors of out = a b: a [rows, inner] with steps between rows and columns, b [inner, size].
template <typename T, int L, int ROWS, int COLUMNS>
inline void multiply_tile(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t inner, T* out,
                          int64_t out_step) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = typename Vector<T, L>::type{};
  for (int64_t k = 0; k < inner; ++k) {
    typename Vector<T, L>::type columns[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) columns[c] = load<T, L>(b + k * b_step + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * a_row + k * a_column];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += factor * columns[c];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) store<T, L>(out + r * out_step + c * L, sums[r][c]);
}

// Calls f(r, std::integral_constant<int, ROWS>) for tiles of ROWS rows from row r on: six, or as many as are left.
template <typename F>
inline void in_tiles(int64_t rows, F f) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    if (left >= 6 && left != 8)                    // 8 is better done as 4 + 4
      f(r, std::integral_constant<int, 6>()), r += 6;
    else if (left >= 4)
      f(r, std::integral_constant<int, 4>()), r += 4;
    else
      f(r, std::integral_constant<int, 1>()), r += 1;
  }
}

template <typename T, int L, int COLUMNS>
void multiply_columns(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t rows, int64_t inner,
                      T* out, int64_t out_step) {
  in_tiles(rows, [&](int64_t r, auto count) {
    multiply_tile<T, L, decltype(count)::value, COLUMNS>(a + r * a_row, a_row, a_column, b, b_step, inner, out + r * out_step,
                                                         out_step);
  });
}

// out [rows, size] = a [rows, inner] b [inner, size]; size is a multiple of L; *_step: from row to row. A few columns of b
// stay in the cache while all rows of a pass over them.
template <typename T, int L>
void multiply(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t rows, int64_t inner,
              int64_t size, T* out, int64_t out_step) {
  // Planes of 8 x 8 are too narrow for the widest vectors, but 64 numbers in a row are not.
  if (L < kMost<T> && size % kMost<T> == 0)
    return multiply<T, kMost<T>>(a, a_row, a_column, b, b_step, rows, inner, size, out, out_step);
  constexpr int COLUMNS = kTileColumns;
  int64_t p = 0;
  for (; p + COLUMNS * L <= size; p += COLUMNS * L)
    multiply_columns<T, L, COLUMNS>(a, a_row, a_column, b + p, b_step, rows, inner, out + p, out_step);
  for (; p < size; p += L) multiply_columns<T, L, 1>(a, a_row, a_column, b + p, b_step, rows, inner, out + p, out_step);
}

// On its own: where it is inlined, the registers do not suffice for the addresses of the rows.
template <typename T, int L, int ROWS, int COLUMNS>
__attribute__((noinline)) void outer_tile(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t size, T* out,
                                          int64_t out_row) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = typename Vector<T, L>::type{};
  for (int64_t p = 0; p < size; p += L) {
    typename Vector<T, L>::type columns[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) columns[c] = load<T, L>(b + c * b_step + p);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto row = load<T, L>(a + r * a_step + p);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += row * columns[c];
    }
  }
  T all[ROWS * COLUMNS + L];
  Sums<T, L>::template write<ROWS * COLUMNS>(&sums[0][0], all);
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) out[r * out_row + c] += all[r * COLUMNS + c];
}

template <typename T, int L, int ROWS>
void outer_rows(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t columns, int64_t size, T* out) {
  constexpr int COLUMNS = kTileColumns;
  int64_t c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS)
    outer_tile<T, L, ROWS, COLUMNS>(a, a_step, b + c * b_step, b_step, size, out + c, columns);
  for (; c < columns; ++c) outer_tile<T, L, ROWS, 1>(a, a_step, b + c * b_step, b_step, size, out + c, columns);
}

// out [rows, columns] += a [rows, size] b [columns, size]^T; size is a multiple of L.
template <typename T, int L>
void add_outer(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t rows, int64_t columns, int64_t size, T* out) {
  if (L < kMost<T> && size % kMost<T> == 0)
    return add_outer<T, kMost<T>>(a, a_step, b, b_step, rows, columns, size, out);
  in_tiles(rows, [&](int64_t r, auto count) {
    outer_rows<T, L, decltype(count)::value>(a + r * a_step, a_step, b, b_step, columns, size, out + r * columns);
  });
}

// A separable convolution of the C channels of one image for one edge: depthwise [C, K, K], then pointwise [C, C].
template <typename T, int L, int K>
struct Separable {
  const Geometry& g;
  Taps<K> taps;
  int64_t channels;

  Separable(const Geometry& g, int64_t dilation, int64_t channels) : g(g), taps(g, dilation), channels(channels) {}

  // inner [C planes, g.step apart]: the depthwise results of the padded planes.
  void depthwise(const T* padded, const T* weight, T* inner) const {
    for (int64_t c = 0; c < channels; ++c)
      correlate<T, L, K, false>(g, padded + c * g.plane, taps, weight + c * K * K, inner + c * g.step);
  }

  // out [C planes, g.size apart]
  void forward(const T* padded, const T* weight, const T* pointwise, T* inner, T* out) const {
    depthwise(padded, weight, inner);
    multiply<T, L>(pointwise, channels, 1, inner, g.step, channels, channels, g.size, out, g.size);
  }

  // gradient: of the output, [C planes, g.step apart], 0 in the columns behind out_w. Adds the gradients of the weights
  // (unless these are null) and that of the padded input, which with stride 1 is [C planes, g.step apart] without
  // padding and else laid out like the padded planes. turned: the depthwise kernels turned round; inner,
  // inner_gradient: room for C planes g.step apart; bordered: a padded plane with a border of 0.
  void backward(const T* padded, const T* weight, const T* turned, const T* pointwise, const T* gradient, T* inner,
                T* inner_gradient, T* bordered, T* weight_gradient, T* pointwise_gradient, T* in_gradient) const {
    if (weight_gradient) {
      depthwise(padded, weight, inner);
      add_outer<T, L>(gradient, g.step, inner, g.step, channels, channels, g.size, pointwise_gradient);
    }
    multiply<T, L>(pointwise, 1, channels, gradient, g.step, channels, channels, g.size, inner_gradient, g.step);
    for (int64_t c = 0; c < channels; ++c) {
      const T* one = inner_gradient + c * g.step;
      if (weight_gradient)
        correlate_weights<T, L, K>(g, padded + c * g.plane, taps, one, weight_gradient + c * K * K);
      if (g.stride == 1) {
        for (int64_t r = 0; r < g.out_h; ++r)
          std::memcpy(bordered + (r + g.padding) * g.row + g.padding, one + r * g.out_row, g.out_w * sizeof(T));
        correlate<T, L, K, true>(g, bordered, taps, turned + c * K * K, in_gradient + c * g.step);
      } else {
        spread<T, L, K>(g, one, taps, weight + c * K * K, in_gradient + c * g.plane);
      }
    }
  }
};

// Pools, 3 x 3 with padding 1, of planes [h, w] -> [out_h, out_row]. A plane is laid out with a border that decides
// nothing: -infinity for the maximum; the mean takes its places by number.
template <typename T>
class Pools {
 public:
  explicit Pools(const Geometry& g) : g_(g), inverse_counts_(g.size, 0) {
    for (int64_t i = 0; i < g.out_h; ++i)
      for (int64_t j = 0; j < g.out_w; ++j)
        inverse_counts_[i * g.out_row + j] = T(1) / (inside(i, g.h) * inside(j, g.w));
  }

  // Numbers of a plane with its border, and what vectors read behind its end.
  int64_t room() const { return (g_.h + 2) * row() + 16; }

  // bordered: room for the plane with its border.
  void max(const T* x, T* bordered, T* to) const {
    g_.stride == 1 ? max_with<1>(x, bordered, to) : max_with<2>(x, bordered, to);
  }
  void mean(const T* x, T* bordered, T* to) const {
    g_.stride == 1 ? mean_with<1>(x, bordered, to) : mean_with<2>(x, bordered, to);
  }

  // Both add to the bordered plane `gradient` what the gradient d [out_h, out_row] of a pool is in front of it. Of equal
  // maxima the first gets it, as in Paddle; top: the maxima, open: room for a row.
  void max_back(const T* x, const T* top, const T* d, T* bordered, T* open, T* gradient) const {
    g_.stride == 1 ? max_back_with<1>(x, top, d, bordered, open, gradient)
                   : max_back_with<2>(x, top, d, bordered, open, gradient);
  }
  // share: room for a row.
  void mean_back(const T* d, T* share, T* gradient) const {
    g_.stride == 1 ? mean_back_with<1>(d, share, gradient) : mean_back_with<2>(d, share, gradient);
  }
  // to [h, w] += what is inside of the border.
  void add_inside(const T* bordered, T* to) const {
    for (int64_t i = 0; i < g_.h; ++i)
#pragma omp simd
      for (int64_t j = 0; j < g_.w; ++j) to[i * g_.w + j] += bordered[(i + 1) * row() + j + 1];
  }

 private:
  // How many of the 3 places of a window around place i * stride are inside.
  int64_t inside(int64_t i, int64_t size) const {
    return std::min(i * g_.stride + 1, size - 1) - std::max<int64_t>(i * g_.stride - 1, 0) + 1;
  }
  int64_t row() const { return g_.w + 2; }
  void border(const T* x, T value, T* to) const {
    std::fill(to, to + row() * (g_.h + 2), value);
    for (int64_t i = 0; i < g_.h; ++i) std::memcpy(to + (i + 1) * row() + 1, x + i * g_.w, g_.w * sizeof(T));
  }
  template <int S>
  void max_with(const T* x, T* bordered, T* to) const {
    border(x, -std::numeric_limits<T>::infinity(), bordered);
    for (int64_t i = 0; i < g_.out_h; ++i, to += g_.out_row) {
      std::fill(to, to + g_.out_row, -std::numeric_limits<T>::infinity());
      for (int k = 0; k < 9; ++k) {
        const T* from = bordered + (i * S + k / 3) * row() + k % 3;
#pragma omp simd
        for (int64_t j = 0; j < g_.out_w; ++j) {
          const T value = from[j * S];
          to[j] = value > to[j] || value != value ? value : to[j];            // a NaN is passed on
        }
      }
      std::fill(to + g_.out_w, to + g_.out_row, T(0));
    }
  }
  template <int S>
  void mean_with(const T* x, T* bordered, T* to) const {
    border(x, T(0), bordered);
    const T* inverse = inverse_counts_.data();
    for (int64_t i = 0; i < g_.out_h; ++i, to += g_.out_row, inverse += g_.out_row) {
      std::fill(to, to + g_.out_row, T(0));
      for (int k = 0; k < 9; ++k) {
        const T* from = bordered + (i * S + k / 3) * row() + k % 3;
#pragma omp simd
        for (int64_t j = 0; j < g_.out_w; ++j) to[j] += from[j * S];
      }
#pragma omp simd
      for (int64_t j = 0; j < g_.out_w; ++j) to[j] *= inverse[j];
    }
  }
  template <int S>
  void max_back_with(const T* x, const T* top, const T* d, T* bordered, T* open, T* gradient) const {
    border(x, -std::numeric_limits<T>::infinity(), bordered);
    for (int64_t i = 0; i < g_.out_h; ++i, top += g_.out_row, d += g_.out_row) {
      std::fill(open, open + g_.out_w, T(1));
      for (int k = 0; k < 9; ++k) {
        const T* from = bordered + (i * S + k / 3) * row() + k % 3;
        T* at = gradient + (i * S + k / 3) * row() + k % 3;
#pragma omp simd
        for (int64_t j = 0; j < g_.out_w; ++j) {
          const T hit = from[j * S] == top[j] ? open[j] : T(0);
          at[j * S] += hit * d[j];
          open[j] -= hit;
        }
      }
    }
  }
  template <int S>
  void mean_back_with(const T* d, T* share, T* gradient) const {
    const T* inverse = inverse_counts_.data();
    for (int64_t i = 0; i < g_.out_h; ++i, d += g_.out_row, inverse += g_.out_row) {
#pragma omp simd
      for (int64_t j = 0; j < g_.out_w; ++j) share[j] = d[j] * inverse[j];
      for (int k = 0; k < 9; ++k) {
        T* at = gradient + (i * S + k / 3) * row() + k % 3;
#pragma omp simd
        for (int64_t j = 0; j < g_.out_w; ++j) at[j * S] += share[j];
      }
    }
  }

  const Geometry g_;
  std::vector<T> inverse_counts_;
};

// Mean and sum of squared deviations of the numbers of a plane.
template <typename T>
void take_moments(const Geometry& g, const T* plane, double* moments) {
  T total = 0, squares = 0;
  for (int64_t i = 0; i < g.rows(); ++i)
#pragma omp simd reduction(+ : total)
    for (int64_t j = 0; j < g.columns(); ++j) total += plane[i * g.out_row + j];
  const T mean = total / (g.out_h * g.out_w);
  for (int64_t i = 0; i < g.rows(); ++i)
#pragma omp simd reduction(+ : squares)
    for (int64_t j = 0; j < g.columns(); ++j) {
      const T deviation = plane[i * g.out_row + j] - mean;
      squares += deviation * deviation;
    }
  moments[0] = mean, moments[1] = squares;
}

// The moments of n planes of `size` numbers, `step` apart -> those of all of them, as mean and variance.
inline void combine_moments(const double* moments, int64_t n, int64_t step, double size, double* mean, double* variance) {
  double squares = 0;
  *mean = 0;
  for (int64_t k = 0; k < n; ++k) *mean += moments[k * step] / n;
  for (int64_t k = 0; k < n; ++k) {
    const double deviation = moments[k * step] - *mean;
    squares += moments[k * step + 1] + size * deviation * deviation;
  }
  *variance = squares / (size * n);
}

// to = factor (d - d_mean - (y - mean) slope): back through a normalisation. With d the gradient behind it, d_mean its
// mean, slope = rstd^2 times the mean of d (y - mean), and factor the scale times rstd.
template <typename T>
void differentiate(const Geometry& g, const T* d, const T* y, T factor, T d_mean, T mean, T slope, T* to) {
  for (int64_t i = 0; i < g.rows(); ++i)
#pragma omp simd
    for (int64_t j = 0; j < g.columns(); ++j) {
      const int64_t p = i * g.out_row + j;
      to[p] = factor * (d[p] - d_mean - (y[p] - mean) * slope);
    }
}

// relu(factor (y - mean) + shift), padded: what comes into the second half of a separable convolution.
template <typename T>
void normalise(const Geometry& g, const T* y, int64_t y_row, T factor, T mean, T shift, T* padded) {
  for (int64_t i = 0; i < g.h; ++i) {
    const T* from = y + i * y_row;
    fill_row(g, padded, i, [=](int64_t j) {
      const T value = factor * (from[j] - mean) + shift;
      return value < 0 ? T(0) : value;
    });
  }
}

// The sums of d and of d (y - mean); d is 0 in the columns behind the end.
template <typename T>
void add_up(const Geometry& g, const T* d, const T* y, T mean, double* sums) {
  T total = 0, dot = 0;
#pragma omp simd reduction(+ : total, dot)
  for (int64_t p = 0; p < g.size; ++p) total += d[p], dot += d[p] * (y[p] - mean);
  sums[0] = total, sums[1] = dot;
}

// A gradient in front of a ReLU. By value: the compiler would not vectorise a conditional read.
template <typename T>
inline T passed(T value, T gradient) {
  return value > 0 ? gradient : T(0);
}

// to = the gradient d in front of relu(factor (y - mean) + shift), 0 in the columns behind the end; and the sums of `to`
// and of to (y - mean). Written with vectors: the compiler makes a branch of it.
template <typename T, int L>
void through_normalised_relu(const Geometry& g, const T* y, T factor, T mean, T shift, const T* d, T* to, double* sums) {
  typename Vector<T, L>::type total{}, dot{}, nothing{};
  for (int64_t p = 0; p < g.size; p += L) {
    const auto centred = load<T, L>(y + p) - mean;
    const auto one = factor * centred + shift > nothing ? load<T, L>(d + p) : nothing;
    store<T, L>(to + p, one);
    if (g.out_row == g.out_w) total += one, dot += one * centred;
  }
  sums[0] = sum<T, L>(total), sums[1] = sum<T, L>(dot);
  if (g.out_row == g.out_w) return;
  for (int64_t i = 0; i < g.out_h; ++i) std::fill(to + i * g.out_row + g.out_w, to + (i + 1) * g.out_row, T(0));
  add_up(g, to, y, mean, sums);
}

// to [h, w] = (or +=, if add) the gradient of x behind the ReLU: `gradient` is laid out like an output plane (stride 1)
// or padded.
template <typename T>
void through_relu(const Geometry& g, const T* x, const T* gradient, bool add, T* to) {
  for (int64_t i = 0; i < g.h; ++i, x += g.w, to += g.w) {
    const T* from = g.stride == 1 ? gradient + i * g.out_row : gradient + (i + g.padding) * g.row;
    if (g.stride > 1)
      for (int64_t j = 0; j < g.w; ++j) to[j] = (add ? to[j] : T(0)) + passed(x[j], from[g.at(0, j + g.padding)]);
    else if (add)
#pragma omp simd
      for (int64_t j = 0; j < g.w; ++j) to[j] += passed(x[j], from[j]);
    else
#pragma omp simd
      for (int64_t j = 0; j < g.w; ++j) to[j] = passed(x[j], from[j]);
  }
}

// The gradients of weights: each thread sums them over its images, and the sums are added in order, so that a run repeats
// itself.
template <typename T>
class PartialSums {
 public:
  PartialSums() : each_(threads()) {}
  // The sums of the thread that calls: `size` zeros.
  T* own(int64_t size) {
    auto& sums = each_[omp_get_thread_num()];
    sums.assign(size, 0);
    return sums.data();
  }
  // to += those of all threads, from number `first` on.
  void add_to(T* to, int64_t first, int64_t size) const {
    for (const auto& sums : each_) {
      if (sums.empty()) continue;                  // fewer threads came than were asked for
      for (int64_t k = 0; k < size; ++k) to[k] += sums[first + k];
    }
  }

 private:
  std::vector<std::vector<T>> each_;
};

// [n, K, K] -> every kernel turned round, with which the gradient of a correlation is one.
template <typename T>
std::vector<T> turn_round(const T* kernels, int64_t n, int64_t taps) {
  std::vector<T> turned(kernels, kernels + n * taps);
  for (int64_t k = 0; k < n; ++k) std::reverse(turned.begin() + k * taps, turned.begin() + (k + 1) * taps);
  return turned;
}

// The width of the vectors that suits rows of out_w numbers.
template <typename T>
int lanes_for(int64_t out_w) {
  int lanes = kMost<T>;
  while (lanes > 4 && out_w <= lanes / 2) lanes /= 2;
  return lanes;
}

// Calls f(std::integral_constant<int, L>) with the width of the vectors for rows of out_w numbers.
template <typename T, typename F>
void with_lanes(int64_t out_w, F f) {
  switch (lanes_for<T>(out_w)) {
    // In single precision on AVX-512; elsewhere it never comes, and only has to compile.
    case 16: f(std::integral_constant<int, kMost<T>>()); break;
    case 8: f(std::integral_constant<int, 8>()); break;
    default: f(std::integral_constant<int, 4>());
  }
}

}  // namespace
