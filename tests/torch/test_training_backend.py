"""What the demo checkpoint is trained with computes the model that inference runs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from porthal.hal import bind  # noqa: E402
from porthal.hal.discovery import backend_class  # noqa: E402
from porthal.model import Config, Glm5, load  # noqa: E402
from porthal.model.checkpoint import Checkpoint  # noqa: E402
from porthal.model.demo.train import Optimiser, Tensors, Training, whole_texts  # noqa: E402
from tests.oracles import tiny  # noqa: E402

TOLERANCE = 1e-4  # logits have a standard deviation near 1
SPARSE = len(tiny.PROMPT)
DENSE = tiny.CONFIG["index_topk"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.build(tmp_path_factory.mktemp("glm5"))


def texts(length: int) -> np.ndarray:
    """int32 [2, length + 1]: beginnings of the tiny prompt and of itself moved, neither with a close choice."""
    first = np.resize(tiny.PROMPT, length + 1)
    return np.stack([first, (first + 7) % tiny.CONFIG["vocab_size"]]).astype(np.int32)


def build(directory: Path, length: int, sparse: bool) -> tuple[Training, Glm5, np.ndarray]:
    backend = Training()
    backend.indexer = backend.sparse = sparse
    model = Glm5(Config.read(directory), Checkpoint(directory), bind(backend=backend))
    return backend, model, texts(length)


@pytest.fixture(params=[(DENSE, False), (SPARSE, True)], ids=["dense", "sparse"])
def trained(request: pytest.FixtureRequest, directory: Path) -> tuple[Training, Glm5, np.ndarray]:
    return build(directory, *request.param)


def forward(model: Glm5, rows: np.ndarray) -> tuple:
    """Main logits and those of the MTP layer's first step, [R, T, V] each, as the training takes them."""
    length = rows.shape[1] - 1
    batch, cache = whole_texts(model.ops, len(rows), length), model.new_cache([1])
    ids = [torch.from_numpy(np.ascontiguousarray(rows[:, i : i + length]).flatten()) for i in (0, 1)]
    hidden = model.hidden(ids[0], batch, cache)
    drafted, _ = model.mtp.hidden(ids[1], model.embed, hidden, batch, cache.layers[-1], None)
    return tuple(model.logits(h).unflatten(0, (len(rows), length)) for h in (hidden, drafted))


def test_logits_equal_inference(trained, directory: Path) -> None:
    _, model, rows = trained
    inference = load(directory, bind("torch"))
    main, drafted = (x.detach().numpy() for x in forward(model, rows))
    for row, got, got_drafted in zip(rows, main, drafted):
        assert np.abs(got - inference.forward(row[:-1].tolist())).max() < TOLERANCE
        cache = inference.new_cache([128])
        batch = inference.ops.plan(cache.step([cache.new_request()], [len(row) - 1]))
        hidden = inference.hidden(inference.ops.from_numpy(row[:-1]), batch, cache)
        following = inference.ops.from_numpy(row[1:])
        g, _ = inference.mtp.hidden(following, inference.embed, hidden, batch, cache.layers[-1], None)
        assert np.abs(got_drafted - inference.ops.to_numpy(inference.logits(g))).max() < TOLERANCE


def test_selection_matters(trained) -> None:
    """A dense pass over the same rows differs where, and only where, more is visible than is selected."""
    backend, model, rows = trained
    chosen = forward(model, rows)[0]
    backend.sparse = False
    difference = (forward(model, rows)[0] - chosen).abs().amax((0, 2))
    assert difference[:DENSE].max() < TOLERANCE
    assert (difference[DENSE:] > 0.1).any() == (rows.shape[1] > DENSE + 1)


class Inference(backend_class("torch")):
    """The inherited kernels, with their parameters on record."""

    name = "inference"

    def __init__(self) -> None:
        super().__init__()
        self.parameters: list[torch.Tensor] = []

    def from_numpy(self, x: np.ndarray) -> torch.Tensor:
        tensor = super().from_numpy(x)
        if tensor.is_floating_point():
            self.parameters.append(tensor.requires_grad_())
        return tensor


