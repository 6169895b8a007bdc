// The search space of a mixed cell: what its primitives and nodes mean for edges, results and their order in memory.
#pragma once

#include "cells.h"

namespace {

// A convolution of every edge; column: of the mixing weights; number: index among the convolutions; stage: of its first
// stage; half: among the convolutions with two stages.
struct Convolution {
  ConvolutionKind kind;
  int column, number, stage, half;
};
struct PoolKind {
  bool max;
  int column;
};
// The result of an operation on an edge, which the mixing weight in `column` scales. plane: of C saved planes, those
// before its normalisation; -1 for the identity. shared: whether all edges from a state share them, as for a pool.
struct End {
  int column;
  int64_t plane;
  bool shared;
};
// number: row of the mixing weights; local: index in the order of the weights, by node, then by state.
struct Edge {
  int state, node, number, local;
  std::vector<End> ends;
};
// States whose edges are computed together, as SearchSpace.state_groups; edges ordered by state, then by node. From
// `plane` on follow the saved planes of pools, first stages and FactorizedReduce, from second_plane on second stages.
struct Group {
  int first_state, states, first_node;
  int64_t plane, second_plane, end_plane;
  std::vector<Edge> edges;
};

// The cell that the attributes of the operator describe. Planes are counted in units of C, the channels of an
// operation: those of a state divided by `partial`. columns: of the mixing weights; the last one is the weight of the
// edge if partial > 1.
struct Space {
  std::vector<Convolution> convolutions;
  std::vector<PoolKind> pools;
  std::vector<Group> groups;
  int nodes, partial, columns, skip = -1, stages = 0, halves = 0;
  int64_t edges = 0, planes = 0, padding = 0, second_padding = 0;
  bool reduction;

  Space(const std::vector<std::string>& primitives, int nodes, bool reduction, int partial)
      : nodes(nodes), partial(partial), columns(primitives.size() + (partial > 1)), reduction(reduction) {
    require(nodes > 0 && nodes <= 1000 && !primitives.empty(), "a cell needs from 1 to 1000 nodes, and primitives");
    require(partial > 0, "partial_channels has to be positive");
    for (int k = 0; k < int(primitives.size()); ++k) {
      check_operation(primitives[k]);
      require(std::count(primitives.begin(), primitives.end(), primitives[k]) == 1, primitives[k],
              " occurs more than once");
      if (primitives[k] == "skip_connect") skip = k;
      if (is_pool(primitives[k])) pools.push_back({primitives[k] == "max_pool_3x3", k});
      const ConvolutionKind* kind = find_convolution(primitives[k]);
      if (!kind) continue;
      convolutions.push_back({*kind, k, int(convolutions.size()), stages, halves});
      stages += kind->stages, halves += kind->stages - 1;
      padding = std::max<int64_t>(padding, kind->dilation * (kind->kernel / 2));
      if (kind->stages > 1) second_padding = std::max<int64_t>(second_padding, kind->kernel / 2);
    }
    padding += padding % 2;                        // an even border is faster with stride 2
    for (int state = 0; state <= nodes; state += state ? 1 : 2) add_group(state, state ? 1 : 2);
  }

  bool has_reduce(const Group& group) const { return reduction && skip >= 0 && group.first_state == 0; }
  int64_t pool_plane(const Group& group, int state, int k) const {
    return group.plane + (state - group.first_state) * int64_t(pools.size()) + k;
  }
  int64_t convolution_plane(const Group& group, const Edge& edge, const Convolution& convolution, int stage) const {
    if (stage) return group.second_plane + edge.local * halves + convolution.half;
    return pool_plane(group, group.first_state + group.states, 0) + edge.local * int64_t(convolutions.size()) +
           convolution.number;
  }
  int64_t reduce_plane(const Group& group, const Edge& edge) const {
    return group.second_plane - int64_t(group.edges.size()) + edge.local;
  }

 private:
  void add_group(int first_state, int states) {
    Group group{first_state, states, std::max(0, first_state - 1), planes, 0, 0, {}};
    for (int s = first_state; s < first_state + states; ++s)
      for (int node = group.first_node; node < nodes; ++node)
        group.edges.push_back({s, node, node * (node + 3) / 2 + s,
                               (node - group.first_node) * states + s - first_state, {}});
    const int64_t count = group.edges.size();
    group.second_plane = planes + states * pools.size() + count * (convolutions.size() + has_reduce(group));
    group.end_plane = group.second_plane + count * halves;
    for (Edge& edge : group.edges) {
      for (const Convolution& each : convolutions)
        edge.ends.push_back({each.column, convolution_plane(group, edge, each, each.kind.stages - 1), false});
      for (size_t k = 0; k < pools.size(); ++k)
        edge.ends.push_back({pools[k].column, pool_plane(group, edge.state, k), true});
      if (skip >= 0) edge.ends.push_back({skip, has_reduce(group) ? reduce_plane(group, edge) : -1, false});
    }
    edges += count, planes = group.end_plane;
    groups.push_back(group);
  }
};

}  // namespace
