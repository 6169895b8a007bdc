// ReLU, depthwise k x k, pointwise: the separable convolution of DARTS as one operator for the CPU.
// README.md in this folder explains the layout and the order of the loops.
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "paddle/extension.h"

namespace {

using paddle::Tensor;

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

template <typename T, int L>
inline T sum(typename Vector<T, L>::type v) {
  T total = 0;
  for (int i = 0; i < L; ++i) total += v[i];
  return total;
}

// Room for the numbers of one thread, kept from call to call: fresh memory costs more than what is computed in it.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t size) : next_(0) {
    if (static_cast<int64_t>(room_.size()) < size) room_.resize(size);
  }
  T* take(int64_t size) {
    T* start = room_.data() + next_;
    next_ += size;
    return start;
  }

 private:
  static thread_local std::vector<T> room_;
  int64_t next_;
};
template <typename T>
thread_local std::vector<T> Scratch<T>::room_;

struct Geometry {
  int64_t n, states, channels, edges;    // edge e reads state e % states; a state has `channels` channels
  int64_t h, w, out_h, out_w, kernel, stride, dilation, padding;
  int64_t out_row;                       // numbers in a row of an output plane in scratch: out_w, rounded up to L
  int64_t phase, row, plane;             // of the padded input: numbers in a phase of a row, in a row, in a plane

  Geometry(const Tensor& x, const Tensor& depthwise, int stride, int dilation, int lanes) {
    n = x.shape()[0], h = x.shape()[2], w = x.shape()[3];
    kernel = depthwise.shape()[2];
    this->stride = stride, this->dilation = dilation, padding = dilation * (kernel / 2);
    out_h = (h - 1) / stride + 1, out_w = (w - 1) / stride + 1;
    out_row = (out_w + lanes - 1) / lanes * lanes;
    phase = out_row + dilation * (kernel - 1) / stride + 1;
    phase = std::max(phase, (w + 2 * padding + stride - 1) / stride);
    row = stride * phase;
    plane = row * (h + 2 * padding);
  }
  int64_t out_plane() const { return out_h * out_row; }
};

// x [h, w] -> relu(x) in a padded plane [h + 2 p, stride, phase]: column c stands at [c % stride, c / stride], so that
// what a tap of the kernel sees along a row is contiguous whatever the stride.
template <typename T>
void pad(const Geometry& g, const T* x, T* padded) {
  std::memset(padded, 0, g.plane * sizeof(T));
  for (int64_t i = 0; i < g.h; ++i) {
    T* row = padded + (i + g.padding) * g.row;
    const T* from = x + i * g.w;
    if (g.stride == 1) {
      T* to = row + g.padding;
#pragma omp simd
      for (int64_t j = 0; j < g.w; ++j) to[j] = from[j] < 0 ? 0 : from[j];      // a NaN stays one
    } else {
      for (int64_t j = 0; j < g.w; ++j) {
        const int64_t c = j + g.padding;
        row[c % g.stride * g.phase + c / g.stride] = from[j] < 0 ? 0 : from[j];
      }
    }
  }
}

// ROWS x COLUMNS vectors of the output at `out`: the correlation of a padded plane with a kernel.
template <typename T, int L, int K, int ROWS, int COLUMNS, bool ADD>
inline void correlate_tile(const T* in, int64_t row, int64_t stride, int64_t dilation, int64_t phase, const T* weight,
                           T* out, int64_t out_row) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS];
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) sums[r][c] = ADD ? load<T, L>(out + r * out_row + c * L) : typename Vector<T, L>::type{};
  for (int i = 0; i < K; ++i) {
    for (int j = 0; j < K; ++j) {
      const T w = weight[i * K + j];
      const int64_t column = j * dilation;
      const T* from = in + i * dilation * row + (stride == 1 ? column : column % stride * phase + column / stride);
#pragma GCC unroll 8
      for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 8
        for (int c = 0; c < COLUMNS; ++c) sums[r][c] += w * load<T, L>(from + r * stride * row + c * L);
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) store<T, L>(out + r * out_row + c * L, sums[r][c]);
}

