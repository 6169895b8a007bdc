// Kernels that both operators of this folder use: convolutions, products, pools and normalisations of image planes.
// cells.h has what they share about cells.
// README.md in this folder explains the memory layout and the order of the loops.
#pragma once

#include <omp.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <utility>
#include <vector>

#include "paddle/phi/api/all.h"    // paddle/extension.h would take 6 s more per source, for interfaces to Python

// The number of threads that share the images of a batch. __init__.py sets it; 0 means the default of OpenMP. No result
// depends on it.
extern "C" int darts_threads;

// What threads spend their time on. scripts/bench compiles the library with -DDARTS_PROFILE to measure it.
enum class Phase { kPad, kDepthwise, kPointwise, kNormalisation, kPools, kSums, kWaiting, kOther };
#ifdef DARTS_PROFILE
extern "C" double darts_phase_seconds[16];       // by phase, of all threads together
extern "C" const char* darts_phase_names[16];    // null at the end
#endif

namespace {

using paddle::Tensor;

// The time until its end counts for a phase, except that of a Timed object that begins later.
class Timed {
#ifdef DARTS_PROFILE
 public:
  explicit Timed(Phase phase) : phase_(phase), outer_(innermost()), began_(now()) {
    if (outer_) outer_->count(began_);
    innermost() = this;
  }
  ~Timed() {
    count(now());
    innermost() = outer_;
    if (outer_) outer_->began_ = began_;
  }
  Timed(const Timed&) = delete;

 private:
  static Timed*& innermost() {
    static thread_local Timed* innermost = nullptr;
    return innermost;
  }
  static double now() {
    return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
  }
  void count(double time) {
#pragma omp atomic
    darts_phase_seconds[int(phase_)] += time - began_;
    began_ = time;
  }

  const Phase phase_;
  Timed* const outer_;
  double began_;
#else
 public:
  explicit Timed(Phase) {}
#endif
};

// Bytes per vector register and number of vector registers of the processor.
#ifdef __AVX512F__
constexpr int kVectorBytes = 64, kRegisters = 32;
#else
constexpr int kVectorBytes = 32, kRegisters = 16;
#endif
template <typename T>
constexpr int kMaxLanes = kVectorBytes / sizeof(T);    // numbers in the widest vector
// Columns, in vectors, of a tile of a product. A tile needs registers for 6 rows of sums, for one vector of the right
// factor per column and for two temporaries.
constexpr int kTileColumns = kRegisters / 8;

// L numbers in a vector. The compiler maps them to the vector registers of the machine.
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

// Returns a vector of equal numbers. Subtracting 0 changes no number, so the compiler omits it.
template <typename T, int L>
inline typename Vector<T, L>::type broadcast(T number) {
  return number - typename Vector<T, L>::type{};
}

// Returns v, in a register. The compiler would otherwise load a vector from memory again wherever it is used, and loads
// across two cache lines are what limits the loops below.
template <typename V>
inline V in_register(V v) {
#ifdef __AVX__
  asm("" : "+v"(v));
#endif
  return v;
}

// Returns the sum of the numbers in a vector, by adding halves.
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

// Sums of vectors. There are four, so that no addition waits for the one before.
template <typename T, int L>
struct FourSums {
  typename Vector<T, L>::type sums[4] = {};

  // Adds f(0), f(L), ... of the complete vectors among `size` numbers; f(p): the vector at index p. Returns the next p.
  template <typename F>
  int64_t add(int64_t size, F f) {
    int64_t p = 0;
    for (; p + 4 * L <= size; p += 4 * L)
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) sums[k] += f(p + k * L);
    for (; p + L <= size; p += L) sums[0] += f(p);
    return p;
  }
  T total() const { return sum<T, L>(sums[0] + sums[1] + (sums[2] + sums[3])); }
};

// Returns the sum of the vectors f(0), f(L), ... over `size` numbers, a multiple of L.
template <typename T, int L, typename F>
inline T sum_vectors(int64_t size, F f) {
  FourSums<T, L> sums;
  sums.add(size, f);
  return sums.total();
}

inline int threads() { return darts_threads > 0 ? darts_threads : omp_get_max_threads(); }

// Returns the numbers of a, then of b, with the indices Source::at(0), Source::at(1) ... They are constants: shuffles by
// variable indices are several times slower.
template <typename T, int L, typename Source, size_t... I>
inline typename Vector<T, L>::type shuffle(typename Vector<T, L>::type a, typename Vector<T, L>::type b,
                                           std::index_sequence<I...>) {
#ifdef __clang__
  return __builtin_shufflevector(a, b, Source::at(I)...);
#else
  typedef typename std::conditional<sizeof(T) == 4, int32_t, int64_t>::type Index;
  typedef typename Vector<Index, L>::type Indices;
  return __builtin_shuffle(a, b, Indices{Index(Source::at(I))...});
#endif
}
template <typename T, int L, typename Source>
inline typename Vector<T, L>::type shuffle(typename Vector<T, L>::type a, typename Vector<T, L>::type b) {
  return shuffle<T, L, Source>(a, b, std::make_index_sequence<L>());
}

// Indices for `shuffle`. Columns with an even (parity 0) or odd number of a row a, b.
template <int PARITY>
struct EverySecond {
  static constexpr int at(int i) { return 2 * i + PARITY; }
};
// The first (half 0) or second half of the row a[0], b[0], a[1], b[1] ...
template <int L, int HALF>
struct Alternating {
  static constexpr int at(int i) { return i % 2 * L + i / 2 + HALF * (L / 2); }
};
// The first (half 0) or second half of every run of 2 RUN numbers, of a and b alternately.
template <int L, int RUN, int HALF>
struct Runs {
  static constexpr int at(int i) { return i / RUN % 2 * L + i / (2 * RUN) * 2 * RUN + i % RUN + HALF * RUN; }
};

// Reduces L vectors to one vector of their L sums. Each of log2 L steps adds pairs of vectors, and halves the length of
// the runs of numbers that still have to be added.
template <typename T, int L>
struct Sums {
  typedef typename Vector<T, L>::type V;

  // Writes the sum of the numbers of each vector to `to` [COUNT], which needs memory for COUNT rounded up to L.
  template <int COUNT>
  static void write(const V* vectors, T* to) {
#pragma GCC unroll 32
    for (int k = 0; k < COUNT; k += L) {
      V block[L];
#pragma GCC unroll 32
      for (int i = 0; i < L; ++i) block[i] = k + i < COUNT ? vectors[k + i] : V{};
      store<T, L>(to + k, reduce<L>(block));
    }
  }

 private:
  // v: COUNT vectors with the partial sums of L / COUNT vectors each.
  template <int COUNT>
  static V reduce(const V* v) {
    if constexpr (COUNT == 1) {
      return v[0];
    } else {
      V halves[COUNT / 2];
#pragma GCC unroll 8
      for (int i = 0; i < COUNT / 2; ++i)
        halves[i] = shuffle<T, L, Runs<L, L / COUNT, 0>>(v[2 * i], v[2 * i + 1]) +
                    shuffle<T, L, Runs<L, L / COUNT, 1>>(v[2 * i], v[2 * i + 1]);
      return reduce<COUNT / 2>(halves);
    }
  }
};

constexpr int64_t kCacheLine = 64;               // bytes

// Rounds a count of numbers up to complete cache lines.
template <typename T>
inline int64_t round_up_to_lines(int64_t size) {
  const int64_t line = kCacheLine / sizeof(T);
  return (size + line - 1) / line * line;
}

