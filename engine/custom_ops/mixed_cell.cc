// All mixed operations of a supernet cell as one operator for the CPU, from both input states to the nodes.
// README.md in this folder explains the memory layout and the order of the loops.
#include "cells.h"

namespace {

// A convolution of an edge; column: of the mixing weights; plane: of its first stage, among those of the edge.
struct Convolution {
  ConvolutionKind kind;
  int column, plane;
};
struct PoolKind {
  bool max;
  int column;
};
// The result of an operation on an edge, scaled by the mixing weight in `column`; plane: -1 for the identity, otherwise
// the index of C saved planes, those of a result before its batch normalisation.
struct End {
  int column;
  int64_t plane;
};
// number: row of the mixing weights; local: index in the group; plane: index of the first saved planes.
struct Edge {
  int state, node, number, local;
  int64_t plane;
  std::vector<End> ends;
};
// States whose edges are computed together, as SearchSpace.state_groups; edges ordered by node, then by state.
// first_results, second_results: the planes that are complete after the first and second convolutions.
struct Group {
  int first_state, states, first_node;
  std::vector<Edge> edges;
  std::vector<int64_t> first_results, second_results;
};

// The cell that the attributes of the operator describe: the same for all images, channels and element types.
struct Space {
  std::vector<Convolution> convolutions;
  std::vector<PoolKind> pools;
  std::vector<Group> groups;
  int nodes, columns, skip = -1, halves = 0;       // halves: the number of convolutions with two stages
  int64_t edges = 0, planes = 0, padding = 0;      // planes: saved per image, in units of C
  int64_t second_padding = 0, stages = 0;
  bool reduction;

  Space(const std::vector<std::string>& primitives, int nodes, bool reduction)
      : nodes(nodes), columns(primitives.size()), reduction(reduction) {
    PD_CHECK(nodes > 0 && nodes <= 1000 && columns > 0, "a cell needs from 1 to 1000 nodes, and primitives");
    for (int k = 0; k < columns; ++k) {
      const std::string& name = primitives[k];
      check_operation(name);
      PD_CHECK(std::count(primitives.begin(), primitives.end(), name) == 1, name, " occurs more than once");
      if (name == "skip_connect") skip = k;
      if (is_pool(name)) pools.push_back({name == "max_pool_3x3", k});
      const ConvolutionKind* kind = find_convolution(name);
      if (!kind) continue;
      convolutions.push_back({*kind, k, static_cast<int>(stages)});
      stages += kind->stages, halves += kind->stages > 1;
      padding = std::max<int64_t>(padding, kind->dilation * (kind->kernel / 2));
      if (kind->stages > 1) second_padding = std::max<int64_t>(second_padding, kind->kernel / 2);
    }
    padding += padding % 2;                        // padding with stride 2 is faster with an even border
    for (int last = 1; last <= nodes; ++last) add_group(last == 1 ? 0 : last, last == 1 ? 2 : 1);
    for (Group& group : groups) add_planes(&group);
  }

  bool has_factorized_reduce(const Group& group) const { return reduction && skip >= 0 && group.first_state == 0; }

