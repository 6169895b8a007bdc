// ReLU, depthwise k x k, pointwise: the separable convolution of DARTS as one operator for the CPU.
// README.md in this folder explains the layout and the order of the loops.
#include "kernels.h"

int darts_threads = 0;

namespace {

struct Sizes {
  int64_t n, states, channels, edges;    // edge e reads state e % states; a state has `channels` channels

  Sizes(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise)
      : n(x.shape()[0]), states(x.shape()[1] / pointwise.shape()[1]), channels(pointwise.shape()[1]),
        edges(depthwise.shape()[0] / channels) {}
};

template <typename T, int L, int K>
void forward(const Sizes& sizes, const Geometry& g, int dilation, const T* x, const T* depthwise, const T* pointwise, T* out) {
  const int64_t c_n = sizes.channels, plane = g.out_h * g.out_w;
  const Separable<T, L, K> convolution(g, dilation, c_n);
#pragma omp parallel num_threads(threads())
  {
    Scratch<T> scratch;
    scratch.reserve(c_n * (g.plane + g.step + g.size));
    T *padded = scratch.take(c_n * g.plane), *inner = scratch.take(c_n * g.step), *outer = scratch.take(c_n * g.size);
    std::fill(padded, padded + c_n * g.plane, T(0));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.n; ++n) {
      for (int64_t s = 0; s < sizes.states; ++s) {
        for (int64_t c = 0; c < c_n; ++c)
          pad(g, x + ((n * sizes.states + s) * c_n + c) * g.h * g.w, padded + c * g.plane);
        for (int64_t e = s; e < sizes.edges; e += sizes.states) {
          T* to = out + (n * sizes.edges + e) * c_n * plane;
          T* result = g.out_row == g.out_w ? to : outer;
          convolution.forward(padded, depthwise + e * c_n * K * K, pointwise + e * c_n * c_n, inner, result);
          if (result != to)
            for (int64_t r = 0; r < c_n * g.out_h; ++r)
              std::memcpy(to + r * g.out_w, result + r * g.out_row, g.out_w * sizeof(T));
        }
      }
    }
  }
}

