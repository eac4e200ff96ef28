"""Speed of decode calls of version 2 on one GPU. Needs PyTorch and the library, none of the package's dependencies."""