template <typename T, int L, int K, bool ADD>
void correlate(const T* in, int64_t row, int64_t stride, int64_t dilation, int64_t phase, const T* weight, T* out,
               int64_t out_h, int64_t out_row) {
  int64_t r = 0;
  if (out_row % (2 * L) == 0) {
    for (; r + 4 <= out_h; r += 4)
      for (int64_t c = 0; c < out_row; c += 2 * L)
        correlate_tile<T, L, K, 4, 2, ADD>(in + r * stride * row + c, row, stride, dilation, phase, weight,
                                           out + r * out_row + c, out_row);
  } else {
    for (; r + 8 <= out_h; r += 8)
      for (int64_t c = 0; c < out_row; c += L)
        correlate_tile<T, L, K, 8, 1, ADD>(in + r * stride * row + c, row, stride, dilation, phase, weight,
                                           out + r * out_row + c, out_row);
  }
  for (; r < out_h; ++r)
    for (int64_t c = 0; c < out_row; c += L)
      correlate_tile<T, L, K, 1, 1, ADD>(in + r * stride * row + c, row, stride, dilation, phase, weight,
                                         out + r * out_row + c, out_row);
}

// weight_gradient [K, K] += the correlation of a padded plane with the gradient of the output, KERNEL_ROWS rows of the
// kernel at a time: as many sums as there are registers for.
template <typename T, int L, int K, int KERNEL_ROWS>
void correlate_weights(const Geometry& g, const T* padded, const T* gradient, T* weight_gradient) {
  for (int i0 = 0; i0 < K; i0 += KERNEL_ROWS) {
    typename Vector<T, L>::type sums[KERNEL_ROWS][K] = {};
    for (int64_t r = 0; r < g.out_h; ++r) {
      for (int64_t c = 0; c < g.out_row; c += L) {
        const auto d = load<T, L>(gradient + r * g.out_row + c);
        const T* from = padded + r * g.stride * g.row + c;
#pragma GCC unroll 8
        for (int i = 0; i < KERNEL_ROWS; ++i)
#pragma GCC unroll 8
          for (int j = 0; j < K; ++j) {
            const int64_t column = j * g.dilation;
            sums[i][j] += d * load<T, L>(from + (i0 + i) * g.dilation * g.row +
                                         (g.stride == 1 ? column : column % g.stride * g.phase + column / g.stride));
          }
      }
    }
    for (int i = 0; i < KERNEL_ROWS; ++i)
      for (int j = 0; j < K; ++j) weight_gradient[(i0 + i) * K + j] += sum<T, L>(sums[i][j]);
  }
}

// padded (a gradient laid out like the padded input) += the output's gradient, spread by the kernel. For strides > 1.
template <typename T, int L, int K>
void spread(const Geometry& g, const T* gradient, const T* weight, T* padded) {
  for (int64_t r = 0; r < g.out_h; ++r)
    for (int i = 0; i < K; ++i)
      for (int j = 0; j < K; ++j) {
        const T w = weight[i * K + j];
        const int64_t column = j * g.dilation;
        T* to = padded + (r * g.stride + i * g.dilation) * g.row + column % g.stride * g.phase + column / g.stride;
        for (int64_t c = 0; c < g.out_row; c += L)
          store<T, L>(to + c, load<T, L>(to + c) + w * load<T, L>(gradient + r * g.out_row + c));
      }
}

// ROWS x COLUMNS vectors of out = a b: a [rows, inner] with steps between rows and columns, b [inner, size].
template <typename T, int L, int ROWS, int COLUMNS>
inline void multiply_tile(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t inner, int64_t size, T* out) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS] = {};
  for (int64_t k = 0; k < inner; ++k) {
    typename Vector<T, L>::type columns[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) columns[c] = load<T, L>(b + k * size + c * L);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const T factor = a[r * a_row + k * a_column];
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += factor * columns[c];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) store<T, L>(out + r * size + c * L, sums[r][c]);
}

template <typename T, int L, int ROWS>
void multiply_rows(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t inner, int64_t size, T* out) {
  int64_t p = 0;
  for (; p + 4 * L <= size; p += 4 * L) multiply_tile<T, L, ROWS, 4>(a, a_row, a_column, b + p, inner, size, out + p);
  for (; p < size; p += L) multiply_tile<T, L, ROWS, 1>(a, a_row, a_column, b + p, inner, size, out + p);
}

// Lanes for a product: planes of 8 x 8 are too narrow for the widest vectors, but 64 numbers in a row are not.
template <typename T>
constexpr int kMost = 64 / sizeof(T);

