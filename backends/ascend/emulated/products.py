"""What the products A2 and A3, which are imitated here, have for all calls."""

import torch

HALVES = (torch.bfloat16, torch.float16)
