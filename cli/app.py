"""The commands. Each imports what it needs when it runs, so that help and `backends` are fast."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from porthal.cli import text
from porthal.cli.bench import bench
from porthal.cli.check import check
from porthal.cli.compare import compare
from porthal.cli.coverage import coverage
from porthal.cli.doctor import doctor
from porthal.cli.explain import explain
from porthal.cli.export import export
from porthal.cli.group import App, Commands
from porthal.cli.options import (
    LOWEST,
    WORKERS,
    BackendOption,
    Base,
    CacheOption,
    Dtype,
    DtypeOption,
    EmulatedFlag,
    JsonFlag,
    LevelOption,
    MemoryOption,
    ModelOption,
    PeersOption,
    PropertiesOption,
    SampleFlag,
    SeedOption,
    SizesOption,
    TemperatureOption,
    TimeoutOption,
    TopKOption,
    TopPOption,
    WorkersOption,
    dtype_of,
)
from porthal.cli.plan import plan
from porthal.cli.quantize import quantize
from porthal.cli.ranks import ExpertsOption, LayoutOption, launch, ranked
from porthal.cli.selecting import among, named, tested
from porthal.cli.stopping import stoppable
from porthal.cli.text import print
from porthal.cli.tune import tune
from porthal.cli.verify import verify
from porthal.hal import UsageError

app = App(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Port GLM-5 to a chip: say how the chip computes each operator, prove that it computes what is specified, run it.",
)

app.command()(bench)


def _version(wanted: bool) -> None:
    if wanted:
        import porthal

        print(f"porthal {porthal.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def start(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="print it")] = False,
) -> None:
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())
        raise typer.Exit(2)


@app.command()
def backends(json: JsonFlag = False) -> None:
    """Which backends can run here, and why the others cannot. No vendor's package is imported."""
    from porthal.hal import Unavailable, probe, probes, selected

    found = probes()
    chosen, rule = selected()
    name = chosen.partition(":")[0]
    if json:
        rows = [{"name": n, "state": f.state, "why": f.why, "selected": n == name} for n, f in found.items()]
        text.as_json({"backends": rows, "selected": chosen, "rule": rule})
    else:
        text.table(["", "backend", "state", "why"], [["*" * (n == name), n, f.state, f.why] for n, f in found.items()])
    if probe(name).state != "available":  # an unknown name is refused by probe itself
        raise Unavailable(f"backend {chosen!r} ({rule}) is {found[name].state}: {found[name].why}")
    if not json:
        print(f"* is selected: {chosen} ({rule})")


app.command()(explain)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(show_default=False, help="the text to continue")],
    model: ModelOption = None,
    max_new: Annotated[int, typer.Option("--max-new", metavar="N", help="tokens at most")] = 64,
    temperature: TemperatureOption = None,
    top_p: TopPOption = None,
    top_k: TopKOption = None,
    sample: SampleFlag = False,
    speculative: Annotated[int, typer.Option(metavar="N", help="MTP drafts per step; greedy text stays the same")] = 0,
    dtype: DtypeOption = Dtype.float32,
    seed: Annotated[int, typer.Option(help="of sampling")] = 0,
    backend: BackendOption = None,
    emulated: EmulatedFlag = False,
    layout: LayoutOption = None,
    experts: ExpertsOption = None,
    stats: Annotated[bool, typer.Option("--stats", help="say how many rows each expert and each rank was given")] = False,
    cache_scheme: CacheOption = None,
    json: JsonFlag = False,
) -> int:
    """Continue a text. Stdout is exactly the text, prompt included, so that two backends can be compared with diff.

    Exit code 1 where logits are NaN or infinite: the text ends before them.
    """
    from porthal.cli.experts import Chosen
    from porthal.cli.stream import Printer, result, summary
    from porthal.hal import NotFinite, bind, create, running
    from porthal.model.generate import generate as run
    from porthal.model.load import DEMO, load
    from porthal.model.tokens import tokenizer

    directory = model or DEMO
    config = _config(directory, cache_scheme)
    words = tokenizer(directory, config.vocab_size)
    heat = temperature if sample or temperature is not None else 0.0
    if heat is None and not config.sampling.temperature:
        raise UsageError(f"--sample: {directory} has no generation_config.json with do_sample: give --temperature instead")
    sampling = config.sampling.but(heat, top_p, top_k)  # refused before anything large is read
    ids, failed = words.encode(prompt), ""
    chosen = create(named(backend, emulated), emulated)
    count, caches = Chosen(chosen, config.n_routed_experts), cache_scheme or ()
    with running(chosen), ranked(chosen, layout, experts) as part:
        bare = bind(backend=chosen, wrap=[count] * stats)
        loaded = load(directory, bare, dtype=dtype.value, layout=part, caches=caches)
        drawn = {**asdict(sampling), "eos": list(config.eos_token_id), "seed": seed, "caches": list(caches)}
        others = bool(part and part.agreed(prompt=prompt, max_new=max_new, speculative=speculative, **drawn))
        printer = Printer(words, prompt, without=config.eos_token_id, silent=json or others)
        start = time.perf_counter()
        try:
            made = run(
                loaded,
                [ids],
                max_new,
                temperature=heat,
                top_p=top_p,
                top_k=top_k,
                speculative=speculative,
                seed=seed,
                on_tokens=lambda _, ids: printer.add(ids),
            )
        except NotFinite as error:
            made, failed = error.done, str(error)
        seconds = time.perf_counter() - start
        given = count.told(part) if stats else {}
    printer.close()
    if others:
        return int(bool(failed))
    found = result(loaded, made, sampling, prompt, printer.text, seconds) | given
    text.as_json(found) if json else text.note("\n".join([summary(found), *count.words(given)]))
    count = len(found["tokens"])
    if failed:
        text.note(f"porthal: {failed}")
    elif count < max_new and len(ids) + count == config.max_position_embeddings:
        text.note(f"the context of {config.max_position_embeddings} tokens is full: {count} of {max_new} new tokens were made")
    return int(bool(failed))


