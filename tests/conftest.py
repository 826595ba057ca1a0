"""An installation without the C kernel says so once, which is right, and here it would be an error."""

import warnings

from polyak.kernels import native

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    native.library()