// out [rows, size] = a [rows, inner] b [inner, size]; size is a multiple of L.
template <typename T, int L>
void multiply(const T* a, int64_t a_row, int64_t a_column, const T* b, int64_t rows, int64_t inner, int64_t size,
              T* out) {
  if (L < kMost<T> && size % kMost<T> == 0)
    return multiply<T, kMost<T>>(a, a_row, a_column, b, rows, inner, size, out);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4)
    multiply_rows<T, L, 4>(a + r * a_row, a_row, a_column, b, inner, size, out + r * size);
  for (; r < rows; ++r) multiply_rows<T, L, 1>(a + r * a_row, a_row, a_column, b, inner, size, out + r * size);
}

template <typename T, int L, int ROWS, int COLUMNS>
inline void outer_tile(const T* a, const T* b, int64_t size, T* out, int64_t out_row) {
  typename Vector<T, L>::type sums[ROWS][COLUMNS] = {};
  for (int64_t p = 0; p < size; p += L) {
    typename Vector<T, L>::type columns[COLUMNS];
#pragma GCC unroll 8
    for (int c = 0; c < COLUMNS; ++c) columns[c] = load<T, L>(b + c * size + p);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; ++r) {
      const auto row = load<T, L>(a + r * size + p);
#pragma GCC unroll 8
      for (int c = 0; c < COLUMNS; ++c) sums[r][c] += row * columns[c];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int c = 0; c < COLUMNS; ++c) out[r * out_row + c] += sum<T, L>(sums[r][c]);
}

// out [rows, columns] += a [rows, size] b [columns, size]^T; size is a multiple of L.
template <typename T, int L>
void add_outer(const T* a, const T* b, int64_t rows, int64_t columns, int64_t size, T* out) {
  if (L < kMost<T> && size % kMost<T> == 0) return add_outer<T, kMost<T>>(a, b, rows, columns, size, out);
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) {
    int64_t c = 0;
    for (; c + 4 <= columns; c += 4)
      outer_tile<T, L, 4, 4>(a + r * size, b + c * size, size, out + r * columns + c, columns);
    for (; c < columns; ++c) outer_tile<T, L, 4, 1>(a + r * size, b + c * size, size, out + r * columns + c, columns);
  }
  for (; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      outer_tile<T, L, 1, 1>(a + r * size, b + c * size, size, out + r * columns + c, columns);
}

template <typename T, int L, int K>
void forward(const Geometry& g, const T* x, const T* depthwise, const T* pointwise, T* out) {
  const int64_t size = g.out_plane(), c_n = g.channels;
#pragma omp parallel
  {
    Scratch<T> scratch(c_n * (g.plane + 2 * size));
    T *padded = scratch.take(c_n * g.plane), *inner = scratch.take(c_n * size), *outer = scratch.take(c_n * size);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < g.n; ++n) {
      for (int64_t s = 0; s < g.states; ++s) {
        for (int64_t c = 0; c < c_n; ++c)
          pad(g, x + ((n * g.states + s) * c_n + c) * g.h * g.w, padded + c * g.plane);
        for (int64_t e = s; e < g.edges; e += g.states) {
          for (int64_t c = 0; c < c_n; ++c)
            correlate<T, L, K, false>(padded + c * g.plane, g.row, g.stride, g.dilation, g.phase,
                                      depthwise + (e * c_n + c) * K * K, inner + c * size, g.out_h, g.out_row);
          T* to = out + (n * g.edges + e) * c_n * g.out_h * g.out_w;
          T* result = g.out_row == g.out_w ? to : outer;
          multiply<T, L>(pointwise + e * c_n * c_n, c_n, 1, inner, c_n, c_n, size, result);
          if (result != to)
            for (int64_t r = 0; r < c_n * g.out_h; ++r)
              std::memcpy(to + r * g.out_w, result + r * g.out_row, g.out_w * sizeof(T));
        }
      }
    }
  }
}

