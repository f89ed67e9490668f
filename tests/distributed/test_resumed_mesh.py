"""SAEs that go on on another mesh, from the same global batches: read back bit for bit, and the same to the end."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from bigsae import CheckpointConfig, MeshConfig, SAEConfig, TrainConfig
from bigsae.parallel.mesh import build_mesh, share_latents
from bigsae.training.routing import Routing
from bigsae.training.saver import Saver
from bigsae.training.saving import resume, save_last
from bigsae.training.sharing import build_trainers
from bigsae.training.state import Run
from bigsae.training.variants import Variant, make_jobs
from tests.distributed.ranks import run_ranks
from tests.distributed.states import assert_close, assert_read_back, assert_same_state, state, waiting
from tests.distributed.test_fit import BATCH, DEAD, STEPS, transcoder_batches
from tests.distributed.test_mesh import ARCHITECTURES, OPTIM, Case

# Within an accumulated update, within a log's window, with dead latents, between two resamplings.
CUT = 9
BEGAN_WINDOW = 7
# They differ in what is kept of them: buffers, thresholds, a density, resampling, targets, the optimiser's dtypes.
CASES = {name: ARCHITECTURES[name] for name in ("topk", "gated", "jumprelu transcoder")}
CASES["int8, accumulation"] = (
    SAEConfig(architecture="batchtopk", k=4, **DEAD),
    replace(OPTIM, moments_dtype="int8", accumulation_steps=2),
    False,
)

ZERO = MeshConfig(latent=1, shard_optimizer=True)
WRITERS = {
    "2 x 1": (2, MeshConfig(latent=1)),
    "1 x 2": (2, MeshConfig(latent=2)),
    "2 x 1, moments sharded": (2, ZERO),
    "dealt to 2": (2, MeshConfig(distribute_saes=True)),
    "2 x 2, moments sharded": (4, MeshConfig(latent=2, shard_optimizer=True)),
}
READERS = {
    "1 x 1": (1, MeshConfig()),
    "1 x 2": (2, MeshConfig(latent=2)),
    "2 x 1, moments sharded": (2, ZERO),
    "dealt to 2": (2, MeshConfig(distribute_saes=True)),
    "2 x 2": (4, MeshConfig(latent=2)),
}


class NoData:
    """Harvest, buffer and rows of a run that is given its batches."""

    refilling = False

    def __init__(self) -> None:
        self.buffer = SimpleNamespace(
            tensors=dict,
            counters=lambda: {"num_unread": 0, "num_new": 0},
            empty_tensors=lambda counters: {},
            bytes_each=lambda: 0,
        )

    def load(self, *waiting: Any) -> None:
        pass

    def refill_from(self, parts: list[Any]) -> None:
        pass

    def state_dict(self) -> dict[str, Any]:
        return {"num_shards": 0, "cursors": []}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def begin(out: Path, mesh: MeshConfig, cases: dict[str, Case] = CASES) -> Run:
    config = TrainConfig(
        hookpoints=("x",),
        output_dir=str(out),
        tokens=STEPS * BATCH,
        batch_size_tokens=BATCH,
        mesh=mesh,
        checkpoint=CheckpointConfig(keep=0),
    )
    ranks = build_mesh()
    num_owners = ranks.num_ranks if mesh.distribute_saes else None
    ranks = share_latents(ranks, mesh.latent or 1)
    batch = transcoder_batches()[0]
    widths = {"x": batch[0].shape[1], "y": batch[1].shape[1]}
    jobs = []
    for predicts in widths:
        made = [
            Variant(name, sae, optim, seed=0)
            for name, (sae, optim, transcoder) in cases.items()
            if transcoder == (predicts == "y")
        ]
        jobs += make_jobs([("x", predicts)], made, widths, num_owners)
    data = cast(Any, NoData())
    trainers = build_trainers(config, ranks, jobs, widths, from_scratch=True)
    named = {job.name: job for job in jobs}
    stand_in = cast(Any, None)
    return Run(
        config, ranks, data, data, None, named, trainers, Routing(ranks, jobs), {}, stand_in, None, stand_in,
        Saver(out / "checkpoints", 0, ranks, 10, beside=True), stand_in, stand_in, clock={"time": 0.0},
    )  # fmt: skip


def train(run: Run, end: int) -> list[dict[str, dict[str, float]]]:
    """The global batches from the run's step to `end`, and what each SAE logs after each of them.

    Nothing is logged from BEGAN_WINDOW to CUT, so that a checkpoint has sums to keep.
    """
    batches, logged = transcoder_batches(), []
    if not run.initialised:
        first = [torch.cat(part) for part in zip(*batches[:2], strict=True)]
        for name, trainer in run.trainers.items():
            trainer.initialise(*for_job(run, name, first, trainer.mesh))
        run.initialised = True
    while run.step < end:
        x, y = (part.chunk(run.mesh.num_ranks)[run.mesh.rank] for part in batches[run.step])
        routed = run.routing({"x": x, "y": y})
        for name, trainer in run.trainers.items():
            job = run.jobs[name]
            trainer.train_step(routed["x"], routed["y"] if job.predicts == "y" else None)
        run.step += 1
        if not BEGAN_WINDOW <= run.step <= CUT:
            logged.append(run.of_all_ranks({n: t.read_metrics() for n, t in run.trainers.items()}))
    return logged


def for_job(run: Run, name: str, pair: list[Tensor], mesh: Any) -> list[Tensor]:
    """What of a global pair a rank of an SAE's mesh takes."""
    kept = pair if run.jobs[name].predicts == "y" else pair[:1]
    return [part.chunk(mesh.num_data)[mesh.data_rank] for part in kept]