// Memory aligned to a cache line, since unaligned vectors would often lie across two lines. It is kept between calls:
// page faults of new memory cost more than the computation in it.
template <typename T>
class Storage {
 public:
  // Returns memory for `size` numbers; the previous contents are lost.
  T* reserve(int64_t size) {
    if (size > size_) {
      numbers_.reset();
      numbers_.reset(new T[size + kCacheLine / sizeof(T)]);
      size_ = size;
    }
    const auto at = reinterpret_cast<uintptr_t>(numbers_.get());
    return numbers_.get() + (kCacheLine - at % kCacheLine) % kCacheLine / sizeof(T);
  }

 private:
  std::unique_ptr<T[]> numbers_;
  int64_t size_ = 0;
};

// Scratch memory of one thread. `take` and `zeros` return consecutive blocks, each at the start of a cache line.
template <typename T>
class Scratch {
 public:
  // size: the sum of the sizes of all blocks, which are at most 32.
  explicit Scratch(int64_t size) {
    static thread_local Storage<T> storage;
    next_ = storage.reserve(size + 32 * kCacheLine / sizeof(T));
  }
#ifdef __SANITIZE_ADDRESS__
  // An allocation of its own, so that the sanitizer sees where the block ends, of NaN, so that its use without a value
  // changes a result.
  T* take(int64_t size) {
    blocks_.emplace_back(new T[size]);
    std::fill_n(blocks_.back().get(), size, std::numeric_limits<T>::quiet_NaN());
    return blocks_.back().get();
  }
#else
  T* take(int64_t size) {
    T* start = next_;
    next_ += round_up_to_lines<T>(size);
    return start;
  }
#endif
  T* zeros(int64_t size) {
    T* start = take(size);
    std::fill(start, start + size, T(0));
    return start;
  }

 private:
  T* next_;
#ifdef __SANITIZE_ADDRESS__
  std::vector<std::unique_ptr<T[]>> blocks_;
#endif
};

// Returns the distance between planes of `size` numbers, an odd number of cache lines. Planes at a distance of a power
// of two would compete for the same few sets of the cache.
template <typename T>
inline int64_t plane_step(int64_t size) {
  const int64_t line = kCacheLine / sizeof(T);
  return (round_up_to_lines<T>(size) / line | 1) * line;
}

// The layout of a plane [h, w] with a border of `padding` in scratch memory: [h + 2 padding, stride, phase], with
// column c at [c % stride, c / stride]. So the columns that one tap of a kernel reads along a row are contiguous for
// every stride. The result of a convolution is a plane [out_h, out_row] with rows rounded up to a multiple of L, the
// length of a vector.
struct Geometry {
  int64_t h, w, stride, padding, out_h, out_w, out_row;
  int64_t phase, row, plane;             // numbers per phase and per padded row; distance between padded planes
  int64_t size, step;                    // numbers per output plane; distance between output planes

  template <typename T>
  static Geometry of(int64_t h, int64_t w, int64_t stride, int64_t padding, int64_t lanes) {
    Geometry g;
    g.h = h, g.w = w, g.stride = stride, g.padding = padding;
    g.out_h = (h - 1) / stride + 1, g.out_w = (w - 1) / stride + 1;
    g.out_row = (g.out_w + lanes - 1) / lanes * lanes;
    g.phase = std::max(g.out_row + 2 * padding / stride + 1, (w + 2 * padding + stride - 1) / stride);
    g.row = stride * g.phase;
    g.plane = plane_step<T>(g.row * (h + 2 * padding));
    g.size = g.out_h * g.out_row;
    g.step = plane_step<T>(g.size);
    return g;
  }
  // Returns the index of row r, column c of a padded plane.
  int64_t at(int64_t r, int64_t c) const {
    return stride == 1 ? r * row + c : r * row + c % stride * phase + c / stride;
  }
  // Rows and columns of an output plane. A plane without rounded-up rows counts as one long row.
  int64_t rows() const { return out_row == out_w ? 1 : out_h; }
  int64_t columns() const { return out_row == out_w ? size : out_w; }
};

// Where a dilated K x K kernel reads a padded plane. The output rows form `chains`: chain p has the rows p, p + chains,
// p + 2 chains ... Row q of a chain and tap row i read the chain's input row q * ratio + i, so that neighbouring rows of a
// chain share input rows. The centre of a kernel with an even K is the place before its middle.
template <int K>
struct Taps {
  int64_t columns[K];            // offsets of tap row 0, relative to the place of the output's row and column
  int64_t row, output_row;       // distances between input rows: of a chain, and of neighbouring output rows
  int64_t chains, ratio;
  int64_t result_row;            // distance between output rows
  Taps(const Geometry& g, int64_t dilation) {
    const int64_t first = g.padding - dilation * ((K - 1) / 2);
    for (int j = 0; j < K; ++j) columns[j] = g.at(first, first + j * dilation);
    chains = dilation % g.stride == 0 ? dilation / g.stride : dilation;
    ratio = g.stride * chains / dilation;
    row = dilation * g.row;
    output_row = g.stride * g.row;
    result_row = g.out_row;
  }
};

// Copies a row of `size` numbers, a multiple of L. A call of memcpy would take longer than the copy of a short row.
template <typename T, int L>
inline void copy_row(const T* from, int64_t size, T* to) {
  for (int64_t p = 0; p < size; p += L) store<T, L>(to + p, load<T, L>(from + p));
}

// Writes f(number) of all numbers of a row to row i of a padded plane; f takes a number or a vector.
template <typename T, int L, typename F>
inline void fill_row(const Geometry& g, const T* from, T* padded, int64_t i, F f) {
  T* row = padded + (i + g.padding) * g.row;
  T *even = row + g.at(0, g.padding), *odd = row + g.at(0, g.padding + 1);
  int64_t j = 0;
  if (g.stride == 1) {
    for (; j + L <= g.w; j += L) store<T, L>(even + j, f(load<T, L>(from + j)));
#pragma omp simd
    for (int64_t k = j; k < g.w; ++k) even[k] = f(from[k]);
    return;
  }
  for (; j + 2 * L <= g.w; j += 2 * L) {
    const auto left = load<T, L>(from + j), right = load<T, L>(from + j + L);
    store<T, L>(even + j / 2, f(shuffle<T, L, EverySecond<0>>(left, right)));
    store<T, L>(odd + j / 2, f(shuffle<T, L, EverySecond<1>>(left, right)));
  }
  for (; j < g.w; ++j) row[g.at(0, j + g.padding)] = f(from[j]);
}

// Returns relu(v) of a number or a vector; keeps a NaN.
template <typename V>
inline V rectify(V v) {
  return v < V{} ? V{} : v;
}

// Writes relu(x), x [h, w], to the inside of a padded plane. The border has to be 0 already.
template <typename T, int L>
void pad(const Geometry& g, const T* x, T* padded) {
  for (int64_t i = 0; i < g.h; ++i)
    fill_row<T, L>(g, x + i * g.w, padded, i, [](auto v) { return rectify(v); });
}

// Computes ROWS x COLUMNS vectors of the correlation of a padded plane with a kernel, of consecutive rows of a chain;
// ADD: adds them to `out`. Each vector of the input is loaded once per column of the kernel and serves up to K rows.
template <typename T, int L, int K, int RATIO, bool ADD, int ROWS, int COLUMNS>
inline void correlate_tile(const T* in, const Taps<K>& taps, const T* weight, T* out, int64_t out_row) {
  typedef typename Vector<T, L>::type V;
  V sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = ADD ? load<T, L>(out + r * out_row + c * L) : V{};
  for (int j = 0; j < K; ++j) {
    const T* from = in + taps.columns[j];
    V weights[K];
#pragma GCC unroll 8
    for (int i = 0; i < K; ++i) weights[i] = broadcast<T, L>(weight[i * K + j]);
#pragma GCC unroll 32
    for (int i = 0; i < RATIO * (ROWS - 1) + K; ++i, from += taps.row)
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) {
        const V numbers = in_register(load<T, L>(from + c * L));
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r)
          if (i >= RATIO * r && i < RATIO * r + K) sums[r][c] += weights[i - RATIO * r] * numbers;
      }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) store<T, L>(out + r * out_row + c * L, sums[r][c]);
}

