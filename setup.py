"""The optional C kernel; everything else about the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

# Products and sums are fused where the source says so and nowhere else, so that every kernel has the same bits. OpenMP
# is not linked: its functions are found in the runtime that torch has loaded, so that there is one set of threads.
native = Extension(
    "polyak.kernels._native",
    ["src/polyak/kernels/native.c"],
    extra_compile_args=["-O3", "-std=gnu11", "-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fopenmp"],
    libraries=["m"],
    optional=True,  # without a compiler, torch's own operations do the same
)

setup(ext_modules=[native] if sys.platform == "linux" else [])
