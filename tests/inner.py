"""pytest in a process of its own: porthal's plugin is there, others that take long to import are not."""

from __future__ import annotations

from importlib.metadata import entry_points

LEFT_OUT = ("hypothesispytest", "benchmark", "anyio", "cacheprovider")


def options(*more: str) -> list[str]:
    """The command line of an inner pytest; where porthal is not installed its plugin is named."""
    installed = any(e.name == "porthal" for e in entry_points(group="pytest11"))
    plugin = [] if installed else ["-p", "porthal.conformance.pytest_plugin"]
    return ["-q", *(word for name in LEFT_OUT for word in ("-p", f"no:{name}")), *plugin, *more]
