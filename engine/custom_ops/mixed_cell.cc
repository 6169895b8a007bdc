// All mixed operations of a supernet cell as one operator for the CPU, from both input states to the nodes.
// README.md in this folder explains the memory layout and the order of the loops.
#include <numeric>

#include "search_space.h"

namespace {

template <typename T, int L>
class MixedCell {
 public:
  // inputs: x, the mixing weights, then the weights; gradients: those of all inputs, or null.
  MixedCell(const Space& space, const std::vector<Tensor>& inputs, std::vector<Tensor>* gradients, double epsilon)
      : space_(space), x_(inputs[0].data<T>()), mixing_(inputs[1].data<T>()), n_(inputs[0].shape()[0]),
        c_(inputs[0].shape()[1] / 2 / space.partial), state_c_(c_ * space.partial), epsilon_(epsilon),
        inputs_(Geometry::of<T>(inputs[0].shape()[2], inputs[0].shape()[3], space.reduction ? 2 : 1, space.padding, L)),
        nodes_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, space.padding, L)),
        second_(Geometry::of<T>(inputs_.out_h, inputs_.out_w, 1, space.second_padding, L)), size_(nodes_.size),
        count_(n_ * nodes_.h * nodes_.w), input_pools_(inputs_), node_pools_(nodes_), grid_(inputs_, c_) {
    Weights<T> weights(inputs, gradients);
    const auto take = [&](int64_t rows, int64_t columns, int64_t kernel) {
      const auto weight = weights.take(rows, columns, kernel);
      blocks_.push_back({weight.value, weight.gradient, weight.size, weights_size_, {}});
      weights_size_ += weight.size;
      if (gradients && columns == 1) blocks_.back().flipped = flip(weight.value, rows, kernel * kernel);
    };
    for (const Group& group : space.groups) {
      first_block_.push_back(blocks_.size());
      for (const Convolution& convolution : space.convolutions)
        for (int stage = 0; stage < convolution.kind.stages; ++stage) {
          take(group.edges.size() * c_, 1, convolution.kind.kernel);
          take(group.edges.size() * c_, c_, 1);
        }
      for (int half = 0; half < 2 && space.has_reduce(group); ++half) take(group.edges.size() * (c_ / 2), c_, 1);
    }
    weights.check_all_used();
    for (const Convolution& convolution : space.convolutions) {
      const ConvolutionKind& kind = convolution.kind;
      for (const Geometry* geometry : {&inputs_, &nodes_})
        convolutions_[geometry == &nodes_].push_back(make_separable<T, L>(kind.kernel, *geometry, kind.dilation, c_));
      convolutions_[2].push_back(kind.stages > 1 ? make_separable<T, L>(kind.kernel, second_, 1, c_) : nullptr);
    }
  }

  static int64_t plane_size(int64_t out_h, int64_t out_w) { return out_h * ((out_w + L - 1) / L * L); }

  // Writes out [N, nodes, C planes], saved [N, planes] and statistics [planes, 2]: mean, 1 / sqrt(variance + epsilon).
  void forward(T* out, T* saved, T* statistics) {
    out_ = out, saved_ = saved, statistics_ = statistics;
    moments_.resize(n_ * planes() * 2);
#pragma omp parallel num_threads(threads())
    {
      Workspace work(*this);
      const int groups = space_.groups.size();
      bool backwards = false;
      for (int g = 0; g <= groups; ++g, backwards = !backwards) {
        // A node is complete, and the convolutions of the next group can read it, when the group before is added.
        share(n_, 1, [&](int64_t n) {
          if (g > 0) add_edges(g - 1, n, work);
          if (g < groups) convolve(g, 0, n, work);
        }, backwards);
        if (g == groups) break;
        const Group& group = space_.groups[g];
        combine(group.plane, group.second_plane);
        if (!space_.halves) continue;
        backwards = !backwards;
        share(n_, 1, [&](int64_t n) { convolve(g, 1, n, work); }, backwards);
        combine(group.second_plane, group.end_plane);
      }
    }
  }

  // weight_gradients: false leaves the gradients of the weights unchanged and skips their computation. constant_states:
  // the same for the first input states, whose gradients are set to 0.
  void backward(const T* out, const T* saved, const T* statistics, const T* out_gradient, bool weight_gradients,
                int constant_states, T* x_gradient, T* mixing_gradient) {
    constant_states_ = constant_states;
    // The backward pass does not write to these tensors.
    out_ = const_cast<T*>(out), saved_ = const_cast<T*>(saved), statistics_ = const_cast<T*>(statistics);
    const int64_t node_planes = space_.nodes * c_, ends = space_.edges * end_count() * c_;
    static thread_local Storage<T> nodes_storage, halves_storage;
    gradient_ = nodes_storage.reserve(n_ * space_.nodes * state_c_ * size_);
    half_gradient_ = halves_storage.reserve(half_planes() * n_ * size_);
    sums_.resize(n_ * node_planes), dot_products_.resize(n_ * ends), half_sums_.resize(n_ * half_planes() * 2);
    d_mean_.resize(planes()), slope_.resize(planes()), scale_gradients_.resize(ends);
    rest_products_.assign(n_ * space_.edges, 0);
    PartialSums<T> partial(n_, weight_gradients ? weights_size_ : 0);
#pragma omp parallel num_threads(threads())
    {
      Workspace work(*this);
      partial.clear();
      bool backwards = false;
      const auto for_images = [&](auto f) {
        partial.for_images([&](int64_t n, T* sums) {
          work.weights = weight_gradients ? sums : nullptr;
          f(n);
        }, backwards);
        backwards = !backwards;
      };
      const int last = int(space_.groups.size()) - 1;
      for (int g = last; g >= -1; --g) {
        // The gradient of a node is complete when the group that reads it is differentiated.
        for_images([&](int64_t n) {
          if (g == last) start_gradients(n, out_gradient);
          else differentiate(g + 1, 0, n, x_gradient, work);
          if (g >= 0) sum_gradients(g, n, work);
        });
        if (g < 0) break;
        combine_gradients(g);
        if (!space_.halves) continue;
        for_images([&](int64_t n) { differentiate(g, 1, n, x_gradient, work); });
        combine_half_gradients(g);
      }
      combine_mixing_gradients(mixing_gradient);
      for (const Block& block : blocks_)
        if (weight_gradients) partial.add_to(block.gradient, block.at, block.size);
    }
  }

 private:
  // The weights of a convolution on all edges of a group; at: index in the sums of the gradients.
  struct Block {
    const T* value;
    T* gradient;
    int64_t size, at;
    std::vector<T> flipped;
  };
  struct EdgeWeight {
    const T *value, *flipped;
    T* gradient;                                     // the sums of a part of the batch, or null
  };

  // What an operation contributes to a node: factor (plane - mean).
  struct Term {
    const T* plane;
    T mean, factor;
  };

  // Memory of a thread. The upper bound of its size: 11 blocks of C planes and 8 of one plane.
  struct Workspace {
    explicit Workspace(const MixedCell& cell) : scratch(11 * (cell.c_ + 1) * cell.largest_plane() + cell.pool_work_size()) {
      const Geometry* geometries[] = {&cell.inputs_, &cell.nodes_, &cell.second_};
      for (int k = 0; k < 3; ++k) {
        padded[k] = scratch.zeros(cell.c_ * geometries[k]->plane);
        bordered[k] = scratch.zeros(geometries[k]->plane);
      }
      conv_gradient = scratch.zeros(cell.grid_size());
      inner = scratch.take(cell.grid_size()), inner_gradient = scratch.take(cell.grid_size());
      for (int half = 0; half < 2 && cell.space_.reduction; ++half) {
        // The columns from out_w on of a grid stay 0: a NaN there would pass through products with 0.
        grids[half] = scratch.zeros(cell.grid_size());
        grids_gradient[half] = scratch.take(cell.grid_size());
      }
      in_gradient = scratch.take(cell.c_ * std::max(cell.in_step(0), cell.in_step(1)));
      pool = scratch.take(cell.pool_work_size());
      for (T** block : {&total, &direct}) *block = scratch.take(cell.largest_plane());
    }
    Scratch<T> scratch;
    // Rectified planes and a plane of their gradient: of inputs, of nodes, between the halves of a sep_conv.
    T *padded[3], *bordered[3];
    T *inner, *inner_gradient, *conv_gradient, *grids[2], *grids_gradient[2], *in_gradient;
    T *pool, *total, *direct;                                          // of the pools; one plane each
    T* weights = nullptr;                                              // gradients of all weights, or null
    std::vector<Term> terms;                                           // of a plane of a node
  };

  // Computes, for one image, the convolutions of a stage on all edges of a group, up to their normalisation. Stage 0
  // begins with the pools of each state and ends with FactorizedReduce.
  void convolve(int g, int stage, int64_t n, Workspace& work) {
    const Group& group = space_.groups[g];
    const int place = stage ? 2 : g > 0;
    for (const Edge& edge : group.edges) {
      if (stage == 0 && edge.node == group.first_node) start_state(g, n, edge.state, work);
      for (const Convolution& convolution : space_.convolutions) {
        if (stage == convolution.kind.stages) continue;
        const int64_t plane = space_.convolution_plane(group, edge, convolution, stage);
        if (stage) pad_normalised(n, space_.convolution_plane(group, edge, convolution, 0), work.padded[2]);
        const int block = 2 * (convolution.stage + stage);
        convolutions_[place][convolution.number]->forward(
            work.padded[place], weight(g, block, edge, work).value, weight(g, block + 1, edge, work).value,
            work.inner, result(n, plane, 0));
        compute_all_moments(n, plane);
      }
      if (stage || !space_.has_reduce(group)) continue;
      const int64_t plane = space_.reduce_plane(group, edge);
      Timed timed(Phase::kPointwise);
      for (int half = 0; half < 2; ++half)
        multiply<T, L>(weight(g, 2 * space_.stages + half, edge, work).value, c_, 1, work.grids[half], nodes_.step,
                       c_ / 2, c_, size_, result(n, plane, half * (c_ / 2)), size_);
      compute_all_moments(n, plane);
    }
  }
  void start_state(int g, int64_t n, int s, Workspace& work) {
    Timed timed(Phase::kPools);
    pad_state(g, n, s, work);
    const T* state = state_planes(n, s);
    const int64_t state_size = geometry_of(g).h * geometry_of(g).w;
    for (size_t k = 0; k < space_.pools.size(); ++k) {
      const int64_t plane = space_.pool_plane(space_.groups[g], s, k);
      for (int64_t c = 0; c < c_; ++c) {
        if (space_.pools[k].max) pools_of(g).max(state + c * state_size, work.pool, result(n, plane, c));
        else pools_of(g).mean(state + c * state_size, work.pool, result(n, plane, c));
      }
      compute_all_moments(n, plane);
    }
    for (int half = 0; half < 2 && space_.has_reduce(space_.groups[g]); ++half)
      grid_.gather(state, half, work.grids[half]);
  }

  // Adds the edges of a group to the nodes of one image.
  void add_edges(int g, int64_t n, Workspace& work) {
    Timed timed(Phase::kSums);
    const Group& group = space_.groups[g];
    const bool compact = nodes_.out_row == nodes_.w;     // a plane has the rows of a node
    std::vector<Term>& terms = work.terms;
    for (int node = group.first_node; node < space_.nodes; ++node)
      for (int64_t c = 0; c < c_; ++c) {
        T *to = node_plane(n, node, c), *total = compact ? to : work.total;
        if (g == 0) std::fill(total, total + size_, T(0));
        else if (!compact) expand_rows(to, total);
        terms.clear();
        for (const Edge& edge : group.edges) {
          if (edge.node != node) continue;
          for (const End& end : edge.ends) {
            const T weight = mixing_weight(edge, end);
            const T* state = state_planes(n, edge.state) + c * nodes_.h * nodes_.w;
            if (end.plane >= 0)
              terms.push_back({result(n, end.plane, c), mean_of(end.plane, c), weight * rstd_of(end.plane, c)});
            else if (compact) terms.push_back({state, 0, weight});
            else add_compact_rows(weight, state, total);
          }
        }
        add_terms(terms, total);
        if (!compact) compact_rows(total, to);
      }
    if (space_.partial > 1) add_rest(g, n, work);
  }
  // Adds several planes to a plane of `size_` numbers, in this order. Four are read at a time: they are far from each
  // other in memory, and the processor does not prefetch the beginning of the next one.
  void add_terms(const std::vector<Term>& terms, T* total) const {
    size_t k = 0;
    for (; k + 4 <= terms.size(); k += 4) add_terms<4>(&terms[k], total);
    for (; k < terms.size(); ++k) add_terms<1>(&terms[k], total);
  }
  template <int COUNT>
  void add_terms(const Term* terms, T* total) const {
    for (int64_t p = 0; p < size_; p += L) {
      auto sum = load<T, L>(total + p);
#pragma GCC unroll 4
      for (int k = 0; k < COUNT; ++k) sum += terms[k].factor * (load<T, L>(terms[k].plane + p) - terms[k].mean);
      store<T, L>(total + p, sum);
    }
  }
  // Adds a plane [h, w] to a plane with rounded-up rows.
  void add_compact_rows(T weight, const T* from, T* to) const {
    for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
      for (int64_t j = 0; j < nodes_.columns(); ++j) to[i * nodes_.out_row + j] += weight * from[i * nodes_.w + j];
  }

  // Adds the channels of a group's states that pass no operation to the nodes.
  void add_rest(int g, int64_t n, Workspace& work) {
    const int64_t plane_size = nodes_.h * nodes_.w;
    for_rest(g, n, work.direct, [&](int s, int64_t c, const T* plane) {
      for (const Edge& edge : space_.groups[g].edges) {
        if (edge.state != s) continue;
        T* to = node_plane(n, edge.node, c);
        const T weight = edge_weight(edge);
        if (s == 0) std::fill(to, to + plane_size, T(0));
#pragma omp simd
        for (int64_t p = 0; p < plane_size; ++p) to[p] += weight * plane[p];
      }
    });
  }
  // Calls function(state, channel, plane [nodes_.h, nodes_.w]) for these channels of one image; pooled: memory for a
  // plane.
  template <typename F>
  void for_rest(int g, int64_t n, T* pooled, F function) const {
    const Geometry& geometry = geometry_of(g);
    const Group& group = space_.groups[g];
    for (int s = group.first_state; s < group.first_state + group.states; ++s)
      for (int64_t c = c_; c < state_c_; ++c) {
        const T* plane = state_planes(n, s) + c * geometry.h * geometry.w;
        if (geometry.stride == 2) pool_halves(plane, pooled);
        function(s, c, geometry.stride == 2 ? pooled : plane);
      }
  }
  // Maxima over 2 x 2 pixels of a plane of an input.
  void pool_halves(const T* plane, T* to) const {
    for (int64_t i = 0; i < nodes_.h; ++i)
      for (int64_t j = 0; j < nodes_.w; ++j) {
        T largest = plane[2 * i * inputs_.w + 2 * j];
        for (int k = 1; k < 4; ++k) {
          const T value = plane[(2 * i + k / 2) * inputs_.w + 2 * j + k % 2];
          if (value > largest || value != value) largest = value;              // keeps a NaN
        }
        to[i * nodes_.w + j] = largest;
      }
  }

  // Copies the gradients of the nodes of one image, in the order before the shuffle.
  void start_gradients(int64_t n, const T* out_gradient) {
    Timed timed(Phase::kSums);
    for (int64_t k = n * space_.nodes * state_c_; k < (n + 1) * space_.nodes * state_c_; ++k)
      expand_rows(out_gradient + k * nodes_.h * nodes_.w,
                  gradient_ + (k / state_c_ * state_c_ + unshuffled(k % state_c_)) * size_);
  }
  // Computes, for one image, the sums of the nodes' gradients d, and of d (y - mean) at the end of every operation.
  void sum_gradients(int g, int64_t n, Workspace& work) {
    Timed timed(Phase::kSums);
    const Group& group = space_.groups[g];
    for (int64_t k = group.first_node * c_; k < space_.nodes * c_; ++k) {
      const T* d = node_gradient(n, k / c_, k % c_);
      sums_[n * space_.nodes * c_ + k] = sum_vectors<T, L>(size_, [d](int64_t p) { return load<T, L>(d + p); });
    }
    for (const Edge& edge : group.edges)
      for (size_t k = 0; k < edge.ends.size(); ++k)
        for (int64_t c = 0; c < c_; ++c)
          dot_products_[end_index(n, edge, k) + c] = dot_product(n, edge, edge.ends[k], c);
    for_rest(g, n, work.direct, [&](int s, int64_t c, const T* plane) {
      for (const Edge& edge : group.edges)
        if (edge.state == s)
          rest_products_[n * space_.edges + edge.number] += dot_product(node_gradient(n, edge.node, c), plane);
    });
  }
  T dot_product(int64_t n, const Edge& edge, const End& end, int64_t c) const {
    const T* d = node_gradient(n, edge.node, c);
    if (end.plane < 0) return dot_product(d, state_planes(n, edge.state) + c * nodes_.h * nodes_.w);
    const T *y = result(n, end.plane, c), mean = mean_of(end.plane, c);
    return sum_vectors<T, L>(size_, [=](int64_t p) { return load<T, L>(d + p) * (load<T, L>(y + p) - mean); });
  }
  // The same of a plane [h, w] that is not normalised.
  T dot_product(const T* d, const T* plane) const {
    T total = 0;
    for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd reduction(+ : total)
      for (int64_t j = 0; j < nodes_.columns(); ++j) total += d[i * nodes_.out_row + j] * plane[i * nodes_.w + j];
    return total;
  }

  // Adds the sums of all images to the numbers that the normalisations need, and to the contributions of each channel
  // to the gradients of the mixing weights.
  void combine_gradients(int g) {
    const Group& group = space_.groups[g];
    const int64_t node_planes = space_.nodes * c_, ends = end_count();
    share(c_, kCacheLine / sizeof(double), [&](int64_t c) {
      Timed timed(Phase::kNormalisation);
      std::vector<double> node_mean(space_.nodes, 0), pool_sums(2 * group.states * space_.pools.size(), 0);
      for (int node = group.first_node; node < space_.nodes; ++node) {
        double total = 0;
        for (int64_t n = 0; n < n_; ++n) total += sums_[n * node_planes + node * c_ + c];
        node_mean[node] = total / count_;
      }
      for (const Edge& edge : group.edges)
        for (int64_t k = 0; k < ends; ++k) {
          const End& end = edge.ends[k];
          double total = 0;
          for (int64_t n = 0; n < n_; ++n) total += dot_products_[end_index(n, edge, k) + c];
          const double rstd = end.plane < 0 ? 1 : rstd_of(end.plane, c);
          scale_gradients_[end_index(0, edge, k) + c] = rstd * total;
          if (end.shared) {                        // a pool has one normalisation for all edges of its state
            double* sums = &pool_sums[2 * (end.plane - group.plane)];
            sums[0] += mixing_weight(edge, end) * node_mean[edge.node], sums[1] += mixing_weight(edge, end) * total;
          } else if (end.plane >= 0) {
            d_mean_[end.plane * c_ + c] = node_mean[edge.node];
            slope_[end.plane * c_ + c] = rstd * rstd * total / count_;
          }
        }
      for (size_t k = 0; k < pool_sums.size() / 2; ++k) {
        const double rstd = rstd_of(group.plane + k, c);
        d_mean_[(group.plane + k) * c_ + c] = pool_sums[2 * k];
        slope_[(group.plane + k) * c_ + c] = rstd * rstd * pool_sums[2 * k + 1] / count_;
      }
    });
  }
  // Adds the contributions of all channels.
  void combine_mixing_gradients(T* mixing_gradient) {
    share(space_.edges, 1, [&](int64_t number) {
      for (const Group& group : space_.groups)
        for (const Edge& edge : group.edges) {
          if (edge.number != number) continue;
          T* to = mixing_gradient + number * space_.columns;
          std::fill_n(to, space_.columns, T(0));            // `none` has no gradient
          for (size_t k = 0; k < edge.ends.size(); ++k) {
            const double* gradients = scale_gradients_.data() + end_index(0, edge, k);
            to[edge.ends[k].column] = std::accumulate(gradients, gradients + c_, 0.0);
          }
          double total = 0;
          for (int64_t n = 0; n < n_; ++n) total += rest_products_[n * space_.edges + number];
          if (space_.partial > 1) to[space_.columns - 1] = total;
        }
    });
  }
  // The same for the normalisations between the halves of the separable convolutions.
  void combine_half_gradients(int g) {
    const Group& group = space_.groups[g];
    const int64_t count = group.edges.size() * space_.convolutions.size();
    share(count, 1, [&](int64_t k) {
      const Edge& edge = group.edges[k / space_.convolutions.size()];
      const Convolution& convolution = space_.convolutions[k % space_.convolutions.size()];
      if (convolution.kind.stages == 1) return;
      Timed timed(Phase::kNormalisation);
      for (int64_t c = 0; c < c_; ++c) {
        double total = 0, dot = 0;
        for (int64_t n = 0; n < n_; ++n) {
          const double* sums = half_sums_.data() + (half_index(n, edge, convolution) + c) * 2;
          total += sums[0], dot += sums[1];
        }
        const int64_t plane = space_.convolution_plane(group, edge, convolution, 0);
        const double rstd = rstd_of(plane, c);
        d_mean_[plane * c_ + c] = total / count_, slope_[plane * c_ + c] = rstd * rstd * dot / count_;
      }
    });
  }
  // Computes the gradient of the input of a normalisation of C planes. d: C planes, the gradient of its output divided
  // by `scale`.
  void differentiate_norm(int64_t n, int64_t plane, const T* d, T scale, T* to) const {
    Timed timed(Phase::kNormalisation);
    for (int64_t c = 0; c < c_; ++c)
      batch_norm_backward(nodes_, d + c * size_, nodes_.out_row, T(1), result(n, plane, c), scale * rstd_of(plane, c),
                          d_mean_[plane * c_ + c], mean_of(plane, c), slope_[plane * c_ + c], to + c * nodes_.step);
  }

  // Differentiates, for one image, the convolutions of a stage on all edges of a group: stage 1 up to the output of
  // the normalisation before it, stage 0 up to the states, with pools, identities and FactorizedReduce.
  void differentiate(int g, int stage, int64_t n, T* x_gradient, Workspace& work) {
    const Group& group = space_.groups[g];
    const int place = stage ? 2 : g > 0;
    for (const Edge& edge : group.edges) {
      if (edge.state < constant_states_) {
        T* to = x_gradient + (n * 2 + edge.state) * state_c_ * inputs_.h * inputs_.w;
        if (stage == 0 && edge.node == 0) std::fill_n(to, state_c_ * inputs_.h * inputs_.w, T(0));
        continue;
      }
      if (stage == 0 && edge.node == group.first_node) {
        pad_state(g, n, edge.state, work);
        std::fill(work.in_gradient, work.in_gradient + c_ * in_step(g), T(0));
      }
      for (const Convolution& convolution : space_.convolutions) {
        if (stage == convolution.kind.stages) continue;
        const int64_t first_plane = space_.convolution_plane(group, edge, convolution, 0);
        const int64_t half = convolution.kind.stages > 1 ? half_index(n, edge, convolution) : 0;
        if (stage == convolution.kind.stages - 1)
          differentiate_norm(n, space_.convolution_plane(group, edge, convolution, stage),
                             node_gradient(n, edge.node, 0),
                             mixing_[edge.number * space_.columns + convolution.column], work.conv_gradient);
        else
          differentiate_norm(n, first_plane, half_gradient_ + half * size_, T(1), work.conv_gradient);
        if (stage) pad_normalised(n, first_plane, work.padded[2]);
        const int block = 2 * (convolution.stage + stage);
        const EdgeWeight depthwise = weight(g, block, edge, work), pointwise = weight(g, block + 1, edge, work);
        // The convolutions of stage 0 read the same state, each of stage 1 planes of its own.
        convolutions_[place][convolution.number]->backward(
            work.padded[place], depthwise.value, depthwise.flipped, pointwise.value, work.conv_gradient, work.inner,
            work.inner_gradient, work.bordered[place], depthwise.gradient, pointwise.gradient, stage == 0,
            work.in_gradient);
        Timed timed(Phase::kNormalisation);
        for (int64_t c = 0; c < c_ && stage; ++c)
          normalised_relu_backward<T, L>(nodes_, result(n, first_plane, c), T(1), mean_of(first_plane, c), T(0),
                                         work.in_gradient + c * nodes_.step, half_gradient_ + (half + c) * size_,
                                         half_sums_.data() + (half + c) * 2);
      }
      if (stage == 0 && edge.node == space_.nodes - 1) finish_state(g, n, edge.state, x_gradient, work);
    }
  }
  // Computes the gradient of a state: through the ReLU of the convolutions, and through pools and identity without one.
  // That of an input is written, that of a node is added to the node's gradient.
  void finish_state(int g, int64_t n, int s, T* x_gradient, Workspace& work) {
    Timed timed(Phase::kPad);
    const Geometry& geometry = geometry_of(g);
    const T* state = state_planes(n, s);
    const int64_t plane_size = geometry.h * geometry.w;
    for (int64_t c = 0; c < c_; ++c) {
      T* direct = g == 0 ? x_gradient + ((n * 2 + s) * state_c_ + c) * plane_size : work.direct;
      std::fill(direct, direct + plane_size, T(0));
      differentiate_unweighted(g, n, s, c, direct, work);
      relu_backward<T, L>(geometry, state + c * plane_size, work.in_gradient + c * in_step(g), true, direct);
      if (g > 0) add_to_node(n, s - 2, c, direct);
    }
    if (space_.has_reduce(space_.groups[g]))
      differentiate_reduce(g, n, s, x_gradient + (n * 2 + s) * state_c_ * plane_size, work);
    for (int64_t c = c_; c < state_c_; ++c) {
      T* d = work.total;
      std::fill(d, d + nodes_.h * nodes_.w, T(0));
      add_node_gradients(space_.groups[g], n, s, c, space_.columns - 1, [&](T weight, const T* from) {
        add_rows(weight, from, d);
      });
      if (g > 0) {
        add_to_node(n, s - 2, c, d);
        continue;
      }
      T* to = x_gradient + ((n * 2 + s) * state_c_ + c) * plane_size;
      if (geometry.stride == 2) pool_halves_backward(state + c * plane_size, d, to);
      else std::copy(d, d + plane_size, to);
    }
  }
  // Adds a plane [h, w] to the gradient of channel c of a node.
  void add_to_node(int64_t n, int64_t node, int64_t c, const T* from) {
    add_compact_rows(1, from, gradient_ + ((n * space_.nodes + node) * state_c_ + unshuffled(c)) * size_);
  }
  // Adds a plane with rounded-up rows to a plane [h, w].
  void add_rows(T weight, const T* from, T* to) const {
    for (int64_t i = 0; i < nodes_.rows(); ++i)
#pragma omp simd
      for (int64_t j = 0; j < nodes_.columns(); ++j) to[i * nodes_.w + j] += weight * from[i * nodes_.out_row + j];
  }
  // The first of several equal maxima gets the gradient, as in Paddle.
  void pool_halves_backward(const T* plane, const T* d, T* to) const {
    for (int64_t i = 0; i < nodes_.h; ++i)
      for (int64_t j = 0; j < nodes_.w; ++j) {
        int64_t largest = 2 * i * inputs_.w + 2 * j;
        for (int k = 0; k < 4; ++k) {
          const int64_t at = (2 * i + k / 2) * inputs_.w + 2 * j + k % 2;
          to[at] = 0;
          if (plane[at] > plane[largest]) largest = at;
        }
        to[largest] = d[i * nodes_.w + j];
      }
  }
  // Adds the gradient of a plane of a state through pools and identities to `direct` [h, w].
  void differentiate_unweighted(int g, int64_t n, int s, int64_t c, T* direct, Workspace& work) {
    const Group& group = space_.groups[g];
    const T* plane = state_planes(n, s) + c * geometry_of(g).h * geometry_of(g).w;
    Timed timed(Phase::kPools);
    for (size_t k = 0; k < space_.pools.size(); ++k) {
      const int64_t pool = space_.pool_plane(group, s, k);
      T* d = work.total;
      std::fill(d, d + size_, T(0));
      add_node_gradients(group, n, s, c, space_.pools[k].column, [&](T weight, const T* from) {
#pragma omp simd
        for (int64_t p = 0; p < size_; ++p) d[p] += weight * from[p];
      });
      batch_norm_backward(nodes_, d, nodes_.out_row, T(1), result(n, pool, c), rstd_of(pool, c),
                          d_mean_[pool * c_ + c], mean_of(pool, c), slope_[pool * c_ + c], d);
      if (space_.pools[k].max)
        pools_of(g).max_backward(plane, d, work.pool, direct);
      else
        pools_of(g).mean_backward(d, work.pool, direct);
    }
    if (space_.skip < 0 || geometry_of(g).stride > 1) return;
    add_node_gradients(group, n, s, c, space_.skip, [&](T weight, const T* from) { add_rows(weight, from, direct); });
  }
  // Calls add(mixing weight in `column`, gradient of the node) for all edges from state s.
  template <typename F>
  void add_node_gradients(const Group& group, int64_t n, int s, int64_t c, int column, F add) const {
    for (const Edge& edge : group.edges)
      if (edge.state == s) add(mixing_[edge.number * space_.columns + column], node_gradient(n, edge.node, c));
  }

  // Adds the gradient of a state through FactorizedReduce to `to`, C planes [h, w].
  void differentiate_reduce(int g, int64_t n, int s, T* to, Workspace& work) const {
    Timed timed(Phase::kPointwise);
    const T* state = state_planes(n, s);
    for (int half = 0; half < 2; ++half) {
      if (work.weights) grid_.gather(state, half, work.grids[half]);
      std::fill_n(work.grids_gradient[half], grid_size(), T(0));
    }
    for (const Edge& edge : space_.groups[g].edges) {
      if (edge.state != s) continue;
      const End& end = edge.ends.back();
      differentiate_norm(n, end.plane, node_gradient(n, edge.node, 0), mixing_weight(edge, end), work.conv_gradient);
      for (int half = 0; half < 2; ++half) {
        const EdgeWeight kernel = weight(g, 2 * space_.stages + half, edge, work);
        const T* d = work.conv_gradient + half * (c_ / 2) * nodes_.step;
        if (kernel.gradient)
          add_outer<T, L>(d, nodes_.step, work.grids[half], nodes_.step, c_ / 2, c_, size_, kernel.gradient);
        multiply<T, L>(kernel.value, 1, c_, d, nodes_.step, c_, c_ / 2, size_, work.inner_gradient, nodes_.step);
        T* sum = work.grids_gradient[half];
        for (int64_t c = 0; c < c_; ++c)                       // between planes the memory is not initialised
#pragma omp simd
          for (int64_t p = c * nodes_.step; p < c * nodes_.step + size_; ++p) sum[p] += work.inner_gradient[p];
      }
    }
    for (int half = 0; half < 2; ++half) grid_.scatter(state, half, work.grids_gradient[half], true, to);
  }

  // Returns the weights of an edge in block `index` of a group.
  EdgeWeight weight(int g, int index, const Edge& edge, const Workspace& work) const {
    const Block& block = blocks_[first_block_[g] + index];
    const int64_t at = block.size / int64_t(space_.groups[g].edges.size()) * edge.local;
    return {block.value + at, block.flipped.empty() ? nullptr : block.flipped.data() + at,
            work.weights ? work.weights + block.at + at : nullptr};
  }
  T mixing_weight(const Edge& edge, const End& end) const {
    return mixing_[edge.number * space_.columns + end.column];
  }
  T edge_weight(const Edge& edge) const { return mixing_[(edge.number + 1) * space_.columns - 1]; }

  int64_t planes() const { return space_.planes * c_; }
  int64_t grid_size() const { return c_ * nodes_.step; }
  const Geometry& geometry_of(int g) const { return g == 0 ? inputs_ : nodes_; }
  const Pools<T>& pools_of(int g) const { return g == 0 ? input_pools_ : node_pools_; }
  int64_t largest_plane() const {
    return std::max({inputs_.plane, nodes_.plane, second_.plane, inputs_.h * inputs_.w});
  }
  int64_t pool_work_size() const { return std::max(input_pools_.work_size(), node_pools_.work_size()); }
  // The distance between the planes of a state's gradient before its ReLU.
  int64_t in_step(int g) const { return geometry_of(g).stride == 1 ? geometry_of(g).step : geometry_of(g).plane; }
  // Indices of the first of C numbers: of the end k of an edge; of the first half of a convolution of an edge.
  int64_t end_count() const { return space_.groups[0].edges[0].ends.size(); }
  int64_t end_index(int64_t n, const Edge& edge, int k) const {
    return ((n * space_.edges + edge.number) * end_count() + k) * c_;
  }
  int64_t half_planes() const { return space_.groups[0].edges.size() * space_.halves * c_; }
  int64_t half_index(int64_t n, const Edge& edge, const Convolution& convolution) const {
    return n * half_planes() + (edge.local * space_.halves + convolution.half) * c_;
  }
  T* result(int64_t n, int64_t plane, int64_t c) const { return saved_ + (n * planes() + plane * c_ + c) * size_; }
  // The channels of a node before their shuffle: the C channels of the operations, then the rest.
  int64_t unshuffled(int64_t c) const { return c % space_.partial * c_ + c / space_.partial; }
  const T* node_gradient(int64_t n, int64_t node, int64_t c) const {
    return gradient_ + ((n * space_.nodes + node) * state_c_ + c) * size_;
  }
  T* node_plane(int64_t n, int64_t node, int64_t c) const {
    const int64_t shuffled = c % c_ * space_.partial + c / c_;
    return out_ + ((n * space_.nodes + node) * state_c_ + shuffled) * nodes_.h * nodes_.w;
  }
  // The planes of a state, those that pass the operations first.
  const T* state_planes(int64_t n, int s) const {
    return s < 2 ? x_ + (n * 2 + s) * state_c_ * inputs_.h * inputs_.w
                 : out_ + (n * space_.nodes + s - 2) * state_c_ * nodes_.h * nodes_.w;
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
  void pad_state(int g, int64_t n, int s, Workspace& work) const {
    Timed timed(Phase::kPad);
    const Geometry& geometry = geometry_of(g);
    for (int64_t c = 0; c < c_ && !space_.convolutions.empty(); ++c)
      pad<T, L>(geometry, state_planes(n, s) + c * geometry.h * geometry.w, work.padded[g > 0] + c * geometry.plane);
  }
  void pad_normalised(int64_t n, int64_t plane, T* padded) const {
    Timed timed(Phase::kPad);
    for (int64_t c = 0; c < c_; ++c)
      normalise_relu<T, L>(second_, result(n, plane, c), nodes_.out_row, rstd_of(plane, c), mean_of(plane, c), T(0),
                     padded + c * second_.plane);
  }
  // Computes the moments of C planes of one image; combines those of all images to the statistics of the planes
  // [first, end).
  void compute_all_moments(int64_t n, int64_t plane) {
    Timed timed(Phase::kNormalisation);
    for (int64_t c = 0; c < c_; ++c)
      compute_moments<T, L>(nodes_, result(n, plane, c), moments_.data() + (n * planes() + plane * c_ + c) * 2);
  }
  void combine(int64_t first, int64_t end) {
    share((end - first) * c_, 16, [&](int64_t plane) {
      Timed timed(Phase::kNormalisation);
      const int64_t k = first * c_ + plane;
      double mean, variance;
      combine_moments(moments_.data() + 2 * k, n_, 2 * planes(), nodes_.h * nodes_.w, &mean, &variance);
      statistics_[2 * k] = mean, statistics_[2 * k + 1] = 1 / std::sqrt(variance + epsilon_);
    });
  }

  const Space& space_;
  const T *x_, *mixing_;
  const int64_t n_, c_, state_c_;                // images; channels of an operation, of a state
  const double epsilon_;
  const Geometry inputs_, nodes_, second_;       // of states 0 and 1; of the nodes; between the halves of a sep_conv
  const int64_t size_, count_;                   // numbers per saved plane; numbers per normalised channel
  const Pools<T> input_pools_, node_pools_;
  const RectifiedConvolution<T, L> grid_;
  std::vector<std::unique_ptr<SeparableConvolution<T>>> convolutions_[3];    // for the three geometries
  std::vector<Block> blocks_;                    // group by group, in the order of README.md
  std::vector<int> first_block_;                 // of each group
  int64_t weights_size_ = 0;
  int constant_states_ = 0;
  T *out_, *saved_, *statistics_;
  std::vector<double> moments_;                  // [N, planes, 2]
  // Gradients of the nodes [N, nodes, channels as of `unshuffled`], and of the first normalisation's output in the
  // sep_convs of a group.
  T *gradient_, *half_gradient_;
  std::vector<double> sums_, dot_products_, half_sums_, rest_products_, scale_gradients_;
  std::vector<T> d_mean_, slope_;                // arguments of batch_norm_backward by plane
};

