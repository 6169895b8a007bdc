// A cell of a discrete network as one operator for the CPU, from the outputs of the two cells before to its own output.
// README.md in this folder explains the memory layout and the order of the loops.
#include "cells.h"

int darts_threads = 0;                           // of all operators, see kernels.h
#ifdef DARTS_PROFILE
double darts_phase_seconds[16];
const char* darts_phase_names[16] = {"pad", "depthwise", "pointwise", "normalisation", "pools", "sums", "waiting", "other"};
#endif

namespace {

// Planes [h, w] of a batch, with contiguous rows and planes. `image` is the distance between images.
template <typename T>
struct Images {
  T* data;
  int64_t image;
  operator Images<const T>() const { return {data, image}; }
};

// The factors of drop path for the result of an operation, one per image. Without data they are 1.
template <typename T>
struct Mask {
  const T* data;
  int64_t step;
  T operator[](int64_t n) const { return data ? data[n * step] : T(1); }
};

// Positions in the tensors of a cell; every operation advances them by its size.
template <typename T>
struct Buffers {
  T *saved, *statistics;                         // written by the forward pass and read by the backward pass
  const T* running;                              // running and new_running are null in the backward pass
  T* new_running;
};

template <typename T>
class Operation {
 public:
  virtual ~Operation() = default;
  virtual int64_t saved_size() const { return 0; }             // numbers kept for the gradient
  virtual int64_t workspace_size() const { return 0; }         // numbers of temporary memory of a backward pass
  virtual int64_t normalised_channels() const { return 0; }    // of all normalisations together
  virtual void bind(Buffers<T>*) {}
  // The result is computed in two parts, so that one pass over the images can finish both edges of a node: `begin`
  // computes what needs the complete batch, then `finish` image n of out = (with add: +=) keep * operation(x), in a
  // parallel region.
  virtual void begin(Images<const T>) {}
  virtual void finish(int64_t n, Images<const T> x, T keep, bool add, Images<T> out) = 0;
  // `sum` computes what `backward` needs of image n, in a parallel region. d: gradient of out.
  virtual void sum(int64_t, T, Images<const T>) {}
  // Computes to = (with add: +=) the gradient of x.
  virtual void backward(Images<const T> x, Mask<T> mask, Images<const T> d, bool add, Images<T> to, T* workspace) = 0;
};

// Copies (with add: adds) `size` numbers of image n.
template <typename T>
void copy_image(int64_t n, int64_t size, Images<const T> from, bool add, Images<T> to) {
  Timed timed(Phase::kSums);
  const T* source = from.data + n * from.image;
  T* target = to.data + n * to.image;
  if (!add) std::memcpy(target, source, size * sizeof(T));
  else
#pragma omp simd
    for (int64_t p = 0; p < size; ++p) target[p] += source[p];
}

// Copies (with add: adds) n images of `size` numbers.
template <typename T>
void copy_images(int64_t n, int64_t size, Images<const T> from, bool add, Images<T> to) {
#pragma omp parallel num_threads(threads())
  share(n, 1, [&](int64_t k) { copy_image(k, size, from, add, to); });
}

// Computes to = a + b, n images of `size` numbers.
template <typename T>
void sum_images(int64_t n, int64_t size, Images<const T> a, Images<const T> b, Images<T> to) {
#pragma omp parallel num_threads(threads())
  share(n, 1, [&](int64_t k) {
    Timed timed(Phase::kSums);
    const T *left = a.data + k * a.image, *right = b.data + k * b.image;
    T* target = to.data + k * to.image;
#pragma omp simd
    for (int64_t p = 0; p < size; ++p) target[p] = left[p] + right[p];
  });
}

template <typename T>
class Identity : public Operation<T> {
 public:
  Identity(int64_t n, int64_t size) : n_(n), size_(size) {}
  void finish(int64_t n, Images<const T> x, T, bool add, Images<T> out) override { copy_image(n, size_, x, add, out); }
  void backward(Images<const T>, Mask<T>, Images<const T> d, bool add, Images<T> to, T*) override {
    copy_images(n_, size_, d, add, to);
  }

 private:
  const int64_t n_, size_;
};

// The operation none: zero.
template <typename T>
class Zero : public Operation<T> {
 public:
  // size, out_size: numbers per image of the input and of the output.
  Zero(int64_t n, int64_t size, int64_t out_size) : n_(n), size_(size), out_size_(out_size) {}
  void finish(int64_t n, Images<const T>, T, bool add, Images<T> out) override {
    if (!add) std::fill_n(out.data + n * out.image, out_size_, T(0));
  }
  void backward(Images<const T>, Mask<T>, Images<const T>, bool add, Images<T> to, T*) override {
    for (int64_t k = 0; k < n_ && !add; ++k) std::fill_n(to.data + k * to.image, size_, T(0));
  }

