"""Programs: short sequences of calls, each judged on what it really got. `seq=update` in a token is one of them.

A kernel passes a single call and fails the second where it keeps what it should read again: weights by their address, a
plan by its shape, pages by their number, results in memory that it uses again. What a step is called with is a function of
the token and of what the steps before have written.
"""

from __future__ import annotations

from collections.abc import Mapping

from porthal.hal.contract import Contract

PROGRAMS: Mapping[str, str] = {
    "update": "a call; new values written into the memory of every operand, and a new plan; the first values again; where "
    "there is no plan, without what is optional and with every other attribute",
    "plans": "plans of one shape in turn, with other lengths, other pages, other rows; one plan for two calls, without what is "
    "optional, and with every other attribute",
    "rewrite": "pages are rewritten, lengths and tables unchanged",
    "drafts": "drafts are dropped, so that requests are shorter than their tables; then they grow again",
    "held": "a result is held while the kernel is called again, with other values and in another shape",
    "models": "two sets of weights of one shape, and a second instance of the backend, in turn",
    "reuse": "write, select, attend; requests grow by a row, and what was selected serves a later step and a later layer",
}


def role_of(contract: Contract) -> str:
    """What an op does in `reuse`, by its signature: it writes a cache, selects in one, picks rows of a selection, or attends
    to what was selected; "" for any other."""
    signature = contract.signature
    batch, pages, given = (bool(signature.of_kind(kind)) for kind in ("Batch", "Pages", "Selection"))
    gives = any(result.kind == "Selection" for result in signature.results)
    if given:
        return "pick" if gives else "attend"
    if pages and batch and gives:
        return "select"
    return "write" if pages and batch and signature.mutated and not signature.of_kind("Weight") else ""


def programs(contract: Contract) -> tuple[str, ...]:
    """The programs that make sense for an op."""
    signature = contract.signature
    batch, pages = bool(signature.of_kind("Batch")), bool(signature.of_kind("Pages"))
    applies = {
        "update": True,
        "plans": batch,
        "rewrite": pages and batch and not signature.mutated,
        "drafts": pages and batch,
        "held": any(not r.mutated for r in signature.results),
        "models": bool(signature.of_kind("Weight")),
        "reuse": role_of(contract) in ("select", "pick", "attend"),
    }
    return tuple(name for name in PROGRAMS if applies[name])