template <typename T, int L, int K>
void backward(const Sizes& sizes, const Geometry& g, int dilation, const T* x, const T* depthwise, const T* pointwise,
              const T* out_gradient, T* x_gradient, T* depthwise_gradient, T* pointwise_gradient) {
  const int64_t c_n = sizes.channels, taps = K * K;
  const int64_t depthwise_size = sizes.edges * c_n * taps, pointwise_size = sizes.edges * c_n * c_n;
  // Each thread sums the gradients of the weights over its images; the sums are added in order, so that a run repeats
  // itself.
  std::vector<std::vector<T>> partial(threads());
  const std::vector<T> turned = turn_round(depthwise, sizes.edges * c_n, taps);
  const Separable<T, L, K> convolution(g, dilation, c_n);
  const int64_t in_step = g.stride == 1 ? g.step : g.plane;
#pragma omp parallel num_threads(threads())
  {
    auto& sums = partial[omp_get_thread_num()];
    sums.assign(depthwise_size + pointwise_size, 0);
    Scratch<T> scratch;
    scratch.reserve(c_n * (g.plane + 3 * g.step + in_step) + g.plane);
    T *padded = scratch.take(c_n * g.plane), *inner = scratch.take(c_n * g.step), *gradient = scratch.take(c_n * g.step);
    T *inner_gradient = scratch.take(c_n * g.step), *in_gradient = scratch.take(c_n * in_step);
    T* bordered = scratch.take(g.plane);
    for (auto* each : {padded, gradient, bordered})         // borders, and the columns behind out_w
      std::fill(each, each + (each == bordered ? g.plane : c_n * (each == padded ? g.plane : g.step)), T(0));
#pragma omp for schedule(static)
    for (int64_t n = 0; n < sizes.n; ++n) {
      for (int64_t s = 0; s < sizes.states; ++s) {
        const T* from = x + (n * sizes.states + s) * c_n * g.h * g.w;
        for (int64_t c = 0; c < c_n; ++c) pad(g, from + c * g.h * g.w, padded + c * g.plane);
        std::fill(in_gradient, in_gradient + c_n * in_step, T(0));
        for (int64_t e = s; e < sizes.edges; e += sizes.states) {
          const T* d = out_gradient + (n * sizes.edges + e) * c_n * g.out_h * g.out_w;
          for (int64_t c = 0; c < c_n; ++c)
            for (int64_t r = 0; r < g.rows(); ++r)
              std::memcpy(gradient + c * g.step + r * g.out_row, d + (c * g.out_h + r) * g.out_w, g.columns() * sizeof(T));
          const int64_t kernel = e * c_n * taps, product = e * c_n * c_n;
          convolution.backward(padded, depthwise + kernel, turned.data() + kernel, pointwise + product, gradient, inner,
                               inner_gradient, bordered, sums.data() + kernel, sums.data() + depthwise_size + product,
                               in_gradient);
        }
        T* to = x_gradient + (n * sizes.states + s) * c_n * g.h * g.w;
        for (int64_t k = 0; k < c_n * g.h; ++k) {
          const int64_t c = k / g.h, i = k % g.h;
          const T *passed = from + k * g.w, *plane = in_gradient + c * in_step;
          T* row = to + k * g.w;
          if (g.stride == 1) {
            plane += i * g.out_row;
#pragma omp simd
            for (int64_t j = 0; j < g.w; ++j) row[j] = passed[j] > 0 ? plane[j] : T(0);
          } else {
            plane += (i + g.padding) * g.row;
            for (int64_t j = 0; j < g.w; ++j) row[j] = passed[j] > 0 ? plane[g.at(0, j + g.padding)] : T(0);
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

// Calls f(lanes, kernel) with both as types, and the geometry.
template <typename T, typename F>
void with_sizes(const Tensor& x, const Tensor& depthwise, int stride, int dilation, F f) {
  const int64_t kernel = depthwise.shape()[2];
  with_lanes<T>((x.shape()[3] - 1) / stride + 1, [&](auto lanes) {
    const Geometry g = Geometry::of<T>(x.shape()[2], x.shape()[3], stride, dilation * (kernel / 2), lanes);
    switch (kernel) {
      case 3: f(lanes, std::integral_constant<int, 3>(), g); break;
      case 5: f(lanes, std::integral_constant<int, 5>(), g); break;
      case 7: f(lanes, std::integral_constant<int, 7>(), g); break;
      default: PD_THROW("a separable convolution of this size is not built");
    }
  });
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, int stride, int dilation) {
  const Sizes sizes(x, depthwise, pointwise);
  Tensor out = paddle::empty({sizes.n, depthwise.shape()[0], (x.shape()[2] - 1) / stride + 1, (x.shape()[3] - 1) / stride + 1},
                             x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.type(), "separable_conv", ([&] {
    with_sizes<data_t>(x, depthwise, stride, dilation, [&](auto lanes, auto kernel, const Geometry& g) {
      forward<data_t, decltype(lanes)::value, decltype(kernel)::value>(
          sizes, g, dilation, x.data<data_t>(), depthwise.data<data_t>(), pointwise.data<data_t>(), out.data<data_t>());
    });
  }));
  return {out};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise,
                             const Tensor& out_gradient, int stride, int dilation) {
  const Sizes sizes(x, depthwise, pointwise);
  Tensor x_gradient = paddle::empty(x.shape(), x.dtype(), x.place());
  Tensor depthwise_gradient = paddle::zeros(depthwise.shape(), x.dtype(), x.place());
  Tensor pointwise_gradient = paddle::zeros(pointwise.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.type(), "separable_conv_grad", ([&] {
    with_sizes<data_t>(x, depthwise, stride, dilation, [&](auto lanes, auto kernel, const Geometry& g) {
      backward<data_t, decltype(lanes)::value, decltype(kernel)::value>(
          sizes, g, dilation, x.data<data_t>(), depthwise.data<data_t>(), pointwise.data<data_t>(),
          out_gradient.data<data_t>(), x_gradient.data<data_t>(), depthwise_gradient.data<data_t>(),
          pointwise_gradient.data<data_t>());
    });
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