// Computes tiles of ROWS rows from row q of a chain on, while there are as many; returns the next row.
template <typename T, int L, int K, int RATIO, bool ADD, int ROWS>
inline int64_t correlate_rows(const Geometry& g, const T* in, const Taps<K>& taps, const T* weight, int64_t q,
                              int64_t count, T* out) {
  constexpr int COLUMNS = ROWS > 2 ? kRegisters / 16 : 1;
  const int64_t out_row = taps.chains * taps.result_row, in_row = taps.chains * taps.output_row;
  for (; q + ROWS <= count; q += ROWS) {
    int64_t c = 0;
    for (; c + COLUMNS * L <= g.out_row; c += COLUMNS * L)
      correlate_tile<T, L, K, RATIO, ADD, ROWS, COLUMNS>(in + q * in_row + c, taps, weight, out + q * out_row + c,
                                                         out_row);
    for (; c < g.out_row; c += L)
      correlate_tile<T, L, K, RATIO, ADD, ROWS, 1>(in + q * in_row + c, taps, weight, out + q * out_row + c, out_row);
  }
  return q;
}

// As `correlate`, for taps of this ratio; ADD: adds to `out`.
template <typename T, int L, int K, int RATIO, bool ADD>
void correlate_chains(const Geometry& g, const T* in, const Taps<K>& taps, const T* weight, T* out) {
  for (int64_t p = 0; p < taps.chains; ++p, in += taps.output_row, out += taps.result_row) {
    const int64_t count = (g.out_h - p + taps.chains - 1) / taps.chains;
    int64_t q = correlate_rows<T, L, K, RATIO, ADD, 8>(g, in, taps, weight, 0, count, out);
    q = correlate_rows<T, L, K, RATIO, ADD, 4>(g, in, taps, weight, q, count, out);
    q = correlate_rows<T, L, K, RATIO, ADD, 2>(g, in, taps, weight, q, count, out);
    correlate_rows<T, L, K, RATIO, ADD, 1>(g, in, taps, weight, q, count, out);
  }
}

// Computes out [out_h, out_row] = the correlation of a padded plane with a kernel, with stride g.stride.
template <typename T, int L, int K>
void correlate(const Geometry& g, const T* in, const Taps<K>& taps, const T* weight, T* out) {
  taps.ratio == 1 ? correlate_chains<T, L, K, 1, false>(g, in, taps, weight, out)
                  : correlate_chains<T, L, K, 2, false>(g, in, taps, weight, out);
}

// Adds to `sums` [J][K] the products of ROWS rows of the gradient of the output, in a chain, and of the input places that
// J columns of taps read. Each vector of the input serves up to K tap rows.
template <typename T, int L, int K, int RATIO, int J, int ROWS, typename V>
inline void correlate_weights_tile(const T* in, const Taps<K>& taps, int first, const T* gradient, int64_t out_row,
                                   V (&sums)[J][K]) {
  V d[ROWS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r) d[r] = in_register(load<T, L>(gradient + r * out_row));
#pragma GCC unroll 32
  for (int i = 0; i < RATIO * (ROWS - 1) + K; ++i, in += taps.row)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      const V numbers = in_register(load<T, L>(in + taps.columns[first + j]));
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
        if (i >= RATIO * r && i < RATIO * r + K) sums[j][i - RATIO * r] += d[r] * numbers;
    }
}

// Adds to weight_gradient [K, K] the correlation of a padded plane with the gradient of the output, from tap column FIRST
// on. One pass handles as many columns as there are registers for their sums.
template <typename T, int L, int K, int RATIO, int FIRST = 0>
void correlate_weights(const Geometry& g, const T* padded, const Taps<K>& taps, const T* gradient, T* weight_gradient) {
  constexpr int J = std::min(K - FIRST, (kRegisters - 6) / K), ROWS = J * K + 9 <= kRegisters ? 8 : 4;
  typedef typename Vector<T, L>::type V;
  const int64_t out_row = taps.chains * g.out_row, in_row = taps.chains * taps.output_row;
  V sums[J][K] = {};
  for (int64_t p = 0; p < taps.chains; ++p) {
    const int64_t count = (g.out_h - p + taps.chains - 1) / taps.chains;
    for (int64_t c = 0; c < g.out_row; c += L) {
      const T *from = padded + p * taps.output_row + c, *d = gradient + p * g.out_row + c;
      int64_t q = 0;
      for (; q + ROWS <= count; q += ROWS, from += ROWS * in_row, d += ROWS * out_row)
        correlate_weights_tile<T, L, K, RATIO, J, ROWS>(from, taps, FIRST, d, out_row, sums);
      for (; q < count; ++q, from += in_row, d += out_row)
        correlate_weights_tile<T, L, K, RATIO, J, 1>(from, taps, FIRST, d, out_row, sums);
    }
  }
  T totals[J * K + L];
  Sums<T, L>::template write<J * K>(&sums[0][0], totals);
  for (int j = 0; j < J; ++j)
    for (int i = 0; i < K; ++i) weight_gradient[i * K + FIRST + j] += totals[j * K + i];
  if constexpr (FIRST + J < K)
    correlate_weights<T, L, K, RATIO, FIRST + J>(g, padded, taps, gradient, weight_gradient);
}

// The gradient of the input of a correlation with stride 2 and a kernel K x K. The input places with the same parity of
// row and column form a plane of the size of the output. Their gradient is a correlation with the taps that read them:
// every second one of the rows and columns, and with a dilation of 2 either all or none.
template <typename T, int L, int K>
class CorrelateBack {
 public:
  // g: of the correlation, with a stride of 2.
  CorrelateBack(const Geometry& g, int64_t dilation)
      : g_(g), dilation_(dilation), d_(Geometry::of<T>(g.out_h, g.out_w, 1, g.padding / 2 + 1, L)), dense_(d_, 1),
        every_second_(d_, 1) {
    dense_.result_row = every_second_.result_row = 2 * g.row;
  }

  // Adds to `padded`, a gradient in the layout of the padded input, the gradient at all places inside of the border.
  // gradient: of the output [out_h, out_row], 0 in the columns from out_w on; weight, flipped [K, K]; bordered: memory for
  // a padded plane of 0, which stays 0 outside of the copy of the gradient. All convolutions of a geometry can share it.
  void add(const T* gradient, const T* weight, const T* flipped, T* bordered, T* padded) const {
    for (int64_t r = 0; r < g_.out_h; ++r)
      copy_row<T, L>(gradient + r * g_.out_row, g_.out_row, bordered + (r + d_.padding) * d_.row + d_.padding);
    if (dilation_ == 2)
      return correlate_chains<T, L, K, 1, true>(d_, bordered, dense_, flipped, padded + at(0, 0));
    T taps[2][2][HALF][HALF] = {};                 // by parity of the place's row and column
#pragma GCC unroll 64
    for (int k = 0; k < K * K; ++k) {
      const int row = K / 2 + k / K, column = K / 2 + k % K;
      taps[row % 2][column % 2][index(k / K)][index(k % K)] = weight[k];
    }
    for (int parity = 0; parity < 4; ++parity)
      correlate_chains<T, L, HALF, 1, true>(d_, bordered, every_second_, &taps[parity / 2][parity % 2][0][0],
                                            padded + at(parity / 2, parity % 2));
  }