template <typename T, int L, int K>
void backward(const Geometry& g, const T* x, const T* depthwise, const T* pointwise, const T* out_gradient,
              T* x_gradient, T* depthwise_gradient, T* pointwise_gradient) {
  const int64_t size = g.out_plane(), c_n = g.channels, taps = K * K;
  const int64_t depthwise_size = g.edges * c_n * taps, pointwise_size = g.edges * c_n * c_n;
  const int threads = omp_get_max_threads();
  // Each thread sums the gradients of the weights over its images; the sums are added in order, so that a run repeats
  // itself.
  std::vector<std::vector<T>> partial(threads);
  // With stride 1 the gradient of the input is a correlation too, with the kernel turned round.
  std::vector<T> turned(depthwise, depthwise + depthwise_size);
  for (int64_t k = 0; k < g.edges * c_n; ++k) std::reverse(turned.begin() + k * taps, turned.begin() + (k + 1) * taps);
  const int64_t in_size = g.stride == 1 ? size : g.plane;
#pragma omp parallel num_threads(threads)
  {
    auto& sums = partial[omp_get_thread_num()];
    sums.assign(depthwise_size + pointwise_size, 0);
    Scratch<T> scratch(c_n * (g.plane + 3 * size + in_size) + g.plane);
    T *padded = scratch.take(c_n * g.plane), *inner = scratch.take(c_n * size), *outer = scratch.take(c_n * size);
    T *inner_gradient = scratch.take(c_n * size), *in_gradient = scratch.take(c_n * in_size);
    T* padded_gradient = scratch.take(g.plane);
    // What is never written has to be 0: the columns behind out_w, the border of the gradient.
    std::fill(outer, outer + c_n * size, T(0));
    std::fill(padded_gradient, padded_gradient + g.plane, T(0));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < g.n; ++n) {
      for (int64_t s = 0; s < g.states; ++s) {
        const T* from = x + (n * g.states + s) * c_n * g.h * g.w;
        for (int64_t c = 0; c < c_n; ++c) pad(g, from + c * g.h * g.w, padded + c * g.plane);
        std::fill(in_gradient, in_gradient + c_n * in_size, T(0));
        for (int64_t e = s; e < g.edges; e += g.states) {
          const T* d = out_gradient + (n * g.edges + e) * c_n * g.out_h * g.out_w;
          if (g.out_row != g.out_w) {
            for (int64_t r = 0; r < c_n * g.out_h; ++r)
              std::memcpy(outer + r * g.out_row, d + r * g.out_w, g.out_w * sizeof(T));
            d = outer;
          }
          for (int64_t c = 0; c < c_n; ++c)
            correlate<T, L, K, false>(padded + c * g.plane, g.row, g.stride, g.dilation, g.phase,
                                      depthwise + (e * c_n + c) * taps, inner + c * size, g.out_h, g.out_row);
          add_outer<T, L>(d, inner, c_n, c_n, size, sums.data() + depthwise_size + e * c_n * c_n);
          multiply<T, L>(pointwise + e * c_n * c_n, 1, c_n, d, c_n, c_n, size, inner_gradient);
          for (int64_t c = 0; c < c_n; ++c) {
            const T* one = inner_gradient + c * size;
            correlate_weights<T, L, K, (K > 5 ? 1 : K)>(g, padded + c * g.plane, one,
                                                        sums.data() + (e * c_n + c) * taps);
            if (g.stride == 1) {
              for (int64_t r = 0; r < g.out_h; ++r)
                std::memcpy(padded_gradient + (r + g.padding) * g.row + g.padding, one + r * g.out_row,
                            g.out_w * sizeof(T));
              correlate<T, L, K, true>(padded_gradient, g.row, 1, g.dilation, g.phase,
                                       turned.data() + (e * c_n + c) * taps, in_gradient + c * in_size, g.out_h,
                                       g.out_row);
            } else {
              spread<T, L, K>(g, one, depthwise + (e * c_n + c) * taps, in_gradient + c * in_size);
            }
          }
        }
        T* to = x_gradient + (n * g.states + s) * c_n * g.h * g.w;
        for (int64_t k = 0; k < c_n * g.h; ++k) {
          const int64_t c = k / g.h, i = k % g.h;
          const T *passed = from + k * g.w, *gradient = in_gradient + c * in_size;
          T* row = to + k * g.w;
          if (g.stride == 1) {
            gradient += i * g.out_row;
#pragma omp simd
            for (int64_t j = 0; j < g.w; ++j) row[j] = passed[j] > 0 ? gradient[j] : 0;
          } else {
            gradient += (i + g.padding) * g.row;
            for (int64_t j = 0; j < g.w; ++j) {
              const int64_t column = j + g.padding;
              row[j] = passed[j] > 0 ? gradient[column % g.stride * g.phase + column / g.stride] : 0;
            }
          }
        }
      }
    }
  }
  for (const auto& sums : partial) {
    if (sums.empty()) continue;                    // fewer threads came than were asked for
    for (int64_t k = 0; k < depthwise_size; ++k) depthwise_gradient[k] += sums[k];
    for (int64_t k = 0; k < pointwise_size; ++k) pointwise_gradient[k] += sums[depthwise_size + k];
  }
}

