// All mixed operations of a supernet cell as one operator for the CPU, from both input states to the four nodes.
// README.md in this folder explains the memory layout and the order of the loops.
#include "kernels.h"

#include <array>
#include <cmath>

namespace {

constexpr int kNodes = 4, kEdges = 14, kStates = 5, kGroups = 4, kPrimitives = 8;
// The columns of alpha, in the order of genotypes.PRIMITIVES.
enum Primitive { kNone, kMaxPool, kAvgPool, kSkip, kSep3, kSep5, kDil3, kDil5 };
// The convolutions of an edge, in the order of their pointwise weights.
enum Convolution { kSep3First, kSep3Second, kSep5First, kSep5Second, kDil3Only, kDil5Only, kConvolutions };
// The results that alpha scales: those of batch normalisations, for kSkipEnd with stride 1 the identity.
enum OpEnd { kSep3End, kSep5End, kDil3End, kDil5End, kMaxEnd, kAvgEnd, kSkipEnd, kEnds };
constexpr int kLastConvolution[4] = {kSep3Second, kSep5Second, kDil3Only, kDil5Only};
constexpr int kPrimitiveOf[kEnds] = {kSep3, kSep5, kDil3, kDil5, kMaxPool, kAvgPool, kSkip};

struct Edge {
  int state, node, number, position, local, group;       // number: row of alpha; position: index in the order of the
                                                         // weights; local: the same within its group
};
// States whose edges are computed together: STATE_GROUPS in model_search.py.
struct Group {
  int first_state, states, first_edge, edges;
};
constexpr Group kGroup[kGroups] = {{0, 2, 0, 8}, {2, 1, 8, 3}, {3, 1, 11, 2}, {4, 1, 13, 1}};

// Returns the edges group by group, in each group ordered by node, then by state.
std::array<Edge, kEdges> make_edges() {
  std::array<Edge, kEdges> edges;
  int position = 0;
  for (int g = 0; g < kGroups; ++g) {
    const int last = kGroup[g].first_state + kGroup[g].states - 1;
    for (int node = std::max(0, last - 1); node < kNodes; ++node)
      for (int s = kGroup[g].first_state; s <= last; ++s, ++position)
        edges[position] = {s, node, node * (node + 3) / 2 + s, position, position - kGroup[g].first_edge, g};
  }
  return edges;
}
const std::array<Edge, kEdges> kEdge = make_edges();

template <typename T, int L>
class MixedCell {
 public:
  MixedCell(const Tensor& x, const Tensor& pointwise, bool reduction, double epsilon)
      : n_(x.shape()[0]), c_(pointwise.shape()[1]), reduction_(reduction), epsilon_(epsilon),
        inputs_(Geometry::of<T>(x.shape()[2], x.shape()[3], reduction ? 2 : 1, 4, L)),
        nodes_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, 4, L)),
        second_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, 2, L)),
        size_(nodes_.size), count_(n_ * nodes_.h * nodes_.w), input_pools_(inputs_),
        node_pools_(nodes_) {}

  // Returns the number of planes per image in `saved`: results before the BN, of the convolutions, then of the pools.
  static int64_t planes(int64_t channels, bool reduction) {
    return (kEdges * kConvolutions + (reduction ? kGroup[0].edges : 0) + 2 * kStates) * channels;
  }
  static int64_t plane_size(int64_t out_h, int64_t out_w) { return out_h * ((out_w + L - 1) / L * L); }

  void forward(const T* x, const T* depthwise3, const T* depthwise5, const T* pointwise, const T* mixing, T* out,
               T* saved, T* statistics) {
    const int64_t image_planes = planes(c_, reduction_);
    std::vector<double> moments(n_ * image_planes * 2);
#pragma omp parallel num_threads(threads())
    {
      Scratch<T> scratch(c_ * (inputs_.plane + nodes_.plane + second_.plane + nodes_.step) + pools_size() + size_);
      T *padded_inputs = scratch.zeros(c_ * inputs_.plane), *padded_nodes = scratch.zeros(c_ * nodes_.plane);
      T *padded_second = scratch.zeros(c_ * second_.plane), *inner = scratch.take(c_ * nodes_.step);
      T *total = scratch.take(size_), *bordered = scratch.take(pools_size());
      for (int g = 0; g < kGroups; ++g) {
        const Group& group = kGroup[g];
        const Geometry& geometry = g == 0 ? inputs_ : nodes_;
        const Pools<T>& pools = g == 0 ? input_pools_ : node_pools_;
        T* padded = g == 0 ? padded_inputs : padded_nodes;
        const Separable<T, L, 3> sep3(geometry, 1, c_), dil3(geometry, 2, c_), sep3_second(second_, 1, c_);
        const Separable<T, L, 5> sep5(geometry, 1, c_), dil5(geometry, 2, c_), sep5_second(second_, 1, c_);
        // Pools and first convolutions of every edge, up to their normalisation.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          T* image = saved + n * image_planes * size_;
          double* image_moments = moments.data() + n * image_planes * 2;
          for (int s = group.first_state; s < group.first_state + group.states; ++s) {
            const T* state = state_plane(x, out, n, s);
            for (int64_t c = 0; c < c_; ++c) {
              pad(geometry, state + c * geometry.h * geometry.w, padded + c * geometry.plane);
              T* max = image + (pool_plane(s, 0) + c) * size_;
              T* mean = image + (pool_plane(s, 1) + c) * size_;
              pools.max(state + c * geometry.h * geometry.w, bordered, max);
              pools.mean(state + c * geometry.h * geometry.w, bordered, mean);
            }
            for (int which = 0; which < 2; ++which) compute_all_moments(image, image_moments, pool_plane(s, which));
            for (int e = group.first_edge; e < group.first_edge + group.edges; ++e) {
              const Edge& edge = kEdge[e];
              if (edge.state != s) continue;
              const auto result = [&](int k) { return image + conv_plane(edge, k) * size_; };
              const auto weight = [&](int k) { return pointwise + pointwise_at(edge, k); };
              sep3.forward(padded, depthwise3 + depthwise_at(edge, 0, 9), weight(kSep3First), inner,
                           result(kSep3First));
              sep5.forward(padded, depthwise5 + depthwise_at(edge, 0, 25), weight(kSep5First), inner,
                           result(kSep5First));
              dil3.forward(padded, depthwise3 + depthwise_at(edge, 2, 9), weight(kDil3Only), inner, result(kDil3Only));
              dil5.forward(padded, depthwise5 + depthwise_at(edge, 2, 25), weight(kDil5Only), inner, result(kDil5Only));
              for (int k : {kSep3First, kSep5First, kDil3Only, kDil5Only})
                compute_all_moments(image, image_moments, conv_plane(edge, k));
              if (reduction_ && g == 0) {
                for (int half = 0; half < 2; ++half) {
                  gather_half(geometry, padded, half, inner);
                  multiply<T, L>(pointwise + factorized_at(edge, half), c_, 1, inner, nodes_.step, c_ / 2, c_, size_,
                                 image + (factorized_plane(edge) + half * c_ / 2) * size_, size_);
                }
                compute_all_moments(image, image_moments, factorized_plane(edge));
              }
            }
          }
        }
        for (int e = group.first_edge; e < group.first_edge + group.edges; ++e) {
          for (int k : {kSep3First, kSep5First, kDil3Only, kDil5Only})
            combine(moments, image_planes, conv_plane(kEdge[e], k), statistics);
          if (reduction_ && g == 0) combine(moments, image_planes, factorized_plane(kEdge[e]), statistics);
        }
        for (int s = group.first_state; s < group.first_state + group.states; ++s)
          for (int which = 0; which < 2; ++which) combine(moments, image_planes, pool_plane(s, which), statistics);
#pragma omp barrier
        // Second halves of the separable convolutions.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          T* image = saved + n * image_planes * size_;
          double* image_moments = moments.data() + n * image_planes * 2;
          for (int e = group.first_edge; e < group.first_edge + group.edges; ++e) {
            const Edge& edge = kEdge[e];
            normalise_relu_all(image, statistics, conv_plane(edge, kSep3First), padded_second);
            sep3_second.forward(padded_second, depthwise3 + depthwise_at(edge, 1, 9),
                                pointwise + pointwise_at(edge, kSep3Second), inner,
                                image + conv_plane(edge, kSep3Second) * size_);
            normalise_relu_all(image, statistics, conv_plane(edge, kSep5First), padded_second);
            sep5_second.forward(padded_second, depthwise5 + depthwise_at(edge, 1, 25),
                                pointwise + pointwise_at(edge, kSep5Second), inner,
                                image + conv_plane(edge, kSep5Second) * size_);
            for (int k : {kSep3Second, kSep5Second}) compute_all_moments(image, image_moments, conv_plane(edge, k));
          }
        }
        for (int e = group.first_edge; e < group.first_edge + group.edges; ++e)
          for (int k : {kSep3Second, kSep5Second}) combine(moments, image_planes, conv_plane(kEdge[e], k), statistics);
#pragma omp barrier
        // Adds the edges of this group to the nodes.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          const T* image = saved + n * image_planes * size_;
          for (int node = kEdge[group.first_edge].node; node < kNodes; ++node)
            for (int64_t c = 0; c < c_; ++c) {
              T* to = out + ((n * kNodes + node) * c_ + c) * nodes_.h * nodes_.w;
              if (g == 0) std::fill(total, total + size_, T(0));
              else expand_rows(to, total);
              for (int e = group.first_edge; e < group.first_edge + group.edges; ++e) {
                const Edge& edge = kEdge[e];
                if (edge.node != node) continue;
                for (int end = 0; end < kEnds; ++end) {
                  const T weight = mixing[edge.number * kPrimitives + kPrimitiveOf[end]];
                  const int64_t from = end_plane(edge, end);
                  if (from < 0) {                        // identity
                    const T* state = state_plane(x, out, n, edge.state) + c * nodes_.h * nodes_.w;
                    for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
                      for (int64_t j = 0; j < nodes_.columns(); ++j)
                        total[i * nodes_.out_row + j] += weight * state[i * nodes_.w + j];
                    continue;
                  }
                  const T mean = statistics[(from + c) * 2], factor = weight * statistics[(from + c) * 2 + 1];
                  const T* y = image + (from + c) * size_;
#pragma omp simd
                  for (int64_t p = 0; p < size_; ++p) total[p] += factor * (y[p] - mean);
                }
              }
              compact_rows(total, to);
            }
        }
      }
    }
  }

  // weight_gradients: false leaves the gradients of the weights unchanged and skips their computation.
  void backward(const T* x, const T* depthwise3, const T* depthwise5, const T* pointwise, const T* mixing, const T* out,
                const T* saved, const T* statistics, const T* out_gradient, bool weight_gradients, T* x_gradient,
                T* depthwise3_gradient, T* depthwise5_gradient, T* pointwise_gradient, T* mixing_gradient) {
    const int64_t image_planes = planes(c_, reduction_), c4 = kNodes * c_;
    const int64_t size3 = kEdges * 3 * c_ * 9, size5 = kEdges * 3 * c_ * 25, size1 = pointwise_size();
    const std::vector<T> flipped3 = flip(depthwise3, kEdges * 3 * c_, 9);
    const std::vector<T> flipped5 = flip(depthwise5, kEdges * 3 * c_, 25);
    PartialSums<T> partial;
    // Gradients of the nodes, and of the first normalisation's output in the sep_convs of one group
    // (which: 0 sep_conv_3x3, 1 sep_conv_5x5).
    static thread_local Storage<T> nodes_storage, first_storage;
    T* const gradient = nodes_storage.reserve(n_ * c4 * size_);
    T* const first_gradient = first_storage.reserve(n_ * kGroup[0].edges * 2 * c_ * size_);
    std::vector<double> sums(n_ * c4), dot_products(n_ * kEdges * kEnds * c_), first_sums(n_ * kEdges * 2 * c_ * 2);
    std::vector<T> mean_gradient(c4), slope(kEdges * kEnds * c_);
    std::vector<T> first_mean(kEdges * 2 * c_), first_slope(kEdges * 2 * c_);
    std::vector<double> total_dot_products(kEdges * kEnds * c_);
#pragma omp parallel num_threads(threads())
    {
      T* const gradient3 = weight_gradients ? partial.thread_sums(size3 + size5 + size1) : nullptr;
      T* const gradient5 = weight_gradients ? gradient3 + size3 : nullptr;
      T* const gradient1 = weight_gradients ? gradient5 + size5 : nullptr;
      const auto offset = [](T* base, int64_t index) { return base ? base + index : nullptr; };
      const int64_t in_size = c_ * std::max(inputs_.stride == 1 ? inputs_.step : inputs_.plane, nodes_.step);
      const int64_t in_plane = std::max(inputs_.h * inputs_.w, size_);
      Scratch<T> scratch(c_ * (inputs_.plane + nodes_.plane + second_.plane + 3 * nodes_.step) + in_size +
                         inputs_.plane + nodes_.plane + second_.plane + 2 * pools_size() + 3 * size_ + in_plane);
      T *padded_inputs = scratch.zeros(c_ * inputs_.plane), *padded_nodes = scratch.zeros(c_ * nodes_.plane);
      T *padded_second = scratch.zeros(c_ * second_.plane);
      T *inner = scratch.take(c_ * nodes_.step), *inner_gradient = scratch.take(c_ * nodes_.step);
      T *conv_gradient = scratch.zeros(c_ * nodes_.step), *in_gradient = scratch.take(in_size);
      T *inputs_bordered = scratch.zeros(inputs_.plane), *nodes_bordered = scratch.zeros(nodes_.plane);
      T *second_bordered = scratch.zeros(second_.plane), *bordered = scratch.take(pools_size());
      T *bordered_gradient = scratch.take(pools_size()), *max_gradient = scratch.take(size_);
      T *avg_gradient = scratch.take(size_), *unclaimed = scratch.take(size_);
      T *direct_gradient = scratch.take(in_plane);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < n_ * c4; ++k) expand_rows(out_gradient + k * nodes_.h * nodes_.w, gradient + k * size_);

      for (int g = kGroups - 1; g >= 0; --g) {
        const Group& group = kGroup[g];
        const Geometry& geometry = g == 0 ? inputs_ : nodes_;
        const Pools<T>& pools = g == 0 ? input_pools_ : node_pools_;
        T* padded = g == 0 ? padded_inputs : padded_nodes;
        T* conv_bordered = g == 0 ? inputs_bordered : nodes_bordered;
        const int first_node = kEdge[group.first_edge].node, end_edge = group.first_edge + group.edges;
        const Separable<T, L, 3> sep3(geometry, 1, c_), dil3(geometry, 2, c_), sep3_second(second_, 1, c_);
        const Separable<T, L, 5> sep5(geometry, 1, c_), dil5(geometry, 2, c_), sep5_second(second_, 1, c_);
        // For the end of every operation: the sums of the node's gradient d and of d (y - mean).
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          const T* image = saved + n * image_planes * size_;
          for (int64_t k = first_node * c_; k < c4; ++k) {
            const T* d = gradient + (n * c4 + k) * size_;
            T total = 0;
#pragma omp simd reduction(+ : total)
            for (int64_t p = 0; p < size_; ++p) total += d[p];
            sums[n * c4 + k] = total;
          }
          for (int e = group.first_edge; e < end_edge; ++e)
            for (int end = 0; end < kEnds; ++end)
              for (int64_t c = 0; c < c_; ++c) {
                const Edge& edge = kEdge[e];
                const T* d = gradient + (n * c4 + edge.node * c_ + c) * size_;
                const int64_t from = end_plane(edge, end);
                T total = 0;
                if (from < 0) {
                  const T* state = state_plane(x, out, n, edge.state) + c * nodes_.h * nodes_.w;
                  for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd reduction(+ : total)
                    for (int64_t j = 0; j < nodes_.columns(); ++j)
                      total += d[i * nodes_.out_row + j] * state[i * nodes_.w + j];
                } else {
                  const T* y = image + (from + c) * size_;
                  const T mean = statistics[(from + c) * 2];
#pragma omp simd reduction(+ : total)
                  for (int64_t p = 0; p < size_; ++p) total += d[p] * (y[p] - mean);
                }
                dot_products[((n * kEdges + e) * kEnds + end) * c_ + c] = total;
              }
        }
#pragma omp single
        {
          for (int64_t k = first_node * c_; k < c4; ++k) {
            double total = 0;
            for (int64_t n = 0; n < n_; ++n) total += sums[n * c4 + k];
            mean_gradient[k] = total / count_;
          }
          for (int e = group.first_edge; e < end_edge; ++e)
            for (int end = 0; end < kEnds; ++end) {
              double scale_gradient = 0;
              for (int64_t c = 0; c < c_; ++c) {
                const int64_t k = (e * kEnds + end) * c_ + c, from = end_plane(kEdge[e], end);
                double total = 0;
                for (int64_t n = 0; n < n_; ++n) total += dot_products[n * kEdges * kEnds * c_ + k];
                total_dot_products[k] = total;
                const double rstd = from < 0 ? 1 : statistics[(from + c) * 2 + 1];
                slope[k] = rstd * rstd * total / count_;
                scale_gradient += rstd * total;
              }
              mixing_gradient[kEdge[e].number * kPrimitives + kPrimitiveOf[end]] = scale_gradient;
            }
        }
        // Computes the gradient of the input of the normalisation at the end of an operation.
        const auto end_gradient = [&](int64_t n, const Edge& edge, int end, T* to) {
          const T weight = mixing[edge.number * kPrimitives + kPrimitiveOf[end]];
          for (int64_t c = 0; c < c_; ++c) {
            const int64_t from = end_plane(edge, end) + c;
            batch_norm_backward(nodes_, gradient + (n * c4 + edge.node * c_ + c) * size_,
                                saved + (n * image_planes + from) * size_, weight * statistics[from * 2 + 1],
                                mean_gradient[edge.node * c_ + c], statistics[from * 2],
                                slope[(edge.position * kEnds + end) * c_ + c], to + c * nodes_.step);
          }
        };
        // Backward pass of the second halves of the separable convolutions.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          const T* image = saved + n * image_planes * size_;
          for (int e = group.first_edge; e < end_edge; ++e) {
            const Edge& edge = kEdge[e];
            for (int which = 0; which < 2; ++which) {
              const int64_t first = conv_plane(edge, which ? kSep5First : kSep3First);
              end_gradient(n, edge, which ? kSep5End : kSep3End, conv_gradient);
              normalise_relu_all(image, statistics, first, padded_second);
              std::fill(in_gradient, in_gradient + c_ * nodes_.step, T(0));
              const int64_t pointwise_k = pointwise_at(edge, which ? kSep5Second : kSep3Second);
              if (which) {
                const int64_t k = depthwise_at(edge, 1, 25);
                sep5_second.backward(padded_second, depthwise5 + k, flipped5.data() + k, pointwise + pointwise_k,
                                     conv_gradient, inner, inner_gradient, second_bordered, offset(gradient5, k),
                                     offset(gradient1, pointwise_k), in_gradient);
              } else {
                const int64_t k = depthwise_at(edge, 1, 9);
                sep3_second.backward(padded_second, depthwise3 + k, flipped3.data() + k, pointwise + pointwise_k,
                                     conv_gradient, inner, inner_gradient, second_bordered, offset(gradient3, k),
                                     offset(gradient1, pointwise_k), in_gradient);
              }
              for (int64_t c = 0; c < c_; ++c) {
                normalised_relu_backward<T, L>(
                    nodes_, image + (first + c) * size_, T(1), statistics[(first + c) * 2], T(0),
                    in_gradient + c * nodes_.step,
                    first_gradient + (((n * kGroup[0].edges + edge.local) * 2 + which) * c_ + c) * size_,
                    first_sums.data() + (((n * kEdges + e) * 2 + which) * c_ + c) * 2);
              }
            }
          }
        }
