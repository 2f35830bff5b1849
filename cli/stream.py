"""Text as its tokens come: a character is printed when all of its bytes are there. And what is said of it behind."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from porthal.cli.text import print, stdout, written
from porthal.model.sampling import Sampling
from porthal.model.tokens import Bytes, Vocabulary

if TYPE_CHECKING:
    from porthal.model.generate import Generated
    from porthal.model.glm5 import Glm5

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
            with written():
                out.write(fresh.encode("utf-8", "surrogateescape"))
                out.flush()


def result(model: Glm5, made: Generated, sampling: Sampling, prompt: str, text: str, seconds: float) -> dict[str, Any]:
    """What `generate --json` prints."""
    chip, [tokens] = model.ops.backend, made.tokens
    return {
        "backend": str(chip),
        "place": chip.place,
        "dtype": model.dtype,
        "sampling": asdict(sampling),
        "prompt": prompt,
        "text": text,
        "tokens": tokens,
        "seconds": seconds,
        "forwards": made.forwards,
        "tokens_per_forward": len(tokens) / made.forwards if made.forwards else 0.0,
    }


def summary(found: Mapping[str, Any]) -> str:
    """The same in one line."""
    count, sampling = len(found["tokens"]), Sampling(**found["sampling"])
    drawn = f", {sampling}" if sampling.temperature else ""
    return (
        f"{found['backend']} ({found['place']}), {found['dtype']}{drawn}: {count} tokens in {found['seconds']:.2f} s "
        f"({count / found['seconds']:.1f} per second), {found['tokens_per_forward']:.2f} per forward of the main model"
    )
