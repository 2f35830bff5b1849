"""What tests of Kunlunxin's stand-ins share."""

import pytest
import torch

BF16, I32, I8 = torch.bfloat16, torch.int32, torch.int8


def ints(*values, dtype=I32):
    return torch.tensor(values, dtype=dtype)


def codes(*shape):
    return torch.randint(-127, 128, shape, dtype=I8)


def close(got, want, rtol=2**-7, atol=1e-5):
    torch.testing.assert_close(got.double(), want.double(), rtol=rtol, atol=atol)


def refused(sentence, call, **arguments):
    with pytest.raises(RuntimeError, match=sentence):
        call(**arguments)
