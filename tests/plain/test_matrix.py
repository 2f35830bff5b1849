from porthal.backends.reference.backend import Reference
from porthal.conformance.report.matrix import Row, cells, rows, section
from porthal.hal import at_most, limits, one_of
from tests.matrix import assert_is_told


def test_the_support_matrix_tells_what_the_backend_states():
    assert_is_told("reference")


def test_of_an_op_all_own_kernels_are_told_and_what_else_there_is():
    class Chip(Reference):
        name = "chip"

        @limits(provider="lib.gemm", schemes=one_of("none", "int8_channel"), dtypes={"x": "float32"}, K=at_most(8))
        def linear(self, x, w, *, out="x"): ...

    found = {op: [row for row in rows(Chip()) if row.op == op] for op in ("linear", "rms_norm", "moe_layer")}
    assert found["linear"] == [
        Row("linear", "own", "lib.gemm", "int8_channel", "x: float32; K: at most 8"),
        Row("linear", "inherited from reference"),
    ]
    assert found["rms_norm"] == [Row("rms_norm", "inherited from reference")]
    assert found["moe_layer"] == [Row("moe_layer", "composed")]
    assert cells(found["linear"]) == {"linear": "own"} and cells(found["rms_norm"]) == {"rms_norm": "inherited"}
    apart = Row("linear", "own", "lib.bits", "only int8_channel"), Row("linear", "inherited from reference")
    assert cells(apart) == {"linear": "own int8_channel; inherited"} and cells([*apart, *found["linear"]]) == cells(apart)
    told = section("chip", "hardware", found["linear"])
    assert told.endswith("| linear | `lib.gemm` | int8_channel | x: float32; K: at most 8 |\n")