// Returns the number of saved planes per image; at least 1, because Paddle 2.6 refuses an empty tensor.
int64_t saved_planes(const Space& space, const Tensor& x) {
  return std::max<int64_t>(1, space.planes * (x.shape()[1] / 2 / space.partial));
}

// Checks the inputs of the forward pass; returns the shape of the output.
Shape check_inputs(const Space& space, const std::vector<Tensor>& inputs, float epsilon) {
  require(inputs.size() >= 2 && epsilon > 0, "a mixed cell needs its states, mixing weights and a positive epsilon");
  check_types(inputs);
  const Shape x = inputs[0].shape();
  const int64_t stride = space.reduction ? 2 : 1;
  require(x.size() == 4 && x[1] > 0 && x[1] % 4 == 0 && x[2] > 0 && x[3] > 0 && x[2] % stride + x[3] % stride == 0,
          "the states have to be [N, 2 C, H, W] with an even C, and in a reduction cell an even H and W");
  require(x[1] % (2 * stride * space.partial) == 0,
          "partial_channels does not divide the channels of a state, or in a reduction cell leaves an odd number");
  check_shape("the tensor of mixing weights", inputs[1], {space.edges, space.columns});
  return {x[0], space.nodes * x[1] / 2, x[2] / stride, x[3] / stride};
}