 private:
  static constexpr int HALF = (K + 1) / 2;
  // Returns the row, in the kernel for a parity, of row k of the kernel.
  static constexpr int index(int k) { return ((k + K / 2) % 2 + K / 2 - k) / 2 + (HALF - 1) / 2; }
  int64_t at(int64_t row, int64_t column) const { return g_.at(row + g_.padding, column + g_.padding); }

  const Geometry g_;
  const int64_t dilation_;
  const Geometry d_;                               // of the gradient of the output
  Taps<K> dense_;
  Taps<HALF> every_second_;
};

// How a product reads its right factor and writes its result.
struct Plain {
  template <typename T, int L>
  static typename Vector<T, L>::type read(const T* p) { return load<T, L>(p); }
  template <typename T, int L>
  void write(T* to, typename Vector<T, L>::type v) const { store<T, L>(to, v); }
};
// Writes results that are not in the cache, and prefetches the next line of each row.
struct ToMemory : Plain {
  template <typename T, int L>
  void write(T* to, typename Vector<T, L>::type v) const {
    __builtin_prefetch(to + kCacheLine / sizeof(T), 1);
    store<T, L>(to, v);
  }
};
// Reads through a ReLU, which keeps a NaN.
struct Rectified : ToMemory {
  template <typename T, int L>
  static typename Vector<T, L>::type read(const T* p) {
    return rectify(load<T, L>(p));
  }
};
// The result is the gradient of relu(x): writes (with add: adds) that of x. x and the result have the same layout. The
// next lines are prefetched as in `ToMemory`.
template <typename T>
struct ThroughRelu : Plain {
  const T *x, *result;
  bool add;
  ThroughRelu(const T* x, const T* result, bool add) : x(x), result(result), add(add) {}
  template <typename, int L>
  void write(T* to, typename Vector<T, L>::type v) const {
    const typename Vector<T, L>::type zero{};
    const T* from = x + (to - result);
    __builtin_prefetch(from + kCacheLine / sizeof(T));
    __builtin_prefetch(to + kCacheLine / sizeof(T), 1);
    v = load<T, L>(from) > zero ? v : zero;
    store<T, L>(to, add ? load<T, L>(to) + v : v);
  }
};

// Computes ROWS x COLUMNS vectors of out = a b. a [rows, inner]: a_row and a_column are the distances between its rows
// and columns; b [inner, size].
template <typename T, int L, int ROWS, int COLUMNS, typename Access>
inline void multiply_tile(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t inner,
                          T* out, int64_t out_step, const Access& access) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = typename Vector<T, L>::type{};
  for (int64_t k = 0; k < inner; ++k) {
    typename Vector<T, L>::type columns[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) columns[c] = in_register(Access::template read<T, L>(b + k * b_step + c * L));
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
    for (int c = 0; c < COLUMNS; ++c) access.template write<T, L>(out + r * out_step + c * L, sums[r][c]);
}

// Calls f(r, std::integral_constant<int, ROWS>) for tiles of ROWS rows from row r on, which cover all rows.
template <typename F>
inline void for_tiles(int64_t rows, F f) {
  for (int64_t r = 0; r < rows;) {
    const int64_t left = rows - r;
    if (left >= 6 && left != 8)                    // 8 = 4 + 4 is faster than 6 + 1 + 1
      f(r, std::integral_constant<int, 6>()), r += 6;
    else if (left >= 4)
      f(r, std::integral_constant<int, 4>()), r += 4;
    else
      f(r, std::integral_constant<int, 1>()), r += 1;
  }
}

template <typename T, int L, int COLUMNS, typename Access>
void multiply_columns(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t rows,
                      int64_t inner, T* out, int64_t out_step, const Access& access) {
  for_tiles(rows, [&](int64_t r, auto count) {
    multiply_tile<T, L, decltype(count)::value, COLUMNS>(a + r * a_row, a_row, a_column, b, b_step, inner,
                                                         out + r * out_step, out_step, access);
  });
}

// Computes out [rows, size] = a [rows, inner] b [inner, size]. size is a multiple of L; *_step: distance between rows.
// A few columns of b stay in the cache while they are multiplied by all rows of a.
template <typename T, int L, typename Access = Plain>
void multiply(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t b_step, int64_t rows, int64_t inner,
              int64_t size, T* out, int64_t out_step, const Access& access = Access()) {
  // A row of a plane of 8 x 8 is shorter than the widest vector, but the plane as one row of 64 numbers is not.
  if (L < kMaxLanes<T> && size % kMaxLanes<T> == 0)
    return multiply<T, kMaxLanes<T>>(a, a_row, a_column, b, b_step, rows, inner, size, out, out_step, access);
  constexpr int COLUMNS = kTileColumns;
  int64_t p = 0;
  for (; p + COLUMNS * L <= size; p += COLUMNS * L)
    multiply_columns<T, L, COLUMNS>(a, a_row, a_column, b + p, b_step, rows, inner, out + p, out_step, access);
  for (; p < size; p += L)
    multiply_columns<T, L, 1>(a, a_row, a_column, b + p, b_step, rows, inner, out + p, out_step, access);
}

// Adds to ROWS x COLUMNS numbers of `out` the products of rows of a and rows of b. Not inlined: in a larger function
// there are not enough registers for the addresses of the rows.
template <typename T, int L, int ROWS, int COLUMNS, typename Access>
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
    for (int c = 0; c < COLUMNS; ++c) columns[c] = in_register(Access::template read<T, L>(b + c * b_step + p));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto row = in_register(load<T, L>(a + r * a_step + p));
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += row * columns[c];
    }
  }
  T totals[ROWS * COLUMNS + L];
  Sums<T, L>::template write<ROWS * COLUMNS>(&sums[0][0], totals);
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) out[r * out_row + c] += totals[r * COLUMNS + c];
}

template <typename T, int L, int ROWS, typename Access>
void outer_rows(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t columns, int64_t size, T* out) {
  constexpr int COLUMNS = kTileColumns;
  int64_t c = 0;
  for (; c + COLUMNS <= columns; c += COLUMNS)
    outer_tile<T, L, ROWS, COLUMNS, Access>(a, a_step, b + c * b_step, b_step, size, out + c, columns);
  for (; c < columns; ++c) outer_tile<T, L, ROWS, 1, Access>(a, a_step, b + c * b_step, b_step, size, out + c, columns);
}

// Computes out [rows, columns] += a [rows, size] b [columns, size]^T. size is a multiple of L.
template <typename T, int L, typename Access = Plain>
void add_outer(const T* a, int64_t a_step, const T* b, int64_t b_step, int64_t rows, int64_t columns, int64_t size,
               T* out) {
  if (L < kMaxLanes<T> && size % kMaxLanes<T> == 0)
    return add_outer<T, kMaxLanes<T>, Access>(a, a_step, b, b_step, rows, columns, size, out);
  for_tiles(rows, [&](int64_t r, auto count) {
    outer_rows<T, L, decltype(count)::value, Access>(a + r * a_step, a_step, b, b_step, columns, size, out + r * columns);
  });
}