 private:
  void add_group(int first_state, int states) {
    Group group{first_state, states, std::max(0, first_state + states - 2), {}, {}, {}};
    for (int node = group.first_node; node < nodes; ++node)
      for (int s = first_state; s < first_state + states; ++s)
        group.edges.push_back({s, node, node * (node + 3) / 2 + s, static_cast<int>(group.edges.size()), 0, {}});
    edges += group.edges.size();
    groups.push_back(group);
  }
  void add_planes(Group* group) {
    const int64_t pool_planes = planes;
    planes += group->states * pools.size();
    for (int64_t k = pool_planes; k < planes; ++k) group->first_results.push_back(k);
    for (Edge& edge : group->edges) {
      edge.plane = planes;
      for (const Convolution& convolution : convolutions) {
        group->first_results.push_back(planes++);
        if (convolution.kind.stages > 1) group->second_results.push_back(planes++);
        edge.ends.push_back({convolution.column, planes - 1});
      }
      for (size_t k = 0; k < pools.size(); ++k)
        edge.ends.push_back({pools[k].column, pool_planes + (edge.state - group->first_state) * int64_t(pools.size()) +
                                                  static_cast<int64_t>(k)});
      if (has_factorized_reduce(*group)) group->first_results.push_back(planes++);
      if (skip >= 0) edge.ends.push_back({skip, has_factorized_reduce(*group) ? planes - 1 : -1});
    }
  }
};

template <typename T, int L>
class MixedCell {
 public:
  // inputs: x, the mixing weights, then the weights; gradients: those of all inputs, or null.
  MixedCell(const Space& space, const std::vector<Tensor>& inputs, std::vector<Tensor>* gradients, double epsilon)
      : space_(space), x_(inputs[0].data<T>()), mixing_(inputs[1].data<T>()), n_(inputs[0].shape()[0]),
        c_(inputs[0].shape()[1] / 2), epsilon_(epsilon),
        inputs_(Geometry::of<T>(inputs[0].shape()[2], inputs[0].shape()[3], space.reduction ? 2 : 1, space.padding, L)),
        nodes_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, space.padding, L)),
        second_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, space.second_padding, L)), size_(nodes_.size),
        count_(n_ * nodes_.h * nodes_.w), input_pools_(inputs_), node_pools_(nodes_), grid_(inputs_, c_) {
    for (const Convolution& convolution : space.convolutions) {
      const ConvolutionKind& kind = convolution.kind;
      first_convolutions_[0].push_back(make_separable<T, L>(kind.kernel, inputs_, kind.dilation, c_));
      first_convolutions_[1].push_back(make_separable<T, L>(kind.kernel, nodes_, kind.dilation, c_));
      second_convolutions_.push_back(make_separable<T, L>(kind.kernel, second_, 1, c_));
    }
    Weights<T> weights(inputs, gradients);
    const auto take = [&](int64_t rows, int64_t columns, int kernel) {
      const auto weight = weights.take(rows, columns, kernel);
      blocks_.push_back({weight.value, weight.gradient, weight.size, weights_size_, {}});
      weights_size_ += weight.size;
      if (gradients && columns == 1) blocks_.back().flipped = flip(weight.value, rows, int64_t(kernel) * kernel);
    };
    for (const Group& group : space.groups) {
      first_block_.push_back(blocks_.size());
      for (const Convolution& convolution : space.convolutions)
        for (int stage = 0; stage < convolution.kind.stages; ++stage) {
          take(group.edges.size() * c_, 1, convolution.kind.kernel);
          take(group.edges.size() * c_, c_, 1);
        }
      for (int half = 0; half < 2 && space.has_factorized_reduce(group); ++half)
        take(group.edges.size() * (c_ / 2), c_, 1);
    }
    weights.check_all_used();
  }

  static int64_t plane_size(int64_t out_h, int64_t out_w) { return out_h * ((out_w + L - 1) / L * L); }

  // Writes out [N, nodes, C planes], saved [N, planes] and statistics [planes, 2]: mean and 1 / sqrt(variance + epsilon).
  void forward(T* out, T* saved, T* statistics) {
    out_ = out, saved_ = saved, statistics_ = statistics;
    moments_.resize(n_ * planes() * 2);
#pragma omp parallel num_threads(threads())
    {
      Workspace work(*this);
      for (size_t g = 0; g < space_.groups.size(); ++g) {
        convolve_states(g, work);
        combine(space_.groups[g].first_results);
        convolve_again(g, work);
        combine(space_.groups[g].second_results);
        add_edges(g, work);
      }
    }
  }

  // weight_gradients: false leaves the gradients of the weights unchanged and skips their computation.
  void backward(const T* out, const T* saved, const T* statistics, const T* out_gradient, bool weight_gradients,
                T* x_gradient, T* mixing_gradient) {
    // The backward pass does not write to these tensors.
    out_ = const_cast<T*>(out), saved_ = const_cast<T*>(saved), statistics_ = const_cast<T*>(statistics);
    const int64_t node_planes = space_.nodes * c_, ends = space_.edges * end_count();
    const int64_t most_edges = space_.groups[0].edges.size(), halves = space_.halves;
    static thread_local Storage<T> nodes_storage, halves_storage;
    gradient_ = nodes_storage.reserve(n_ * node_planes * size_);
    half_gradient_ = halves_storage.reserve(n_ * most_edges * halves * c_ * size_);
    sums_.resize(n_ * node_planes), dot_products_.resize(n_ * ends * c_), total_dot_products_.resize(ends * c_);
    half_sums_.resize(n_ * most_edges * halves * c_ * 2);
    mean_gradient_.resize(node_planes), slope_.resize(ends * c_);
    half_mean_.resize(most_edges * halves * c_), half_slope_.resize(most_edges * halves * c_);
    PartialSums<T> partial;
#pragma omp parallel num_threads(threads())
    {
      Workspace work(*this);
      if (weight_gradients) work.weights = partial.thread_sums(weights_size_);
#pragma omp for schedule(static)
      for (int64_t k = 0; k < n_ * node_planes; ++k)
        expand_rows(out_gradient + k * nodes_.h * nodes_.w, gradient_ + k * size_);
      for (int g = space_.groups.size() - 1; g >= 0; --g) {
        sum_gradients(g);
        combine_gradients(g, mixing_gradient);
        differentiate_again(g, work);
        combine_half_gradients(g);
        differentiate_states(g, x_gradient, work);
      }
    }
    for (const Block& block : blocks_)
      if (weight_gradients) partial.add_to(block.gradient, block.at, block.size);
  }

 private:
  // The weights of one convolution on all edges of a group; at: index in the sums of a thread's gradients.
  struct Block {
    const T* value;
    T* gradient;
    int64_t size, at;
    std::vector<T> flipped;
  };

  // Memory of a thread: planes of C channels, or of one channel.
  struct Workspace {
    explicit Workspace(const MixedCell& cell)
        : scratch(cell.c_ * (cell.inputs_.plane + cell.nodes_.plane + cell.second_.plane + 5 * cell.nodes_.step) +
                  cell.in_gradient_size() + cell.inputs_.plane + cell.nodes_.plane + cell.second_.plane +
                  2 * cell.pools_size() + 4 * cell.size_ + cell.inputs_.h * cell.inputs_.w),
          padded{scratch.zeros(cell.c_ * cell.inputs_.plane), scratch.zeros(cell.c_ * cell.nodes_.plane)},
          padded_second(scratch.zeros(cell.c_ * cell.second_.plane)),
          bordered{scratch.zeros(cell.inputs_.plane), scratch.zeros(cell.nodes_.plane)},
          bordered_second(scratch.zeros(cell.second_.plane)), inner(scratch.take(cell.c_ * cell.nodes_.step)),
          inner_gradient(scratch.take(cell.c_ * cell.nodes_.step)), grids(scratch.take(2 * cell.c_ * cell.nodes_.step)),
          conv_gradient(scratch.zeros(cell.c_ * cell.nodes_.step)), in_gradient(scratch.take(cell.in_gradient_size())),
          pool_bordered(scratch.take(cell.pools_size())), pool_gradient(scratch.take(cell.pools_size())),
          total(scratch.take(cell.size_)), end_gradient(scratch.take(cell.size_)), row(scratch.take(cell.size_)),
          direct_gradient(scratch.take(std::max(cell.size_, cell.inputs_.h * cell.inputs_.w))) {}
    Scratch<T> scratch;
    T *padded[2], *padded_second;                    // rectified states, inputs or nodes; first halves of a sep_conv
    T *bordered[2], *bordered_second;                // a padded plane, for gradients
    T *inner, *inner_gradient, *grids, *conv_gradient, *in_gradient;
    T *pool_bordered, *pool_gradient, *total, *end_gradient, *row, *direct_gradient;
    T* weights = nullptr;                            // gradients of all weights, or null
  };

  // ---- forward pass of a group of states

  // Computes pools, first convolutions and FactorizedReduce of every edge, up to their normalisation.
  void convolve_states(int g, Workspace& work) {
    const Group& group = space_.groups[g];
    const Geometry& geometry = geometry_of(g);
    T* padded = work.padded[g > 0];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n) {
      for (int s = group.first_state; s < group.first_state + group.states; ++s) {
        const T* state = state_planes(n, s);
        for (int64_t c = 0; c < c_; ++c) pad(geometry, state + c * geometry.h * geometry.w, padded + c * geometry.plane);
        for (size_t k = 0; k < space_.pools.size(); ++k) {
          const int64_t plane = pool_plane(group, s, k);
          for (int64_t c = 0; c < c_; ++c) pool(g, k, state + c * geometry.h * geometry.w, work, result(n, plane, c));
          compute_all_moments(n, plane);
        }
        for (int half = 0; half < 2 && space_.has_factorized_reduce(group); ++half)
          grid_.gather(state, half, work.grids + half * c_ * nodes_.step);
        for (const Edge& edge : group.edges) {
          if (edge.state != s) continue;
          for (size_t k = 0; k < space_.convolutions.size(); ++k) {
            const int64_t plane = edge.plane + space_.convolutions[k].plane;
            first_convolutions_[g > 0][k]->forward(padded, depthwise(g, k, 0, edge).value,
                                                   pointwise(g, k, 0, edge).value, work.inner, result(n, plane, 0));
            compute_all_moments(n, plane);
          }
          if (!space_.has_factorized_reduce(group)) continue;
          const int64_t plane = edge.ends.back().plane;
          for (int half = 0; half < 2; ++half)
            multiply<T, L>(reduce(g, half, edge).value, c_, 1, work.grids + half * c_ * nodes_.step, nodes_.step, c_ / 2,
                           c_, size_, result(n, plane, half * (c_ / 2)), size_);
          compute_all_moments(n, plane);
        }
      }
    }
  }

  // Computes the second halves of the separable convolutions.
  void convolve_again(int g, Workspace& work) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n)
      for (const Edge& edge : space_.groups[g].edges)
        for (size_t k = 0; k < space_.convolutions.size(); ++k) {
          if (space_.convolutions[k].kind.stages == 1) continue;
          const int64_t plane = edge.plane + space_.convolutions[k].plane;
          pad_normalised(n, plane, work.padded_second);
          second_convolutions_[k]->forward(work.padded_second, depthwise(g, k, 1, edge).value,
                                           pointwise(g, k, 1, edge).value, work.inner, result(n, plane + 1, 0));
          compute_all_moments(n, plane + 1);
        }
  }

  // Adds the edges of a group to the nodes.
  void add_edges(int g, Workspace& work) {
    const Group& group = space_.groups[g];
    T* total = work.total;
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n)
      for (int node = group.first_node; node < space_.nodes; ++node)
        for (int64_t c = 0; c < c_; ++c) {
          T* to = out_ + ((n * space_.nodes + node) * c_ + c) * nodes_.h * nodes_.w;
          if (g == 0) std::fill(total, total + size_, T(0));
          else expand_rows(to, total);
          for (const Edge& edge : group.edges) {
            if (edge.node != node) continue;
            for (const End& end : edge.ends) {
              const T weight = mixing_[edge.number * space_.columns + end.column];
              if (end.plane < 0) {
                const T* state = state_planes(n, edge.state) + c * nodes_.h * nodes_.w;
                for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
                  for (int64_t j = 0; j < nodes_.columns(); ++j)
                    total[i * nodes_.out_row + j] += weight * state[i * nodes_.w + j];
                continue;
              }
              const T mean = mean_of(end.plane, c), factor = weight * rstd_of(end.plane, c);
              const T* y = result(n, end.plane, c);
#pragma omp simd
              for (int64_t p = 0; p < size_; ++p) total[p] += factor * (y[p] - mean);
            }
          }
          compact_rows(total, to);
        }
  }

  // ---- backward pass of a group of states

  // Computes, per image, the sums of the nodes' gradients d, and of d (y - mean) at the end of every operation.
  void sum_gradients(int g) {
    const Group& group = space_.groups[g];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n) {
      for (int64_t k = group.first_node * c_; k < space_.nodes * c_; ++k) {
        const T* d = node_gradient(n, 0, k);
        T total = 0;
#pragma omp simd reduction(+ : total)
        for (int64_t p = 0; p < size_; ++p) total += d[p];
        sums_[n * space_.nodes * c_ + k] = total;
      }
      for (const Edge& edge : group.edges)
        for (size_t k = 0; k < edge.ends.size(); ++k)
          for (int64_t c = 0; c < c_; ++c)
            dot_products_[n * space_.edges * end_count() * c_ + end_index(edge, k) + c] =
                dot_product(n, edge, edge.ends[k], c);
    }
  }
  T dot_product(int64_t n, const Edge& edge, const End& end, int64_t c) const {
    const T* d = node_gradient(n, edge.node, c);
    T total = 0;
    if (end.plane < 0) {
      const T* state = state_planes(n, edge.state) + c * nodes_.h * nodes_.w;
      for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd reduction(+ : total)
        for (int64_t j = 0; j < nodes_.columns(); ++j) total += d[i * nodes_.out_row + j] * state[i * nodes_.w + j];
    } else {
      const T *y = result(n, end.plane, c), mean = mean_of(end.plane, c);
#pragma omp simd reduction(+ : total)
      for (int64_t p = 0; p < size_; ++p) total += d[p] * (y[p] - mean);
    }
    return total;
  }

  // Adds the sums of all images: the gradients of the mixing weights, and what the normalisations need of all images.
  void combine_gradients(int g, T* mixing_gradient) {
    const Group& group = space_.groups[g];
    const int64_t node_planes = space_.nodes * c_, ends = end_count();
#pragma omp for schedule(static) nowait
    for (int64_t k = group.first_node * c_; k < node_planes; ++k) {
      double total = 0;
      for (int64_t n = 0; n < n_; ++n) total += sums_[n * node_planes + k];
      mean_gradient_[k] = total / count_;
    }
#pragma omp for schedule(static)
    for (int64_t k = 0; k < int64_t(group.edges.size()) * ends; ++k) {
      const Edge& edge = group.edges[k / ends];
      const End& end = edge.ends[k % ends];
      double scale_gradient = 0;
      for (int64_t c = 0; c < c_; ++c) {
        const int64_t at = end_index(edge, k % ends) + c;
        double total = 0;
        for (int64_t n = 0; n < n_; ++n) total += dot_products_[n * space_.edges * ends * c_ + at];
        const double rstd = end.plane < 0 ? 1 : rstd_of(end.plane, c);
        total_dot_products_[at] = total, slope_[at] = rstd * rstd * total / count_;
        scale_gradient += rstd * total;
      }
      mixing_gradient[edge.number * space_.columns + end.column] = scale_gradient;
    }
  }

  // Computes the gradient of the normalisation's input at the end k of an edge.
  void differentiate_end(int64_t n, const Edge& edge, int k, T* to) const {
    const End& end = edge.ends[k];
    const T weight = mixing_[edge.number * space_.columns + end.column];
    for (int64_t c = 0; c < c_; ++c)
      batch_norm_backward(nodes_, node_gradient(n, edge.node, c), result(n, end.plane, c), weight * rstd_of(end.plane, c),
                          mean_gradient_[edge.node * c_ + c], mean_of(end.plane, c), slope_[end_index(edge, k) + c],
                          to + c * nodes_.step);
  }

  // Differentiates the second halves of the separable convolutions, up to the first normalisation's output.
  void differentiate_again(int g, Workspace& work) {
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n)
      for (const Edge& edge : space_.groups[g].edges)
        for (int k = 0, half = 0; k < int(space_.convolutions.size()); ++k) {
          if (space_.convolutions[k].kind.stages == 1) continue;
          const int64_t plane = edge.plane + space_.convolutions[k].plane;
          differentiate_end(n, edge, k, work.conv_gradient);
          pad_normalised(n, plane, work.padded_second);
          std::fill(work.in_gradient, work.in_gradient + c_ * nodes_.step, T(0));
          differentiate(*second_convolutions_[k], work.padded_second, depthwise(g, k, 1, edge),
                        pointwise(g, k, 1, edge), work.bordered_second, work);
          for (int64_t c = 0; c < c_; ++c)
            normalised_relu_backward<T, L>(nodes_, result(n, plane, c), T(1), mean_of(plane, c), T(0),
                                           work.in_gradient + c * nodes_.step,
                                           half_gradient_ + (half_index(n, edge, half) + c) * size_,
                                           half_sums_.data() + (half_index(n, edge, half) + c) * 2);
          ++half;
        }
  }
  void combine_half_gradients(int g) {
    const Group& group = space_.groups[g];
    const int64_t halves = space_.halves * int64_t(group.edges.size());
#pragma omp for schedule(static)
    for (int64_t k = 0; k < halves * c_; ++k) {
      double total = 0, dot = 0;
      for (int64_t n = 0; n < n_; ++n) {
        const double* sums = half_sums_.data() + (half_index(n, group.edges[0], 0) + k) * 2;
        total += sums[0], dot += sums[1];
      }
      const double rstd = rstd_of(half_plane(group.edges[k / c_ / space_.halves], k / c_ % space_.halves), k % c_);
      half_mean_[k] = total / count_, half_slope_[k] = rstd * rstd * dot / count_;
    }
  }
  // Computes the gradient of the first normalisation's input in a separable convolution of two halves.
  void differentiate_half(int64_t n, const Edge& edge, int half, T* to) const {
    const int64_t plane = half_plane(edge, half), first = half_index(0, edge, half);
    for (int64_t c = 0; c < c_; ++c)
      batch_norm_backward(nodes_, half_gradient_ + (half_index(n, edge, half) + c) * size_, result(n, plane, c),
                          rstd_of(plane, c), half_mean_[first + c], mean_of(plane, c), half_slope_[first + c],
                          to + c * nodes_.step);
  }

  // Differentiates first convolutions, FactorizedReduce, pools and identities, up to the states.
  void differentiate_states(int g, T* x_gradient, Workspace& work) {
    const Group& group = space_.groups[g];
    const Geometry& geometry = geometry_of(g);
    const int64_t in_step = geometry.stride == 1 ? geometry.step : geometry.plane;
    T* padded = work.padded[g > 0];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < n_; ++n)
      for (int s = group.first_state; s < group.first_state + group.states; ++s) {
        const T* state = state_planes(n, s);
        for (int64_t c = 0; c < c_; ++c) pad(geometry, state + c * geometry.h * geometry.w, padded + c * geometry.plane);
        std::fill(work.in_gradient, work.in_gradient + c_ * in_step, T(0));
        for (const Edge& edge : group.edges) {
          if (edge.state != s) continue;
          for (int k = 0, half = 0; k < int(space_.convolutions.size()); ++k) {
            if (space_.convolutions[k].kind.stages > 1) differentiate_half(n, edge, half++, work.conv_gradient);
            else differentiate_end(n, edge, k, work.conv_gradient);
            differentiate(*first_convolutions_[g > 0][k], padded, depthwise(g, k, 0, edge), pointwise(g, k, 0, edge),
                          work.bordered[g > 0], work);
          }
        }
        for (int64_t c = 0; c < c_; ++c) {
          differentiate_unweighted(g, n, s, c, work);
          // The gradient through the ReLU of the convolutions, and that of pools and identity, which have no ReLU.
          const T *value = state + c * geometry.h * geometry.w, *rectified = work.in_gradient + c * in_step;
          if (g == 0)
            add_state_gradient<false>(geometry, value, rectified, work.direct_gradient, geometry.w,
                                      x_gradient + ((n * 2 + s) * c_ + c) * geometry.h * geometry.w);
          else
            add_state_gradient<true>(geometry, value, rectified, work.direct_gradient, nodes_.out_row,
                                     gradient_ + ((n * space_.nodes + s - 2) * c_ + c) * size_);
        }
        if (space_.has_factorized_reduce(group))
          differentiate_reduce(g, n, s, x_gradient + (n * 2 + s) * c_ * geometry.h * geometry.w, work);
      }
  }
  template <bool ADD>
  static void add_state_gradient(const Geometry& g, const T* value, const T* rectified, const T* direct, int64_t row,
                                 T* to) {
    for (int64_t i = 0; i < g.h; ++i, value += g.w, direct += g.w, to += row) {
      if (g.stride == 1) {
        const T* from = rectified + i * g.out_row;
#pragma omp simd
        for (int64_t j = 0; j < g.w; ++j) to[j] = (ADD ? to[j] : T(0)) + (direct[j] + relu_grad(value[j], from[j]));
      } else {
        const T* from = rectified + (i + g.padding) * g.row;
        for (int64_t j = 0; j < g.w; ++j) to[j] = direct[j] + relu_grad(value[j], from[g.at(0, j + g.padding)]);
      }
    }
  }

  // Computes the gradient of a plane of a state through pools and identities in work.direct_gradient.
  void differentiate_unweighted(int g, int64_t n, int s, int64_t c, Workspace& work) {
    const Group& group = space_.groups[g];
    const Geometry& geometry = geometry_of(g);
    const Pools<T>& pools = pools_of(g);
    const T* plane = state_planes(n, s) + c * geometry.h * geometry.w;
    std::fill(work.direct_gradient, work.direct_gradient + geometry.h * geometry.w, T(0));
    if (!space_.pools.empty()) std::fill(work.pool_gradient, work.pool_gradient + pools.bordered_size(), T(0));
    for (size_t k = 0; k < space_.pools.size(); ++k) {
      differentiate_pool_end(g, n, s, k, c, work.end_gradient);
      if (space_.pools[k].max)
        pools.max_backward(plane, result(n, pool_plane(group, s, k), c), work.end_gradient, work.pool_bordered, work.row,
                           work.pool_gradient);
      else
        pools.mean_backward(work.end_gradient, work.row, work.pool_gradient);
    }
    if (!space_.pools.empty()) pools.add_interior(work.pool_gradient, work.direct_gradient);
    if (space_.skip < 0 || geometry.stride > 1) return;
    for (const Edge& edge : group.edges) {
      if (edge.state != s) continue;
      const T weight = mixing_[edge.number * space_.columns + space_.skip];
      const T* d = node_gradient(n, edge.node, c);
      for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
        for (int64_t j = 0; j < nodes_.columns(); ++j)
          work.direct_gradient[i * nodes_.w + j] += weight * d[i * nodes_.out_row + j];
    }
  }
  // Computes the gradient of the input of a pool's normalisation, which all edges of the state share.
  void differentiate_pool_end(int g, int64_t n, int s, int k, int64_t c, T* to) const {
    const Group& group = space_.groups[g];
    const int end = space_.convolutions.size() + k;
    const int64_t plane = pool_plane(group, s, k);
    double d_mean = 0, d_dot = 0;
    std::fill(to, to + size_, T(0));
    for (const Edge& edge : group.edges) {
      if (edge.state != s) continue;
      const T weight = mixing_[edge.number * space_.columns + space_.pools[k].column];
      d_mean += weight * mean_gradient_[edge.node * c_ + c];
      d_dot += weight * total_dot_products_[end_index(edge, end) + c];
      const T* d = node_gradient(n, edge.node, c);
#pragma omp simd
      for (int64_t p = 0; p < size_; ++p) to[p] += weight * d[p];
    }
    const T rstd = rstd_of(plane, c);
    batch_norm_backward(nodes_, to, result(n, plane, c), rstd, static_cast<T>(d_mean), mean_of(plane, c),
                        static_cast<T>(double(rstd) * rstd * d_dot / count_), to);
  }

  // Adds the gradient of a state through FactorizedReduce to `to`, C planes [h, w].
  void differentiate_reduce(int g, int64_t n, int s, T* to, Workspace& work) const {
    const T* state = state_planes(n, s);
    for (int half = 0; half < 2 && work.weights; ++half) grid_.gather(state, half, work.grids + half * c_ * nodes_.step);
    for (const Edge& edge : space_.groups[g].edges) {
      if (edge.state != s) continue;
      differentiate_end(n, edge, edge.ends.size() - 1, work.conv_gradient);
      for (int half = 0; half < 2; ++half) {
        const auto weight = reduce(g, half, edge);
        const T* d = work.conv_gradient + half * (c_ / 2) * nodes_.step;
        if (work.weights)
          add_outer<T, L>(d, nodes_.step, work.grids + half * c_ * nodes_.step, nodes_.step, c_ / 2, c_, size_,
                          work.weights + weight.at);
        multiply<T, L>(weight.value, 1, c_, d, nodes_.step, c_, c_ / 2, size_, work.inner_gradient, nodes_.step);
        grid_.backward(state, half, work.inner_gradient, true, to);
      }
    }
  }

  // ---- weights

  // The weights of an edge in a block.
  struct EdgeWeight {
    const T *value, *flipped;
    int64_t at;
  };
  EdgeWeight in_block(const Block& block, int64_t offset) const {
    return {block.value + offset, block.flipped.empty() ? nullptr : block.flipped.data() + offset, block.at + offset};
  }
  // k: index of the convolution.
  EdgeWeight depthwise(int g, int k, int stage, const Edge& edge) const {
    const Convolution& convolution = space_.convolutions[k];
    return in_block(blocks_[first_block_[g] + 2 * (convolution.plane + stage)],
                    edge.local * c_ * convolution.kind.kernel * convolution.kind.kernel);
  }
  EdgeWeight pointwise(int g, int k, int stage, const Edge& edge) const {
    return in_block(blocks_[first_block_[g] + 2 * (space_.convolutions[k].plane + stage) + 1], edge.local * c_ * c_);
  }
  EdgeWeight reduce(int g, int half, const Edge& edge) const {
    return in_block(blocks_[first_block_[g] + 2 * space_.stages + half], edge.local * (c_ / 2) * c_);
  }
  void differentiate(const SeparableConvolution<T>& convolution, const T* padded, const EdgeWeight& depthwise,
                     const EdgeWeight& pointwise, T* bordered, Workspace& work) const {
    convolution.backward(padded, depthwise.value, depthwise.flipped, pointwise.value, work.conv_gradient, work.inner,
                         work.inner_gradient, bordered, work.weights ? work.weights + depthwise.at : nullptr,
                         work.weights ? work.weights + pointwise.at : nullptr, work.in_gradient);
  }

  // ---- planes and statistics

  int64_t planes() const { return space_.planes * c_; }
  const Geometry& geometry_of(int g) const { return g == 0 ? inputs_ : nodes_; }
  const Pools<T>& pools_of(int g) const { return g == 0 ? input_pools_ : node_pools_; }
  int64_t pools_size() const { return std::max(input_pools_.bordered_size(), node_pools_.bordered_size()); }
  int64_t in_gradient_size() const {
    return c_ * std::max(inputs_.stride == 1 ? inputs_.step : inputs_.plane, nodes_.step);
  }
  int64_t pool_plane(const Group& group, int s, int k) const {
    return group.edges[0].plane - (group.states - (s - group.first_state)) * int64_t(space_.pools.size()) + k;
  }
  int64_t half_plane(const Edge& edge, int half) const {
    for (const Convolution& convolution : space_.convolutions)
      if (convolution.kind.stages > 1 && half-- == 0) return edge.plane + convolution.plane;
    return -1;
  }
  // Indices of the first of C numbers: of the end k of an edge; of the gradient of a half, in planes.
  int64_t end_count() const { return space_.groups[0].edges[0].ends.size(); }
  int64_t end_index(const Edge& edge, int k) const { return (edge.number * end_count() + k) * c_; }
  int64_t half_index(int64_t n, const Edge& edge, int half) const {
    return ((n * int64_t(space_.groups[0].edges.size()) + edge.local) * space_.halves + half) * c_;
  }
  T* result(int64_t n, int64_t plane, int64_t c) const { return saved_ + (n * planes() + plane * c_ + c) * size_; }
  const T* node_gradient(int64_t n, int64_t node, int64_t c) const {
    return gradient_ + ((n * space_.nodes + node) * c_ + c) * size_;
  }
  const T* state_planes(int64_t n, int s) const {
    return s < 2 ? x_ + (n * 2 + s) * c_ * inputs_.h * inputs_.w
                 : out_ + (n * space_.nodes + s - 2) * c_ * nodes_.h * nodes_.w;
  }
  T mean_of(int64_t plane, int64_t c) const { return statistics_[(plane * c_ + c) * 2]; }
  T rstd_of(int64_t plane, int64_t c) const { return statistics_[(plane * c_ + c) * 2 + 1]; }

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
  void pool(int g, int k, const T* from, const Workspace& work, T* to) const {
    if (space_.pools[k].max) pools_of(g).max(from, work.pool_bordered, to);
    else pools_of(g).mean(from, work.pool_bordered, to);
  }
  // Computes the moments of C planes of one image.
  void compute_all_moments(int64_t n, int64_t plane) {
    for (int64_t c = 0; c < c_; ++c)
      compute_moments(nodes_, result(n, plane, c), moments_.data() + (n * planes() + plane * c_ + c) * 2);
  }
  // Combines the moments of all images to the statistics of C planes each.
  void combine(const std::vector<int64_t>& results) {
#pragma omp for schedule(static)
    for (int64_t k = 0; k < int64_t(results.size()) * c_; ++k) {
      const int64_t plane = results[k / c_] * c_ + k % c_;
      double mean, variance;
      combine_moments(moments_.data() + 2 * plane, n_, 2 * planes(), nodes_.h * nodes_.w, &mean, &variance);
      statistics_[2 * plane] = mean, statistics_[2 * plane + 1] = 1 / std::sqrt(variance + epsilon_);
    }
  }
  void pad_normalised(int64_t n, int64_t plane, T* padded) const {
    for (int64_t c = 0; c < c_; ++c)
      normalise_relu(second_, result(n, plane, c), nodes_.out_row, rstd_of(plane, c), mean_of(plane, c), T(0),
                     padded + c * second_.plane);
  }

  const Space& space_;
  const T *x_, *mixing_;
  const int64_t n_, c_;
  const double epsilon_;
  const Geometry inputs_, nodes_, second_;       // of states 0 and 1; of the nodes; between the halves of a sep_conv
  const int64_t size_, count_;                   // numbers per saved plane; numbers per normalised channel
  const Pools<T> input_pools_, node_pools_;
  const RectifiedGrid<T> grid_;
  std::vector<std::unique_ptr<SeparableConvolution<T>>> first_convolutions_[2], second_convolutions_;
  std::vector<Block> blocks_;                    // group by group, in the order of README.md
  std::vector<int> first_block_;                 // of each group
  int64_t weights_size_ = 0;
  T *out_, *saved_, *statistics_;
  std::vector<double> moments_;                  // [N, planes, 2]
  // Gradients of the nodes [N, nodes, C planes], and of the first normalisation's output in the sep_convs of a group.
  T *gradient_, *half_gradient_;
  std::vector<double> sums_, dot_products_, total_dot_products_, half_sums_;
  std::vector<T> mean_gradient_, slope_, half_mean_, half_slope_;
};