 private:
  const int64_t n_, size_, out_size_;
};

template <typename T>
class Pool : public Operation<T> {
 public:
  Pool(int64_t n, int64_t channels, int64_t h, int64_t w, int64_t stride, bool max)
      : n_(n), channels_(channels), g_(Geometry::of<T>(h, w, stride, 1, 1)), pools_(g_), max_(max) {}

  void finish(int64_t n, Images<const T> x, T keep, bool add, Images<T> out) override {
    Timed timed(Phase::kPools);
    Scratch<T> scratch(pools_.work_size() + g_.size);
    T *work = scratch.take(pools_.work_size()), *pooled = scratch.take(g_.size);
    for (int64_t c = 0; c < channels_; ++c) {
      const T* from = x.data + n * x.image + c * g_.h * g_.w;
      T* to = out.data + n * out.image + c * g_.size;
      if (max_) pools_.max(from, work, pooled);
      else pools_.mean(from, work, pooled);
      if (add)
#pragma omp simd
        for (int64_t p = 0; p < g_.size; ++p) to[p] += keep * pooled[p];
      else
#pragma omp simd
        for (int64_t p = 0; p < g_.size; ++p) to[p] = keep * pooled[p];
    }
  }

  void backward(Images<const T> x, Mask<T> mask, Images<const T> d, bool add, Images<T> to, T*) override {
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(pools_.work_size() + g_.size);
      T *work = scratch.take(pools_.work_size()), *kept = scratch.take(g_.size);
      share(n_, 1, [&](int64_t n) {
        Timed timed(Phase::kPools);
        for (int64_t c = 0; c < channels_; ++c) {
          const T *from = x.data + n * x.image + c * g_.h * g_.w, *d_plane = d.data + n * d.image + c * g_.size;
          T* target = to.data + n * to.image + c * g_.h * g_.w;
          const T keep = mask[n];
#pragma omp simd
          for (int64_t p = 0; p < g_.size; ++p) kept[p] = keep * d_plane[p];
          if (!add) std::fill(target, target + g_.h * g_.w, T(0));
          if (max_) {
            pools_.max_backward(from, kept, work, target);
          } else {
            pools_.mean_backward(kept, work, target);
          }
        }
      });
    }
  }

 private:
  const int64_t n_, channels_;
  const Geometry g_;
  const Pools<T> pools_;
  const bool max_;
};

// ReLU, depthwise K x K, pointwise, batch normalisation, in one or two stages. K = 1 means no depthwise convolution:
// with stride 1 it is ReLUConvBN, with stride 2 FactorizedReduce, whose two halves of the channels read two grids.
template <typename T, int L>
class ConvNorm : public Operation<T> {
 public:
  ConvNorm(int64_t n, int64_t c_in, int64_t channels, int64_t h, int64_t w, const ConvolutionKind& kind, int64_t stride,
           const Normalisation& normalisation, Weights<T>* weights)
      : n_(n), c_in_(c_in), c_(channels), kernel_(kind.kernel), stages_(kind.stages), normalisation_(normalisation),
        halves_(kernel_ == 1 ? stride : 1), first_(Geometry::of<T>(h, w, stride, kind.dilation * (kernel_ / 2), L)),
        second_(Geometry::of<T>(first_.out_h, first_.out_w, 1, kernel_ / 2, L)), size_(first_.size),
        plane_(first_.out_h * first_.out_w), grid_(first_, c_in), pointwise_(weights->take(stages_ * c_, c_in, 1)),
        affine_(weights->take_affine(2 * stages_ * c_)), sums_(n * channels * 2) {
    require(c_ % halves_ == 0, "the output of FactorizedReduce consists of two halves: the channels have to be even");
    if (kernel_ == 1) return;
    depthwise_ = weights->take(stages_ * c_, 1, kernel_);
    for (int stage = 0; stage < stages_; ++stage)
      convolutions_.push_back(make_separable<T, L>(kernel_, geometry(stage), kind.dilation, c_));
  }

  // Saved: results of the convolutions [N, stages, C planes]. Workspace: gradient of the output of the first of two
  // normalisations [N, C planes].
  int64_t saved_size() const override { return n_ * stages_ * c_ * size_; }
  int64_t workspace_size() const override { return stages_ > 1 ? n_ * c_ * size_ : 0; }
  int64_t normalised_channels() const override { return stages_ * c_; }
  void bind(Buffers<T>* buffers) override {
    saved_ = buffers->saved, statistics_ = buffers->statistics;
    running_ = buffers->running, new_running_ = buffers->new_running;
    buffers->saved += saved_size(), buffers->statistics += 2 * normalised_channels();
    if (running_) buffers->running += 2 * normalised_channels(), buffers->new_running += 2 * normalised_channels();
  }

