"""Compiled kernels for decoding on CPUs: products of integers, attention, whole decode steps.

`csrc/` holds the sources and the C interface (`api.h`), `build.py` compiles them, `library.py`
loads what was compiled. The package works without it, on PyTorch alone. This
package must not import torch.
"""
