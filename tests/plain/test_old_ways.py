"""What was written for an earlier porthal works, or is answered with one sentence."""

from __future__ import annotations

import importlib
import re

import pytest

from porthal.cli.app import app
from porthal.conformance.cases.case import Case
from porthal.hal import UsageError, contracts


def command(capsys, *args):
    with pytest.raises(SystemExit) as left:
        app(list(args), prog_name="porthal")
    return left.value.code or 0, *capsys.readouterr()


@pytest.mark.parametrize("args", [["--self-test"], ["--self-test", "--op", "add"]])
def test_a_flag_that_became_a_command_names_it(capsys, args):
    sentence = "porthal: --self-test is a command now: run porthal self-test\n"
    assert command(capsys, "conform", *args) == (2, "", sentence)


def test_the_public_names_of_conformance_are_where_they_were():
    conformance = importlib.import_module("porthal.conformance")
    assert [callable(getattr(conformance, name)) for name in ("run", "replay", "Report", "Case")] == [True] * 4
    assert importlib.import_module("porthal.conformance.pytest_plugin").pytest_addoption
    with pytest.raises(AttributeError, match=r"^porthal\.conformance has no 'check': it offers Case, Report, replay, run$"):
        conformance.check  # noqa: B018


def test_a_name_that_was_a_function_is_no_module_in_its_place():
    """`from porthal.conformance.runner import run` would otherwise give a module, which fails when it is called."""
    with pytest.raises(ImportError, match="cannot import name 'run'"):
        from porthal.conformance.runner import run  # noqa: F401


# -- tokens ------------------------------------------------------------------------------------------------------------

TOKEN = "rms_norm,T=2,H=4,x:bf16,0"


def test_a_token_of_before_is_the_same_case():
    case = Case.from_token(TOKEN)
    assert (case.token, case.stream) == (TOKEN, TOKEN)


def test_a_token_of_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(contracts()["rms_norm"], "version", 2)
    with pytest.raises(UsageError, match=r"is for version 1 of rms_norm, expected version 2: run conform again"):
        Case.from_token(TOKEN)
    newer = Case.from_token(TOKEN.replace("rms_norm", "rms_norm@2"))
    assert newer.token == "rms_norm@2,T=2,H=4,x:bf16,0"
    assert newer.stream == TOKEN  # the same values
    for wrong in ("3", "0", "x", "2.0", "-1"):
        with pytest.raises(UsageError, match=f"is for version {re.escape(wrong)} of rms_norm"):
            Case.from_token(TOKEN.replace("rms_norm", f"rms_norm@{wrong}"))


@pytest.mark.parametrize(
    ("token", "why"),
    [
        ("rms_norm,T=2,H=4,x%fp8_block,0", "x is under scheme fp8_block, expected no scheme"),
        ("linear,T=2,K=4,N=4,w%int4,0", "w is under scheme int4, expected one of int8_channel, fp8_block, "),
        ("linear,T=2,K=4,N=4,w%,0", "w is under scheme empty, expected one of int8_channel, fp8_block, "),
        ("kv_write,T=2,A=4,B=4,pages%int8_keys,batch=mixed,block_size=64,view=beyond,0", "schemes do not go with beyond"),
    ],
)
def test_a_scheme_that_does_not_apply_is_named(token, why):
    with pytest.raises(UsageError, match=f"^case token '{token}' does not describe a call of .*: {why}"):
        Case.from_token(token)