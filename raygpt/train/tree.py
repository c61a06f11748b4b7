"""The order of the canonical sum, fixed by lane numbers: a pure function of who has which lanes.

A binary tree over the lanes whose top bit pairs first, ``node(j, m) = node(j - 1, m) +
node(j - 1, m + L / 2**j)``.  What a worker's own lanes form of it is a forest.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

from raygpt.data.order import Segments, lane_order

Node = tuple[int, int]
"""(j, m): the sum of the lanes l = m (mod L / 2**j)."""


def sibling(node: Node, total: int) -> Node:
    """The node that ``node`` is added to; not for the root."""
    level, index = node
    return level, index ^ (total >> (level + 1))


def parent(node: Node, total: int) -> Node:
    level, index = node
    return level + 1, index & ((total >> (level + 1)) - 1)


class LaneForest:
    """What is left when lanes are added up as far as they form complete subtrees.

    ``merges[lane]`` says with which waiting nodes a lane's sum is merged when it comes, in
    order; ``roots`` are the nodes that remain, in the order in which they were begun; ``most`` is
    how many sums there are at once, the lane at hand with them.
    """

    def __init__(self, lanes: Sequence[int], total: int) -> None:
        self.order = lane_order(lanes, total)
        self.merges: dict[int, list[Node]] = {}
        self.nodes: dict[int, Node] = {}
        self.most = 0
        waiting: dict[Node, None] = {}
        for lane in self.order:
            node: Node = (0, lane)
            self.merges[lane] = []
            self.most = max(self.most, len(waiting) + 1)
            while node[0] < total.bit_length() - 1 and sibling(node, total) in waiting:
                other = sibling(node, total)
                del waiting[other]
                self.merges[lane].append(other)
                node = parent(node, total)
            waiting[node] = None
            self.nodes[lane] = node
        self.roots = list(waiting)


@dataclass(frozen=True)
class ReducePlan:
    """Who adds what in a step; a function of the owners of the lanes."""

    owners: tuple[int, ...]
    rank: int
    world_size: int
    forest: LaneForest = field(compare=False)
    parts: tuple[tuple[Node, ...], ...] = field(compare=False)
    """Of each rank: the partial sums that it hands on."""

    @property
    def lanes(self) -> list[int]:
        """This worker's lanes in the order in which it computes them."""
        return self.forest.order

    @property
    def last_node(self) -> Node:
        """What this worker's last lane completes: the last of its own partial sums."""
        return self.forest.nodes[self.lanes[-1]]


@lru_cache(maxsize=64)
def reduce_plan(owners: tuple[int, ...], rank: int, world_size: int) -> ReducePlan:
    """The plan for lanes that belong to ``owners`` (a rank a lane)."""
    total = len(owners)
    forests = [
        LaneForest([lane for lane, owner in enumerate(owners) if owner == r], total)
        for r in range(world_size)
    ]
    parts = tuple(tuple(forest.roots) for forest in forests)
    return ReducePlan(owners, rank, world_size, forests[rank], parts)


def most_sums(lanes: int, fewest: int, most: int) -> int:
    """How many sums of lanes, each as large as the gradient, a worker holds at once, of ``fewest``
    to ``most`` workers.

    The fewer workers, the more; but a power of two has fewer than the next number has.
    """
    found = 0
    for world_size in range(fewest, min(most, fewest + 2) + 1):
        segments = Segments(0, world_size + 1, 1, lanes)
        for owners in {segments.owners(s, world_size) for s in range(segments.count)}:
            shares: list[list[int]] = [[] for _ in range(world_size)]
            for lane, owner in enumerate(owners):
                shares[owner].append(lane)
            found = max(found, *(LaneForest(share, lanes).most for share in shares))
    return found
