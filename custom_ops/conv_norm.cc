// ReLU, depthwise k x k, pointwise, batch normalisation, once or twice: an operation of a discrete network as one
// operator for the CPU. README.md in this folder explains the layout and the order of the loops.
#include "kernels.h"

#include <cmath>
#include <memory>

int darts_threads = 0;

namespace {

// K = 1 stands for no depthwise convolution: ReLU, pointwise from c_in to c_out channels, normalisation.
template <typename T, int L, int K>
class ConvNorm {
 public:
  ConvNorm(const Tensor& x, const Tensor& affine, int stages, int stride, int dilation)
      : n_(x.shape()[0]), c_in_(x.shape()[1]), c_(affine.shape()[0] / (2 * stages)), stages_(stages), dilation_(dilation),
        first_(Geometry::of<T>(x.shape()[2], x.shape()[3], stride, dilation * (K / 2), L)),
        second_(Geometry::of<T>(first_.out_h, first_.out_w, 1, K / 2, L)), size_(first_.size),
        plane_(first_.out_h * first_.out_w) {}

  static int64_t plane_size(int64_t out_h, int64_t out_w) { return out_h * ((out_w + L - 1) / L * L); }

  // affine, running [stages, 2, C]: scale and shift, mean and variance; mask: null, or what each image is multiplied by;
  // saved [N, stages, C planes]; statistics [stages, C, 2]: mean and 1 / sqrt(variance + epsilon).
  void forward(const T* x, const T* depthwise, const T* pointwise, const T* affine, const T* running, const T* mask,
               bool training, double epsilon, double momentum, T* out, T* saved, T* statistics, T* new_running) {
    std::vector<double> moments(n_ * c_ * 2);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch;
      scratch.reserve(room() + inner_room());
      T *padded = scratch.zeros(room()), *inner = scratch.zeros(inner_room());
      for (int stage = 0; stage < stages_; ++stage) {
        const Separable<T, L, K> convolution(geometry(stage), dilation_, c_);
        const T *weight = depthwise + stage * c_ * K * K, *product = pointwise + stage * c_ * c_;
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          T* result = saved + (n * stages_ + stage) * c_ * size_;
          prepare(stage, n, x, saved, affine, statistics, padded, inner);
          if (K == 1) multiply<T, L>(product, c_in_, 1, inner, first_.step, c_, c_in_, size_, result, size_);
          else convolution.forward(padded, weight, product, inner, result);
          for (int64_t c = 0; c < c_ && training; ++c)
            take_moments(first_, result + c * size_, moments.data() + (n * c_ + c) * 2);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < c_; ++c) {
          const int64_t at = stage * 2 * c_ + c;                              // of the mean; the variance is c_ further
          double mean = running[at], variance = running[at + c_];
          if (training) combine_moments(moments.data() + 2 * c, n_, 2 * c_, plane_, &mean, &variance);
          T* both = statistics + (stage * c_ + c) * 2;
          both[0] = mean, both[1] = 1 / std::sqrt(variance + epsilon);
          new_running[at] = training ? momentum * running[at] + (1 - momentum) * mean : running[at];
          new_running[at + c_] = training ? momentum * running[at + c_] + (1 - momentum) * variance : running[at + c_];
        }
      }
      const int64_t last = (stages_ - 1) * c_;
#pragma omp for schedule(static)
      for (int64_t k = 0; k < n_ * c_; ++k) {
        const int64_t n = k / c_, c = k % c_;
        const T *from = saved + (n * stages_ * c_ + last + c) * size_, *both = statistics + (last + c) * 2;
        const T keep = mask ? mask[n] : T(1), mean = both[0];
        const T factor = keep * affine[2 * last + c] * both[1], shift = keep * affine[2 * last + c_ + c];
        for (int64_t i = 0; i < first_.rows(); ++i)
#pragma omp simd
          for (int64_t j = 0; j < first_.columns(); ++j)
            out[k * plane_ + i * first_.out_w + j] = factor * (from[i * first_.out_row + j] - mean) + shift;
      }
    }
  }

  void backward(const T* x, const T* depthwise, const T* pointwise, const T* affine, const T* mask, bool training,
                const T* saved, const T* statistics, const T* out_gradient, T* x_gradient, T* depthwise_gradient, T* pointwise_gradient,
                T* affine_gradient) {
    const int64_t depthwise_size = K == 1 ? 0 : stages_ * c_ * K * K, pointwise_size = stages_ * c_ * c_in_;
    const std::vector<T> turned = turn_round(depthwise, depthwise_size / (K * K), K * K);
    // Each thread sums the gradients of the weights over its images; the sums are added in order, so that a run repeats
    // itself.
    std::vector<std::vector<T>> partial(threads());
    std::unique_ptr<T[]> between(stages_ > 1 ? new T[n_ * c_ * size_] : nullptr);      // behind the first normalisation
    std::vector<double> sums(n_ * c_ * 2);
    std::vector<T> d_mean(c_), slope(c_);
#pragma omp parallel num_threads(threads())
    {
      auto& weights = partial[omp_get_thread_num()];
      weights.assign(depthwise_size + pointwise_size, 0);
      Scratch<T> scratch;
      const int64_t in_size = std::max({c_in_ * (first_.stride == 1 ? first_.step : first_.plane), c_ * second_.step});
      const int64_t border = std::max(first_.plane, second_.plane);
      scratch.reserve(room() + 2 * inner_room() + 2 * c_ * first_.step + in_size + border);
      T *padded = scratch.zeros(room()), *inner = scratch.zeros(inner_room()), *d = scratch.zeros(c_ * first_.step);
      T *inner_gradient = scratch.take(inner_room()), *gradient = scratch.zeros(c_ * first_.step);
      T *in_gradient = scratch.take(in_size), *bordered = scratch.take(border);
      for (int stage = stages_ - 1; stage >= 0; --stage) {
        const bool last = stage == stages_ - 1;
        const Geometry& g = geometry(stage);
        const Separable<T, L, K> convolution(g, dilation_, c_);
        const T *scale = affine + stage * 2 * c_, *both = statistics + stage * c_ * 2;
        const T *weight = depthwise + stage * c_ * K * K, *product = pointwise + stage * c_ * c_;
        // The gradient behind this normalisation: given for the last, made by the loop below for the one before.
        const auto behind = [&](int64_t n, int64_t c) -> const T* {
          if (!last) return between.get() + (n * c_ + c) * size_;
          const T* from = out_gradient + (n * c_ + c) * plane_;
          const T keep = mask ? mask[n] : T(1);
          T* to = d + c * first_.step;
          for (int64_t i = 0; i < first_.rows(); ++i)
#pragma omp simd
            for (int64_t j = 0; j < first_.columns(); ++j) to[i * first_.out_row + j] = keep * from[i * first_.out_w + j];
          return to;
        };
        if (last) {
#pragma omp for schedule(static)
          for (int64_t n = 0; n < n_; ++n)
            for (int64_t c = 0; c < c_; ++c)
              add_up(first_, behind(n, c), saved + ((n * stages_ + stage) * c_ + c) * size_, both[2 * c], sums.data() + (n * c_ + c) * 2);
        }
#pragma omp for schedule(static)
        for (int64_t c = 0; c < c_; ++c) {
          double total = 0, dot = 0;
          for (int64_t n = 0; n < n_; ++n) total += sums[(n * c_ + c) * 2], dot += sums[(n * c_ + c) * 2 + 1];
          const double rstd = both[2 * c + 1], count = n_ * plane_;
          affine_gradient[stage * 2 * c_ + c] = dot * rstd, affine_gradient[stage * 2 * c_ + c_ + c] = total;
          // Running statistics do not depend on the batch.
          d_mean[c] = training ? total / count : 0, slope[c] = training ? rstd * rstd * dot / count : 0;
        }
        if (K > 1) std::fill(bordered, bordered + g.plane, T(0));
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          const T* result = saved + (n * stages_ + stage) * c_ * size_;
          for (int64_t c = 0; c < c_; ++c)
            differentiate(first_, behind(n, c), result + c * size_, scale[c] * both[2 * c + 1], d_mean[c], both[2 * c], slope[c],
                          gradient + c * first_.step);
          prepare(stage, n, x, saved, affine, statistics, padded, inner);
          if (K == 1) {
            add_outer<T, L>(gradient, first_.step, inner, first_.step, c_, c_in_, size_, weights.data());
            multiply<T, L>(product, 1, c_in_, gradient, first_.step, c_in_, c_, size_, in_gradient, first_.step);
          } else {
            std::fill(in_gradient, in_gradient + c_ * (g.stride == 1 ? g.step : g.plane), T(0));
            T* kernels = weights.data() + stage * c_ * K * K;
            convolution.backward(padded, weight, turned.data() + stage * c_ * K * K, product, gradient, inner,
                                 inner_gradient, bordered, kernels, weights.data() + depthwise_size + stage * c_ * c_,
                                 in_gradient);
          }
          if (stage == 0) {
            for (int64_t c = 0; c < c_in_; ++c) {
              const int64_t at = (n * c_in_ + c) * g.h * g.w;
              through_relu(g, x + at, in_gradient + c * (g.stride == 1 ? g.step : g.plane), x_gradient + at);
            }
          } else {
            const T *first = statistics, *first_affine = affine;
            for (int64_t c = 0; c < c_; ++c) {
              const T* y = saved + (n * stages_ * c_ + c) * size_;
              const T mean = first[2 * c], factor = first_affine[c] * first[2 * c + 1], shift = first_affine[c_ + c];
              through_normalised_relu<T, L>(first_, y, factor, mean, shift, in_gradient + c * g.step,
                                            between.get() + (n * c_ + c) * size_, sums.data() + (n * c_ + c) * 2);
            }
          }
        }
      }
    }
    for (const auto& each : partial) {
      if (each.empty()) continue;                  // fewer threads came than were asked for
      for (int64_t k = 0; k < depthwise_size; ++k) depthwise_gradient[k] += each[k];
      for (int64_t k = 0; k < pointwise_size; ++k) pointwise_gradient[k] += each[depthwise_size + k];
    }
  }

 private:
  const Geometry& geometry(int stage) const { return stage == 0 ? first_ : second_; }
  int64_t room() const { return K == 1 ? 0 : c_ * std::max(first_.plane, second_.plane); }
  int64_t inner_room() const { return c_in_ * first_.step; }
  // What the convolution of a stage reads: with a kernel, padded planes; without, planes first_.step apart in `inner`.
  void prepare(int stage, int64_t n, const T* x, const T* saved, const T* affine, const T* statistics, T* padded,
               T* inner) const {
    // The border is 0; what the other stage left there is in the way where it lays its planes out differently.
    if (stages_ > 1 && first_.stride > 1) std::fill(padded, padded + room(), T(0));
    if (stage > 0) {
      for (int64_t c = 0; c < c_; ++c)
        normalise(second_, saved + (n * stages_ * c_ + c) * size_, first_.out_row, affine[c] * statistics[2 * c + 1],
                  statistics[2 * c], affine[c_ + c], padded + c * second_.plane);
      return;
    }
    for (int64_t c = 0; c < c_in_; ++c) {
      const T* from = x + (n * c_in_ + c) * first_.h * first_.w;
      if (K > 1) {
        pad(first_, from, padded + c * first_.plane);
        continue;
      }
      T* to = inner + c * first_.step;
      for (int64_t i = 0; i < first_.rows(); ++i)
#pragma omp simd
        for (int64_t j = 0; j < first_.columns(); ++j) {
          const T value = from[i * first_.w + j];
          to[i * first_.out_row + j] = value < 0 ? T(0) : value;              // a NaN stays one
        }
    }
  }
  const int64_t n_, c_in_, c_;
  const int stages_, dilation_;
  const Geometry first_, second_;
  const int64_t size_, plane_;                   // numbers of a plane of the result in scratch, and in a tensor
};