  // affine: scale and shift [stages, 2, C]; running: mean and variance [stages, 2, C]; statistics: mean and
  // 1 / sqrt(variance + epsilon) [stages, C, 2].
  void begin(Images<const T> x) override {
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(padded_size() + inner_size());
      T *padded = scratch.zeros(padded_size()), *inner = scratch.zeros(inner_size());
      for (int stage = 0; stage < stages_; ++stage) {
        share(n_, 1, [&](int64_t n) {
          T* result = saved_ + (n * stages_ + stage) * c_ * size_;
          if (kernel_ > 1) {
            prepare(stage, n, x, padded);
            convolutions_[stage]->forward(padded, depthwise_.value + stage * c_ * taps(),
                                          pointwise_.value + stage * c_ * c_, inner, result);
          } else {
            for (int64_t half = 0; half < halves_; ++half)
              grid_.forward(x.data + n * x.image, half, pointwise_.value + half * half_channels() * c_in_,
                            half_channels(), inner, result + half * half_channels() * size_, size_);
          }
          Timed timed(Phase::kNormalisation);
          for (int64_t c = 0; c < c_ && normalisation_.training; ++c)
            compute_moments<T, L>(first_, result + c * size_, sums_.data() + (n * c_ + c) * 2);
        });
        share(c_, 8, [&](int64_t c) {
          Timed timed(Phase::kNormalisation);
          const int64_t at = stage * 2 * c_ + c;                              // the mean; the variance is at + c_
          normalisation_.combine(sums_.data() + 2 * c, n_, 2 * c_, plane_, running_[at], running_[at + c_],
                                 statistics_ + (stage * c_ + c) * 2, new_running_ + at, new_running_ + at + c_);
        });
      }
    }
  }

  void finish(int64_t n, Images<const T>, T keep, bool add, Images<T> out) override {
    Timed timed(Phase::kNormalisation);
    const int64_t last = (stages_ - 1) * c_;
    const T* affine = affine_.value + 2 * last;
    for (int64_t c = 0; c < c_; ++c) {
      const T *from = saved_ + (n * stages_ * c_ + last + c) * size_, *mean_rstd = statistics_ + (last + c) * 2;
      T* to = out.data + n * out.image + c * plane_;
      const T mean = mean_rstd[0], factor = keep * affine[c] * mean_rstd[1], shift = keep * affine[c_ + c];
      for (int64_t i = 0; i < first_.rows(); ++i) {
        const T* source = from + i * first_.out_row;
        T* target = to + i * first_.out_w;
        if (add)
#pragma omp simd
          for (int64_t j = 0; j < first_.columns(); ++j) target[j] += factor * (source[j] - mean) + shift;
        else
#pragma omp simd
          for (int64_t j = 0; j < first_.columns(); ++j) target[j] = factor * (source[j] - mean) + shift;
      }
    }
  }

  void sum(int64_t n, T keep, Images<const T> d) override {
    Timed timed(Phase::kNormalisation);
    for (int64_t c = 0; c < c_; ++c) {
      const int64_t plane = (stages_ - 1) * c_ + c;                            // of the last stage
      sum_gradient(first_, d.data + n * d.image + c * plane_, first_.out_w, keep,
                   saved_ + (n * stages_ * c_ + plane) * size_, statistics_[2 * plane],
                   sums_.data() + (n * c_ + c) * 2);
    }
  }

  void backward(Images<const T> x, Mask<T> mask, Images<const T> out_gradient, bool add, Images<T> to,
                T* first_gradient) override {
    const int64_t depthwise_size = depthwise_.size, pointwise_size = pointwise_.size;
    const std::vector<T> flipped = flip(depthwise_.value, depthwise_size / taps(), taps());
    PartialSums<T> partial(n_, depthwise_size + pointwise_size);
    std::vector<T> d_mean(c_), slope(c_);
#pragma omp parallel num_threads(threads())
    {
      partial.clear();
      const int64_t in_plane = kernel_ == 1 || first_.stride == 1 ? first_.step : first_.plane;
      const int64_t in_size = std::max(c_in_ * in_plane, c_ * second_.step);
      const int64_t border = std::max(first_.plane, second_.plane);
      Scratch<T> scratch(padded_size() + 2 * inner_size() + c_ * first_.step + in_size + border);
      T *padded = scratch.zeros(padded_size()), *inner = scratch.zeros(inner_size());
      T *inner_gradient = scratch.take(inner_size()), *gradient = scratch.zeros(c_ * first_.step);
      T *in_gradient = scratch.take(in_size), *bordered = scratch.take(border);
      for (int stage = stages_ - 1; stage >= 0; --stage) {
        const bool last = stage == stages_ - 1;
        const Geometry& g = geometry(stage);
        const T *scale = affine_.value + stage * 2 * c_, *mean_rstd = statistics_ + stage * c_ * 2;
        share(c_, 8, [&](int64_t c) {
          Timed timed(Phase::kNormalisation);
          T* scale_gradient = affine_.gradient + stage * 2 * c_ + c;           // that of the shift is c_ behind it
          normalisation_.differentiate(sums_.data() + 2 * c, n_, 2 * c_, plane_, mean_rstd[2 * c + 1], scale_gradient,
                                       scale_gradient + c_, &d_mean[c], &slope[c]);
        });
        if (kernel_ > 1) std::fill(bordered, bordered + g.plane, T(0));
        partial.for_images([&](int64_t n, T* weight_gradients) {
          const T* result = saved_ + (n * stages_ + stage) * c_ * size_;
          {
            Timed timed(Phase::kNormalisation);
            // The gradient of the output of this stage's normalisation: that of the first of two stages is computed
            // below, in the pass over the last.
            for (int64_t c = 0; c < c_; ++c) {
              const T* d = last ? out_gradient.data + n * out_gradient.image + c * plane_
                                : first_gradient + (n * c_ + c) * size_;
              batch_norm_backward(first_, d, last ? first_.out_w : first_.out_row, last ? mask[n] : T(1),
                                  result + c * size_, scale[c] * mean_rstd[2 * c + 1], d_mean[c], mean_rstd[2 * c],
                                  slope[c], gradient + c * first_.step);
            }
          }
          if (kernel_ == 1) {
            for (int64_t half = 0; half < halves_; ++half) {
              const T *image = x.data + n * x.image, *d_half = gradient + half * half_channels() * first_.step;
              const int64_t at = half * half_channels() * c_in_;
              grid_.add_weight_gradient(image, half, d_half, half_channels(), inner, weight_gradients + at);
              grid_.backward(image, half, pointwise_.value + at, d_half, half_channels(), in_gradient, add,
                             to.data + n * to.image);
            }
          } else {
            prepare(stage, n, x, padded);
            const int64_t at = stage * c_ * taps();
            convolutions_[stage]->backward(padded, depthwise_.value + at, flipped.data() + at,
                                           pointwise_.value + stage * c_ * c_, gradient, inner, inner_gradient,
                                           bordered, weight_gradients + at,
                                           weight_gradients + depthwise_size + stage * c_ * c_, false, in_gradient);
            Timed timed(stage == 0 ? Phase::kPad : Phase::kNormalisation);
            if (stage == 0) {
              for (int64_t c = 0; c < c_; ++c) {
                const int64_t at = c * g.h * g.w;
                relu_backward<T, L>(g, x.data + n * x.image + at, in_gradient + c * (g.stride == 1 ? g.step : g.plane),
                                    add, to.data + n * to.image + at);
              }
            } else {
              for (int64_t c = 0; c < c_; ++c) {
                const T* y = saved_ + (n * stages_ * c_ + c) * size_;
                const T mean = statistics_[2 * c], factor = affine_.value[c] * statistics_[2 * c + 1];
                normalised_relu_backward<T, L>(first_, y, factor, mean, affine_.value[c_ + c], in_gradient + c * g.step,
                                               first_gradient + (n * c_ + c) * size_, sums_.data() + (n * c_ + c) * 2);
              }
            }
          }
        });
      }
      partial.add_to(depthwise_.gradient, 0, depthwise_size);
      partial.add_to(pointwise_.gradient, depthwise_size, pointwise_size);
    }
  }

 private:
  const Geometry& geometry(int stage) const { return stage == 0 ? first_ : second_; }
  int64_t half_channels() const { return c_ / halves_; }
  int64_t taps() const { return kernel_ * kernel_; }
  // Numbers of the padded planes, and of the results between depthwise and pointwise convolution.
  int64_t padded_size() const { return kernel_ == 1 ? 0 : c_ * std::max(first_.plane, second_.plane); }
  int64_t inner_size() const { return kernel_ == 1 ? grid_.grid_size() : c_in_ * first_.step; }

  // Computes the padded planes that the convolution of a stage reads.
  void prepare(int stage, int64_t n, Images<const T> x, T* padded) const {
    Timed timed(Phase::kPad);
    // The border has to be 0. With stride 2 the stages have different layouts, and one writes where the other has its
    // border.
    if (stages_ > 1 && first_.stride > 1) std::fill(padded, padded + padded_size(), T(0));
    for (int64_t c = 0; c < c_; ++c) {
      if (stage == 0)
        pad<T, L>(first_, x.data + n * x.image + c * first_.h * first_.w, padded + c * first_.plane);
      else
        normalise_relu<T, L>(second_, saved_ + (n * stages_ * c_ + c) * size_, first_.out_row,
                             affine_.value[c] * statistics_[2 * c + 1], statistics_[2 * c], affine_.value[c_ + c],
                             padded + c * second_.plane);
    }
  }

  const int64_t n_, c_in_, c_;
  const int kernel_, stages_;
  const Normalisation normalisation_;
  const int64_t halves_;
  const Geometry first_, second_;
  const int64_t size_, plane_;                   // numbers per plane of the result, in scratch and in a tensor
  const RectifiedConvolution<T, L> grid_;
  const typename Weights<T>::Weight pointwise_, affine_;
  typename Weights<T>::Weight depthwise_;
  std::vector<std::unique_ptr<SeparableConvolution<T>>> convolutions_;       // of the stages
  T *saved_, *statistics_, *new_running_;
  const T* running_;
  std::vector<double> sums_;     // [N, C, 2]: moments of the planes, or in the backward pass those of `sum_gradient`
};

