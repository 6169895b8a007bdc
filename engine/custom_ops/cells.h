// What both operators of this folder know about cells: the convolutions by name, the weights of a cell, checks.
#pragma once

#include <cmath>
#include <iostream>
#include <string>

#include "kernels.h"

namespace {

using Shape = std::vector<int64_t>;

// Raises an error with a message of several parts. Paddle 3's executor replaces the message of an exception, so it is
// printed too.
template <typename... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::cerr << "compiled operator: ";
  (std::cerr << ... << parts) << std::endl;
  PD_THROW(parts...);
}
template <typename... Parts>
void require(bool condition, const Parts&... parts) {
  if (!condition) fail(parts...);
}

// The separable convolutions. stages: how often ReLU, convolution and normalisation follow each other; only the first
// stage has a stride.
struct ConvolutionKind {
  const char* name;
  int kernel, dilation, stages;
};
constexpr ConvolutionKind kConvolutions[] = {{"sep_conv_3x3", 3, 1, 2}, {"sep_conv_5x5", 5, 1, 2},
                                             {"sep_conv_7x7", 7, 1, 2}, {"dil_conv_3x3", 3, 2, 1},
                                             {"dil_conv_5x5", 5, 2, 1}};

// Returns the convolution of an operation, or null.
inline const ConvolutionKind* find_convolution(const std::string& name) {
  for (const ConvolutionKind& kind : kConvolutions)
    if (name == kind.name) return &kind;
  return nullptr;
}
inline bool is_pool(const std::string& name) { return name == "max_pool_3x3" || name == "avg_pool_3x3"; }

// Raises an error for an operation that neither cell computes.
inline void check_operation(const std::string& name) {
  require(find_convolution(name) || is_pool(name) || name == "skip_connect" || name == "none",
          "the compiled operators have no operation ", name);
}

inline void check_shape(const char* name, const Tensor& tensor, const Shape& expected) {
  require(tensor.shape() == expected, name, " has a wrong shape");
}

// constant_states: the number of the first states whose gradients are not needed.
inline void check_constant_states(int constant_states, bool weight_gradients) {
  require(constant_states >= 0 && constant_states <= (weight_gradients ? 0 : 2),
          "constant_states is not from 0 to 2, or not 0 with the gradients of the weights");
}

// Calls a function in which data_t is the element type. float64 takes a fifth of the time of compilation, and only tests
// need it: they compile it (-DDARTS_FLOAT64).
#ifdef DARTS_FLOAT64
#define DARTS_DISPATCH(type, name, ...) PD_DISPATCH_FLOATING_TYPES(type, name, __VA_ARGS__)
#else
#define DARTS_DISPATCH(type, name, ...) \
  do {                                  \
    using data_t = float;               \
    __VA_ARGS__();                      \
  } while (false)
#endif

// Raises an error unless all tensors are on the CPU and have the element type of the first one, one of those above.
inline void check_types(const std::vector<Tensor>& tensors) {
  require(!tensors.empty(), "there is no input");
  for (const Tensor& tensor : tensors) {
    require(tensor.is_cpu(), "an input is not on the CPU");
    require(tensor.dtype() == tensors[0].dtype(), "the inputs have different element types");
  }
#ifdef DARTS_FLOAT64
  const bool float64 = tensors[0].dtype() == paddle::DataType::FLOAT64;
#else
  const bool float64 = false;
#endif
  require(float64 || tensors[0].dtype() == paddle::DataType::FLOAT32,
          "the element type is not float32 (float64 is compiled with CXXFLAGS=-DDARTS_FLOAT64 only)");
}

// A batch normalisation with scale and shift, of one channel. moments and sums: of its plane in each of n images, at
// distances of `step`; plane: numbers of a plane.
struct Normalisation {
  bool training;                                 // by the batch, and update the running statistics; else by them
  double epsilon, momentum;

  // Computes mean_rstd [2], mean and 1 / sqrt(variance + epsilon), and the new running mean and variance from those
  // before and from `compute_moments`.
  template <typename T>
  void combine(const double* moments, int64_t n, int64_t step, int64_t plane, T running_mean, T running_variance,
               T* mean_rstd, T* new_mean, T* new_variance) const {
    double mean = running_mean, variance = running_variance;
    const double kept = training ? momentum : 1;
    if (training) combine_moments(moments, n, step, plane, &mean, &variance);
    mean_rstd[0] = mean, mean_rstd[1] = 1 / std::sqrt(variance + epsilon);
    *new_mean = kept * running_mean + (1 - kept) * mean;
    *new_variance = kept * running_variance + (1 - kept) * variance;
  }

  // Computes the gradients of scale and shift, and d_mean and slope for `batch_norm_backward`, from `sum_gradient`.
  template <typename T>
  void differentiate(const double* sums, int64_t n, int64_t step, int64_t plane, T rstd, T* scale_gradient,
                     T* shift_gradient, T* d_mean, T* slope) const {
    double total = 0, dot = 0;
    for (int64_t k = 0; k < n; ++k) total += sums[k * step], dot += sums[k * step + 1];
    const double count = n * plane, exact_rstd = rstd;
    *scale_gradient = dot * exact_rstd, *shift_gradient = total;
    // Running statistics do not depend on the batch, so only batch statistics contribute to the gradient.
    *d_mean = training ? total / count : 0;
    *slope = training ? exact_rstd * exact_rstd * dot / count : 0;
  }
};

// Assigns the weights of a cell to its operations. Every call of `take` returns the next rows of a tensor.
template <typename T>
class Weights {
 public:
  // inputs: those of the operator. From the third on they are tensors [rows, columns, k, k], one per pair (columns, k),
  // and possibly one tensor [rows] of all scales and shifts. gradients: tensors of the same shapes, or null.
  Weights(const std::vector<Tensor>& inputs, std::vector<Tensor>* gradients)
      : values_(inputs), gradients_(gradients), used_(inputs.size(), 0) {}

  struct Weight {
    const T* value = nullptr;
    T* gradient = nullptr;
    int64_t size = 0;
  };
  Weight take(int64_t rows, int64_t columns, int64_t kernel) {
    for (size_t k = 2; k < values_.size(); ++k) {
      const Shape shape = values_[k].shape();
      const bool fits = columns ? shape.size() == 4 && shape[1] == columns && shape[2] == kernel && shape[3] == kernel
                                : shape.size() == 1;
      const int64_t size = rows * (columns ? columns * kernel * kernel : 1);
      if (!fits || used_[k] + size > values_[k].numel()) continue;
      const int64_t from = used_[k];
      used_[k] += size;
      return {values_[k].data<T>() + from, gradients_ ? (*gradients_)[k].template data<T>() + from : nullptr, size};
    }
    fail("the cell lacks weights of one of its operations");
  }
  Weight take_affine(int64_t size) { return take(size, 0, 0); }
  void check_all_used() const {
    for (size_t k = 2; k < values_.size(); ++k)
      require(used_[k] == values_[k].numel(), "the cell has more weights than its operations need");
  }

 private:
  const std::vector<Tensor>& values_;
  std::vector<Tensor>* gradients_;
  std::vector<int64_t> used_;
};

// Returns tensors for the gradients of the inputs of a cell: those before `written` are written, the others added to.
inline std::vector<Tensor> gradients_of(const std::vector<Tensor>& inputs, size_t written) {
  std::vector<Tensor> gradients;
  for (const Tensor& input : inputs)
    gradients.push_back(gradients.size() < written ? paddle::empty(input.shape(), input.dtype(), input.place())
                                                   : paddle::zeros(input.shape(), input.dtype(), input.place()));
  return gradients;
}

}  // namespace
