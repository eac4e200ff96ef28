"""What the kernel benchmarks share: inputs, timing, peers, counted work, reports. See benchmarks/README.md."""
