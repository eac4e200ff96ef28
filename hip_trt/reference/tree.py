"""Mask search: which key blocks a query block attends to (HiP, arXiv 2406.09827, section 3.2 and algorithm 1).

The paper halves the key range of each query anew. Here the tree stands on a fixed grid: node i of a level that covers
L blocks is blocks [i L, (i + 1) L), clipped to the candidates. Representatives are then the same keys for every query
block and from one decode step to the next. branch = leaf_branch = 2 is the paper's halving.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tree:
    """The nodes over candidate key blocks [first, last).

    Attributes:
        first, last: candidate blocks, ``first`` inclusive, ``last`` exclusive.
        branch: children per node above level 1.
        leaf_branch: blocks per level-1 node.
    """

    first: int
    last: int
    branch: int
    leaf_branch: int

    def size(self, level: int) -> int:
        """Blocks that a node of this level covers."""
        return 1 if level == 0 else self.leaf_branch * self.branch ** (level - 1)

    def nodes(self, level: int) -> Tensor:
        """Indices of all nodes of the level that hold a candidate, ascending: [N] int64."""
        size = self.size(level)
        return torch.arange(self.first // size, -(-self.last // size))

    def start_level(self, budget: int) -> int:
        """Lowest level that holds all candidates' nodes; a level holds budget x branch (leaf_branch at level 0)."""
        level = 0
        while len(self.nodes(level)) > budget * (self.leaf_branch if level == 0 else self.branch):
            level += 1
        return level

    def occupied(self, nodes: Tensor, level: int) -> Tensor:
        """The distinct nodes among ``nodes`` that hold a candidate, ascending."""
        left, right = self._interval(nodes, level)
        distinct: Tensor = torch.unique(nodes[right > left])
        return distinct

    def children(self, nodes: Tensor, level: int) -> Tensor:
        """The nodes one level down that hold a candidate, ascending."""
        width = self.leaf_branch if level == 1 else self.branch
        return self.occupied((nodes[:, None] * width + torch.arange(width)).flatten(), level - 1)

    def representatives(self, nodes: Tensor, level: int) -> Tensor:
        """The middle block of each node's candidates (the paper's representative token, here a block): [N] int64."""
        left, right = self._interval(nodes, level)
        return left + (right - left) // 2

    def _interval(self, nodes: Tensor, level: int) -> tuple[Tensor, Tensor]:
        size = self.size(level)
        return (nodes * size).clamp(min=self.first), (nodes * size + size).clamp(max=self.last)


def block_scores(queries: Tensor, keys: Tensor, blocks: Tensor, *, block_k: int, stride_k: int) -> Tensor:
    """Score of key blocks: the largest q.k over all rows and every stride_k-th token.

    Args:
        queries: [R, D], the sampled rows of every query head of the mask head.
        keys: [T, D], one key head of the sequence.
        blocks: [N] int64.

    Returns:
        [N], the type of ``queries``.
    """
    tokens = blocks[:, None] * block_k + torch.arange(0, block_k, stride_k)
    return (keys[tokens] @ queries.mT).amax(dim=(1, 2))


def keep_best(nodes: Tensor, scores: Tensor, budget: int) -> Tensor:
    """The ``budget`` nodes of highest score, the lower index where scores are equal; ascending."""
    order = torch.argsort(scores, descending=True, stable=True)  # nodes come in ascending order
    return nodes[order[:budget]].sort().values


def search(
    queries: Tensor, keys: Tensor, tree: Tree, *, budget: int, block_k: int, stride_k: int, reuse_level: int
) -> tuple[Tensor, Tensor | None]:
    """Search from the top: keep the best nodes of each level, replace them by their children, down to blocks.

    Args:
        queries: [R, D], see :func:`block_scores`.
        keys: [T, D].
        tree: over more than ``budget`` candidates.
        budget: K, blocks to choose.

    Returns:
        The chosen blocks, [K] int64 ascending, and the nodes kept at ``reuse_level``, [K] int64 ascending, or None if
        the search began below that level.
    """
    level = tree.start_level(budget)
    nodes, kept = tree.nodes(level), None
    while True:
        scores = block_scores(queries, keys, tree.representatives(nodes, level), block_k=block_k, stride_k=stride_k)
        nodes = keep_best(nodes, scores, budget)
        if level == reuse_level:
            kept = nodes
        if level == 0:
            return nodes, kept
        nodes, level = tree.children(nodes, level), level - 1


def search_from(
    past_nodes: Tensor, queries: Tensor, keys: Tensor, tree: Tree, *, budget: int, block_k: int, stride_k: int,
    reuse_level: int,
) -> Tensor:
    """Search from the nodes that an earlier decode step kept.

    At reuse_level 0 the chosen blocks are reused as they are (the paper, section 3.3); at reuse_level 1 the nodes and
    the two newest level-1 nodes are expanded and blocks chosen with the current query.

    Args:
        past_nodes: [N] int64; negative entries are none.

    Returns:
        The chosen blocks, at most K, int64 ascending.
    """
    past_nodes = past_nodes[past_nodes >= 0]
    if reuse_level == 0:
        return tree.occupied(past_nodes, 0)
    newest = tree.nodes(1)[-2:]
    blocks = tree.children(tree.occupied(torch.cat([past_nodes, newest]), 1), 1)
    return keep_best(blocks, block_scores(queries, keys, blocks, block_k=block_k, stride_k=stride_k), budget)