// Checks the inputs of the forward pass; returns the shape of the output.
Shape check_inputs(const Space& space, const std::vector<Tensor>& inputs, float epsilon) {
  PD_CHECK(inputs.size() >= 2 && epsilon > 0, "a mixed cell needs its states, mixing weights and a positive epsilon");
  check_types(inputs);
  const Shape x = inputs[0].shape();
  const int64_t stride = space.reduction ? 2 : 1;
  PD_CHECK(x.size() == 4 && x[1] > 0 && x[1] % 4 == 0 && x[2] > 0 && x[3] > 0 && x[2] % stride == 0 && x[3] % stride == 0,
           "the states have to be [N, 2 C, H, W] with an even C, and in a reduction cell an even H and W");
  check_shape("the tensor of mixing weights", inputs[1], {space.edges, space.columns});
  return {x[0], space.nodes * x[1] / 2, x[2] / stride, x[3] / stride};
}

std::vector<Tensor> Forward(const std::vector<Tensor>& inputs, const std::vector<std::string>& primitives, int nodes,
                            bool reduction, bool, float epsilon) {
  const Space space(primitives, nodes, reduction);
  const Shape shape = check_inputs(space, inputs, epsilon);
  const Tensor& x = inputs[0];
  const int64_t planes = space.planes * x.shape()[1] / 2;
  const auto empty = [&](const Shape& sizes) { return paddle::empty(sizes, x.dtype(), x.place()); };
  Tensor out = empty(shape), statistics = empty({planes, 2}), saved;
  PD_DISPATCH_FLOATING_TYPES(x.type(), "darts_mixed_cell", ([&] {
    dispatch_lanes<data_t>(shape[3], [&](auto lanes) {
      using Cell = MixedCell<data_t, decltype(lanes)::value>;
      Cell cell(space, inputs, nullptr, epsilon);
      saved = empty({shape[0], planes, Cell::plane_size(shape[2], shape[3])});
      cell.forward(out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>());
    });
  }));
  return {out, saved, statistics};
}