#pragma omp for schedule(static)
        for (int64_t k = group.first_edge * 2 * c_; k < end_edge * 2 * c_; ++k) {
          const Edge& edge = kEdge[k / (2 * c_)];
          double total = 0, dot = 0;
          for (int64_t n = 0; n < n_; ++n) {
            total += first_sums[(n * kEdges * 2 * c_ + k) * 2];
            dot += first_sums[(n * kEdges * 2 * c_ + k) * 2 + 1];
          }
          const double rstd = statistics[(conv_plane(edge, k / c_ % 2 ? kSep5First : kSep3First) + k % c_) * 2 + 1];
          first_mean[k] = total / count_, first_slope[k] = rstd * rstd * dot / count_;
        }
        const auto first_half_gradient = [&](int64_t n, const Edge& edge, int which, T* to) {
          for (int64_t c = 0; c < c_; ++c) {
            const int64_t from = conv_plane(edge, which ? kSep5First : kSep3First) + c;
            const int64_t k = (edge.position * 2 + which) * c_ + c;
            batch_norm_backward(nodes_,
                                first_gradient + (((n * kGroup[0].edges + edge.local) * 2 + which) * c_ + c) * size_,
                                saved + (n * image_planes + from) * size_, statistics[from * 2 + 1], first_mean[k],
                                statistics[from * 2], first_slope[k], to + c * nodes_.step);
          }
        };
        // Backward pass from the first convolutions and the pools to the states.