def of_all(run: Run, what: Any) -> dict[str, Any]:
    return run.of_all_ranks({name: what(trainer) for name, trainer in run.trainers.items()})


def write(home: Path, writer: str) -> dict[str, Any]:
    """A checkpoint of step CUT, and what is in it."""
    run = begin(home / writer, WRITERS[writer][1])
    train(run, CUT)
    save_last(run)
    return {"state": of_all(run, state), "waiting": of_all(run, waiting)}


def go_on(home: Path, writer: str, reader: str) -> dict[str, Any]:
    """What is read of a checkpoint, and what comes of it."""
    run = begin(home / writer, READERS[reader][1])
    resume(run)
    assert run.step == CUT
    read = {"state": of_all(run, state), "waiting": of_all(run, waiting)}
    logged = train(run, STEPS)
    return {"read": read, "logged": logged, "end": of_all(run, state)}


# One launch of two ranks, then one of four, then one process: each reads all that was written until then.
PAIRS = [
    (writer, reader)
    for writer in WRITERS
    for reader in ("1 x 2", "1 x 1", "2 x 2")
    if WRITERS[writer][0] == 2 or READERS[reader][0] != 2
]
PAIRS += [("2 x 1", "2 x 1, moments sharded"), ("1 x 2", "dealt to 2")]


def on_ranks(home: Path, num_ranks: int) -> tuple[dict[str, Any], dict[tuple[str, str], Any]]:
    """What as many ranks write, and what they find in all that was written until then."""
    written = {name: write(home, name) for name, (ranks, _) in WRITERS.items() if ranks == num_ranks}
    pairs = [pair for pair in PAIRS if READERS[pair[1]][0] == num_ranks]
    return written, {pair: go_on(home, *pair) for pair in pairs}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("meshes")


@pytest.fixture(scope="module")
def runs(home) -> list[list[tuple[dict[str, Any], dict[tuple[str, str], Any]]]]:
    return [run_ranks(2, on_ranks, home, 2), run_ranks(4, on_ranks, home, 4), [on_ranks(home, 1)]]


@pytest.fixture(scope="module")
def written(runs) -> dict[str, Any]:
    return {name: kept for ranks in runs for name, kept in ranks[0][0].items()}


@pytest.fixture(scope="module")
def resumed(runs) -> dict[tuple[str, str], list[dict[str, Any]]]:
    """What each rank found, of each checkpoint on each mesh."""
    return {pair: [rank[1][pair] for rank in ranks] for ranks in runs for pair in ranks[0][1]}


@pytest.fixture(scope="module")
def straight(home) -> dict[str, Any]:
    """One process, uninterrupted."""
    run = begin(home / "straight", MeshConfig())
    logged = train(run, STEPS)
    return {"logged": logged[BEGAN_WINDOW - 1 :], "end": of_all(run, state)}


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_what_is_read_is_what_was_written(written, resumed, writer, reader):
    for rank in resumed[writer, reader]:
        assert_read_back(rank["read"]["state"], written[writer]["state"])
        assert_close(rank["read"]["waiting"], written[writer]["waiting"])


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_the_same_batches_give_the_same_losses_and_weights(straight, resumed, writer, reader):
    for rank in resumed[writer, reader]:
        assert len(rank["logged"]) == STEPS - CUT == len(straight["logged"])
        for ours, theirs in zip(rank["logged"], straight["logged"], strict=True):
            for name, metrics in ours.items():
                assert metrics == pytest.approx(theirs[name], rel=1e-5), name
        for name, ours in rank["end"].items():
            assert_same_state(ours, straight["end"][name])


def test_a_checkpoint_holds_what_a_cut_can_lose(written, straight):
    for name, kept in written["2 x 1"]["state"].items():
        read = written["2 x 1"]["waiting"][name]
        assert read["window"][1] == CUT - BEGAN_WINDOW + 1, name
        gathered = max(t.abs().max() for t in read["gathered"].values())
        assert (gathered > 0) == ("accumulation" in name), name
        assert kept["counters"]["firing"]["num_last_window_tokens"] > 0, name
        assert straight["end"][name]["firing"]["num_tokens_since_fired"].max() > 2 * BATCH, name
        if "int8" in name:
            assert kept["adam"]["W_dec/exp_avg_sq"].dtype == torch.uint8


@pytest.mark.parametrize("cut", [8, 9], ids=["after an update", "before one"])
def test_gradients_below_float32_wait_for_an_update(tmp_path, cut):
    """In one process, bit for bit: on several ranks each rounds the gradient of its own tokens."""
    optim = replace(OPTIM, grad_dtype="bfloat16", accumulation_steps=2)
    cases: dict[str, Case] = {"topk": (SAEConfig(k=4, **DEAD), optim, False)}
    straight = begin(tmp_path / "straight", MeshConfig(), cases)
    train(straight, 12)
    run = begin(tmp_path / "run", MeshConfig(), cases)
    train(run, cut)
    save_last(run)
    run = begin(tmp_path / "run", MeshConfig(), cases)
    resume(run)
    train(run, 12)
    assert_read_back(of_all(run, state), of_all(straight, state))
