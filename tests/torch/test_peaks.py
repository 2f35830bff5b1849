"""What a PyTorch device can do at most, and time by its own events."""

import torch

from porthal.backends.torch import peaks
from porthal.hal import create


class Event:
    """Of a device on which a second passes between any two events."""

    recorded = 0

    def __init__(self, enable_timing):
        assert enable_timing
        self.at, self.over = 0, False

    def record(self):
        Event.recorded += 1
        self.at = Event.recorded

    def synchronize(self):
        self.over = True

    def elapsed_time(self, end):
        assert end.over, "the device may still be at work"
        return 1000.0 * (end.at - self.at)


def test_a_device_is_timed_by_its_events(monkeypatch):
    monkeypatch.setattr(torch.cuda, "Event", Event)
    done = []
    assert peaks.by_events(torch.device("cuda"), lambda: done.append(Event.recorded)) == 1.0
    assert done == [1]  # between the two
    backend = create("torch")
    backend.device = "cuda"
    assert backend.timed(lambda: None, lambda: 1 / 0) == 1.0  # the host's clock is not read


def test_products_and_copies_tell_their_work():
    found = peaks.peaks(torch.device("cpu"))
    assert set(found) == {"fp32", "bf16", "fp16", "dram", "copy"}
    assert found["fp32"].work() == 2 * 1024**3
    assert found["dram"] is not found["copy"] and found["copy"].work() == 2 * 2**28
    assert create("torch").timed(found["fp32"].work) > 0