#pragma omp for schedule(static)
        for (int64_t n = 0; n < n_; ++n) {
          const T* image = saved + n * image_planes * size_;
          for (int s = group.first_state; s < group.first_state + group.states; ++s) {
            const T* state = state_plane(x, out, n, s);
            const int64_t in_step = geometry.stride == 1 ? geometry.step : geometry.plane;
            for (int64_t c = 0; c < c_; ++c)
              pad(geometry, state + c * geometry.h * geometry.w, padded + c * geometry.plane);
            std::fill(in_gradient, in_gradient + c_ * in_step, T(0));
            for (int e = group.first_edge; e < end_edge; ++e) {
              const Edge& edge = kEdge[e];
              if (edge.state != s) continue;
              const auto backward3 = [&](const Separable<T, L, 3>& convolution, int kind, int k) {
                const int64_t kernel = depthwise_at(edge, kind, 9), pointwise_k = pointwise_at(edge, k);
                convolution.backward(padded, depthwise3 + kernel, flipped3.data() + kernel, pointwise + pointwise_k,
                                     conv_gradient, inner, inner_gradient, conv_bordered, offset(gradient3, kernel),
                                     offset(gradient1, pointwise_k), in_gradient);
              };
              const auto backward5 = [&](const Separable<T, L, 5>& convolution, int kind, int k) {
                const int64_t kernel = depthwise_at(edge, kind, 25), pointwise_k = pointwise_at(edge, k);
                convolution.backward(padded, depthwise5 + kernel, flipped5.data() + kernel, pointwise + pointwise_k,
                                     conv_gradient, inner, inner_gradient, conv_bordered, offset(gradient5, kernel),
                                     offset(gradient1, pointwise_k), in_gradient);
              };
              first_half_gradient(n, edge, 0, conv_gradient);
              backward3(sep3, 0, kSep3First);
              first_half_gradient(n, edge, 1, conv_gradient);
              backward5(sep5, 0, kSep5First);
              end_gradient(n, edge, kDil3End, conv_gradient);
              backward3(dil3, 2, kDil3Only);
              end_gradient(n, edge, kDil5End, conv_gradient);
              backward5(dil5, 2, kDil5Only);
              if (reduction_ && g == 0) {
                end_gradient(n, edge, kSkipEnd, conv_gradient);
                for (int half = 0; half < 2; ++half) {
                  const int64_t k = factorized_at(edge, half);
                  const T* d = conv_gradient + half * (c_ / 2) * nodes_.step;
                  if (weight_gradients) {
                    gather_half(geometry, padded, half, inner);
                    add_outer<T, L>(d, nodes_.step, inner, nodes_.step, c_ / 2, c_, size_, gradient1 + k);
                  }
                  multiply<T, L>(pointwise + k, 1, c_, d, nodes_.step, c_, c_ / 2, size_, inner_gradient, nodes_.step);
                  scatter_add_half(geometry, inner_gradient, half, in_gradient);
                }
              }
            }
            for (int64_t c = 0; c < c_; ++c) {
              const T* plane = state + c * geometry.h * geometry.w;
              std::fill(direct_gradient, direct_gradient + geometry.h * geometry.w, T(0));
              pool_gradient(n, s, kMaxEnd, c, group, mixing, gradient, image, statistics, mean_gradient,
                            total_dot_products, max_gradient);
              pool_gradient(n, s, kAvgEnd, c, group, mixing, gradient, image, statistics, mean_gradient,
                            total_dot_products, avg_gradient);
              std::fill(bordered_gradient, bordered_gradient + pools.bordered_size(), T(0));
              pools.max_backward(plane, image + (pool_plane(s, 0) + c) * size_, max_gradient, bordered, unclaimed,
                                 bordered_gradient);
              pools.mean_backward(avg_gradient, unclaimed, bordered_gradient);
              pools.add_interior(bordered_gradient, direct_gradient);
              if (geometry.stride == 1)
                for (int e = group.first_edge; e < end_edge; ++e) {
                  const Edge& edge = kEdge[e];
                  if (edge.state != s) continue;
                  const T weight = mixing[edge.number * kPrimitives + kSkip];
                  const T* d = gradient + (n * c4 + edge.node * c_ + c) * size_;
                  for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
                    for (int64_t j = 0; j < nodes_.columns(); ++j)
                      direct_gradient[i * nodes_.w + j] += weight * d[i * nodes_.out_row + j];
                }
              // The gradient through the ReLU of the convolutions, and that of pools and identity, which have no ReLU.
              for (int64_t i = 0; i < geometry.h; ++i) {
                const T *value = plane + i * geometry.w, *direct = direct_gradient + i * geometry.w;
                T* to = s < 2 ? x_gradient + (((n * 2 + s) * c_ + c) * geometry.h + i) * geometry.w
                              : gradient + (n * c4 + (s - 2) * c_ + c) * size_ + i * nodes_.out_row;
                if (geometry.stride == 1) {
                  const T* rectified = in_gradient + c * in_step + i * geometry.out_row;
                  if (s < 2) {
#pragma omp simd
                    for (int64_t j = 0; j < geometry.w; ++j) to[j] = direct[j] + relu_grad(value[j], rectified[j]);
                  } else {
#pragma omp simd
                    for (int64_t j = 0; j < geometry.w; ++j) to[j] += direct[j] + relu_grad(value[j], rectified[j]);
                  }
                } else {
                  const T* rectified = in_gradient + c * in_step + (i + geometry.padding) * geometry.row;
                  for (int64_t j = 0; j < geometry.w; ++j)
                    to[j] = direct[j] + relu_grad(value[j], rectified[geometry.at(0, j + geometry.padding)]);
                }
              }
            }
          }
        }
      }
    }
    if (!weight_gradients) return;
    partial.add_to(depthwise3_gradient, 0, size3);
    partial.add_to(depthwise5_gradient, size3, size5);
    partial.add_to(pointwise_gradient, size3 + size5, size1);
  }

 private:
  // Offsets of weights. Depthwise weights are ordered by group, in a group by convolution (kind 0 and 1: halves of the
  // sep_conv, 2: dil_conv), then by edge. Pointwise weights have the same order with six convolutions, and at the end
  // of the first group of a reduction cell the two convolutions of FactorizedReduce.
  int64_t depthwise_at(const Edge& edge, int kind, int taps) const {
    const Group& group = kGroup[edge.group];
    return (3 * group.first_edge + kind * group.edges + edge.local) * c_ * taps;
  }
  int64_t pointwise_at(const Edge& edge, int k) const {
    const Group& group = kGroup[edge.group];
    const int64_t factorized = reduction_ && edge.group > 0 ? kGroup[0].edges : 0;
    return (6 * group.first_edge + factorized + k * group.edges + edge.local) * c_ * c_;
  }
  int64_t factorized_at(const Edge& edge, int half) const {
    return (6 * kGroup[0].edges * c_ + (half * kGroup[0].edges + edge.local) * (c_ / 2)) * c_;
  }
  int64_t pointwise_size() const { return (6 * kEdges + (reduction_ ? kGroup[0].edges : 0)) * c_ * c_; }

  // Indices of the first of C planes in `saved` (of an image) and in `statistics`: of a convolution, of
  // FactorizedReduce, of a pool (which: 0 maximum, 1 mean), and of the result at the end of an operation, -1 for the
  // identity.
  int64_t conv_plane(const Edge& edge, int k) const { return (edge.position * kConvolutions + k) * c_; }
  int64_t factorized_plane(const Edge& edge) const { return (kEdges * kConvolutions + edge.local) * c_; }
  int64_t pool_plane(int state, int which) const {
    return (kEdges * kConvolutions + (reduction_ ? kGroup[0].edges : 0) + 2 * state + which) * c_;
  }
  int64_t end_plane(const Edge& edge, int end) const {
    if (end < 4) return conv_plane(edge, kLastConvolution[end]);
    if (end < kSkipEnd) return pool_plane(edge.state, end - kMaxEnd);
    return reduction_ && edge.group == 0 ? factorized_plane(edge) : -1;
  }

  int64_t pools_size() const { return std::max(input_pools_.bordered_size(), node_pools_.bordered_size()); }

  const T* state_plane(const T* x, const T* out, int64_t n, int s) const {
    return s < 2 ? x + (n * 2 + s) * c_ * inputs_.h * inputs_.w : out + (n * kNodes + s - 2) * c_ * nodes_.h * nodes_.w;
  }

  // Copies a plane [h, w] to a plane with rounded-up rows, which end in zeros, and back.
  void expand_rows(const T* from, T* to) const {
    if (nodes_.out_row != nodes_.w) std::fill(to, to + size_, T(0));
    for (int64_t i = 0; i < nodes_.rows(); ++i)
      std::memcpy(to + i * nodes_.out_row, from + i * nodes_.w, nodes_.columns() * sizeof(T));
  }
  void compact_rows(const T* from, T* to) const {
    for (int64_t i = 0; i < nodes_.rows(); ++i)
      std::memcpy(to + i * nodes_.w, from + i * nodes_.out_row, nodes_.columns() * sizeof(T));
  }

  // Computes the moments of C planes of one image.
  void compute_all_moments(const T* image, double* moments, int64_t first) const {
    for (int64_t k = first; k < first + c_; ++k) compute_moments(nodes_, image + k * size_, moments + 2 * k);
  }
  // Combines the moments of C planes over all images to mean and 1 / sqrt(variance + epsilon); the threads share the
  // planes.
  void combine(const std::vector<double>& moments, int64_t image_planes, int64_t first, T* statistics) const {
#pragma omp for schedule(static) nowait
    for (int64_t k = first; k < first + c_; ++k) {
      double mean, variance;
      combine_moments(moments.data() + 2 * k, n_, 2 * image_planes, nodes_.h * nodes_.w, &mean, &variance);
      statistics[2 * k] = mean, statistics[2 * k + 1] = 1 / std::sqrt(variance + epsilon_);
    }
  }
  void normalise_relu_all(const T* image, const T* statistics, int64_t first, T* padded) const {
    for (int64_t k = first; k < first + c_; ++k)
      normalise_relu(second_, image + k * size_, nodes_.out_row, statistics[2 * k + 1], statistics[2 * k], T(0),
                     padded + (k - first) * second_.plane);
  }

  // The input of a half of FactorizedReduce: every second row and column of C rectified planes; half 1 starts one pixel
  // further down and right. The other function adds its gradient to that of the padded planes.
  void gather_half(const Geometry& g, const T* padded, int half, T* to) const {
    const int64_t first = g.at(g.padding + half, g.padding + half);
    for (int64_t c = 0; c < c_; ++c)
      for (int64_t i = 0; i < g.out_h; ++i)
        std::memcpy(to + c * g.step + i * g.out_row, padded + c * g.plane + first + i * g.stride * g.row,
                    g.out_row * sizeof(T));
  }
  void scatter_add_half(const Geometry& g, const T* from, int half, T* padded) const {
    const int64_t first = g.at(g.padding + half, g.padding + half);
    for (int64_t c = 0; c < c_; ++c)
      for (int64_t i = 0; i < g.out_h; ++i) {
        T* to = padded + c * g.plane + first + i * g.stride * g.row;
#pragma omp simd
        for (int64_t j = 0; j < g.out_w; ++j) to[j] += from[c * g.step + i * g.out_row + j];
      }
  }

  // Computes the gradient of the input of a pool's normalisation, which all edges of the state share.
  void pool_gradient(int64_t n, int s, int end, int64_t c, const Group& group, const T* mixing, const T* gradient,
                     const T* image, const T* statistics, const std::vector<T>& mean_gradient,
                     const std::vector<double>& total_dot_products, T* to) const {
    const int64_t from = pool_plane(s, end - kMaxEnd) + c;
    const T mean = statistics[from * 2], rstd = statistics[from * 2 + 1];
    const T* y = image + from * size_;
    double d_mean = 0, d_dot = 0;
    std::fill(to, to + size_, T(0));
    for (int e = group.first_edge; e < group.first_edge + group.edges; ++e) {
      const Edge& edge = kEdge[e];
      if (edge.state != s) continue;
      const T weight = mixing[edge.number * kPrimitives + kPrimitiveOf[end]];
      d_mean += weight * mean_gradient[edge.node * c_ + c];
      d_dot += weight * total_dot_products[(e * kEnds + end) * c_ + c];
      const T* d = gradient + (n * kNodes * c_ + edge.node * c_ + c) * size_;
#pragma omp simd
      for (int64_t p = 0; p < size_; ++p) to[p] += weight * d[p];
    }
    batch_norm_backward(nodes_, to, y, rstd, static_cast<T>(d_mean), mean,
                        static_cast<T>(double(rstd) * rstd * d_dot / count_), to);
  }

  const int64_t n_, c_;
  const bool reduction_;
  const double epsilon_;
  const Geometry inputs_, nodes_, second_;       // of states 0 and 1; of the nodes; between the halves of a sep_conv
  const int64_t size_, count_;                   // numbers per saved plane; numbers per normalised channel
  const Pools<T> input_pools_, node_pools_;
};

