"""Two thousand texts that are nearly case tokens: each is a case that can be built, or refused in one sentence."""

from hypothesis import HealthCheck, given, settings

from tests.tokens import is_case_or_refused, texts

PROVES = ("conformance/cases", "conformance/level.py", "ops", "hal/signature.py", "hal/contract.py", "tests/tokens.py")


@settings(max_examples=2000, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(texts())
def test_text_is_a_case_or_refused_in_one_sentence(text):
    assert is_case_or_refused(text)
