"""Vendors' kernels take what their contracts say: names, order, kinds and defaults."""

import inspect

from porthal.hal import contracts


def test_ascend_kernels_have_the_signatures_of_their_contracts():
    from porthal.backends.ascend.backend import Ascend
    from porthal.backends.torch.backend import Torch

    own = Ascend.__mro__[: Ascend.__mro__.index(Torch)]
    kernels = {op: f for cls in own for op, f in vars(cls).items() if op in contracts()}
    assert len(kernels) >= 13
    for op, kernel in kernels.items():
        given = list(inspect.signature(kernel).parameters.values())[1:]
        wanted = list(inspect.signature(contracts()[op].reference).parameters.values())
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], op