std::vector<Tensor> Backward(const std::vector<Tensor>& inputs, const Tensor& out, const Tensor& saved,
                             const Tensor& statistics, const Tensor& out_gradient,
                             const std::vector<std::string>& primitives, int nodes, bool reduction,
                             bool weight_gradients, float epsilon) {
  const Space space(primitives, nodes, reduction);
  const Shape shape = check_inputs(space, inputs, epsilon);
  const int64_t planes = space.planes * inputs[0].shape()[1] / 2;
  check_types({inputs[0], out, saved, statistics, out_gradient});
  check_shape("the output", out, shape);
  check_shape("the gradient of the output", out_gradient, shape);
  check_shape("the tensor of statistics", statistics, {planes, 2});
  std::vector<Tensor> gradients = gradients_of(inputs, 1);
  PD_DISPATCH_FLOATING_TYPES(out.type(), "darts_mixed_cell_grad", ([&] {
    dispatch_lanes<data_t>(shape[3], [&](auto lanes) {
      using Cell = MixedCell<data_t, decltype(lanes)::value>;
      check_shape("the tensor of saved results", saved, {shape[0], planes, Cell::plane_size(shape[2], shape[3])});
      Cell(space, inputs, &gradients, epsilon)
          .backward(out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(), out_gradient.data<data_t>(),
                    weight_gradients, gradients[0].data<data_t>(), gradients[1].data<data_t>());
    });
  }));
  return gradients;
}