@app.command()
def trace(
    model: ModelOption = None,
    rows: Annotated[int, typer.Option(metavar="N", help="query rows of the step")] = 1,
    context: Annotated[int | None, typer.Option(metavar="N", help="positions at its end; default: as --rows")] = None,
    dtype: DtypeOption = Dtype.float32,
    expand: Annotated[bool, typer.Option("--expand", help="composites as the ops they are made of")] = False,
    cache_scheme: CacheOption = None,
    json: JsonFlag = False,
    flashinfer: Annotated[
        Path | None, typer.Option("--flashinfer", metavar="DIR", help="write what FlashInfer-Bench has definitions for there")
    ] = None,
) -> None:
    """Every op of one step with its shapes: what a chip must be able to do for this model."""
    from porthal.hal.calls import distinct
    from porthal.model.load import trace as calls_of

    config = _config(model, cache_scheme)
    ends = rows if context is None else context
    if not 1 <= rows <= ends <= config.max_position_embeddings:
        raise UsageError(
            f"--rows is {rows} and --context {ends}: expected 1 <= rows <= context <= {config.max_position_embeddings}"
        )
    made = calls_of(config, dtype.value, rows, ends, expand)
    calls = distinct(made)
    if flashinfer:
        from porthal.bench.flashinfer import write

        left = write(flashinfer, made, ends)
        text.note(f"porthal: left out, since FlashInfer-Bench has no definition of the kind: {', '.join(left)}")
    if json:
        text.as_json([asdict(c) for c in calls])
        return
    shown = [
        [str(c.count), c.op, c.signature(), c.attributes_text(), text.si(c.flops, "FLOP"), text.si(c.bytes, "B")]
        for c in calls
    ]
    text.table(["count", "op", "operands -> results", "attributes", "work", "traffic"], shown)
    flops, traffic = sum(c.count * c.flops for c in calls), sum(c.count * c.bytes for c in calls)
    print(
        f"{sum(c.count for c in calls)} calls, {len(calls)} distinct, of {len({c.op for c in calls})} ops: "
        f"{text.si(flops, 'FLOP')}, {text.si(traffic, 'B')} (rows {rows}, context {ends})"
    )