// A separable convolution of the C channels of one image for one edge: depthwise [C, K, K], then pointwise [C, C].
template <typename T>
class SeparableConvolution {
 public:
  virtual ~SeparableConvolution() = default;
  // padded: C planes. inner: memory for C planes at distances of g.step. out: C planes at distances of g.size.
  virtual void forward(const T* padded, const T* weight, const T* pointwise, T* inner, T* out) const = 0;
  // Adds the gradients of the weights (unless their pointers are null); computes in_gradient = (with add: +=) that of
  // the input. gradient: of the output, C planes at distances of g.step, 0 in the columns from out_w on. in_gradient:
  // with stride 1 C planes at distances of
  // g.step without padding, otherwise in the layout of the padded planes. flipped: the depthwise kernels from `flip`.
  // inner, inner_gradient: memory for C planes at distances of g.step. bordered: memory for a padded plane, with a
  // border of 0.
  virtual void backward(const T* padded, const T* weight, const T* flipped, const T* pointwise, const T* gradient,
                        T* inner, T* inner_gradient, T* bordered, T* weight_gradient, T* pointwise_gradient, bool add,
                        T* in_gradient) const = 0;
};

template <typename T, int L, int K>
class Separable : public SeparableConvolution<T> {
 public:
  Separable(const Geometry& g, int64_t dilation, int64_t channels)
      : g(g), taps(g, dilation), channels(channels), back(g, dilation) {}

  void forward(const T* padded, const T* weight, const T* pointwise, T* inner, T* out) const override {
    depthwise(padded, weight, inner);
    Timed timed(Phase::kPointwise);
    multiply<T, L>(pointwise, channels, 1, inner, g.step, channels, channels, g.size, out, g.size, ToMemory());
  }

  void backward(const T* padded, const T* weight, const T* flipped, const T* pointwise, const T* gradient, T* inner,
                T* inner_gradient, T* bordered, T* weight_gradient, T* pointwise_gradient, bool add,
                T* in_gradient) const override {
    if (weight_gradient) {
      depthwise(padded, weight, inner);
      Timed timed(Phase::kPointwise);
      add_outer<T, L>(gradient, g.step, inner, g.step, channels, channels, g.size, pointwise_gradient);
    }
    {
      Timed timed(Phase::kPointwise);
      multiply<T, L>(pointwise, 1, channels, gradient, g.step, channels, channels, g.size, inner_gradient, g.step);
    }
    Timed timed(Phase::kDepthwise);
    for (int64_t c = 0; c < channels; ++c) {
      const T* d = inner_gradient + c * g.step;
      if (weight_gradient)
        taps.ratio == 1
            ? correlate_weights<T, L, K, 1>(g, padded + c * g.plane, taps, d, weight_gradient + c * K * K)
            : correlate_weights<T, L, K, 2>(g, padded + c * g.plane, taps, d, weight_gradient + c * K * K);
      if (g.stride == 1) {
        for (int64_t r = 0; r < g.out_h; ++r)
          copy_row<T, L>(d + r * g.out_row, g.out_row, bordered + (r + g.padding) * g.row + g.padding);
        add ? correlate_chains<T, L, K, 1, true>(g, bordered, taps, flipped + c * K * K, in_gradient + c * g.step)
            : correlate_chains<T, L, K, 1, false>(g, bordered, taps, flipped + c * K * K, in_gradient + c * g.step);
      } else {
        if (!add) std::fill_n(in_gradient + c * g.plane, g.plane, T(0));
        back.add(d, weight + c * K * K, flipped + c * K * K, bordered, in_gradient + c * g.plane);
      }
    }
  }

 private:
  void depthwise(const T* padded, const T* weight, T* inner) const {
    Timed timed(Phase::kDepthwise);
    for (int64_t c = 0; c < channels; ++c)
      correlate<T, L, K>(g, padded + c * g.plane, taps, weight + c * K * K, inner + c * g.step);
  }

  const Geometry g;
  const Taps<K> taps;
  const int64_t channels;
  const CorrelateBack<T, L, K> back;               // with stride 2
};

// kernel: 3, 5 or 7.
template <typename T, int L>
std::unique_ptr<SeparableConvolution<T>> make_separable(int kernel, const Geometry& g, int64_t dilation,
                                                        int64_t channels) {
  typedef std::unique_ptr<SeparableConvolution<T>> Pointer;
  switch (kernel) {
    case 3: return Pointer(new Separable<T, L, 3>(g, dilation, channels));
    case 5: return Pointer(new Separable<T, L, 5>(g, dilation, channels));
    case 7: return Pointer(new Separable<T, L, 7>(g, dilation, channels));
  }
  PD_THROW("there is no separable convolution of this kernel size: ", kernel);
}

// Pools 3 x 3 with padding 1, planes [h, w] -> [out_h, out_row], first along the rows or columns, then along the other.
// The planes are copied to memory with a border, where vectors run over complete planes: rows are often shorter than a
// vector. With stride 2 every second row and column of the result with stride 1 is kept, and its gradient is placed there.
// The mean divides by the number of places inside of the plane.
template <typename T>
class Pools {
 public:
  explicit Pools(const Geometry& g)
      : g_(g), row_(g.w + 2), plane_(round_up_to_lines<T>((g.h + 2) * row_ + 2 * L)), inverse_counts_(g.size, 0) {
    for (int64_t i = 0; i < g.out_h; ++i)
      for (int64_t j = 0; j < g.out_w; ++j)
        inverse_counts_[i * g.out_row + j] = T(1) / (window_length(i, g.h) * window_length(j, g.w));
  }

  // Numbers of the temporary memory `work` of the calls below.
  int64_t work_size() const { return 7 * plane_; }

  void max(const T* x, T* work, T* to) const {
    pool(x, work, to, -std::numeric_limits<T>::infinity(), larger);
  }
  void mean(const T* x, T* work, T* to) const {
    pool(x, work, to, T(0), [](V a, V b) { return a + b; });
#pragma omp simd
    for (int64_t p = 0; p < g_.size; ++p) to[p] *= inverse_counts_[p];
  }

  // Both add the gradient of the pool's input to `gradient` [h, w]; d [out_h, out_row]: gradient of its output.
  // The first of several equal maxima gets the gradient, as in Paddle: that of the first row which has one.
  void max_backward(const T* x, const T* d, T* work, T* gradient) const {
    T *in = plane(work, 0), *maxima = plane(work, 1), *out = plane(work, 2);
    T* by_row[3] = {plane(work, 3), plane(work, 4), plane(work, 5)};       // what the three rows of a window receive
    T* by_column[3] = {maxima, out, plane(work, 6)};                       // what three columns receive, in place
    copy(x, -std::numeric_limits<T>::infinity(), in);
    place(d, nullptr, out);
    std::fill_n(by_row[0] + (g_.h + 1) * row_, row_, T(0));
    std::fill_n(by_row[2], row_, T(0));
    for_vectors(0, g_.h + 2, [&](int64_t p) {
      store<T, L>(maxima + p, larger(larger(at(in, p - 1), at(in, p)), at(in, p + 1)));
    });
    for_vectors(1, g_.h + 1, [&](int64_t p) {
      give_to_first(at(maxima, p - row_), at(maxima, p), at(maxima, p + row_), at(out, p), p, by_row);
    });
    for_vectors(1, g_.h + 1, [&](int64_t p) {
      const V received = at(by_row[2], p - row_) + at(by_row[1], p) + at(by_row[0], p + row_);
      give_to_first(at(in, p - 1), at(in, p), at(in, p + 1), received, p, by_column);
    });
    add_rows(by_column[2], by_column[1], by_column[0], gradient);
  }
  void mean_backward(const T* d, T* work, T* gradient) const {
    T *out = plane(work, 0), *received = plane(work, 1);
    place(d, inverse_counts_.data(), out);
    for_vectors(1, g_.h + 1, [&](int64_t p) {
      store<T, L>(received + p, at(out, p - row_) + at(out, p) + at(out, p + row_));
    });
    add_rows(received, received, received, gradient);
  }

