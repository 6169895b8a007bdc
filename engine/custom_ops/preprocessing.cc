// The preprocessing of both inputs of a supernet cell as one operator for the CPU: ReLU, 1x1 convolution or
// FactorizedReduce, batch normalisation without scale and shift. README.md in this folder explains the order of the loops.
#include "cells.h"

namespace {

// One input of the cell: planes [h, w] of `channels` -> C planes, by one convolution, or with stride 2 by two, of half
// of the C channels each.
template <typename T, int L>
struct Input {
  struct Kernel {
    const T* value;
    T* gradient;                                 // null in the forward pass
    int64_t at;                                  // index in the sums of the gradients
  };
  const T* data;
  T* gradient;                                   // null in the forward pass
  int64_t channels, rows;                        // rows: C divided by the number of kernels
  Geometry geometry;
  RectifiedConvolution<T, L> convolution;
  std::vector<Kernel> kernels;
};

template <typename T, int L>
class Preprocessing {
 public:
  // inputs: both states, the kernels of the first, the kernel of the second; gradients: those of all inputs, or null.
  Preprocessing(const std::vector<Tensor>& inputs, std::vector<Tensor>* gradients)
      : n_(inputs[0].shape()[0]), c_(inputs.back().shape()[0]), h_(inputs[1].shape()[2]), w_(inputs[1].shape()[3]),
        step_(Geometry::of<T>(h_, w_, 1, 0, L).step), plane_(h_ * w_) {
    for (size_t i = 0, next = 2; i < 2; ++i) {
      const Shape shape = inputs[i].shape();
      const int64_t stride = shape[2] / h_;
      const Geometry geometry = Geometry::of<T>(shape[2], shape[3], stride, 0, L);
      inputs_.push_back({inputs[i].data<T>(), gradients ? (*gradients)[i].template data<T>() : nullptr, shape[1],
                         c_ / stride, geometry, RectifiedConvolution<T, L>(geometry, shape[1]), {}});
      for (int64_t k = 0; k < stride; ++k, ++next) {
        inputs_[i].kernels.push_back({inputs[next].data<T>(),
                                      gradients ? (*gradients)[next].template data<T>() : nullptr, weights_size_});
        weights_size_ += inputs[next].numel();
      }
    }
  }

