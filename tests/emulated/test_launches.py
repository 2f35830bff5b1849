"""How many kernels a decode step launches: what Ascend's fused calls save against the torch base on the same device."""

from porthal.model.generate import generate
from tests import demo
from tests.launches import Launches
from tests.proofs import ROOT


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
