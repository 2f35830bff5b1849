"""`pytest --porthal-backend=NAME` runs a backend's conformance cases as tests."""