  // Writes x [N, 2 C, h, w] and rstd [2 C], 1 / sqrt(variance + epsilon).
  void forward(double epsilon, T* x, T* rstd) {
    std::vector<double> moments(n_ * 2 * c_ * 2);
    std::vector<T> means(2 * c_);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(grid_size() + c_ * step_);
      T *grid = scratch.zeros(grid_size()), *y = scratch.take(c_ * step_);
      share(2 * n_, 1, [&](int64_t k) {
        const Input<T, L>& input = inputs_[k % 2];
        for (size_t i = 0; i < input.kernels.size(); ++i)
          input.convolution.forward(image_of(input, k / 2), i, input.kernels[i].value, input.rows, grid,
                                    y + i * input.rows * step_, step_);
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < c_; ++c) {
          compute_moments<T, L>(input.geometry, y + c * step_, moments.data() + (k * c_ + c) * 2);
          compact_rows(input.geometry, y + c * step_, x + (k * c_ + c) * plane_);
        }
      });
      share(2 * c_, 16, [&](int64_t c) {
        double mean, variance;
        combine_moments(moments.data() + 2 * c, n_, 4 * c_, plane_, &mean, &variance);
        means[c] = mean, rstd[c] = 1 / std::sqrt(variance + epsilon);
      });
      share(n_, 1, [&](int64_t n) {
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < 2 * c_; ++c) {
          T* plane = x + (n * 2 * c_ + c) * plane_;
          const T mean = means[c], factor = rstd[c];
#pragma omp simd
          for (int64_t p = 0; p < plane_; ++p) plane[p] = factor * (plane[p] - mean);
        }
      });
    }
  }

  // d: gradient of x. weight_gradients: false leaves the gradients of the weights unchanged. constant_states: the number
  // of the first inputs whose gradients are not needed, and set to 0.
  void backward(const T* x, const T* rstd, const T* d, bool weight_gradients, int constant_states) {
    std::vector<double> sums(n_ * 2 * c_ * 2);
    std::vector<T> d_mean(2 * c_), slope(2 * c_);
    PartialSums<T> partial(n_, weight_gradients ? weights_size_ : 0);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(grid_size() + c_ * step_);
      T* grid = scratch.zeros(grid_size());
      T* gradient = scratch.zeros(c_ * step_);
      partial.clear();
      const Geometry plane = Geometry::of<T>(1, plane_, 1, 0, 1);
      share(n_, 1, [&](int64_t n) {
        Timed timed(Phase::kNormalisation);
        for (int64_t k = (n * 2 + constant_states) * c_; k < (n + 1) * 2 * c_; ++k)
          sum_gradient(plane, d + k * plane_, plane_, T(1), x + k * plane_, T(0), sums.data() + 2 * k);
      });
      share(2 * c_, 8, [&](int64_t c) {
        double total = 0, dot = 0;
        for (int64_t n = 0; n < n_; ++n) total += sums[(n * 2 * c_ + c) * 2], dot += sums[(n * 2 * c_ + c) * 2 + 1];
        d_mean[c] = total / (n_ * plane_), slope[c] = dot / (n_ * plane_);
      });
      partial.for_images([&](int64_t n, T* weight_sums) {
        for (int i = 0; i < 2; ++i) {
          const Input<T, L>& input = inputs_[i];
          Timed normalisation(Phase::kNormalisation);
          if (i < constant_states) {
            std::fill_n(input.gradient + n * image_size(input), image_size(input), T(0));
            continue;
          }
          for (int64_t c = 0; c < c_; ++c) {
            const int64_t channel = i * c_ + c, at = (n * 2 * c_ + channel) * plane_;
            differentiate_norm(input.geometry, d + at, x + at, rstd[channel], d_mean[channel], slope[channel],
                               gradient + c * step_);
          }
          for (size_t k = 0; k < input.kernels.size(); ++k) {
            const T* d_kernel = gradient + k * input.rows * step_;
            const auto& kernel = input.kernels[k];
            if (weight_gradients)
              input.convolution.add_weight_gradient(image_of(input, n), k, d_kernel, input.rows, grid,
                                                    weight_sums + kernel.at);
            input.convolution.backward(image_of(input, n), k, kernel.value, d_kernel, input.rows, grid, false,
                                       input.gradient + n * image_size(input));
          }
        }
      });
      for (const Input<T, L>& input : inputs_)
        for (const auto& kernel : input.kernels)
          if (weight_gradients) partial.add_to(kernel.gradient, kernel.at, input.rows * input.channels);
    }
  }

 private:
  int64_t grid_size() const { return std::max(inputs_[0].convolution.grid_size(), inputs_[1].convolution.grid_size()); }
  static int64_t image_size(const Input<T, L>& input) { return input.channels * input.geometry.h * input.geometry.w; }
  static const T* image_of(const Input<T, L>& input, int64_t n) { return input.data + n * image_size(input); }

  // Computes the gradient of the input of a normalisation from that of its output x: planes [h, w] -> a plane with
  // rounded-up rows, whose additional columns are kept.
  static void differentiate_norm(const Geometry& g, const T* d, const T* x, T rstd, T d_mean, T slope, T* to) {
    for (int64_t i = 0; i < g.rows(); ++i, d += g.out_w, x += g.out_w, to += g.out_row)
#pragma omp simd
      for (int64_t j = 0; j < g.columns(); ++j) to[j] = rstd * (d[j] - d_mean - x[j] * slope);
  }
  static void compact_rows(const Geometry& g, const T* from, T* to) {
    for (int64_t i = 0; i < g.rows(); ++i) std::memcpy(to + i * g.out_w, from + i * g.out_row, g.columns() * sizeof(T));
  }

  const int64_t n_, c_, h_, w_, step_, plane_;   // step_, plane_: distance between planes in scratch, in a tensor
  std::vector<Input<T, L>> inputs_;
  int64_t weights_size_ = 0;
};

