// How a workspace is shared out.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace hip_trt
{

// Hands out aligned pieces of the workspace, or, with no base, only adds up their sizes.
class Arena
{
public:
    explicit Arena(void* base)
        : mBase(static_cast<char*>(base))
    {
    }

    template <typename Item>
    Item* take(int64_t count)
    {
        constexpr size_t kAlignment = 256;
        char* const piece = mBase == nullptr ? nullptr : mBase + mUsed;
        mUsed += (count * sizeof(Item) + kAlignment - 1) / kAlignment * kAlignment;
        return reinterpret_cast<Item*>(piece);
    }

    size_t used() const
    {
        return mUsed;
    }

private:
    char* mBase;
    size_t mUsed = 0;
};

} // namespace hip_trt