 private:
  static constexpr int L = kMaxLanes<T>;
  typedef typename Vector<T, L>::type V;
  static V at(const T* plane, int64_t p) { return in_register(load<T, L>(plane + p)); }
  static V larger(V a, V b) { return (b > a) | (b != b) ? b : a; }            // keeps a NaN

  // Returns how many of the 3 places of a window around place i * stride are inside of the plane.
  int64_t window_length(int64_t i, int64_t size) const {
    return std::min(i * g_.stride + 1, size - 1) - std::max<int64_t>(i * g_.stride - 1, 0) + 1;
  }
  // Returns block k of the temporary memory: a plane of h + 2 rows of w + 2 numbers, with a vector before and behind it.
  T* plane(T* work, int k) const { return work + k * plane_ + L; }
  // Calls f(p) for vectors that cover the rows [first, end) of a plane with border.
  template <typename F>
  void for_vectors(int64_t first, int64_t end, F f) const {
    for (int64_t p = first * row_; p < end * row_; p += L) f(p);
  }
  void copy(const T* x, T border, T* to) const {
    std::fill_n(to, (g_.h + 2) * row_, border);
    const int64_t vectors = g_.w / L * L;
    for (int64_t i = 0; i < g_.h; ++i, x += g_.w) {
      T* row = to + (i + 1) * row_ + 1;
      copy_row<T, L>(x, vectors, row);
      for (int64_t j = vectors; j < g_.w; ++j) row[j] = x[j];
    }
  }
  // Copies d [out_h, out_row], multiplied by `factors`, to its places in a plane with border that is 0 elsewhere, the
  // vector behind it included.
  void place(const T* d, const T* factors, T* to) const {
    std::fill_n(to, (g_.h + 2) * row_ + L, T(0));
    for (int64_t i = 0; i < g_.out_h; ++i) {
      T* row = to + (i * g_.stride + 1) * row_ + 1;
      for_columns(i, [&](int64_t j, int64_t p, auto stride) { row[j * stride] = factors ? d[p] * factors[p] : d[p]; });
    }
  }
  // Calls f(j, index in a plane [out_h, out_row], stride) for the columns j of an output row.
  template <typename F>
  void for_columns(int64_t i, F f) const {
    if (g_.stride == 1)
#pragma omp simd
      for (int64_t j = 0; j < g_.out_w; ++j) f(j, i * g_.out_row + j, std::integral_constant<int, 1>());
    else
#pragma omp simd
      for (int64_t j = 0; j < g_.out_w; ++j) f(j, i * g_.out_row + j, std::integral_constant<int, 2>());
  }
  template <typename F>
  void pool(const T* x, T* work, T* to, T border, F f) const {
    T *in = plane(work, 0), *rows = plane(work, 1);
    copy(x, border, in);
    for_vectors(1, g_.h + 1, [&](int64_t p) {
      store<T, L>(rows + p, f(f(at(in, p - row_), at(in, p)), at(in, p + row_)));
    });
    for_vectors(1, g_.h + 1, [&](int64_t p) {                // in place of the input
      store<T, L>(in + p, f(f(at(rows, p - 1), at(rows, p)), at(rows, p + 1)));
    });
    for (int64_t i = 0; i < g_.out_h; ++i) {
      const T* row = in + (i * g_.stride + 1) * row_ + 1;
      for_columns(i, [&](int64_t j, int64_t p, auto stride) { to[p] = row[j * stride]; });
      std::fill(to + i * g_.out_row + g_.out_w, to + (i + 1) * g_.out_row, T(0));
    }
  }
  // Writes d to `to` [3], at the index of the first maximum of a, b and c, and 0 to the others.
  static void give_to_first(V a, V b, V c, V d, int64_t p, T* const* to) {
    const V zero{}, first_two = c > larger(a, b) ? zero : d, second = b > a ? first_two : zero;
    store<T, L>(to[0] + p, first_two - second);
    store<T, L>(to[1] + p, second);
    store<T, L>(to[2] + p, d - first_two);
  }
  // Adds to `gradient` [h, w] what each place receives from the windows around its left neighbour, itself and its right
  // neighbour.
  void add_rows(const T* left, const T* centre, const T* right, T* gradient) const {
    for (int64_t i = 0; i < g_.h; ++i) {
      const int64_t p = (i + 1) * row_ + 1;
#pragma omp simd
      for (int64_t j = 0; j < g_.w; ++j) gradient[i * g_.w + j] += left[p + j - 1] + centre[p + j] + right[p + j + 1];
    }
  }

  const Geometry g_;
  const int64_t row_, plane_;
  std::vector<T> inverse_counts_;
};

// Returns a vector of ones, with 0 from column g.out_w on, for the last vector of a row.
template <typename T, int L>
typename Vector<T, L>::type columns_mask(const Geometry& g) {
  typename Vector<T, L>::type mask;
  for (int k = 0; k < L; ++k) mask[k] = g.out_row - L + k < g.out_w ? T(1) : T(0);
  return mask;
}

// Writes the mean and the sum of the squared deviations of a plane to moments [2].
template <typename T, int L>
void compute_moments(const Geometry& g, const T* plane, double* moments) {
  if constexpr (L < kMaxLanes<T>)
    if (g.rows() == 1 && g.size % kMaxLanes<T> == 0) return compute_moments<T, kMaxLanes<T>>(g, plane, moments);
  typedef typename Vector<T, L>::type V;
  const V zero{}, mask = columns_mask<T, L>(g);
  const auto total = [&](auto f) {
    FourSums<T, L> total;
    for (int64_t i = 0; i < g.rows(); ++i) {
      const T* row = plane + i * g.out_row;
      const int64_t j = total.add(g.columns(), [&](int64_t p) { return f(load<T, L>(row + p)); });
      if (j < g.columns()) total.sums[1] += mask > zero ? f(load<T, L>(row + j)) : zero;
    }
    return total.total();
  };
  const T mean = total([](V v) { return v; }) / (g.out_h * g.out_w);
  moments[0] = mean;
  moments[1] = total([mean](V v) { return (v - mean) * (v - mean); });
}

// Combines the moments of n planes of `size` numbers, at distances of `step`, to the mean and variance of all numbers.
inline void combine_moments(const double* moments, int64_t n, int64_t step, double size, double* mean,
                            double* variance) {
  double squares = 0;
  *mean = 0;
  for (int64_t k = 0; k < n; ++k) *mean += moments[k * step] / n;
  for (int64_t k = 0; k < n; ++k) {
    const double deviation = moments[k * step] - *mean;
    squares += moments[k * step + 1] + size * deviation * deviation;
  }
  *variance = squares / (size * n);
}

// Computes the gradient of the input y of a batch normalisation, to = factor (keep d - d_mean - (y - mean) slope).
// keep d: gradient of its output, d with rows of d_row numbers; d_mean: mean of keep d; slope: rstd^2 times the mean of
// keep d (y - mean); factor: scale times rstd.
template <typename T>
void batch_norm_backward(const Geometry& g, const T* d, int64_t d_row, T keep, const T* y, T factor, T d_mean, T mean,
                         T slope, T* to) {
  for (int64_t i = 0; i < g.rows(); ++i, d += d_row, y += g.out_row, to += g.out_row)
#pragma omp simd
    for (int64_t j = 0; j < g.columns(); ++j) to[j] = factor * (keep * d[j] - d_mean - (y[j] - mean) * slope);
}

