"""Text as its tokens come: a character is printed when all of its bytes are there."""

from __future__ import annotations

from collections.abc import Sequence

from porthal.cli.text import print, stdout
from porthal.model.tokens import Bytes, Vocabulary

UNFINISHED = "\ufffd"


class Printer:
    """Writes prompt and text to stdout, or only collects it; `text` is what came after the prompt.

    without  ids that are not text: end-of-text tokens
    """

    def __init__(self, words: Bytes | Vocabulary, prompt: str, without: Sequence[int], silent: bool) -> None:
        self.words, self.prompt, self.without, self.silent = words, prompt, without, silent
        self.ids: list[int] = []
        self.text = ""
        self.started = False

    def add(self, ids: Sequence[int]) -> None:
        self.ids.extend(i for i in ids if i not in self.without)
        # A tail that does not decode yet may be the beginning of a character.
        self._show(self.words.decode(self.ids).rstrip(UNFINISHED))

    def close(self) -> None:
        self._show(self.words.decode(self.ids))
        if not self.silent and stdout().isatty():
            print()

    def _show(self, text: str) -> None:
        fresh = text[len(self.text) :]
        if not self.started:  # a prompt that is refused prints nothing
            fresh, self.started = self.prompt + fresh, True
        self.text = text
        if not self.silent:
            out = stdout().buffer
            out.write(fresh.encode("utf-8", "surrogateescape"))
            out.flush()