template <typename T>
std::unique_ptr<Operation<T>> make_conv_norm(int64_t n, int64_t c_in, int64_t channels, int64_t h, int64_t w,
                                             const ConvolutionKind& kind, int64_t stride,
                                             const Normalisation& normalisation, Weights<T>* weights) {
  std::unique_ptr<Operation<T>> operation;
  dispatch_lanes<T>((w - 1) / stride + 1, [&](auto lanes) {
    operation.reset(new ConvNorm<T, decltype(lanes)::value>(n, c_in, channels, h, w, kind, stride, normalisation,
                                                            weights));
  });
  return operation;
}

constexpr ConvolutionKind kPointwise = {"", 1, 1, 1};          // ReLUConvBN and FactorizedReduce

// Returns the shape of a cell's output; x: that of the output of the cell before, with -1 for an unknown batch size.
inline Shape out_shape(const Shape& x, int64_t channels, int64_t nodes, bool reduction) {
  const int64_t stride = reduction ? 2 : 1;
  return {x[0], channels * nodes, x[2] / stride, x[3] / stride};
}

// The cell that the attributes of the operator describe, by the rules of model.Cell.
struct Structure {
  std::vector<std::string> operations;           // of the edges, two per node
  std::vector<int> states, concat;               // the state that each edge reads; the states in the output
  int64_t channels;
  bool reduction, reduction_prev;