def test_gradients_equal_those_through_the_cache(trained, directory: Path) -> None:
    backend, model, rows = trained
    main, drafted = forward(model, rows)
    (main.square().mean() + drafted.square().mean()).backward()
    paged = Inference()
    model = Glm5(Config.read(directory), Checkpoint(directory), bind(backend=paged))
    cache, length = model.new_cache([256]), rows.shape[1] - 1
    batch = model.ops.plan(cache.step([cache.new_request() for _ in rows], [length] * len(rows)))
    hidden = model.hidden(torch.from_numpy(rows[:, :-1].flatten()), batch, cache)
    following = torch.from_numpy(rows[:, 1:].flatten())
    g, _ = model.mtp.hidden(following, model.embed, hidden, batch, cache.layers[-1], None)
    (model.logits(hidden).square().mean() + model.logits(g).square().mean()).backward()
    router_biases = {id(block.mlp.bias) for block in [*model.blocks[1:], model.mtp.block]}
    compared = 0
    for ours, theirs in zip(backend.parameters, paged.parameters):
        if theirs.grad is None or id(theirs) in router_biases:
            assert id(theirs) in router_biases or ours.grad is None
            continue
        assert float((ours.grad - theirs.grad).norm()) <= 1e-4 * float(theirs.grad.norm())
        compared += 1
    assert compared > 60


def test_indexer_learns_from_its_own_loss_alone(directory: Path) -> None:
    backend, model, rows = build(directory, SPARSE, True)
    forward(model, rows)
    assert len(backend.losses) == 5  # 4 layers and the MTP layer
    indexer, attention = model.blocks[0].attention.indexer, model.blocks[0].attention
    assert all(x.item() > 0 for x in backend.losses)
    sum(backend.losses).backward()
    assert all(p.grad.any() for p in (indexer.wq_b.native, indexer.wk.native, indexer.w_head.native, indexer.k_norm))
    assert attention.q_a.native.grad is None
    assert model.embed.native.grad is None


def test_router_bias_follows_the_load() -> None:
    backend = Training()
    logits = torch.tensor([[3.0, 2.0, 0.0, 0.0]] * 6)
    bias = backend.from_numpy(np.zeros(4, np.float32))
    backend.moe_route(logits, bias, k=2, scale=1.0)
    assert bias.grad.tolist() == [3.0, 3.0, -3.0, -3.0]


def test_masters_are_the_published_tensors(directory: Path, tmp_path: Path) -> None:
    """A step moves every tensor under its published name as it moved the binding's; what is written is what ran."""
    config, source = Config.read(directory), Tensors()
    backend = Training()
    model = Glm5(config, source, bind(backend=backend), "bfloat16")
    optimiser = Optimiser(config, source, backend.parameters)
    main, drafted = forward(model, texts(SPARSE))
    (main.square().mean() + drafted.square().mean()).backward()
    before = {name: x.copy() for name, x in source.items()}
    optimiser.step(1.0)
    optimiser.write(tmp_path)
    (tmp_path / "config.json").write_text((directory / "config.json").read_text())
    after = optimiser.named(optimiser.masters)
    assert all((after[n] != before[n]).any() == ("indexer" not in n) for n in before)
    again = Training()
    Glm5(config, Checkpoint(tmp_path), bind(backend=again), "bfloat16")
    assert all(torch.equal(a, b) for a, b in zip(backend.parameters, again.parameters))


def test_ties_go_to_the_lowest_position() -> None:
    """With all scores equal, row t attends to the first min(k, t + 1) positions."""
    backend = Training()
    backend.indexer = backend.sparse = True
    batch = whole_texts(bind(backend=backend), 1, 8)
    iq, w, keys = torch.zeros(1, 8, 2, 4), torch.ones(1, 8, 2), torch.zeros(1, 8, 4)
    _, hidden = backend.indexer_topk(iq, w, keys, batch, k=3, scale=1.0)
    assert [row.nonzero()[:, 0].tolist() for row in ~hidden[0]] == [list(range(min(3, t + 1))) for t in range(8)]