// Writes relu(factor (y - mean) + shift) to the inside of a padded plane: the input of the second half of a sep_conv.
template <typename T, int L>
void normalise_relu(const Geometry& g, const T* y, int64_t y_row, T factor, T mean, T shift, T* padded) {
  for (int64_t i = 0; i < g.h; ++i)
    fill_row<T, L>(g, y + i * y_row, padded, i, [=](auto v) { return rectify(factor * (v - mean) + shift); });
}

// Writes the sums of keep d and of keep d (y - mean) to sums [2]. d_row: distance between the rows of d. Four sums of
// each, as in `FourSums`.
template <typename T>
void sum_gradient(const Geometry& g, const T* d, int64_t d_row, T keep, const T* y, T mean, double* sums) {
  constexpr int L = kMaxLanes<T>;
  typename Vector<T, L>::type totals[4] = {}, dots[4] = {};
  T total = 0, dot = 0;
  for (int64_t i = 0; i < g.rows(); ++i, d += d_row, y += g.out_row) {
    int64_t j = 0;
    const auto add = [&](int k) {
      const auto numbers = load<T, L>(d + j + k * L);
      totals[k] += numbers, dots[k] += numbers * (load<T, L>(y + j + k * L) - mean);
    };
    for (; j + 4 * L <= g.columns(); j += 4 * L) add(0), add(1), add(2), add(3);
    for (; j + L <= g.columns(); j += L) add(0);
#pragma omp simd reduction(+ : total, dot)
    for (int64_t k = j; k < g.columns(); ++k) total += d[k], dot += d[k] * (y[k] - mean);
  }
  for (int k = 0; k < 4; ++k) total += sum<T, L>(totals[k]), dot += sum<T, L>(dots[k]);
  sums[0] = keep * total, sums[1] = keep * dot;
}

// Returns the gradient of the input `value` of a ReLU. By value, as the compiler does not vectorise a conditional read.
template <typename T>
inline T relu_grad(T value, T gradient) {
  return value > 0 ? gradient : T(0);
}

// Computes `to`, the gradient of the ReLU's input in relu(factor (y - mean) + shift), from the gradient d of its
// output, with 0 in the columns from out_w on; writes the sums of `to` and of to (y - mean) to sums [2]. Written with
// vectors, as the compiler would generate a branch.
template <typename T, int L>
void normalised_relu_backward(const Geometry& g, const T* y, T factor, T mean, T shift, const T* d, T* to,
                              double* sums) {
  typedef typename Vector<T, L>::type V;
  const V zero{}, mask = columns_mask<T, L>(g);
  const int64_t row = g.rows() == 1 ? g.size : g.out_row;
  V total{}, dot{};
  for (int64_t first = 0; first < g.size; first += row)
    for (int64_t p = first; p < first + row; p += L) {
      const V centred = load<T, L>(y + p) - mean;
      V masked = factor * centred + shift > zero ? load<T, L>(d + p) : zero;
      if (p == first + row - L) masked = mask > zero ? masked : zero;
      store<T, L>(to + p, masked);
      total += masked, dot += masked * centred;
    }
  sums[0] = sum<T, L>(total), sums[1] = sum<T, L>(dot);
}

// Computes `to` [h, w] = (with add: +=) the gradient of the ReLU's input x. gradient: that of its output, in the layout
// of an output plane (stride 1) or of a padded plane.
template <typename T, int L>
void relu_backward(const Geometry& g, const T* x, const T* gradient, bool add, T* to) {
  typedef typename Vector<T, L>::type V;
  const V zero{};
  for (int64_t i = 0; i < g.h; ++i, x += g.w, to += g.w) {
    const T* row = g.stride == 1 ? gradient + i * g.out_row : gradient + (i + g.padding) * g.row;
    const auto write = [&](int64_t j, V d) {
      const V masked = load<T, L>(x + j) > zero ? d : zero;
      store<T, L>(to + j, add ? load<T, L>(to + j) + masked : masked);
    };
    int64_t j = 0;
    if (g.stride == 1) {
      for (; j + L <= g.w; j += L) write(j, load<T, L>(row + j));
    } else {
      const T *even = row + g.at(0, g.padding), *odd = row + g.at(0, g.padding + 1);
      for (; j + 2 * L <= g.w; j += 2 * L) {
        const V left = load<T, L>(even + j / 2), right = load<T, L>(odd + j / 2);
        write(j, shuffle<T, L, Alternating<L, 0>>(left, right));
        write(j + L, shuffle<T, L, Alternating<L, 1>>(left, right));
      }
    }
    for (; j < g.w; ++j)
      to[j] = (add ? to[j] : T(0)) + relu_grad(x[j], row[g.stride == 1 ? j : g.at(0, j + g.padding)]);
  }
}

// A 1x1 convolution after a ReLU, on all places of a plane [h, w] (stride 1) or on one of the two grids of
// FactorizedReduce (stride 2), which take every second place; grid 1 starts one pixel further down and right. Where the
// places are no contiguous vectors, they are copied to planes in the layout of output planes first.
template <typename T, int L>
class RectifiedConvolution {
 public:
  RectifiedConvolution(const Geometry& g, int64_t channels)
      : g_(g), channels_(channels), direct_(g.stride == 1 && g.out_row == g.out_w) {}

  // Numbers of the temporary memory `grid` of the calls below.
  int64_t grid_size() const { return direct_ ? 0 : channels_ * g_.step; }

  // Computes `rows` output planes at distances of `step`; weight [rows, channels]; x: `channels` planes [h, w].
  void forward(const T* x, int64_t number, const T* weight, int64_t rows, T* grid, T* out, int64_t step) const {
    if (direct_) {
      Timed timed(Phase::kPointwise);
      return multiply<T, L>(weight, channels_, 1, x, g_.size, rows, channels_, g_.size, out, step, Rectified());
    }
    gather(x, number, grid);
    Timed timed(Phase::kPointwise);
    multiply<T, L>(weight, channels_, 1, grid, g_.step, rows, channels_, g_.size, out, step, ToMemory());
  }
  // Adds the gradient of the weights. d: gradient of the output, planes at distances of g.step.
  void add_weight_gradient(const T* x, int64_t number, const T* d, int64_t rows, T* grid, T* weight_gradient) const {
    if (direct_) {
      Timed timed(Phase::kPointwise);
      return add_outer<T, L, Rectified>(d, g_.step, x, g_.size, rows, channels_, g_.size, weight_gradient);
    }
    gather(x, number, grid);
    Timed timed(Phase::kPointwise);
    add_outer<T, L>(d, g_.step, grid, g_.step, rows, channels_, g_.size, weight_gradient);
  }
  // Computes to = (with add: +=) the gradient of x. Without add the other places of a plane are set to 0 by grid 0 and
  // kept by grid 1.
  void backward(const T* x, int64_t number, const T* weight, const T* d, int64_t rows, T* grid, bool add, T* to) const {
    {
      Timed timed(Phase::kPointwise);
      if (direct_)
        return multiply<T, L>(weight, 1, channels_, d, g_.step, channels_, rows, g_.size, to, g_.size,
                              ThroughRelu<T>(x, to, add));
      multiply<T, L>(weight, 1, channels_, d, g_.step, channels_, rows, g_.size, grid, g_.step);
    }
    scatter(x, number, grid, add, to);
  }