  // Raises an error for attributes that describe no cell.
  void check() const {
    require(!operations.empty() && operations.size() % 2 == 0 && states.size() == operations.size() && channels > 0,
            "a cell needs channels, and two operations and states per node");
    for (size_t edge = 0; edge < operations.size(); ++edge) {
      check_operation(operations[edge]);
      require(states[edge] >= 0 && states[edge] < 2 + int(edge / 2), "an edge reads a state that does not precede it");
    }
    require(!concat.empty(), "a cell needs an output");
    for (int state : concat)
      require(state >= 2 && state < state_count() && std::count(concat.begin(), concat.end(), state) == 1,
              "the states in the output have to be different nodes");
  }

  int64_t state_count() const { return 2 + operations.size() / 2; }
  int64_t stride(int edge) const { return reduction && states[edge] < 2 ? 2 : 1; }
  // Returns the index of state s in the output, or -1.
  int64_t output_position(int64_t s) const {
    const auto found = std::find(concat.begin(), concat.end(), s);
    return found == concat.end() ? -1 : found - concat.begin();
  }
  bool droppable(int edge) const { return operations[edge] != "skip_connect" || stride(edge) == 2; }
  int64_t droppable_edges() const {
    int64_t count = 0;
    for (size_t edge = 0; edge < operations.size(); ++edge) count += droppable(edge);
    return count;
  }
};

template <typename T>
class DiscreteCell {
 public:
  // inputs: the outputs of the two cells before, then the weights; gradients: those of all inputs, or null.
  DiscreteCell(const std::vector<Tensor>& inputs, std::vector<Tensor>* gradients, const Structure& structure,
               const Normalisation& normalisation)
      : structure_(structure), x0_(inputs[0]), x1_(inputs[1]), gradients_(gradients), n_(x1_.shape()[0]),
        c_(structure.channels), h_(x1_.shape()[2]), w_(x1_.shape()[3]), out_h_(h_ / (structure.reduction ? 2 : 1)),
        out_w_(w_ / (structure.reduction ? 2 : 1)) {
    const int64_t scale = structure.reduction_prev ? 2 : 1;
    require(x0_.shape().size() == 4 && x0_.shape()[0] == n_ && x0_.shape()[2] == scale * h_ &&
                 x0_.shape()[3] == scale * w_ && h_ > 0 && w_ > 0 && x0_.shape()[1] > 0 && x1_.shape()[1] > 0,
            "the two inputs of a cell differ in batch size, height or width, or are empty");
    Weights<T> weights(inputs, gradients);
    operations_.push_back(make_conv_norm<T>(n_, x0_.shape()[1], c_, x0_.shape()[2], x0_.shape()[3], kPointwise,
                                            structure.reduction_prev ? 2 : 1, normalisation, &weights));
    operations_.push_back(make_conv_norm<T>(n_, x1_.shape()[1], c_, h_, w_, kPointwise, 1, normalisation, &weights));
    for (size_t edge = 0; edge < structure.operations.size(); ++edge)
      operations_.push_back(make(edge, normalisation, &weights));
    weights.check_all_used();
  }