@app.command()
def conform(
    backend: BackendOption = None,
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="only this one; may be repeated")] = None,
    level: LevelOption = LOWEST,
    dtype: Annotated[
        list[Dtype] | None,
        typer.Option("--dtype", parser=dtype_of, metavar="DTYPE", help="only this one; may be repeated"),
    ] = None,
    emulated: EmulatedFlag = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the report as JSON")] = None,
    html: Annotated[Path | None, typer.Option("--html", metavar="FILE", help="write the report as one page")] = None,
    junit: Annotated[Path | None, typer.Option("--junit", metavar="FILE", help="write the report as JUnit XML")] = None,
    profile: Annotated[
        str, typer.Option("--profile", metavar="USE", help="ops of a use: inference, moe, distributed; default: of one device")
    ] = "",
    verify_waivers: Annotated[
        bool, typer.Option("--verify-waivers", help="fail on waivers that expired, match nothing, or match what passes")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option("--resume", metavar="FILE", help="keep each verdict there, and continue from those kept")
    ] = None,
    workers: WorkersOption = WORKERS,
    timeout: TimeoutOption = 300,
    memory: MemoryOption = 3,
    properties: PropertiesOption = 0,
    seed: SeedOption = 0,
    model: SizesOption = None,
    peers: PeersOption = None,
    self_test: Annotated[bool, typer.Option("--self-test", hidden=True)] = False,
) -> int:
    """Prove that a backend computes what is specified. Exit code 1 when a case failed, 2 when none ran on an own kernel."""
    from porthal.cli.scaffold import next_step
    from porthal.conformance import run
    from porthal.conformance.report.reached import members, shared
    from porthal.conformance.runner.workers import Bounds
    from porthal.hal import create

    if self_test:
        raise UsageError("--self-test is a command now: run porthal self-test")
    journal = resume or (json and json.with_name(f"{json.name}.journal"))
    text.check_writable(json=json, html=html, junit=junit, resume=journal)
    asked = members(profile) if profile else op
    if profile and op:
        raise UsageError(f"--profile {profile} with --op {op[0]}: give only one of the two")
    name, known = tested(backend, emulated), among(peers)

    def advice() -> str:
        kept = journal and journal.exists()
        return f"run the same command with --resume {journal} to continue" if kept else "nothing is kept without --resume FILE"

    with stoppable(advice), text.progress() as advance:
        report = run(
            name,
            ops=asked or None,
            level=level.value,
            dtypes=[d.value for d in dtype] if dtype else None,
            progress=lambda done, of, result, left: advance(done, of, result.op, left),
            emulated=emulated,
            bounds=Bounds(workers, timeout, memory),
            journal=journal,
            resume=resume is not None,
            properties=properties,
            seed=seed,
            peers=known,
            **({"model": str(model)} if model else {}),
        )
    if asked:
        report = replace(report, profile=profile or shared(asked))
    text.drawn(report.table())
    if json:
        text.save(json, report.json())
    if html:
        text.save(html, report.html())
    if junit:
        text.save(junit, report.junit())
    if journal and not resume:  # the report has all of it
        journal.unlink()
    if report.exit_code == 2 and not (known and known.python(name)):
        print(next_step(create(name, emulated), [row.op for row in report.rows]))
    wrong = report.wrong_waivers() if verify_waivers else []
    for sentence in wrong[len(report.expired_waivers()) :]:  # which the table says
        print(f"waivers.toml: {sentence}")
    return 1 if wrong else int(report.exit_code)


app.command()(coverage)


@app.command("self-test")
def self_test(
    op: Annotated[list[str] | None, typer.Option("--op", metavar="OP", help="only this one; may be repeated")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="a part, in a few minutes")] = False,
    by_others: Annotated[bool, typer.Option("--outside", help="defects by authors who had seen no case, by level")] = False,
    workers: WorkersOption = WORKERS,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write every trial as JSON")] = None,
) -> int:
    """Test the suite itself: planted defects it must find, honest kernels it must accept. Needs PyTorch.

    Exit code 1 when a defect escaped or an honest kernel was accused. With --quick, --outside keeps to the bring-up level.
    """
    from porthal.hal import Unavailable, probe

    text.check_writable(json=json)
    if probe("torch").state != "available":
        raise Unavailable("the self-test needs PyTorch, as it plants defects in the torch kernels: pip install torch")
    from porthal.conformance.selftest import outside, run

    with stoppable(), text.progress() as advance:
        score = (outside if by_others else run).self_test(op or [], quick, advance, workers)
    text.drawn(score.table())
    if json:
        text.save(json, score.json())
    return score.exit_code


app.command()(check)
app.command()(export)
app.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})(launch)
app.command()(plan)
app.command()(quantize)
app.command()(compare)
app.command()(verify)
app.command()(doctor)
app.command()(tune)