// Checks the inputs of the forward pass; returns the shape of the output.
Shape check_inputs(const std::vector<Tensor>& inputs, float epsilon) {
  require(inputs.size() == 4 || inputs.size() == 5, "preprocessing needs two states and two or three kernels");
  require(epsilon > 0, "epsilon has to be positive");
  check_types(inputs);
  const Shape s0 = inputs[0].shape(), s1 = inputs[1].shape();
  const int64_t stride = inputs.size() - 3;
  require(s0.size() == 4 && s1.size() == 4 && s0[0] == s1[0] && s1[1] > 0 && s1[2] > 0 && s1[3] > 0 && s0[1] > 0 &&
              s0[2] == stride * s1[2] && s0[3] == stride * s1[3],
          "the states have to be [N, C, H, W] of the same N, H and W, the first with 2 H and 2 W if it has two kernels");
  const int64_t channels = inputs.back().shape()[0];
  require(channels > 0 && channels % stride == 0, "the number of channels of FactorizedReduce has to be even");
  for (int64_t k = 0; k < stride; ++k) check_shape("a kernel", inputs[2 + k], {channels / stride, s0[1], 1, 1});
  check_shape("a kernel", inputs.back(), {channels, s1[1], 1, 1});
  return {s1[0], 2 * channels, s1[2], s1[3]};
}

std::vector<Tensor> Forward(const std::vector<Tensor>& inputs, bool, int, float epsilon) {
  const Shape shape = check_inputs(inputs, epsilon);
  const auto empty = [&](const Shape& sizes) { return paddle::empty(sizes, inputs[0].dtype(), inputs[0].place()); };
  Tensor x = empty(shape), rstd = empty({shape[1]});
  DARTS_DISPATCH(x.type(), "darts_preprocessing", ([&] {
    dispatch_lanes<data_t>(shape[3], [&](auto lanes) {
      Preprocessing<data_t, decltype(lanes)::value>(inputs, nullptr)
          .forward(epsilon, x.data<data_t>(), rstd.data<data_t>());
    });
  }));
  return {x, rstd};
}

std::vector<Tensor> Backward(const std::vector<Tensor>& inputs, const Tensor& x, const Tensor& rstd,
                             const Tensor& x_gradient, bool weight_gradients, int constant_states,
                             float epsilon) {
  const Shape shape = check_inputs(inputs, epsilon);
  check_types({inputs[0], x, rstd, x_gradient});
  check_shape("the output", x, shape);
  check_shape("the gradient of the output", x_gradient, shape);
  check_shape("the tensor of statistics", rstd, {shape[1]});
  check_constant_states(constant_states, weight_gradients);
  std::vector<Tensor> gradients = gradients_of(inputs, 2);
  DARTS_DISPATCH(x.type(), "darts_preprocessing_grad", ([&] {
    dispatch_lanes<data_t>(shape[3], [&](auto lanes) {
      Preprocessing<data_t, decltype(lanes)::value>(inputs, &gradients)
          .backward(x.data<data_t>(), rstd.data<data_t>(), x_gradient.data<data_t>(), weight_gradients,
                    constant_states);
    });
  }));
  return gradients;
}

// For wrong inputs it returns unknown sizes: an exception would end the process here. The kernel raises the error.
std::vector<Shape> InferShape(const std::vector<Shape>& inputs, bool, int, float) {
  if (inputs.size() < 3 || inputs[1].size() != 4 || inputs.back().empty()) return {{-1, -1, -1, -1}, {-1}};
  const Shape& s1 = inputs[1];
  return {{s1[0], 2 * inputs.back()[0], s1[2], s1[3]}, {2 * inputs.back()[0]}};
}

std::vector<paddle::DataType> InferDtype(const std::vector<paddle::DataType>& inputs) { return {inputs[0], inputs[0]}; }

}  // namespace

#define DARTS_PREPROCESSING_ATTRIBUTES {"weight_gradients: bool", "constant_states: int", "epsilon: float"}

// Paddle requires a list of gradients to be the only output, so all inputs with a gradient form one list.
PD_BUILD_OP(darts_preprocessing)
    .Inputs({paddle::Vec("Inputs")})
    .Outputs({"Out", "Statistics"})
    .Attrs(DARTS_PREPROCESSING_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_preprocessing)
    .Inputs({paddle::Vec("Inputs"), "Out", "Statistics", paddle::Grad("Out")})
    .Outputs({paddle::Grad(paddle::Vec("Inputs"))})
    .Attrs(DARTS_PREPROCESSING_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Backward));
