"""How many kernels a decode step launches: what Ascend's fused calls save against the torch base on the same device."""

from collections import Counter

from torch.utils._python_dispatch import TorchDispatchMode

from porthal.model.generate import generate
from tests import demo
from tests.proofs import ROOT

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    """Operations that are neither views nor allocations."""

    def __init__(self):
        super().__init__()
        self.found = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.found[name] += not view and name not in FREE
        return func(*args, **kwargs or {})


def per_step(backend):
    """A step of one token behind others, which is not captured here."""
    model, counts = demo.model(backend, "bfloat16"), []  # loaded before anything is counted
    for tokens in (2, 3):
        with Launches() as launches:
            generate(model, [demo.PROMPT], tokens)
        counts.append(launches.found)
    return counts[1] - counts[0]


def test_a_step_launches_two_fifths_of_the_bases_kernels_at_most():
    own, base = per_step("ascend"), per_step("torch:npu:0")
    page = (ROOT / "docs" / "ascend.md").read_text(encoding="utf-8")
    assert f"is {own.total()} operations on the device" in page and f"alone it is {base.total()}." in page
    assert own.total() < 0.4 * base.total()
    assert own["npu_sparse_flash_attention"] == 3 and base["npu_sparse_flash_attention"] == 0
