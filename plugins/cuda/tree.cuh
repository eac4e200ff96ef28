// The nodes over candidate key blocks, on a fixed grid: mirrors hip_trt/reference/tree.py.
#pragma once

namespace hip_trt
{

// Candidate blocks are [first, last). A level-0 node is a block; a level-1 node covers leaf_branch aligned blocks; a
// node of level d covers `branch` aligned nodes of level d - 1.
struct Tree
{
    int first;
    int last;
    int branch;
    int leaf_branch;

    // Blocks that a node of this level covers.
    __device__ int size(int level) const
    {
        int blocks = level == 0 ? 1 : leaf_branch;
        for (; level > 1; --level)
        {
            blocks *= branch;
        }
        return blocks;
    }

    // Children of a node of this level (1 or higher).
    __device__ int width(int level) const
    {
        return level == 1 ? leaf_branch : branch;
    }

    // The nodes of a level that hold a candidate are [firstNode, endNode).
    __device__ int firstNode(int level) const
    {
        return first / size(level);
    }

    __device__ int endNode(int level) const
    {
        return (last - 1) / size(level) + 1;
    }

    __device__ bool occupied(int node, int level) const
    {
        return node >= firstNode(level) && node < endNode(level);
    }

    // Lowest level that holds all candidates' nodes; a level holds budget * branch (leaf_branch at level 0).
    __device__ int startLevel(int budget) const
    {
        int level = 0;
        while (endNode(level) - firstNode(level) > budget * (level == 0 ? leaf_branch : branch))
        {
            ++level;
        }
        return level;
    }

    // The middle block of a node's candidates; `blocks` is the size of its level.
    __device__ int representative(int node, int blocks) const
    {
        const int left = max(node * blocks, first);
        const int right = min(node * blocks + blocks, last);
        return left + (right - left) / 2;
    }
};

// An ascending list of occupied nodes that need not be stored: all nodes of a level, or the children of listed nodes.
struct NodeList
{
    const int* parents; // ascending, occupied; nullptr: the list is a range
    int width;          // children per parent
    int offset;         // first node of a range; else children of parents[0] that hold no candidate
    int count;

    __device__ int operator[](int index) const
    {
        const int child = index + offset;
        return parents == nullptr ? child : parents[child / width] * width + child % width;
    }
};

__device__ inline NodeList allNodes(const Tree& tree, int level)
{
    return {nullptr, 0, tree.firstNode(level), tree.endNode(level) - tree.firstNode(level)};
}

// The occupied nodes one level below `level`. Only the first parent can have children before the candidates, and only
// the last one children after them.
__device__ inline NodeList children(const Tree& tree, const int* parents, int count, int level)
{
    const int width = tree.width(level);
    const int before = max(0, tree.firstNode(level - 1) - parents[0] * width);
    const int after = max(0, (parents[count - 1] + 1) * width - tree.endNode(level - 1));
    return {parents, width, before, count * width - before - after};
}

} // namespace hip_trt