std::vector<Shape> InferShape(const std::vector<Shape>& inputs, const std::vector<std::string>& primitives, int nodes,
                              bool reduction, bool, float) {
  const Space space(primitives, nodes, reduction);
  const Shape& x = inputs[0];
  const int64_t planes = space.planes * x[1] / 2, stride = reduction ? 2 : 1;
  return {{x[0], nodes * x[1] / 2, x[2] / stride, x[3] / stride}, {x[0], planes, -1}, {planes, 2}};
}

std::vector<paddle::DataType> InferDtype(const std::vector<paddle::DataType>& inputs) {
  return {inputs[0], inputs[0], inputs[0]};
}

}  // namespace

#define DARTS_MIXED_CELL_ATTRIBUTES                                                                                 \
  {"primitives: std::vector<std::string>", "nodes: int", "reduction: bool", "weight_gradients: bool", "epsilon: float"}

// Paddle requires a list of gradients to be the only output, so all inputs with a gradient form one list.
PD_BUILD_OP(darts_mixed_cell)
    .Inputs({paddle::Vec("Inputs")})
    .Outputs({"Out", "Saved", "Statistics"})
    .Attrs(DARTS_MIXED_CELL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Forward))
    .SetInferShapeFn(PD_INFER_SHAPE(InferShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(InferDtype));

PD_BUILD_GRAD_OP(darts_mixed_cell)
    .Inputs({paddle::Vec("Inputs"), "Out", "Saved", "Statistics", paddle::Grad("Out")})
    .Outputs({paddle::Grad(paddle::Vec("Inputs"))})
    .Attrs(DARTS_MIXED_CELL_ATTRIBUTES)
    .SetKernelFn(PD_KERNEL(Backward));
