"""What is proved seldom stays proved: every file of tests/proof has a result, of the sources as they are now."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.proofs import ROOT, digest, entry, objection, proofs, proves, record, results

FILES = proofs()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_proof_has_a_result_of_these_sources(file):
    assert objection(file.name, digest(file), results()) == ""


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_what_a_proof_names_exists(file):
    assert proves(file), f"{file.name} does not say in PROVES what it proves"
    assert [name for name in proves(file) if not (ROOT / name).exists()] == []


def test_no_result_is_left_of_a_file_that_is_gone():
    assert FILES
    assert sorted(results().keys() - {file.name for file in FILES}) == []


def test_a_proof_without_a_result_or_tests_and_a_stale_one_are_refused(tmp_path):
    kept = {"test_old.py": entry("a", 3, 1.5), "test_empty.py": entry("b", 0, 0.0)}
    assert objection("test_old.py", "a", kept) == ""
    assert objection("test_new.py", "a", kept) == "tests/proof/test_new.py has no result: run make proof"
    assert objection("test_old.py", "b", kept).startswith("tests/proof/test_old.py is stale, ")
    assert objection("test_empty.py", "b", kept) == "tests/proof/test_empty.py passed 0 tests: run make proof"
    file = tmp_path / "results.json"
    record(kept, file)
    record({"test_empty.py": None, "test_new.py": entry("c", 1, 0.4)}, file)
    assert {name: line["hash"] for name, line in results(file).items()} == {"test_new.py": "c", "test_old.py": "a"}


def test_a_hash_changes_with_each_source_and_its_name(tmp_path):
    proof, folder = tmp_path / "test_x.py", tmp_path / "ops"
    proof.write_text('PROVES = ("ops", "level.py")\n')
    (folder / "__pycache__").mkdir(parents=True)
    (folder / "a.py").write_text("1")
    (tmp_path / "level.py").write_text("")
    seen = {first := digest(proof, tmp_path)}

    def changed(file: Path, text: str) -> str:
        file.write_text(text)
        return digest(proof, tmp_path)

    assert changed(folder / "__pycache__" / "a.pyc", "x") == first
    seen |= {changed(folder / "a.py", "2"), changed(folder / "b.py", ""), changed(tmp_path / "level.py", "3")}
    (folder / "b.py").rename(folder / "c.py")
    seen |= {digest(proof, tmp_path), changed(proof, proof.read_text() + "# and more\n")}
    assert len(seen) == 6
