"""The suite. Without a GPU, Triton interprets its kernels: it reads that when it is imported, which comes later."""

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
