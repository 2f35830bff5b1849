"""How tokens are drawn: by default, by generation_config.json, and by what is given."""

from __future__ import annotations

from dataclasses import dataclass

from porthal.hal import UsageError
from porthal.hal.spans import TEMPERATURE
from porthal.model.tokens import check_count, check_number

HOTTEST = TEMPERATURE.high


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn: see `porthal.ops.sample`; temperature 0 is greedy, top_k 0 keeps all."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0

    def but(self, temperature: float | None, top_p: float | None, top_k: int | None) -> Sampling:
        """This with what is given in its place; UsageError for a bad number, or where it would have no effect."""
        heat = self.temperature if temperature is None else check_number("temperature", temperature, HOTTEST)
        if heat not in TEMPERATURE:
            raise UsageError(f"temperature is {heat!r}: expected {TEMPERATURE}, which chips can divide by")
        given = {"top_p": top_p, "top_k": top_k}
        for name, value in given.items():
            if value is not None and heat == 0:
                raise UsageError(f"{name} is {value!r} at temperature 0, which is greedy: give a temperature above 0 as well")
        return Sampling(
            heat,
            self.top_p if top_p is None else check_number("top_p", top_p, 1),
            self.top_k if top_k is None else check_count("top_k", top_k, 0),
        )

    def __str__(self) -> str:
        kept = f", top-p {self.top_p:g}" * (self.top_p < 1) + f", top-k {self.top_k}" * (self.top_k > 0)
        return f"temperature {self.temperature:g}{kept}"


GREEDY = Sampling()