// The width of the vectors that suits rows of out_w numbers.
int lanes_for(int64_t out_w, int64_t most) {
  int lanes = static_cast<int>(most);
  while (lanes > 4 && out_w <= lanes / 2) lanes /= 2;
  return lanes;
}

#define FOR_KERNEL(T, L, CALL)                                            \
  switch (g.kernel) {                                                     \
    case 3: { constexpr int K = 3; CALL; break; }                         \
    case 5: { constexpr int K = 5; CALL; break; }                         \
    case 7: { constexpr int K = 7; CALL; break; }                         \
    default: PD_THROW("a separable convolution of this size is not built"); \
  }

#define FOR_LANES(T, CALL)                                                \
  switch (lanes) {                                                        \
    case 16: { constexpr int L = 16; FOR_KERNEL(T, L, CALL); break; }     \
    case 8: { constexpr int L = 8; FOR_KERNEL(T, L, CALL); break; }       \
    default: { constexpr int L = 4; FOR_KERNEL(T, L, CALL); }             \
  }

Geometry geometry(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, int stride, int dilation,
                  int lanes) {
  Geometry g(x, depthwise, stride, dilation, lanes);
  g.channels = pointwise.shape()[1];
  g.states = x.shape()[1] / g.channels;
  g.edges = depthwise.shape()[0] / g.channels;
  return g;
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, int stride, int dilation) {
  const int64_t out_w = (x.shape()[3] - 1) / stride + 1;
  const int lanes = lanes_for(out_w, x.dtype() == paddle::DataType::FLOAT32 ? 16 : 8);
  const Geometry g = geometry(x, depthwise, pointwise, stride, dilation, lanes);
  Tensor out = paddle::empty({g.n, g.edges * g.channels, g.out_h, g.out_w}, x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.type(), "separable_conv", ([&] {
                               FOR_LANES(data_t, (forward<data_t, L, K>(g, x.data<data_t>(), depthwise.data<data_t>(),
                                                                        pointwise.data<data_t>(), out.data<data_t>())))
                             }));
  return {out};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
                             const Tensor& out_gradient, int stride, int dilation) {
  const int64_t out_w = (x.shape()[3] - 1) / stride + 1;
  const int lanes = lanes_for(out_w, x.dtype() == paddle::DataType::FLOAT32 ? 16 : 8);
  const Geometry g = geometry(x, depthwise, pointwise, stride, dilation, lanes);
  Tensor x_gradient = paddle::empty(x.shape(), x.dtype(), x.place());
  Tensor depthwise_gradient = paddle::zeros(depthwise.shape(), x.dtype(), x.place());
  Tensor pointwise_gradient = paddle::zeros(pointwise.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(
      x.type(), "separable_conv_grad", ([&] {
        FOR_LANES(data_t, (backward<data_t, L, K>(g, x.data<data_t>(), depthwise.data<data_t>(),
                                                  pointwise.data<data_t>(), out_gradient.data<data_t>(),
                                                  x_gradient.data<data_t>(), depthwise_gradient.data<data_t>(),
                                                  pointwise_gradient.data<data_t>())))
      }));
  return {x_gradient, depthwise_gradient, pointwise_gradient};
}

std::vector<std::vector<int64_t>> InferShape(const std::vector<int64_t>& x, const std::vector<int64_t>& depthwise,
                                             const std::vector<int64_t>& pointwise, int stride, int dilation) {
  return {{x[0], depthwise[0], (x[2] - 1) / stride + 1, (x[3] - 1) / stride + 1}};
}

std::vector<paddle::DataType> InferDtype(paddle::DataType x, paddle::DataType, paddle::DataType) { return {x}; }

}  // namespace

PD_BUILD_OP(darts_separable_conv)
    .Inputs({"X", "Depthwise", "Pointwise"})
    .Outputs({"Out"})
    .Attrs({"stride: int", "dilation: int"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_separable_conv)
    .Inputs({"X", "Depthwise", "Pointwise", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Depthwise"), paddle::Grad("Pointwise")})
    .Attrs({"stride: int", "dilation: int"})
    .SetKernelFn(PD_KERNEL(Backward));
