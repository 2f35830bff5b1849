"""Golden values kept on disk: the same as computed, never another call's, never a broken file's, never without bound."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from porthal.conformance import replay
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.cases.inputs import Inputs
from porthal.conformance.cases.plan import cases
from porthal.conformance.judgement import golden_cache as cache
from porthal.conformance.judgement.golden import Golden
from porthal.hal import UsageError, Weight, contracts


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PORTHAL_CACHE", str(tmp_path / "golden"))
    monkeypatch.setattr(cache, "_memory", cache._Memory())
    monkeypatch.setattr(cache, "IN_MEMORY_EACH", -1)  # all on disk
    monkeypatch.setattr(cache, "WORTH", 0.0)
    return tmp_path / "golden"


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A line for each evaluation of a reference."""
    made: list[str] = []
    call = Golden.call

    def counted(self: Golden, function: Any, *extra: Any, **operands: Any) -> Any:
        made.append(self.contract.name)
        return call(self, function, *extra, **operands)

    monkeypatch.setattr(Golden, "call", counted)
    return made


def inputs(op: str) -> Inputs:
    return build(next(c for c in cases(contracts()[op]) if ("T", 7) in c.dims and not c.fault))


def same(one: Any, other: Any) -> bool:
    return one.keys() == other.keys() and all(
        np.array_equal(getattr(one[k], part), getattr(other[k], part), equal_nan=True)
        for k in one
        for part in ("value", "sigma", "most")
    )


@pytest.mark.parametrize("op", ["rms_norm", "silu_mul", "mla_prolog"])
def test_warm_is_cold(folder: Path, calls: list[str], op: str) -> None:
    cold = Golden(inputs(op)).spread()
    assert calls
    calls.clear()
    warm = Golden(inputs(op)).spread()
    assert calls == [] and same(cold, warm)


def test_scores_and_results_are_kept_apart(folder: Path, calls: list[str]) -> None:
    golden = Golden(inputs("moe_route"))
    scores, weights = golden.scores(), golden.spread()
    calls.clear()
    again = Golden(inputs("moe_route"))
    assert np.array_equal(again.scores().value, scores.value) and same(again.spread(), weights) and calls == []


def test_other_operands_under_the_same_token_have_their_own_entry(folder: Path, calls: list[str]) -> None:
    given = inputs("linear")
    clean = Golden(given).spread()["y"]
    poisoned = dict(given.operands, x=given.operands["x"].copy())
    poisoned["x"][0] = np.nan
    weight = given.operands["w"]
    doubled = dict(given.operands, w=Weight(weight.spec, weight.native * 2))
    assert np.isnan(Golden(replace(given, operands=poisoned)).spread()["y"].value[0]).all()
    assert np.array_equal(Golden(replace(given, operands=doubled)).spread()["y"].value, 2 * clean.value)
    calls.clear()
    assert np.array_equal(Golden(given).spread()["y"].value, clean.value) and calls == []


def test_the_key_follows_the_names_of_operands() -> None:
    """The same bytes mean another call as the operand beside."""
    given = inputs("add")
    a = given.operands["a"]
    calls = {"a": a, "b": None}, {"a": None, "b": a}
    assert len({cache.key(replace(given, operands=operands), "results") for operands in calls}) == 2


def test_the_key_follows_attributes_and_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    given = inputs("rms_norm")
    keys = [cache.key(given, "results"), cache.key(given, "scores")]
    keys.append(cache.key(replace(given, attrs={"eps": 1.0}), "results"))
    monkeypatch.setattr(cache, "_sources", lambda contract: "an edited reference")
    keys.append(cache.key(given, "results"))
    assert len(set(keys)) == 4
    monkeypatch.undo()
    assert cache.key(inputs("rms_norm"), "results") == keys[0]


def test_an_edited_reference_has_other_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    contract = contracts()["rms_norm"]
    cache._sources.cache_clear()
    before = cache._sources(contract)
    cache._sources.cache_clear()
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda self: read(self) + b"#" * (self.name == "rms_norm.py"))
    after = cache._sources(contract)
    cache._sources.cache_clear()
    assert before != after