std::vector<Tensor> Forward(const Tensor& x, const Tensor& depthwise3, const Tensor& depthwise5,
                            const Tensor& pointwise, const Tensor& mixing, bool reduction, bool, float epsilon) {
  const int64_t n = x.shape()[0], c = pointwise.shape()[1];
  const int64_t h = x.shape()[2] / (reduction ? 2 : 1), w = x.shape()[3] / (reduction ? 2 : 1);
  Tensor out = paddle::empty({n, kNodes * c, h, w}, x.dtype(), x.place()), saved, statistics;
  PD_DISPATCH_FLOATING_TYPES(x.type(), "mixed_cell", ([&] {
    dispatch_lanes<data_t>(w, [&](auto lanes) {
      using Cell = MixedCell<data_t, decltype(lanes)::value>;
      const int64_t planes = Cell::planes(c, reduction);
      saved = paddle::empty({n, planes, Cell::plane_size(h, w)}, x.dtype(), x.place());
      statistics = paddle::empty({planes, 2}, x.dtype(), x.place());
      Cell(x, pointwise, reduction, epsilon)
          .forward(x.data<data_t>(), depthwise3.data<data_t>(), depthwise5.data<data_t>(), pointwise.data<data_t>(),
                   mixing.data<data_t>(), out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>());
    });
  }));
  return {out, saved, statistics};
}

