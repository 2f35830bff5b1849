from tests.matrix import assert_is_told


def test_the_support_matrix_tells_what_the_backend_states():
    assert_is_told("cpu")