  // Copies the rectified places of the planes x to the planes `grid`.
  void gather(const T* x, int64_t number, T* grid) const {
    Timed timed(Phase::kPad);
    for (int64_t c = 0; c < channels_; ++c, x += g_.h * g_.w, grid += g_.step)
      for (int64_t i = 0; i < rows(); ++i) {
        T* to = grid + i * g_.out_row;
        if (g_.stride == 1) gather_row(x + i * g_.w, to);
        else if (number == 0) gather_every_second<0>(x + 2 * i * g_.w, to);
        else gather_every_second<1>(x + (2 * i + 1) * g_.w, to);
      }
  }
  // Computes to = (with add: +=) the gradient of x from that of a grid, as `backward`.
  void scatter(const T* x, int64_t number, const T* gradient, bool add, T* to) const {
    Timed timed(Phase::kPad);
    const int64_t plane = g_.h * g_.w;
    for (int64_t c = 0; c < channels_; ++c, x += plane, to += plane, gradient += g_.step) {
      if (g_.stride == 2 && !add && number == 0) std::fill(to, to + plane, T(0));
      for (int64_t i = 0; i < rows(); ++i) {
        const T* d = gradient + i * g_.out_row;
        const int64_t row = (i * g_.stride + number) * g_.w;
        if (g_.stride == 1) scatter_row(x + row, d, add, to + row);
        else if (number == 0) add_every_second<0>(x + row, d, to + row);
        else add_every_second<1>(x + row, d, to + row);
      }
    }
  }

 private:
  void gather_row(const T* from, T* to) const {
#pragma omp simd
    for (int64_t j = 0; j < columns(); ++j) to[j] = rectify(from[j]);
  }
  void scatter_row(const T* x, const T* d, bool add, T* to) const {
    if (add)
#pragma omp simd
      for (int64_t j = 0; j < columns(); ++j) to[j] += relu_grad(x[j], d[j]);
    else
#pragma omp simd
      for (int64_t j = 0; j < columns(); ++j) to[j] = relu_grad(x[j], d[j]);
  }
  // A row of x and the row of a grid with its columns PARITY, PARITY + 2 ...
  template <int PARITY>
  void gather_every_second(const T* from, T* to) const {
    int64_t j = 0;
    for (; j + L <= g_.out_w; j += L) {
      const auto left = load<T, L>(from + 2 * j), right = load<T, L>(from + 2 * j + L);
      store<T, L>(to + j, rectify(shuffle<T, L, EverySecond<PARITY>>(left, right)));
    }
    for (; j < g_.out_w; ++j) to[j] = rectify(from[2 * j + PARITY]);
  }
  template <int PARITY>
  void add_every_second(const T* x, const T* d, T* to) const {
    typedef typename Vector<T, L>::type V;
    const V zero{};
    int64_t j = 0;
    for (; j + L <= g_.out_w; j += L) {
      const V even = PARITY ? zero : load<T, L>(d + j), odd = PARITY ? load<T, L>(d + j) : zero;
      const V halves[2] = {shuffle<T, L, Alternating<L, 0>>(even, odd), shuffle<T, L, Alternating<L, 1>>(even, odd)};
      for (int k = 0; k < 2; ++k) {
        const int64_t at = 2 * j + k * L;
        store<T, L>(to + at, load<T, L>(to + at) + (load<T, L>(x + at) > zero ? halves[k] : zero));
      }
    }
    for (; j < g_.out_w; ++j) to[2 * j + PARITY] += relu_grad(x[2 * j + PARITY], d[j]);
  }
  // A grid with stride 1 whose rows are not rounded up counts as one long row.
  int64_t rows() const { return g_.stride == 1 ? g_.rows() : g_.out_h; }
  int64_t columns() const { return g_.stride == 1 ? g_.columns() : g_.out_w; }

  const Geometry g_;
  const int64_t channels_;
  const bool direct_;
};

// Calls f(k) for k < count, in a parallel region. A thread takes the next `chunk` numbers when it is idle, so that one
// whose core is busy with another process takes fewer. Returns when all calls have returned. backwards: from the last
// number on. If the passes alternate, each begins with the images that are still in the cache.
template <typename F>
void share(int64_t count, int64_t chunk, F f, bool backwards = false) {
  {
    Timed timed(Phase::kOther);
#pragma omp for schedule(dynamic, chunk) nowait
    for (int64_t k = 0; k < count; ++k) f(backwards ? count - 1 - k : k);
  }
  Timed timed(Phase::kWaiting);
#pragma omp barrier
}

// Gradients of weights, summed over the images of a batch in an order that does not depend on the threads: first within
// each of at most kParts parts of the batch, then over the parts.
template <typename T>
class PartialSums {
 public:
  // n: images; size: of the gradients.
  PartialSums(int64_t n, int64_t size) : n_(n), images_(std::max<int64_t>(2, (n + kParts - 1) / kParts)), size_(size) {
    static thread_local Storage<T> storage;
    step_ = round_up_to_lines<T>(size);
    sums_ = storage.reserve(parts() * step_);
  }
  int64_t parts() const { return (n_ + images_ - 1) / images_; }

  // In a parallel region: sets the sums to 0.
  void clear() {
    share(parts(), 1, [&](int64_t part) { std::fill_n(sums_ + part * step_, size_, T(0)); });
  }
  // In a parallel region: calls f(n, sums of the part that image n belongs to) for every image, in order in a part.
  // backwards: from the last image on.
  template <typename F>
  void for_images(F f, bool backwards = false) {
    share(parts(), 1, [&](int64_t part) {
      const int64_t first = part * images_, count = std::min(images_, n_ - first);
      for (int64_t k = 0; k < count; ++k) f(first + (backwards ? count - 1 - k : k), sums_ + part * step_);
    }, backwards);
  }
  // In a parallel region: adds the sums of all parts, from index `first` on, to `to` [size]; does not wait for the other
  // threads.
  void add_to(T* to, int64_t first, int64_t size) const {
    Timed timed(Phase::kSums);
    constexpr int64_t kBlock = 4096;
#pragma omp for schedule(dynamic) nowait
    for (int64_t begin = 0; begin < size; begin += kBlock)
      for (int64_t part = 0; part < parts(); ++part) {
        const T* from = sums_ + part * step_ + first;
#pragma omp simd
        for (int64_t k = begin; k < std::min(size, begin + kBlock); ++k) to[k] += from[k];
      }
  }

 private:
  static constexpr int64_t kParts = 16;
  const int64_t n_, images_, size_;              // images_: of a part
  int64_t step_;
  T* sums_;
};

// Returns n kernels rotated by 180 degrees. The gradient of a correlation is a correlation with the rotated kernel.
template <typename T>
std::vector<T> flip(const T* kernels, int64_t n, int64_t taps) {
  std::vector<T> flipped(kernels, kernels + n * taps);
  for (int64_t k = 0; k < n; ++k) std::reverse(flipped.begin() + k * taps, flipped.begin() + (k + 1) * taps);
  return flipped;
}

// Returns the length of the vectors for rows of out_w numbers.
template <typename T>
int choose_lanes(int64_t out_w) {
  int lanes = kMaxLanes<T>;
  while (lanes > 4 && out_w <= lanes / 2) lanes /= 2;
  return lanes;
}

// Calls f(std::integral_constant<int, L>) with the length of the vectors for rows of out_w numbers.
template <typename T, typename F>
void dispatch_lanes(int64_t out_w, F f) {
  switch (choose_lanes<T>(out_w)) {
    // Single precision on AVX-512. On other processors the case is not reached and only has to compile.
    case 16: f(std::integral_constant<int, kMaxLanes<T>>()); break;
    case 8: f(std::integral_constant<int, 8>()); break;
    default: f(std::integral_constant<int, 4>());
  }
}

}  // namespace
