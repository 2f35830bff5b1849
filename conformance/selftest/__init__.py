"""The suite is tested: planted defects it must find, honest variants it must accept, both at one level.

`defects()` is the registry; `run.self_test()` scores it; `porthal self-test` prints the score.
"""

from porthal.conformance.selftest.planting import Defect, defects

__all__ = ["Defect", "defects"]
