"""What is timed is the call that was judged; what it has to do is counted from its own data."""

import os

import numpy as np
import pytest

from porthal.bench.call import Call, apart, evicting
from porthal.bench.measured import Measured
from porthal.bench.report import compared, shortened, time_text
from porthal.bench.roofline import Work
from porthal.conformance.cases.case import Case
from porthal.conformance.cases.copies import build
from porthal.conformance.execution.bindings import Bindings
from porthal.hal import Pages, create

PAGED = (
    "indexer_topk,T=6,G=8,D=128,k=16,scale=0.1,iq:fp32,batch=6*1/70,block_size=16,distinct=2,0",
    "sparse_mla,T=6,N=2,C=512,R=64,k=16,scale=0.0625,q_latent:fp32,batch=2*3/70,block_size=16,distinct=2,0",
)


@pytest.fixture(scope="module")
def bindings():
    return Bindings(create("reference"))


@pytest.mark.parametrize("token", PAGED)
def test_requests_with_pages_of_their_own_make_the_same_call(token, bindings):
    shared = build(Case.from_token(token))
    own = apart(shared)
    held = own.batch.block_table[own.batch.block_table >= 0]
    assert len(np.unique(held)) == len(held) > len(np.unique(shared.batch.block_table))
    for r in range(own.batch.R):
        for name, value in own.operands.items():
            if isinstance(value, Pages):
                for field in value.native:
                    mine, theirs = value.native[field][own.batch.slots_of(r)], shared.operands[name].native[field]
                    assert np.array_equal(mine, theirs[shared.batch.slots_of(r)])
    assert Call(Case.from_token(token), bindings).judged.verdict == "PASS"


def test_a_cache_that_is_written_stays_as_it_is():
    written = build(Case.from_token("kv_write,T=3,A=512,B=64,first:fp32,batch=3*1/70,block_size=16,distinct=2,0"))
    assert apart(written) is written


def test_a_call_is_repeated_on_the_operands_that_were_judged(bindings):
    call = Call(Case.from_token("add,T=3,H=96,a:fp32,0"), bindings)
    assert call.judged.verdict == "PASS" and call.judged.kernel == "own" and call.other is not None
    first = call.run()
    call.repeat(3)()
    assert np.array_equal(call.run(), first) and np.array_equal(call.other(), first)
    cells = ([c.cell_contents for c in f.__closure__ if isinstance(c.cell_contents, list)] for f in (call.run, call.other))
    assert not any(np.shares_memory(a, b) for a, b in zip(*(operands for [operands] in cells)))  # else the caches would be warm


def test_a_call_that_no_kernel_takes_has_no_work():
    flagged = Call(Case.from_token("add,T=3,H=96,a:fp32,via=nobody,0"), Bindings(create("reference")))
    assert flagged.judged.verdict != "PASS" and flagged.judged.work is None


def test_caches_are_emptied_by_a_copy_of_twice_what_they_hold():
    backend = create("reference")
    cores, written = sorted(os.sched_getaffinity(0)), []

    def write(into, value):
        written.append((value.nbytes, os.sched_getaffinity(0)))
        return into

    backend.write = write
    evicting(backend, 2.0**27)
    assert written == [(2**28, set(cores))]
    evicting(backend, 0, cores)
    assert written[1:] == [(2**27, set(cores)), *((2**22, {core}) for core in cores)]  # each core's own cache as well
    assert os.sched_getaffinity(0) == set(cores)


# -- work ----------------------------------------------------------------------------------------------------------------


def work(token):
    return Work.of(build(Case.from_token(token)))


def test_work_is_what_the_contract_states():
    found = work("linear,T=4,K=64,N=32,x:bf16,0")
    assert found == Work(2 * 4 * 64 * 32, 2 * (4 * 64 + 64 * 32 + 4 * 32), 2 * 4 * 32, "bfloat16")


def test_a_row_that_selects_all_it_sees_needs_no_scores():
    few = work("indexer_topk,T=2,G=8,D=128,k=16,scale=0.1,iq:fp32,batch=2*1/16,block_size=16,0")
    more = work("indexer_topk,T=2,G=8,D=128,k=16,scale=0.1,iq:fp32,batch=2*1/17,block_size=16,0")
    assert few.flops == 0 and more.flops == 2 * 2 * 17 * 8 * 129


def test_attention_counts_the_keys_that_there_are():
    short = work("sparse_mla,T=2,N=2,C=512,R=64,k=16,scale=0.0625,q_latent:fp32,batch=2*1/8,block_size=16,0")
    long = work("sparse_mla,T=2,N=2,C=512,R=64,k=16,scale=0.0625,q_latent:fp32,batch=2*1/80,block_size=16,0")
    assert (short.flops, long.flops) == (2 * 2 * 2 * 8 * 1088, 2 * 2 * 2 * 16 * 1088)


def test_a_row_whose_index_is_none_is_not_read():
    inputs = build(Case.from_token("check_finite,T=17,V=256,logits:fp32,0"))
    chosen = np.count_nonzero(inputs.operands["ids"] >= 0)
    assert 0 < chosen < 17 and Work.of(inputs).bytes == chosen * 256 * 4


def test_only_experts_that_were_chosen_are_read():
    one = work("moe_experts,T=1,H=96,I=128,E=17,k=2,x:fp32,0")
    assert one.bytes == 2 * 96 * 4 + 2 * 3 * 96 * 128 * 4
    counted = build(Case.from_token("grouped_gemm,M=64,K=96,N=7,E=33,x:fp32,0"))
    used = np.count_nonzero(counted.operands["counts"])
    assert 0 < used < 33
    assert Work.of(counted).bytes == 4 * (64 * (96 + 7) + used * 96 * 7)


# -- words ---------------------------------------------------------------------------------------------------------------


def test_how_numbers_are_written():
    assert [time_text(t) for t in (2.5, 1.234e-3, 5.6e-6, 7e-9)] == ["2.5 s", "1.23 ms", "5.6 µs", "7 ns"]
    assert shortened("T=8,G=32,scale=0.015,iq:bf16,batch=8*1/8192,block_size=64,distinct=4,0") == "T=8 G=32 iq:bf16 8*1/8192"


def test_a_noisy_time_is_not_compared():
    quiet = Measured("add,0", "a", "cold", "PASS", work=Work(1, 1, 1, "float32"), samples=(1.0,) * 9)
    noisy = Measured("add,0", "b", "cold", "PASS", work=Work(1, 1, 1, "float32"), samples=(1.0, 2.0, 3.0, 4.0, 5.0))
    assert compared(quiet, quiet) == "1x (1 to 1)"
    assert compared(quiet, noisy) == compared(noisy, quiet) == compared(quiet, None) == ""