// Calls f(ConvNorm) for these sizes.
template <typename T, typename F>
void with_sizes(const Tensor& x, const Tensor& depthwise, const Tensor& affine, int stages, int stride, int dilation, F f) {
  with_lanes<T>((x.shape()[3] - 1) / stride + 1, [&](auto lanes) {
    constexpr int L = decltype(lanes)::value;
    switch (depthwise.shape()[2]) {
      case 1: f(ConvNorm<T, L, 1>(x, affine, stages, stride, dilation)); break;
      case 3: f(ConvNorm<T, L, 3>(x, affine, stages, stride, dilation)); break;
      case 5: f(ConvNorm<T, L, 5>(x, affine, stages, stride, dilation)); break;
      case 7: f(ConvNorm<T, L, 7>(x, affine, stages, stride, dilation)); break;
      default: PD_THROW("a separable convolution of this size is not built");
    }
  });
}

std::vector<Tensor> Forward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, const Tensor& affine,
                            const Tensor& running, const Tensor& mask, int stages, int stride, int dilation, bool training,
                            bool masked, float epsilon, float momentum) {
  const int64_t n = x.shape()[0], c = affine.shape()[0] / (2 * stages);
  const int64_t h = (x.shape()[2] - 1) / stride + 1, w = (x.shape()[3] - 1) / stride + 1;
  Tensor out = paddle::empty({n, c, h, w}, x.dtype(), x.place()), saved;
  Tensor statistics = paddle::empty({stages * c, 2}, x.dtype(), x.place());
  Tensor new_running = paddle::empty(running.shape(), x.dtype(), x.place());
  PD_DISPATCH_FLOATING_TYPES(x.type(), "conv_norm", ([&] {
    with_sizes<data_t>(x, depthwise, affine, stages, stride, dilation, [&](auto op) {
      saved = paddle::empty({n, stages * c, op.plane_size(h, w)}, x.dtype(), x.place());
      op.forward(x.data<data_t>(), depthwise.data<data_t>(), pointwise.data<data_t>(), affine.data<data_t>(),
                 running.data<data_t>(), masked ? mask.data<data_t>() : nullptr, training, epsilon, momentum,
                 out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(), new_running.data<data_t>());
    });
  }));
  return {out, saved, statistics, new_running};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& depthwise, const Tensor& pointwise, const Tensor& affine,
                             const Tensor& mask, const Tensor& saved, const Tensor& statistics, const Tensor& out_gradient,
                             int stages, int stride, int dilation, bool training, bool masked, float, float) {
  const auto like = [](const Tensor& t) { return paddle::zeros(t.shape(), t.dtype(), t.place()); };
  Tensor x_gradient = paddle::empty(x.shape(), x.dtype(), x.place()), depthwise_gradient = like(depthwise);
  Tensor pointwise_gradient = like(pointwise), affine_gradient = like(affine);
  PD_DISPATCH_FLOATING_TYPES(x.type(), "conv_norm_grad", ([&] {
    with_sizes<data_t>(x, depthwise, affine, stages, stride, dilation, [&](auto op) {
      op.backward(x.data<data_t>(), depthwise.data<data_t>(), pointwise.data<data_t>(), affine.data<data_t>(),
                  masked ? mask.data<data_t>() : nullptr, training, saved.data<data_t>(), statistics.data<data_t>(),
                  out_gradient.data<data_t>(), x_gradient.data<data_t>(), depthwise_gradient.data<data_t>(),
                  pointwise_gradient.data<data_t>(), affine_gradient.data<data_t>());
    });
  }));
  return {x_gradient, depthwise_gradient, pointwise_gradient, affine_gradient};
}

