"""An installation without the C kernel says so once, which is right, and here it would be an error."""

import warnings

from polyak.kernels import native

# What writes the files there needs libraries that tests do not.
collect_ignore_glob = ["data/*"]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    native.library()