std::vector<Tensor> Backward(const Tensor& x, const Tensor& depthwise3, const Tensor& depthwise5,
                             const Tensor& pointwise, const Tensor& mixing, const Tensor& out, const Tensor& saved,
                             const Tensor& statistics, const Tensor& out_gradient, bool reduction,
                             bool weight_gradients, float epsilon) {
  const auto like = [](const Tensor& t) { return paddle::zeros(t.shape(), t.dtype(), t.place()); };
  Tensor x_gradient = paddle::empty(x.shape(), x.dtype(), x.place()), gradient3 = like(depthwise3);
  Tensor gradient5 = like(depthwise5), gradient1 = like(pointwise), mixing_gradient = like(mixing);
  PD_DISPATCH_FLOATING_TYPES(x.type(), "mixed_cell_grad", ([&] {
    dispatch_lanes<data_t>(out.shape()[3], [&](auto lanes) {
      MixedCell<data_t, decltype(lanes)::value>(x, pointwise, reduction, epsilon)
          .backward(x.data<data_t>(), depthwise3.data<data_t>(), depthwise5.data<data_t>(), pointwise.data<data_t>(),
                    mixing.data<data_t>(), out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(),
                    out_gradient.data<data_t>(), weight_gradients, x_gradient.data<data_t>(), gradient3.data<data_t>(),
                    gradient5.data<data_t>(), gradient1.data<data_t>(), mixing_gradient.data<data_t>());
    });
  }));
  return {x_gradient, gradient3, gradient5, gradient1, mixing_gradient};
}

