"""Graph capture of an emulated device: `torch.npu.NPUGraph` and `torch.npu.graph`, and their like of other vendors.

As on a chip, a capture computes nothing: what it wrote is undone, and its results hold garbage before the first replay.
A replay issues the same operations on the same memory, with the numbers of the host as they were. Nothing in a capture
may be copied between host and device, wait for a value, or clone a tensor (vllm-ascend#9736).
"""

import copy
import math
import types
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map, tree_map_only

from porthal.backends.torch.emulation.device import copies, on_host

_NOT_COMPUTED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_capturing: list["Graph"] = []


class _NoClones(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__name__", "") == "clone" and not args[0].is_cpu:
            raise RuntimeError("a tensor is cloned while a graph is captured: write into memory that was there before.")
        return func(*args, **kwargs or {})


class _Recorder(TorchDispatchMode):
    """The operations on the device; those that make tensors with these, which a replay writes again."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []
        self.made: list[torch.Tensor] = []
        self.before: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.inside = False  # an operator, which is recorded as a whole

    def call(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """A vendor's function that is no operator of PyTorch, as one. What it is given that is no tensor, a schedule say, is in
        each replay as it was before."""
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        self.before += [(x, on_host(x).clone()) for x in given if not x.is_cpu]
        frozen = tree_map(_frozen, (args, kwargs))
        self.inside = True
        try:
            out = function(*args, **kwargs)
        finally:
            self.inside = False
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.made += [x for x in made if not any(x is y for y in given)]

        def again(*held: Any, **named: Any) -> Any:
            fresh_args, fresh_kwargs = tree_map(_fresh, (held, named))
            return function(*fresh_args, **fresh_kwargs)

        self.calls.append((again, *frozen, made))
        return out

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        schema = func._schema
        given = {**dict(zip((a.name for a in schema.arguments), args)), **kwargs}
        written = [given[a.name] for a in schema.arguments if a.alias_info and a.alias_info.is_write and a.name in given]
        for x in (x for x in tree_leaves(written) if isinstance(x, torch.Tensor) and not x.is_cpu):
            self.before.append((x, on_host(x).clone()))
        outer, self.inside = self.inside, True
        try:
            out = func(*args, **kwargs)
        finally:
            self.inside = outer
        aliases = [r.alias_info for r in schema.returns if r.alias_info]
        new = [] if aliases else [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        device = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor) and not x.is_cpu]
        if device and not self.inside and all(alias.is_write for alias in aliases):  # views stay what they are
            self.made += new
            if func.overloadpacket.__name__ not in _NOT_COMPUTED:
                frozen = tree_map_only(torch.Tensor, lambda x: x.clone() if x.is_cpu else x, (args, kwargs))
                self.calls.append((func, *frozen, new))
        return out

    def undo(self) -> None:
        for x, held in reversed(self.before):
            on_host(x).copy_(held)
        for x in self.made:
            if not x.is_cpu:
                on_host(x).fill_(math.nan if x.is_floating_point() else 85)


def _fresh(x: Any) -> Any:
    return x if isinstance(x, torch.Tensor) else copy.copy(x)


def _frozen(x: Any) -> Any:
    """As it is now: numbers of the host do not change any more."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_cpu else _fresh(x)


def recorded(function: Callable[..., Any]) -> Callable[..., Any]:
    """A vendor's function, which a capture records."""

    def run(*args: Any, **kwargs: Any) -> Any:
        recorder = _capturing[0]._recorder if _capturing else None
        return function(*args, **kwargs) if recorder is None or recorder.inside else recorder.call(function, args, kwargs)

    return run


class Graph:
    """One captured graph."""

    def __init__(self) -> None:
        self._recorder: _Recorder | None = None
        self._clones = _NoClones()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        if _capturing:
            raise RuntimeError("a graph is captured already: one capture at a time.")
        if capture_error_mode not in ("global", "thread_local", "relaxed"):
            raise RuntimeError(f"capture_error_mode is {capture_error_mode!r}: expected global, thread_local or relaxed.")
        _capturing.append(self)
        copies.refused = "copied between host and device while a graph is captured, or read by the host: not supported."
        self._recorder = _Recorder()
        self._clones.__enter__()
        self._recorder.__enter__()

    def capture_end(self) -> None:
        if self._recorder is None or self not in _capturing:
            raise RuntimeError("this graph is not being captured.")
        self._recorder.__exit__(None, None, None)
        self._clones.__exit__(None, None, None)
        _capturing.remove(self)
        copies.refused = ""
        self._recorder.undo()

    @torch.no_grad()
    def replay(self) -> None:
        if self._recorder is None or self in _capturing:
            raise RuntimeError("this graph has not been captured: nothing can be replayed.")
        for function, args, kwargs, held in self._recorder.calls:
            made = [x for x in tree_leaves(function(*args, **kwargs)) if isinstance(x, torch.Tensor)]
            for old, new in zip(held, made):
                old.copy_(new)

    def reset(self) -> None:
        self._recorder = None

    def pool(self) -> tuple[int, int]:
        return (0, id(self))


class graph:
    """The context manager around a capture, with the names of torch_npu 2.13.0."""

    def __init__(self, npu_graph: Graph, pool: Any = None, stream: Any = None, auto_dispatch_capture: bool = False,
                 capture_error_mode: str = "global") -> None:
        self.graph, self.pool, self.mode = npu_graph, pool, capture_error_mode
        if auto_dispatch_capture:
            raise RuntimeError("auto_dispatch_capture is True: this emulation captures what is issued and updates nothing.")

    def __enter__(self) -> None:
        self.graph.capture_begin(self.pool, self.mode)

    def __exit__(self, *error: object) -> None:
        self.graph.capture_end()


def add_graphs(module: types.ModuleType, name: str) -> None:
    """Give the vendor's module `torch.NAME` its graphs: NPUGraph, MUSAGraph, MLUGraph."""
    module.__dict__.update({f"{name.upper()}Graph": Graph, "graph": graph, "graph_pool_handle": lambda: (0, 0),
                            "is_current_stream_capturing": lambda: bool(_capturing)})
