"""How fast is a backend, against the limit of the machine and against the others?

workloads   which calls, and how many of each one step makes
roofline    the least time that a call can take
worker      a process in which one backend is judged and timed
run         all of them side by side, in turns
report      what came out, in pytest-benchmark's format
"""

if not __name__.startswith("porthal."):
    raise ImportError(f"import porthal.{__name__} instead of {__name__}: two names make two registries.")
