// What a network computes outside of its cells, as operators for the CPU: the stem, and the step of all weights.
#include "cells.h"

namespace {

// 3 x 3 convolution of the images with padding 1 and stride 1, batch normalisation with scale and shift. The images are
// data, so they get no gradient. The kernels take the longest vectors themselves if these divide a plane.
template <typename T>
class Stem {
 public:
  Stem(const Tensor& images, const Tensor& weight, const Tensor& scale)
      : images_(images.data<T>()), weight_(weight.data<T>()), scale_(scale.data<T>()), n_(images.shape()[0]),
        c_in_(images.shape()[1]), c_(weight.shape()[0]), taps_(9 * c_in_),
        g_(Geometry::of<T>(images.shape()[2], images.shape()[3], 1, 0, L)), plane_(g_.h * g_.w) {}

  // Numbers of the results of the convolution, which the gradient needs: [N, C planes].
  static int64_t saved_size(const Shape& images, int64_t channels) {
    return images[0] * channels * Geometry::of<T>(images[2], images[3], 1, 0, L).size;
  }

  // Writes out [N, C, h, w], saved, statistics [C, 2]: mean, 1 / sqrt(variance + epsilon), and the new running mean and
  // variance [C].
  void forward(const T* shift, const T* mean, const T* variance, const Normalisation& normalisation, T* out, T* saved,
               T* statistics, T* new_mean, T* new_variance) {
    std::vector<double> moments(n_ * c_ * 2);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(taps_ * g_.step);
      T* columns = scratch.zeros(taps_ * g_.step);
      share(n_, 1, [&](int64_t n) {
        T* result = saved + n * c_ * g_.size;
        gather(n, columns);
        {
          Timed timed(Phase::kPointwise);
          multiply<T, L>(weight_, taps_, 1, columns, g_.step, c_, taps_, g_.size, result, g_.size);
        }
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < c_ && normalisation.training; ++c)
          compute_moments<T, L>(g_, result + c * g_.size, moments.data() + (n * c_ + c) * 2);
      });
      share(c_, 8, [&](int64_t c) {
        normalisation.combine(moments.data() + 2 * c, n_, 2 * c_, plane_, mean[c], variance[c], statistics + 2 * c,
                              new_mean + c, new_variance + c);
      });
      share(n_, 1, [&](int64_t n) {
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < c_; ++c) {
          const T factor = scale_[c] * statistics[2 * c + 1], centre = statistics[2 * c];
          const T* from = saved + (n * c_ + c) * g_.size;
          T* to = out + (n * c_ + c) * plane_;
          for (int64_t i = 0; i < g_.rows(); ++i)
#pragma omp simd
            for (int64_t j = 0; j < g_.columns(); ++j)
              to[i * g_.w + j] = factor * (from[i * g_.out_row + j] - centre) + shift[c];
        }
      });
    }
  }

  // Adds to the gradient of weight [C, taps], and writes those of scale and shift [C]; d [N, C, h, w]: gradient of the
  // output.
  void backward(const T* saved, const T* statistics, const T* d, const Normalisation& normalisation, T* weight_gradient,
                T* scale_gradient, T* shift_gradient) {
    std::vector<double> sums(n_ * c_ * 2);
    std::vector<T> d_mean(c_), slope(c_);
    PartialSums<T> partial(n_, c_ * taps_);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(taps_ * g_.step + c_ * g_.step);
      T *columns = scratch.zeros(taps_ * g_.step), *gradient = scratch.zeros(c_ * g_.step);
      partial.clear();
      share(n_, 1, [&](int64_t n) {
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < c_; ++c)
          sum_gradient(g_, d + (n * c_ + c) * plane_, g_.w, T(1), saved + (n * c_ + c) * g_.size, statistics[2 * c],
                       sums.data() + (n * c_ + c) * 2);
      });
      share(c_, 8, [&](int64_t c) {
        normalisation.differentiate(sums.data() + 2 * c, n_, 2 * c_, plane_, statistics[2 * c + 1], scale_gradient + c,
                                    shift_gradient + c, &d_mean[c], &slope[c]);
      });
      partial.for_images([&](int64_t n, T* weight_sums) {
        {
          Timed timed(Phase::kNormalisation);
          for (int64_t c = 0; c < c_; ++c)
            batch_norm_backward(g_, d + (n * c_ + c) * plane_, g_.w, T(1), saved + (n * c_ + c) * g_.size,
                                scale_[c] * statistics[2 * c + 1], d_mean[c], statistics[2 * c], slope[c],
                                gradient + c * g_.step);
        }
        gather(n, columns);
        Timed timed(Phase::kPointwise);
        add_outer<T, L>(gradient, g_.step, columns, g_.step, c_, taps_, g_.size, weight_sums);
      });
      partial.add_to(weight_gradient, 0, c_ * taps_);
    }
  }

 private:
  static constexpr int L = 4;

  // Writes for each tap of the kernel the plane of the numbers that it reads, 0 outside of the image: a convolution is
  // then a product of matrices. The columns from out_w on are kept.
  void gather(int64_t n, T* columns) const {
    Timed timed(Phase::kPad);
    for (int64_t tap = 0; tap < taps_; ++tap) {
      const T* plane = images_ + (n * c_in_ + tap / 9) * plane_;
      const int64_t down = tap % 9 / 3 - 1, right = tap % 3 - 1, first = std::max<int64_t>(0, -right);
      const int64_t count = std::max<int64_t>(0, g_.w - std::abs(right));
      for (int64_t i = 0; i < g_.h; ++i) {
        T* to = columns + tap * g_.step + i * g_.out_row;
        if (i + down < 0 || i + down >= g_.h) {
          std::fill_n(to, g_.w, T(0));
          continue;
        }
        if (right) to[right < 0 ? 0 : g_.w - 1] = 0;
        std::memcpy(to + first, plane + (i + down) * g_.w + first + right, count * sizeof(T));
      }
    }
  }

  const T *images_, *weight_, *scale_;
  const int64_t n_, c_in_, c_, taps_;
  const Geometry g_;
  const int64_t plane_;
};

