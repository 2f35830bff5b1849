"""What a report says of an emulated device: own cases exist, and none of them looks like hardware's."""

import re

import pytest

from porthal.conformance import run
from porthal.hal import create


@pytest.fixture(scope="module")
def report():
    return run(create("ascend:0"), ["sparse_mla", "rms_norm", "argmax"])


def test_own_kernels_are_reached_in_the_dims_they_claim(report):
    own = [r for r in report.results if r.op == "sparse_mla" and r.status == "own"]
    assert own and all(",C=512,R=64," in r.token for r in own)
    assert report.failures == []
    assert str(report.levels["sparse_mla"]) == str(report.levels["rms_norm"]) == "bring-up"
    assert str(report.levels["argmax"]) == "none (inherited)"


def test_page_and_table_name_the_place_and_the_command(report):
    assert report.place == "emulated device" and report.overall.endswith("(emulated device)")
    page = report.html()
    assert "Nothing here ran on the chip" in page and 'class="chip own"' not in page
    assert re.search(r'class="chip elsewhere" title="\d+ passed by own kernels \(emulated device\)"', page)
    command = report.replay(report.results[0])
    assert command == f"porthal replay '{report.results[0].token}' --backend ascend:0 --emulated"
