"""Planted in what writes and moves the paged cache: kv_write, page_copy."""

# ruff: noqa: E501, since a snippet is quoted on one line as it stands in its source
# fmt: off
from __future__ import annotations

from functools import partial

from porthal.conformance.selftest.planting import Defect

write = partial(Defect, "kv_write")
copy = partial(Defect, "page_copy")
put = "pages[name].index_copy_(0, plan.targets, rows)\n"
chosen = "rows = rows.index_select(0, plan.written)\n"
coded = "            rows = coded_rows(pages, name, plan.targets, rows)\n"
moved = "blocks.index_copy_(0, target.long(), blocks.index_select(0, source))\n"

DEFECTS = [
    write("minus-one-is-the-last-slot", "-1", "if len(plan.written) < batch.T:\n                " + chosen + coded + "            " + put,
          "pages[name][plan.slots] = rows\n", discrepancy=9),
    write("padding-to-slot-0", "padding", "if len(plan.written) < batch.T:\n                " + chosen + coded + "            " + put,
          "pages[name][plan.slots.clamp(min=0)] = rows\n", discrepancy=8),
    write("pages-of-64", "block size", put, """size, t = pages.spec.block_size, plan.targets
            pages[name].index_copy_(0, (t // size * 64 + t % size) % len(pages[name]), rows)\n"""),
    write("slot-off-by-one", "off by one", put, "pages[name].index_copy_(0, (plan.targets + 1) % len(pages[name]), rows)\n"),
    write("first-rows-for-padded-batches", "padding", chosen, "rows = rows[: len(plan.written)]\n", discrepancy=39),
    write("second-field-forgotten", "optional", "zip(pages.spec.fields, (first, second)):\n        ",
          "zip(pages.spec.fields[:1], (first, second)):\n        "),
    write("only-decoding-rows", "rows", put, """pages[name].index_copy_(0, plan.targets[:16], rows[:16])\n"""),
    write("neighbouring-slot-cleared", "outside", put,
          put + "            pages[name][(plan.targets[-1:] + 1) % len(pages[name])] = 0\n"),
    write("through-float16", "rounding", put, "pages[name].index_copy_(0, plan.targets, rows.half().to(rows.dtype))\n"),
    write("nan-refused", "special", put, "pages[name].index_copy_(0, plan.targets, torch.nan_to_num(rows))\n"),
    write("strides-ignored", "strides", put,
          "pages[name].index_copy_(0, plan.targets, rows.as_strided(rows.shape, (rows.shape[1], 1)))\n", discrepancy=27),
    write("written-twice-late", "off by one", put, "pages[name].index_copy_(0, plan.targets, rows.roll(1, 0))\n"),
    copy("pages-of-64", "block size", "return pages[name].view(pages.spec.n_blocks, pages.spec.block_size, -1)\n",
         "return pages[name].unflatten(0, (-1, 64))\n"),
    copy("one-page-after-the-other", "order", moved, """for a, b in zip(source.tolist(), target.tolist()):
                blocks[b] = blocks[a]\n"""),
    copy("first-field-only", "optional", "for name in pages.form(pages.spec):\n            blocks",
         "for name, _ in pages.spec.fields[:1]:\n            blocks"),
    copy("last-slot-left", "off by one", moved, "blocks[target.long(), :-1] = blocks.index_select(0, source)[:, :-1]\n"),
    copy("swapped", "order", moved, "blocks.index_copy_(0, source.long(), blocks.index_select(0, target))\n"),
    copy("moved-not-copied", "outside", moved, moved + "            blocks[sorted(set(source.tolist()) - set(target.tolist()))] = 0\n"),
]