  // Sizes of the tensors that the forward pass keeps for the backward pass.
  int64_t saved_size() const {
    int64_t size = states_outside_output() * c_ * n_ * std::max(h_ * w_, out_h_ * out_w_);
    for (const auto& operation : operations_) size += operation->saved_size();
    return size;
  }
  int64_t normalised_channels() const {
    int64_t channels = 0;
    for (const auto& operation : operations_) channels += operation->normalised_channels();
    return channels;
  }

  void forward(Mask<T> masks, const T* running, T* out, T* saved, T* statistics, T* new_running) {
    assign_states(out, &saved);
    Buffers<T> buffers{saved, statistics, running, new_running};
    for (const auto& operation : operations_) operation->bind(&buffers);
    for (size_t first = 0; first < operations_.size(); first += 2) {        // both inputs, then the edges of each node
      for (size_t k = first; k < first + 2; ++k) operations_[k]->begin(input_of(k));
      const Mask<T> mask[2] = {mask_of(first, masks), mask_of(first + 1, masks)};
#pragma omp parallel num_threads(threads())
      share(n_, 1, [&](int64_t n) {
        for (size_t k = first; k < first + 2; ++k)
          operations_[k]->finish(n, input_of(k), mask[k - first][n], first > 0 && k > first, states_[output_of(k)]);
      });
    }
  }

  // again_gradient: null, or the gradient of the second output, to be added to that of the first.
  void backward(Mask<T> masks, const T* out, const T* saved, const T* statistics, const T* out_gradient,
                const T* again_gradient) {
    // The backward pass does not write to these tensors.
    T* at = const_cast<T*>(saved);
    assign_states(const_cast<T*>(out), &at);
    Buffers<T> buffers{at, const_cast<T*>(statistics), nullptr, nullptr};
    int64_t workspace_size = 0;
    for (const auto& operation : operations_) {
      operation->bind(&buffers);
      workspace_size = std::max(workspace_size, operation->workspace_size());
    }
    const int64_t outer = c_ * h_ * w_, inner = c_ * out_h_ * out_w_, state_count = structure_.state_count();
    const int64_t gradients_size = n_ * (2 * outer + (state_count - 2) * inner);
    static thread_local Storage<T> storage;
    T *next = storage.reserve(gradients_size + workspace_size), *workspace = next + gradients_size;
    std::vector<Images<T>> gradients;
    std::vector<bool> has_gradient;              // whether to add to it
    for (int64_t s = 0; s < state_count; ++s) {
      const int64_t size = s < 2 ? outer : inner, position = structure_.output_position(s);
      gradients.push_back({next, size});
      has_gradient.push_back(position >= 0);
      next += n_ * size;
      if (position < 0) continue;
      const Images<const T> from = state_in_output(out_gradient, position, size);
      if (again_gradient)
        sum_images(n_, size, from, state_in_output(again_gradient, position, size), gradients[s]);
      else
        copy_images(n_, size, from, false, gradients[s]);
    }
    for (int first = operations_.size() - 2; first >= 0; first -= 2) {
      // A state that no edge reads and that is not in the output has the gradient 0.
      for (int k = first; k < first + 2; ++k)
        if (!has_gradient[output_of(k)]) clear(gradients[output_of(k)]), has_gradient[output_of(k)] = true;
      const Mask<T> mask[2] = {mask_of(first, masks), mask_of(first + 1, masks)};
#pragma omp parallel num_threads(threads())
      share(n_, 1, [&](int64_t n) {
        for (int k = first; k < first + 2; ++k)
          operations_[k]->sum(n, mask[k - first][n], gradients[output_of(k)]);
      });
      for (int k = first + 1; k >= first; --k) {
        const Images<const T> x = input_of(k), d = gradients[output_of(k)];
        if (k < 2) {
          operations_[k]->backward(x, {}, d, false, {(*gradients_)[k].template data<T>(), x.image}, workspace);
        } else {
          const int s = structure_.states[k - 2];
          operations_[k]->backward(x, mask[k - first], d, has_gradient[s], gradients[s], workspace);
          has_gradient[s] = true;
        }
      }
    }
  }

