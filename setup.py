"""The optional C kernels; everything else about the package stands in pyproject.toml."""

import sys

from setuptools import Extension, setup

FOLDER = "src/polyak/kernels/native"

# Products and sums are fused where the source says so and nowhere else, so that every kernel has the same bits. OpenMP
# is not linked: its functions are found in the runtime that torch has loaded, so that there is one set of threads. No
# bits depend on trapping math, but with it GCC leaves loops that compare numbers without vectors.
native = Extension(
    "polyak.kernels.native._native",
    [f"{FOLDER}/update.c", f"{FOLDER}/passes.c", f"{FOLDER}/look.c"],
    depends=[f"{FOLDER}/common.h", f"{FOLDER}/rounding.h"],
    extra_compile_args=[
        "-O3",
        "-std=gnu11",
        "-ffp-contract=off",
        "-fno-math-errno",
        "-fno-trapping-math",
        "-fvisibility=hidden",
        "-fopenmp",
    ],
    libraries=["m"],
    optional=True,  # without a compiler, torch's own operations do the same
)

setup(ext_modules=[native] if sys.platform == "linux" else [])
