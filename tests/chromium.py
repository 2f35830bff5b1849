"""Pages measured by a browser."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from collections.abc import Sequence

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium is here: apt-get install chromium")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--dump-dom"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync", "--virtual-time-budget=4000"),
]
WIDTHS = (360, 390, 768, 1280)
# Each page stands in frames of these widths; what is measured there becomes the text of the outer page.
MEASURE = """<!doctype html><meta charset="utf-8">%s<pre id="out"></pre><script>
onload = () => {
  const found = [...document.querySelectorAll("iframe")].map(frame => {
    const page = frame.contentDocument, root = page.documentElement;
    const middle = e => { const r = e.getBoundingClientRect(); return r.left + r.width / 2; };
    const all = (s) => [...page.querySelectorAll(s)];
    // Every line of text with its box, and what cuts it off: the page, or a part that scrolls by itself.
    const lines = [], walk = page.createTreeWalker(page.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
      const text = walk.currentNode, range = page.createRange(), card = text.parentElement.closest(".wide, .card");
      const hidden = text.parentElement.closest("style, .plot .op, details:not([open]) > :not(summary)");
      if (!text.textContent.trim() || hidden) continue;
      range.selectNodeContents(text);
      for (const r of range.getClientRects())
        if (r.width > 1)
          lines.push({text: text.textContent.trim(), r, end: card ? card.getBoundingClientRect().right : root.clientWidth});
    }
    const meet = (a, b) => a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 3 && b.top < a.bottom - 3;
    return {
      cut: lines.filter(l => l.r.right > l.end).map(l => l.text),
      meeting: lines.flatMap((a, i) => lines.slice(i + 1).filter(b => meet(a.r, b.r)).map(b => a.text + " | " + b.text)),
      width: root.clientWidth, needs: root.scrollWidth,
      font: parseFloat(getComputedStyle(page.body).fontSize),
      background: getComputedStyle(page.body).backgroundColor,
      limits: all(".plot line.limit").map(middle),
      bad: all(".plot .dot-bad").map(middle),
      good: all(".plot .dot-own, .plot .dot-other").map(middle),
      stacks: all(".step .stack").map(e => [...e.children].reduce((sum, i) => sum + i.getBoundingClientRect().width, 0)),
      strays: all(".chart circle, .chart line").filter(e => {
        const r = e.getBoundingClientRect(), at = e.closest(".chart").getBoundingClientRect();
        return r.left < at.left - 5 || r.right > at.right + 5 || r.top < at.top - 5 || r.bottom > at.bottom + 5;
      }).length,
      details: all("details").length,
      open: all("details").map(d => { d.open = true; return d.querySelector("pre, .call").getBoundingClientRect().width; }),
      afterwards: root.scrollWidth,
    };
  });
  document.getElementById("out").textContent = JSON.stringify(found);
};
</script>"""


def measured(pages: Sequence[tuple[str, int]], folder, *flags: str) -> list[dict]:
    """What a browser says of pages, each at its width."""
    frame = '<iframe srcdoc="{}" width="{}" height="800" style="border: 0"></iframe>'
    frames = "".join(frame.format(html.escape(page), width) for page, width in pages)
    file = folder / "measure.html"
    file.write_text(MEASURE % frames, encoding="utf-8")
    command = [CHROMIUM, *FLAGS, *flags, f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", file.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | {"HOME": str(folder)})
    out = re.search(r'<pre id="out">(.+?)</pre>', done.stdout, re.S)
    assert out, done.stderr
    return json.loads(html.unescape(out[1]))


def at_widths(page: str, folder, *flags: str) -> list[dict]:
    """The same of one page at each of the widths."""
    return measured([(page, width) for width in WIDTHS], folder, *flags)


def brightness(found: dict) -> float:
    """Of the background, of 255."""
    return sum(map(int, re.findall(r"\d+", found["background"])[:3])) / 3