 private:
  std::unique_ptr<Operation<T>> make(int edge, const Normalisation& normalisation, Weights<T>* weights) const {
    const std::string& name = structure_.operations[edge];
    const int64_t stride = structure_.stride(edge), h = structure_.states[edge] < 2 ? h_ : out_h_;
    const int64_t w = structure_.states[edge] < 2 ? w_ : out_w_;
    if (name == "none") return std::unique_ptr<Operation<T>>(new Zero<T>(n_, c_ * h * w, c_ * out_h_ * out_w_));
    if (is_pool(name))
      return std::unique_ptr<Operation<T>>(new Pool<T>(n_, c_, h, w, stride, name == "max_pool_3x3"));
    if (name == "skip_connect" && stride == 1) return std::unique_ptr<Operation<T>>(new Identity<T>(n_, c_ * h * w));
    const ConvolutionKind* kind = find_convolution(name);
    return make_conv_norm<T>(n_, c_, c_, h, w, kind ? *kind : kPointwise, stride, normalisation, weights);
  }
  // The number of states that are not in the output; they have memory in `saved`.
  int64_t states_outside_output() const { return structure_.state_count() - structure_.concat.size(); }
  void assign_states(T* out, T** saved) {
    for (int64_t s = 0; s < structure_.state_count(); ++s) {
      const int64_t size = s < 2 ? c_ * h_ * w_ : c_ * out_h_ * out_w_, at = structure_.output_position(s);
      states_.push_back(at < 0 ? Images<T>{*saved, size} : state_in_output(out, at, size));
      if (at < 0) *saved += n_ * size;
    }
  }
  // Returns state number `at` of the output; size: numbers per image of a state.
  template <typename P>
  Images<P> state_in_output(P* out, int64_t at, int64_t size) const {
    return {out + at * size, static_cast<int64_t>(structure_.concat.size()) * size};
  }
  void clear(Images<T> images) const { std::fill(images.data, images.data + n_ * images.image, T(0)); }
  // Returns what operation k reads, and the number of the state that it contributes to.
  Images<const T> input_of(int k) const {
    if (k >= 2) return states_[structure_.states[k - 2]];
    const Tensor& x = k == 0 ? x0_ : x1_;
    return {x.data<T>(), x.shape()[1] * x.shape()[2] * x.shape()[3]};
  }
  static int output_of(int k) { return k < 2 ? k : 2 + (k - 2) / 2; }
  // Returns the factors of operation k; masks [N, edges that can be dropped].
  Mask<T> mask_of(int k, Mask<T> masks) const {
    if (k < 2 || !masks.data || !structure_.droppable(k - 2)) return {};
    int64_t number = 0;
    for (int edge = 0; edge < k - 2; ++edge) number += structure_.droppable(edge);
    return {masks.data + number, masks.step};
  }

  const Structure structure_;
  const Tensor &x0_, &x1_;
  std::vector<Tensor>* const gradients_;
  const int64_t n_, c_, h_, w_, out_h_, out_w_;  // sizes of states 0 and 1, of the nodes
  std::vector<std::unique_ptr<Operation<T>>> operations_;        // of both inputs, then of the edges
  std::vector<Images<T>> states_;
};

template <typename T>
Mask<T> masks_in(const Tensor& masks, bool masked) {
  return {masked ? masks.data<T>() : nullptr, masked ? masks.shape()[1] : 0};
}

// Checks attributes and inputs of the operator, except for the weights; returns the shape of the output.
Shape check_inputs(const Structure& structure, const std::vector<Tensor>& inputs, const Tensor& masks, bool masked,
                   float epsilon, float momentum) {
  require(inputs.size() >= 2 && epsilon > 0 && momentum >= 0 && momentum <= 1,
          "a cell needs two inputs, a positive epsilon and a momentum from 0 to 1");
  check_types(inputs);
  structure.check();
  const Shape x = inputs[1].shape();
  require(x.size() == 4 && (!structure.reduction || x[2] % 2 + x[3] % 2 == 0),
          "the inputs of a cell have to be [N, C, H, W], and H and W of a reduction cell even");
  if (masked) {
    check_types({inputs[0], masks});
    check_shape("the tensor of masks", masks, {x[0], structure.droppable_edges(), 1, 1});
  }
  return out_shape(x, structure.channels, structure.concat.size(), structure.reduction);
}

