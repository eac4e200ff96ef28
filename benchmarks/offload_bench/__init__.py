"""Decode throughput with the KV cache in host memory: what :mod:`offload_decode` is made of."""
