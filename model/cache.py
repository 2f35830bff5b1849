"""Which cache pages belong to which request, and the batch of each step. All on the host, in plain integers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from porthal.hal import Batch, UsageError
from porthal.model.attention import LayerCache


@dataclass
class Request:
    """The pages a request holds and how many of its positions are cached."""

    pages: list[int] = field(default_factory=list)
    length: int = 0


class Cache:
    """The pages of all layers (the MTP layer's last) behind one block table, and the free list."""

    def __init__(self, layers: list[LayerCache], n_blocks: int, block_size: int) -> None:
        self.layers = layers
        self.block_size = block_size
        self.free = list(range(n_blocks - 1, -1, -1))

    def new_request(self) -> Request:
        return Request()

    def release(self, request: Request) -> None:
        """Give a request's pages back."""
        self.free.extend(reversed(request.pages))
        request.pages, request.length = [], 0

    def truncate(self, request: Request, length: int) -> None:
        """Forget positions from `length` on (rejected drafts): nothing moves, the next step overwrites them."""
        request.length = length

    def step(self, requests: Sequence[Request], q_lens: Sequence[int]) -> Batch:
        """The batch that appends q_lens[r] positions to request r; takes pages as needed."""
        for request, new in zip(requests, q_lens):
            request.length += new
            while len(request.pages) * self.block_size < request.length:
                if not self.free:
                    raise UsageError(
                        f"the cache is full: a request of {request.length} tokens needs another page of "
                        f"{self.block_size}; make the cache larger or release requests"
                    )
                request.pages.append(self.free.pop())
        return self.view(requests, q_lens, [r.length for r in requests])

    def view(self, requests: Sequence[Request], q_lens: Sequence[int], kv_lens: Sequence[int]) -> Batch:
        """A batch over pages already held, ending at other lengths: the MTP layer's steps."""
        return Batch.build(q_lens, kv_lens, [r.pages for r in requests], self.block_size)