@app.command()
def replay(
    call: Annotated[
        str, typer.Argument(show_default=False, metavar="CALL", help="a case's token, or the path of a saved .npz")
    ],
    backend: BackendOption = None,
    level: LevelOption = LOWEST,
    emulated: EmulatedFlag = False,
    save: Annotated[
        Path | None,
        typer.Option("--save", metavar="DIR", help="also write its arrays as case.npz, with a script that needs no porthal"),
    ] = None,
    timeout: TimeoutOption = 300,
    memory: MemoryOption = 3,
    peers: PeersOption = None,
) -> int:
    """Run exactly one call again and say what came out. Exit code 1 when it failed, 2 when it was not tested."""
    from porthal.conformance import replay as replayed
    from porthal.conformance.judgement import saved
    from porthal.conformance.runner.workers import Bounds

    name, known = tested(backend, emulated), among(peers)
    if Path(call).is_dir():
        raise UsageError(f"{call} is a folder: give the file in it, {Path(call) / 'case.npz'}")
    inputs = saved.call(call) if save or call.endswith(".npz") else None
    came: list[Any] = []
    heard = {"returned": came.append} if save else {}
    with stoppable():
        bounds = Bounds(1, timeout, memory)
        result = replayed(inputs or call, name, level.value, emulated=emulated, bounds=bounds, peers=known, **heard)
    print(result.explain())
    if save and result.verdict == "NOT_JUDGED":
        text.note("nothing is saved, because the call cannot be judged")
    elif save and inputs:
        where = name + " (emulated device)" * emulated
        got = came[-1] if came else {}
        inputs = getattr(got, "inputs", inputs)  # of a program, the step that failed
        text.note_saved(saved.save(inputs, got, save, "case", where, level.value), bool(got))
    return 1 if result.failed else 0 if result.tested or result.verdict == "WAIVED" else 2


@app.command()
def diff(
    model: ModelOption = None,
    backend: BackendOption = None,
    dtype: DtypeOption = Dtype.float32,
    prompt: Annotated[str, typer.Option("--text", metavar="TEXT", help="what is read; default: a piece of code")] = "",
    tokens: Annotated[int, typer.Option(metavar="N", help="how many of its tokens, at most")] = 64,
    decode: Annotated[int, typer.Option(metavar="N", help="steps of one token after them")] = 4,
    cache_scheme: CacheOption = None,
    emulated: EmulatedFlag = False,
    json: Annotated[Path | None, typer.Option("--json", metavar="FILE", help="write the report as JSON")] = None,
    save: Annotated[Path | None, typer.Option("--save", metavar="DIR", help="write the call at fault, to replay")] = None,
) -> int:
    """Run a model beside the reference and name the first op and layer at fault. Exit code 1 when there is one.

    Where the backend captures graphs, a decode step is captured once as well, and replayed beside the step that is called.
    """
    from porthal.conformance.diff.captured import replays
    from porthal.conformance.diff.model import TEXT, lockstep
    from porthal.hal import bind, create, running
    from porthal.model.load import DEMO
    from porthal.model.tokens import check_count, tokenizer

    text.check_writable(json=json)
    directory, config = model or DEMO, _config(model, cache_scheme)
    ids = tokenizer(directory, config.vocab_size).encode(prompt or TEXT)[: check_count("--tokens", tokens, 1)]
    steps = check_count("--decode", decode, 0)
    if len(ids) + steps > config.max_position_embeddings:
        raise UsageError(
            f"--decode is {steps} after {len(ids)} tokens: expected no more than {config.max_position_embeddings} together"
        )
    made = create(named(backend, emulated), emulated)
    with running(made):
        given = ids, directory, dtype.value, steps, cache_scheme or ()
        found = lockstep(bind(backend=made), *given)
        captured = replays(bind(backend=made), *given) if made.captures and steps else None
    text.drawn(found.table())
    if json:
        text.save(json, found.json())
    if captured:
        print(captured.sentence)
    if save and found.at_fault and (file := found.save(save)):
        text.note_saved(file, bool(found.at_fault.returned))
    return found.exit_code or int(bool(captured and not captured.ok))


@app.command("new-backend")
def new_backend(
    name: Annotated[str, typer.Argument(show_default=False, help="of the chip, as in --backend NAME")],
    base: Annotated[Base, typer.Option("--base", help="whose kernels it inherits; torch where the chip has a PyTorch")] = (
        Base.reference
    ),
    folder: Annotated[Path | None, typer.Option("--dir", metavar="PATH", help="default: porthal-NAME")] = None,
) -> None:
    """Write a plugin package for a chip: it installs, inherits every op and has a stub for each."""
    from porthal.cli.scaffold import new_backend as write

    made = write(name, base.value, folder)
    print(f"{made}: a backend with 0 ops of its own\n\npip install -e {made}\nporthal conform --backend {name}")


def _config(model: Path | None, caches: list[str] | None = None) -> Any:
    from porthal.model.config import Config
    from porthal.model.load import DEMO

    return Config.read(model or DEMO).cached(caches or ())
