"""A backend in lockstep with the reference: no op exceeds its budget, and its choices are honest."""

import pytest

from porthal import bind
from porthal.conformance.diff.model import lockstep
from porthal.model import profile
from porthal.model.config import Config
from tests.oracles.tiny import PROMPT


class Honest:
    """What every right backend shows; a subclass names the backend. A prompt is longer than index_topk; tests/proof has 40."""

    backend: str
    tokens = 24

    @pytest.mark.parametrize(("kind", "dtype"), [("glm5", "float32"), ("glm52", "bfloat16")])
    def test_no_op_exceeds_its_budget(self, checkpoints, kind, dtype):
        directory = checkpoints[kind]
        theirs = bind(self.backend, profile=profile(Config.read(directory), dtype), overrides={}, fallback="error")
        found = lockstep(theirs, PROMPT[: self.tokens], directory, dtype, decode=1)
        assert found.at_fault is None, found.sentence
        assert sum(layer.wrong for layer in found.layers) == 0
        assert 0 < max(layer.accumulated for layer in found.layers) < {"float32": 1e-5, "bfloat16": 0.05}[dtype]
        if dtype == "float32":  # the tiny checkpoints' choices are further apart than float32 rounds
            assert found.first_flip is None
