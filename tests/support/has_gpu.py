"""Whether the tests for a GPU can run here."""

import importlib.util

import torch

CAN_RUN = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