@pytest.mark.parametrize("damage", ["cut", "flipped", "emptied", "replaced"])
def test_a_broken_entry_is_computed_again(folder: Path, calls: list[str], damage: str) -> None:
    cold = Golden(inputs("rms_norm")).spread()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(
        {
            "cut": content[:middle],
            "flipped": content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :],
            "emptied": b"",
            "replaced": b"nonsense",
        }[damage]
    )
    calls.clear()
    assert same(Golden(inputs("rms_norm")).spread(), cold) and calls
    calls.clear()
    assert same(Golden(inputs("rms_norm")).spread(), cold) and calls == []  # and mended


def test_no_changed_byte_of_an_entry_is_trusted(folder: Path, calls: list[str]) -> None:
    given = build(Case.from_token("rms_norm,T=1,H=7,x:bf16,0"))
    cold = Golden(given).spread()
    (file,) = folder.iterdir()
    content = file.read_bytes()
    for at in (*range(0, len(content), 9), *range(content.index(b"PK\1\2"), len(content))):
        file.write_bytes(content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :])
        assert same(Golden(given).spread(), cold), at
    for end in range(0, len(content), 25):
        file.write_bytes(content[:end])
        assert same(Golden(given).spread(), cold), end
    np.savez(file)
    assert same(Golden(given).spread(), cold)


def test_an_entry_is_whole_or_not_there(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is written beside, under a name that nobody reads."""

    def interrupted(out: Any, **arrays: Any) -> None:
        out.write(b"PK")
        assert [path.suffix for path in folder.iterdir()] == [".part"]
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Golden(inputs("rms_norm")).spread()
    assert list(folder.iterdir()) == []


def test_what_is_used_least_goes_first(folder: Path) -> None:
    folder.mkdir()
    for age, name in enumerate(("new", "old", "older")):
        (folder / f"{name}.npz").write_bytes(bytes(100))
        os.utime(folder / f"{name}.npz", (1000 - age, 1000 - age))
    cache.trim(250)
    assert sorted(p.name for p in folder.iterdir()) == ["new.npz", "old.npz"]
    cache.trim(0)
    assert list(folder.iterdir()) == []


def test_a_folder_that_cannot_be_written_only_costs_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("PORTHAL_CACHE", "/proc/porthal/golden")
    monkeypatch.setattr(cache, "WORTH", 0.0)
    monkeypatch.setattr(cache, "_memory", cache._Memory())  # in which other tests may have put it
    assert Golden(inputs("rms_norm")).spread()["y"].value.shape == (7, 96)
    assert "nothing is kept for the next run: /proc/porthal/golden cannot be made: No such file or directory" in caplog.text


def test_where_entries_lie(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PORTHAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/a")
    assert cache.folder() == Path("/a/porthal/golden")
    monkeypatch.setenv("PORTHAL_CACHE", "/b")
    assert cache.folder() == Path("/b")


@pytest.mark.parametrize("name", ["file", "file/golden"])
def test_a_file_is_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("PORTHAL_CACHE", str(tmp_path / name))
    with pytest.raises(UsageError, match=r"^PORTHAL_CACHE is '.*', which is or lies in a file: expected a folder, "):
        cache.folder()
    with pytest.raises(UsageError, match=r"^PORTHAL_CACHE is "):  # before the first case
        replay("add,T=1,H=7,0", "reference")


def test_what_is_small_stays_in_memory_and_the_oldest_goes(
    monkeypatch: pytest.MonkeyPatch, folder: Path, calls: list[str]
) -> None:
    monkeypatch.setattr(cache, "IN_MEMORY_EACH", 2**20)
    monkeypatch.setattr(cache, "IN_MEMORY", 2**20)
    for _ in range(2):
        Golden(inputs("rms_norm")).spread()
    first = list(calls)
    kept = dict(cache._memory)
    assert kept and not any(array.flags.writeable for arrays in kept.values() for array in arrays.values())
    monkeypatch.setattr(cache, "IN_MEMORY", 1)
    Golden(inputs("layer_norm")).spread()
    assert len(calls) > len(first) > 0
    assert not kept.keys() & cache._memory.keys() and len(cache._memory) == 1