std::vector<std::vector<int64_t>> InferShape(const std::vector<int64_t>& x, const std::vector<int64_t>&,
                                             const std::vector<int64_t>&, const std::vector<int64_t>& pointwise,
                                             const std::vector<int64_t>&, bool reduction, bool, float) {
  const int64_t c = pointwise[1], planes = MixedCell<float, 4>::planes(c, reduction), stride = reduction ? 2 : 1;
  return {{x[0], kNodes * c, x[2] / stride, x[3] / stride}, {x[0], planes, -1}, {planes, 2}};
}

std::vector<paddle::DataType> InferDtype(paddle::DataType x, paddle::DataType, paddle::DataType, paddle::DataType,
                                         paddle::DataType) {
  return {x, x, x};
}

}  // namespace

PD_BUILD_OP(darts_mixed_cell)
    .Inputs({"X", "Depthwise3", "Depthwise5", "Pointwise", "Mixing"})
    .Outputs({"Out", "Saved", "Statistics"})
    .Attrs({"reduction: bool", "weight_gradients: bool", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_mixed_cell)
    .Inputs({"X", "Depthwise3", "Depthwise5", "Pointwise", "Mixing", "Out", "Saved", "Statistics", paddle::Grad("Out")})
    .Outputs({paddle::Grad("X"), paddle::Grad("Depthwise3"), paddle::Grad("Depthwise5"), paddle::Grad("Pointwise"),
              paddle::Grad("Mixing")})
    .Attrs({"reduction: bool", "weight_gradients: bool", "epsilon: float"})
    .SetKernelFn(PD_KERNEL(Backward));