std::vector<Tensor> Forward(const std::vector<Tensor>& inputs, const std::vector<std::string>& primitives, int nodes,
                            bool reduction, int partial_channels, bool, int, float epsilon) {
  const Space space(primitives, nodes, reduction, partial_channels);
  const Shape shape = check_inputs(space, inputs, epsilon);
  const Tensor& x = inputs[0];
  const int64_t planes = saved_planes(space, x);
  const auto empty = [&](const Shape& sizes) { return paddle::empty(sizes, x.dtype(), x.place()); };
  Tensor out = empty(shape), statistics = empty({planes, 2}), saved;
  DARTS_DISPATCH(x.type(), "darts_mixed_cell", ([&] {
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
                             int partial_channels, bool weight_gradients, int constant_states, float epsilon) {
  const Space space(primitives, nodes, reduction, partial_channels);
  const Shape shape = check_inputs(space, inputs, epsilon);
  const int64_t planes = saved_planes(space, inputs[0]);
  check_types({inputs[0], out, saved, statistics, out_gradient});
  check_shape("the output", out, shape);
  check_shape("the gradient of the output", out_gradient, shape);
  check_shape("the tensor of statistics", statistics, {planes, 2});
  check_constant_states(constant_states, weight_gradients);
  std::vector<Tensor> gradients = gradients_of(inputs, 1);
  DARTS_DISPATCH(out.type(), "darts_mixed_cell_grad", ([&] {
    dispatch_lanes<data_t>(shape[3], [&](auto lanes) {
      using Cell = MixedCell<data_t, decltype(lanes)::value>;
      check_shape("the tensor of saved results", saved, {shape[0], planes, Cell::plane_size(shape[2], shape[3])});
      Cell(space, inputs, &gradients, epsilon)
          .backward(out.data<data_t>(), saved.data<data_t>(), statistics.data<data_t>(), out_gradient.data<data_t>(),
                    weight_gradients, constant_states, gradients[0].data<data_t>(), gradients[1].data<data_t>());
    });
  }));
  return gradients;
}

// For wrong inputs it returns unknown sizes: an exception would end the process here. The kernel raises the error.
std::vector<Shape> InferShape(const std::vector<Shape>& inputs, const std::vector<std::string>& primitives, int nodes,
                              bool reduction, int, bool, int, float) {
  const Shape& x = inputs[0];
  if (x.size() != 4) return {{-1, -1, -1, -1}, {-1, -1, -1}, {-1, 2}};
  const int64_t stride = reduction ? 2 : 1;
  return {{x[0], nodes * x[1] / 2, x[2] / stride, x[3] / stride}, {x[0], -1, -1}, {-1, 2}};
}

std::vector<paddle::DataType> InferDtype(const std::vector<paddle::DataType>& inputs) {
  return {inputs[0], inputs[0], inputs[0]};
}

}  // namespace

#define DARTS_MIXED_CELL_ATTRIBUTES                                                                    \
  {"primitives: std::vector<std::string>", "nodes: int", "reduction: bool", "partial_channels: int", \
   "weight_gradients: bool", "constant_states: int", "epsilon: float"}

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