std::vector<Tensor> Forward(const std::vector<Tensor>& inputs, const Tensor& running, const Tensor& masks,
                            const std::vector<std::string>& operations, const std::vector<int>& states,
                            const std::vector<int>& concat, int channels, bool reduction, bool reduction_prev,
                            bool training, bool masked, bool twice, float epsilon, float momentum) {
  const Structure structure{operations, states, concat, channels, reduction, reduction_prev};
  const Shape shape = check_inputs(structure, inputs, masks, masked, epsilon, momentum);
  check_types({inputs[0], running});
  const auto empty = [&](const Shape& sizes) { return paddle::empty(sizes, running.dtype(), running.place()); };
  Tensor out = empty(shape), new_running = empty(running.shape()), saved, statistics;
  DARTS_DISPATCH(out.type(), "darts_discrete_cell", ([&] {
    DiscreteCell<data_t> cell(inputs, nullptr, structure, {training, epsilon, momentum});
    check_shape("the tensor of running statistics", running, {2 * cell.normalised_channels()});
    saved = empty({cell.saved_size()}), statistics = empty({cell.normalised_channels(), 2});
    cell.forward(masks_in<data_t>(masks, masked), running.data<data_t>(), out.data<data_t>(), saved.data<data_t>(),
                 statistics.data<data_t>(), new_running.data<data_t>());
  }));
  return {out, saved, statistics, new_running, twice ? out : empty({1})};
}

std::vector<Tensor> Backward(const std::vector<Tensor>& inputs, const Tensor& masks, const Tensor& out,
                             const Tensor& saved, const Tensor& statistics, const Tensor& out_gradient,
                             const Tensor& again_gradient,
                             const std::vector<std::string>& operations, const std::vector<int>& states,
                             const std::vector<int>& concat, int channels, bool reduction, bool reduction_prev,
                             bool training, bool masked, bool twice, float epsilon, float momentum) {
  const Structure structure{operations, states, concat, channels, reduction, reduction_prev};
  const Shape shape = check_inputs(structure, inputs, masks, masked, epsilon, momentum);
  check_types({inputs[0], out, saved, statistics, out_gradient});
  check_shape("the output", out, shape);
  check_shape("the gradient of the output", out_gradient, shape);
  if (twice) {
    check_types({out, again_gradient});
    check_shape("the gradient of the second output", again_gradient, shape);
  }
  std::vector<Tensor> gradients = gradients_of(inputs, 2);
  DARTS_DISPATCH(out.type(), "darts_discrete_cell_grad", ([&] {
    DiscreteCell<data_t> cell(inputs, &gradients, structure, {training, epsilon, momentum});
    check_shape("the tensor of saved results", saved, {cell.saved_size()});
    check_shape("the tensor of statistics", statistics, {cell.normalised_channels(), 2});
    cell.backward(masks_in<data_t>(masks, masked), out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(),
                  out_gradient.data<data_t>(), twice ? again_gradient.data<data_t>() : nullptr);
  }));
  return gradients;
}

// For wrong inputs it returns unknown sizes: an exception would end the process here. The kernel raises the error.
std::vector<Shape> InferShape(const std::vector<Shape>& inputs, const Shape& running, const Shape&,
                              const std::vector<std::string>&, const std::vector<int>&, const std::vector<int>& concat,
                              int channels, bool reduction, bool, bool, bool, bool twice, float, float) {
  Shape out{-1, -1, -1, -1};
  if (inputs.size() > 1 && inputs[1].size() == 4) out = out_shape(inputs[1], channels, concat.size(), reduction);
  return {out, {-1}, {-1, 2}, running, twice ? out : Shape{1}};
}

using paddle::DataType;
std::vector<DataType> InferDtype(const std::vector<DataType>& inputs, const DataType&, const DataType&) {
  return {inputs[0], inputs[0], inputs[0], inputs[0], inputs[0]};
}

}  // namespace

#define DARTS_CELL_ATTRIBUTES                                                                                         \
  {"operations: std::vector<std::string>", "states: std::vector<int>", "concat: std::vector<int>", "channels: int",  \
   "reduction: bool", "reduction_prev: bool", "training: bool", "masked: bool", "twice: bool", "epsilon: float",     \
   "momentum: float"}

// Paddle requires a list of gradients to be the only output, so all inputs with a gradient form one list.
PD_BUILD_OP(darts_discrete_cell)
    .Inputs({paddle::Vec("Inputs"), "Running", "Masks"})
    .Outputs({"Out", "Saved", "Statistics", "NewRunning", "Again"})
    .Attrs(DARTS_CELL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_discrete_cell)
    .Inputs({paddle::Vec("Inputs"), "Masks", "Out", "Saved", "Statistics", paddle::Grad("Out"), paddle::Grad("Again")})
    .Outputs({paddle::Grad(paddle::Vec("Inputs"))})
    .Attrs(DARTS_CELL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Backward));
