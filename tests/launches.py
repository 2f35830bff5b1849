"""How many operations a decode step of the demo model is: those of PyTorch that are neither views nor allocations, and calls of
the vendor, each as one, whatever its stand-in computes."""

from __future__ import annotations

import sys
from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from porthal.model.generate import generate
from tests import demo
from tests.proofs import ROOT

FREE = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        self.found[name] += not view and name not in FREE and not _in_a_stand_in()
        return func(*args, **kwargs or {})


def _in_a_stand_in() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        file = frame.f_code.co_filename
        if ("/backends/" in file and "/emulated/" in file) or file.endswith("emulation/stand_in.py"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def per_step(backend: str, calls: Counter[str]) -> tuple[int, int]:
    """Of a step of one token behind others, which is not captured: all of it, and the vendor's calls among them."""
    model, found = demo.model(backend, "bfloat16"), []  # loaded before anything is counted
    for tokens in (2, 3):
        before = calls.total()
        with Launches() as launches:
            generate(model, [demo.PROMPT], tokens)
        found.append((launches.found.total(), calls.total() - before))
    vendor = found[1][1] - found[0][1]
    return found[1][0] - found[0][0] + vendor, vendor


def assert_the_page_says_how_many(vendor: str, base: str, calls: Counter[str]) -> None:
    """Operations of a step: of the vendor's backend fewer than 0.6 of those of the base, and as many as its page says."""
    (own, called), (inherited, _) = (per_step(backend, calls) for backend in (vendor, base))
    page = (ROOT / "docs" / f"{vendor}.md").read_text(encoding="utf-8").replace("\n", " ")
    assert f"is {own} operations, {called} of them the vendor's calls" in page
    assert f"it is {inherited}, views and allocations not counted" in page
    assert own < 0.6 * inherited
