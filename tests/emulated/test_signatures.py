"""Vendors' kernels take what their contracts say: names, order, kinds and defaults."""

import inspect

from porthal.hal import contracts


def test_ascend_kernels_have_the_signatures_of_their_contracts():
    from porthal.backends.ascend.backend import Ascend

    kernels = {op: f for op, f in vars(Ascend).items() if op in contracts() and f is not None}
    assert kernels
    for op, kernel in kernels.items():
        given = list(inspect.signature(kernel).parameters.values())[1:]
        wanted = list(inspect.signature(contracts()[op].reference).parameters.values())
        assert [(p.name, p.kind, p.default) for p in given] == [(p.name, p.kind, p.default) for p in wanted], op