void check_stem(const Tensor& images, const Tensor& weight, const Tensor& scale, float epsilon) {
  check_types({images, weight, scale});
  require(epsilon > 0, "epsilon has to be positive");
  const Shape shape = images.shape();
  require(shape.size() == 4 && shape[1] > 0 && shape[2] > 0 && shape[3] > 0 &&
              weight.shape().size() == 4 && weight.shape()[0] > 0,
          "the images have to be [N, C, H, W], and the weight of the stem [channels, C, 3, 3]");
  check_shape("the weight of the stem", weight, {weight.shape()[0], shape[1], 3, 3});
  check_shape("the scale of the stem", scale, {weight.shape()[0]});
}

Shape stem_shape(const Shape& images, const Shape& weight) { return {images[0], weight[0], images[2], images[3]}; }

std::vector<Tensor> StemForward(const Tensor& images, const Tensor& weight, const Tensor& scale, const Tensor& shift,
                                const Tensor& mean, const Tensor& variance, bool training, bool, float epsilon,
                                float momentum) {
  check_stem(images, weight, scale, epsilon);
  check_types({images, shift, mean, variance});
  for (const Tensor* tensor : {&shift, &mean, &variance}) check_shape("a vector of the stem", *tensor, scale.shape());
  const auto empty = [&](const Shape& sizes) { return paddle::empty(sizes, images.dtype(), images.place()); };
  const int64_t channels = weight.shape()[0];
  Tensor out = empty(stem_shape(images.shape(), weight.shape())), saved, statistics = empty({channels, 2});
  Tensor new_mean = empty({channels}), new_variance = empty({channels});
  DARTS_DISPATCH(images.type(), "darts_stem", ([&] {
    saved = empty({Stem<data_t>::saved_size(images.shape(), channels)});
    Stem<data_t>(images, weight, scale)
        .forward(shift.data<data_t>(), mean.data<data_t>(), variance.data<data_t>(), {training, epsilon, momentum},
                 out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(), new_mean.data<data_t>(),
                 new_variance.data<data_t>());
  }));
  return {out, saved, statistics, new_mean, new_variance};
}

std::vector<Tensor> StemBackward(const Tensor& images, const Tensor& weight, const Tensor& scale, const Tensor&,
                                 const Tensor& saved, const Tensor& statistics, const Tensor& out_gradient,
                                 bool training, bool weight_gradients, float epsilon, float momentum) {
  check_stem(images, weight, scale, epsilon);
  check_types({images, saved, statistics, out_gradient});
  check_shape("the gradient of the stem's output", out_gradient, stem_shape(images.shape(), weight.shape()));
  check_shape("the tensor of statistics", statistics, {weight.shape()[0], 2});
  const auto zeros = [&](const Tensor& like) { return paddle::zeros(like.shape(), like.dtype(), like.place()); };
  Tensor weight_gradient = zeros(weight), scale_gradient = zeros(scale), shift_gradient = zeros(scale);
  DARTS_DISPATCH(images.type(), "darts_stem_grad", ([&] {
    check_shape("the tensor of saved results", saved, {Stem<data_t>::saved_size(images.shape(), weight.shape()[0])});
    if (weight_gradients)
      Stem<data_t>(images, weight, scale)
          .backward(saved.data<data_t>(), statistics.data<data_t>(), out_gradient.data<data_t>(),
                    {training, epsilon, momentum}, weight_gradient.data<data_t>(), scale_gradient.data<data_t>(),
                    shift_gradient.data<data_t>());
  }));
  return {weight_gradient, scale_gradient, shift_gradient};
}

// For wrong inputs it returns unknown sizes: an exception would end the process here. The kernel raises the error.
std::vector<Shape> StemShapes(const Shape& images, const Shape& weight, const Shape& scale, const Shape&, const Shape&,
                              const Shape&, bool, bool, float, float) {
  if (images.size() != 4 || weight.size() != 4) return {{-1, -1, -1, -1}, {-1}, {-1, 2}, scale, scale};
  return {stem_shape(images, weight), {-1}, {weight[0], 2}, scale, scale};
}

