"""Speed of one attention layer on a GPU, hip-trt beside dense attention: inputs, calls that are checked before they are
timed, and timing. What benchmarks/ and ``hip-trt eval break-even`` share.

The modules geometry, inputs and timing need PyTorch only: processes of other peers, which have another Triton and none
of hip-trt's dependencies, import them too.
"""
