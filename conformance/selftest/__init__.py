"""The suite is tested: planted defects it must find, honest variants it must accept, both at one level.

`planting.defects()` is the registry; `run.self_test()` scores it; `porthal self-test` prints the score.
"""