using paddle::DataType;
std::vector<DataType> StemTypes(const DataType& images, const DataType&, const DataType&, const DataType&,
                                const DataType&, const DataType&) {
  return {images, images, images, images, images};
}

constexpr int64_t kBlock = 4096;                 // weights that one call of `share` updates

// Returns the Euclidean norm of g [size] in a parallel region. squares: memory for a number per block. The order of the
// additions does not depend on the threads.
template <typename T>
T norm(const T* g, int64_t size, std::vector<double>* squares) {
  share(squares->size(), 4, [&](int64_t block) {
    double sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t k = block * kBlock; k < std::min(size, (block + 1) * kBlock); ++k) sum += double(g[k]) * g[k];
    (*squares)[block] = sum;
  });
  double sum = 0;
  for (double square : *squares) sum += square;
  return std::sqrt(sum);
}

// One step of SGD with momentum, in one pass over the weights: g <- g min(1, limit / ||g||), v' = momentum v +
// (g + weight_decay w), w' = w - lr v'. limit: infinite for none.
template <typename T>
void step(const T* w, const T* v, const T* g, int64_t size, T momentum, T weight_decay, T lr, T limit, T* w_to,
          T* v_to) {
  std::vector<double> squares((size + kBlock - 1) / kBlock);
#pragma omp parallel num_threads(threads())
  {
    const T factor = std::isinf(limit) ? T(1) : limit / std::max(norm(g, size, &squares), limit);     // keeps a NaN
    share(squares.size(), 4, [&](int64_t block) {
      Timed timed(Phase::kSums);
#pragma omp simd
      for (int64_t k = block * kBlock; k < std::min(size, (block + 1) * kBlock); ++k) {
        v_to[k] = momentum * v[k] + (factor * g[k] + weight_decay * w[k]);
        w_to[k] = w[k] - lr * v_to[k];
      }
    });
  }
}

// numbers [1]: momentum, weight decay, lr and, or none, the limit.
std::vector<Tensor> MomentumStep(const Tensor& weights, const Tensor& velocity, const Tensor& gradient,
                                 const std::vector<Tensor>& numbers) {
  check_types({weights, velocity, gradient});
  check_types(numbers);
  require(weights.shape().size() == 1 && (numbers.size() == 3 || numbers.size() == 4) &&
              numbers[0].dtype() == weights.dtype(),
          "a step needs vectors, and three or four numbers of their element type");
  for (const Tensor* tensor : {&velocity, &gradient}) check_shape("a vector of a step", *tensor, weights.shape());
  for (const Tensor& number : numbers) check_shape("a number of a step", number, {1});
  const auto empty = [&] { return paddle::empty(weights.shape(), weights.dtype(), weights.place()); };
  Tensor new_weights = empty(), new_velocity = empty();
  DARTS_DISPATCH(weights.type(), "darts_momentum_step", ([&] {
    const auto number = [&](size_t k) { return numbers[k].data<data_t>()[0]; };
    step(weights.data<data_t>(), velocity.data<data_t>(), gradient.data<data_t>(), weights.numel(), number(0),
         number(1), number(2), numbers.size() > 3 ? number(3) : std::numeric_limits<data_t>::infinity(),
         new_weights.data<data_t>(), new_velocity.data<data_t>());
  }));
  return {new_weights, new_velocity};
}

std::vector<Shape> StepShapes(const Shape& weights, const Shape&, const Shape&, const std::vector<Shape>&) {
  return {weights, weights};
}
std::vector<DataType> StepTypes(const DataType& weights, const DataType&, const DataType&,
                                const std::vector<DataType>&) {
  return {weights, weights};
}

}  // namespace

#define DARTS_STEM_ATTRIBUTES {"training: bool", "weight_gradients: bool", "epsilon: float", "momentum: float"}

PD_BUILD_OP(darts_stem)
    .Inputs({"Images", "Weight", "Scale", "Shift", "Mean", "Variance"})
    .Outputs({"Out", "Saved", "Statistics", "NewMean", "NewVariance"})
    .Attrs(DARTS_STEM_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(StemForward))
    .SetInferShapeFn(PD_INFER_SHAPE(StemShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(StemTypes));

// Paddle takes the shapes of the gradients from inputs of the same names, so the shift is an input.
PD_BUILD_GRAD_OP(darts_stem)
    .Inputs({"Images", "Weight", "Scale", "Shift", "Saved", "Statistics", paddle::Grad("Out")})
    .Outputs({paddle::Grad("Weight"), paddle::Grad("Scale"), paddle::Grad("Shift")})
    .Attrs(DARTS_STEM_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(StemBackward));

PD_BUILD_OP(darts_momentum_step)
    .Inputs({"Weights", "Velocity", "Gradient", paddle::Vec("Numbers")})
    .Outputs({"NewWeights", "NewVelocity"})
    .SetKernelFn(PD_KERNEL(MomentumStep))
    .SetInferShapeFn(PD_INFER_SHAPE(StepShapes))
    .SetInferDtypeFn(PD_INFER_DTYPE(StepTypes));