using Shape = std::vector<int64_t>;
std::vector<Shape> InferShape(const Shape& x, const Shape&, const Shape&, const Shape& affine, const Shape& running, const Shape&,
                              int stages, int stride, int, bool, bool, float, float) {
  const int64_t c = affine[0] / (2 * stages);
  return {{x[0], c, (x[2] - 1) / stride + 1, (x[3] - 1) / stride + 1}, {x[0], stages * c, -1}, {stages * c, 2}, running};
}

using paddle::DataType;
std::vector<DataType> InferDtype(DataType x, DataType, DataType, DataType, DataType, DataType) { return {x, x, x, x}; }

}  // namespace

PD_BUILD_OP(darts_conv_norm)
    .Inputs({"X", "Depthwise", "Pointwise", "Affine", "Running", "Mask"})
    .Outputs({"Out", "Saved", "Statistics", "NewRunning"})
    .Attrs({"stages: int", "stride: int", "dilation: int", "training: bool", "masked: bool", "epsilon: float",
            "momentum: float"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_conv_norm)
    .Inputs({"X", "Depthwise", "Pointwise", "Affine", "Mask", "Saved", "Statistics", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Depthwise"), paddle::Grad("Pointwise"), paddle::Grad("Affine")})
    .Attrs({"stages: int", "stride: int", "dilation: int", "training: bool", "masked: bool", "epsilon: float",
            "momentum: float"})
    .SetKernelFn(PD_KERNEL(Backward));
