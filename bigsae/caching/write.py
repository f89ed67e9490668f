"""From text to activations on disk: the function behind `bigsae.cache_activations`."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import datasets
import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar

from bigsae.caching.folder import MADE, check_disk, check_folder, check_same, identity, with_saved_rows
from bigsae.caching.options import CacheConfig, check_options
from bigsae.caching.push import push_cache
from bigsae.caching.shards import (
    ShardBuffer,
    Written,
    drop_after,
    finish,
    read_progress,
    write_progress,
)
from bigsae.checks import check
from bigsae.config import UserError
from bigsae.data import tokens
from bigsae.data.cache_index import HELDOUT, INDEX, Index, to_json, with_shards
from bigsae.data.text import open_text
from bigsae.hub.dataset_repository import FLAG, open_dataset_repository
from bigsae.hub.files import write_json
from bigsae.hub.repository import check_repo_id
from bigsae.lm.activations import Extractor
from bigsae.lm.hookpoints import locate, resolve_hookpoints
from bigsae.lm.loading import download_lm, load_lm, meta_model, process_groups, resolve_layout
from bigsae.lm.micro_batch import activation_elements, with_rows
from bigsae.parallel import collectives
from bigsae.parallel.launch import join_launch
from bigsae.parallel.mesh import Mesh, build_mesh
from bigsae.parallel.nodes import errors_shared, first_on_node, limit_waits, lost_peers_named
from bigsae.progress import Progress
from bigsae.training.run import Preempted
from bigsae.training.signals import StopSignal

logger = logging.getLogger("bigsae")

_ROWS_IN_VAIN = 4096
# What of --lm and --data is told to those who train from the cache. No kwargs: they may hold a token of the Hub.
_LM = ("revision", "dtype", "autocast", "compile", "micro_batch_rows")
_NOT_DATA = ("epochs", "cached_order")


def write_activations(config: CacheConfig) -> Path:
    """Write the activations that `config` describes; every rank of the launch calls this. Returns the folder.

    Raises UserError for what the user can mend, Preempted where a signal ended it (what all ranks had written stays:
    `resume=True` goes on from there), and PeerLost where another rank is gone.
    """
    folder = Path(config.output_dir)
    with StopSignal() as stop, lost_peers_named(config.timeout):
        join_launch(config.timeout)
        mesh = build_mesh()
        limit_waits((mesh.world, mesh.control), config.timeout)
        if not mesh.is_main:
            datasets.disable_progress_bars()
            disable_progress_bar()
        check_options(config)
        if config.push_to_hub:
            check_repo_id(config.push_to_hub, FLAG)
        config = with_saved_rows(config, folder)
        check(config.as_run(mesh.num_ranks), mesh.num_ranks)
        if (folder / INDEX).exists():
            check_same(config, folder)
            logger.info("%s is finished: nothing to write", folder)
        else:
            _Writing(config, mesh, stop).run()
    if config.push_to_hub and mesh.is_main:  # the other ranks are done, and need not wait for hours
        push_cache(folder, config.push_to_hub, private=config.private)
    return folder


@dataclass
class _Source:
    """Where rows and activations come from."""

    rows: tokens.TokenRows
    heldout: Tensor
    """[n, ctx_len] rows that are kept aside, a multiple of the ranks."""
    kept: Callable[[Tensor], Tensor]
    extract: Extractor


class _Writing:
    """One cache in the making, on this rank."""

    def __init__(self, config: CacheConfig, mesh: Mesh, stop: StopSignal):
        self.config, self.mesh, self.stop = config, mesh, stop
        self.as_run = config.as_run(mesh.num_ranks)
        self.folder = Path(config.output_dir)
        self.rows_in_vain = 0

    def run(self) -> None:
        """Find what is wrong, load the model, write what is not there yet, and the index."""
        config, mesh = self.config, self.mesh
        check_folder(config, self.folder)
        layout = resolve_layout(config.lm, mesh.num_ranks, mesh.num_local_ranks)
        with first_on_node(mesh):
            meta, lm_config = meta_model(config.model, config.lm)
        sites = locate(meta, resolve_hookpoints(config.hookpoints, meta))
        self.widths = {site.name: site.d_in for site in sites}
        elements, most = activation_elements(meta, sites), config.shard_tokens
        lm = with_rows(config.lm, config.ctx_len, elements, most, mesh.device.type)
        self.config = config = replace(config, lm=lm)
        self.micro_rows = lm.chosen_rows
        self.num_forwards = max(1, config.shard_tokens // (self.micro_rows * config.ctx_len))
        """Forwards of a shard."""
        done = self._take_over()
        with errors_shared(mesh):
            if mesh.is_main:  # all ranks write to one file system
                self._check_disk(
                    sum(w.shard.num_activations for part in done.values() for w in part if w.shard)
                )
        with errors_shared(mesh):
            with first_on_node(mesh):
                text = open_text(
                    config.dataset, self.as_run.data, config.model, config.lm, lm_config, config.ctx_len
                )
            rows = text.rows(config.seed, mesh.rank, mesh.num_ranks)
            rows.begin()
            heldout = text.heldout(config.seed, config.heldout_rows, mesh.num_ranks, "--heldout-rows")
        try:
            with errors_shared(mesh):
                if config.push_to_hub and mesh.is_main:
                    open_dataset_repository(config.push_to_hub, config.private)
            with first_on_node(mesh):
                download_lm(config.model, config.lm, meta)
            model = load_lm(config.model, config.lm, meta, layout, mesh.device, sites)
            limit_waits(process_groups(model), config.timeout)
            logger.info("%d ranks on %s, language model %s, %d rows of %d tokens a forward", mesh.num_ranks,
                        mesh.device.type, layout, self.micro_rows, config.ctx_len)  # fmt: skip
            if mesh.is_main:
                write_json(self.folder / MADE, identity(config))
            self.source = _Source(rows, heldout, text.kept, Extractor(model, sites))
            done = self._write(done)
        finally:
            rows.close()
        if mesh.is_main:
            self._finish(done, getattr(lm_config, "_commit_hash", None), text.prepend_bos)
        collectives.barrier(mesh.control)

    # -- before anything is written ------------------------------------------------------------------------------

    def _take_over(self) -> dict[int, list[Written]]:
        """What all ranks of a run before have finished; the rest of it is removed."""
        done: dict[int, list[Written]] = {}
        with errors_shared(self.mesh):
            if self.mesh.is_main and self.config.resume:
                done = read_progress(self.folder)
                drop_after(self.folder, max(done, default=HELDOUT - 1))
        done = collectives.objects(done, self.mesh.control)[0]
        if done:
            logger.info("resumed %s after %d shards of each rank", self.folder, max(done) + 1)
        elif self.config.resume:
            logger.warning("--resume: %s holds no finished shards, starting afresh", self.folder)
        return done

    def _check_disk(self, num_done: int) -> None:
        """Tell what the cache will need, and refuse it where that is not there."""
        config = self.config
        most = config.tokens + self.mesh.num_ranks * self.micro_rows * config.ctx_len
        if config.data.heldout_documents:
            most += config.heldout_rows * config.ctx_len
        itemsize = getattr(torch, config.dtype).itemsize
        # Ids, what is kept and starts: 5 bytes a token and a few a row, of which about half may be kept.
        per_token = sum(self.widths.values()) * itemsize + 12
        needed = max(0, most - num_done) * per_token
        shard = self.num_forwards * self.micro_rows * config.ctx_len * per_token
        check_disk(config, len(self.widths), needed, shard)

    # -- writing -------------------------------------------------------------------------------------------------

    def _write(self, done: dict[int, list[Written]]) -> dict[int, list[Written]]:
        """Places after those that are `done`, until there are enough tokens or no more rows. Returns all."""
        config, mesh = self.config, self.mesh
        if len(self.source.heldout) and HELDOUT not in done:
            done[HELDOUT] = self._write_heldout()
        trained = [written for place, part in done.items() if place != HELDOUT for written in part]
        total = sum(written.shard.num_activations for written in trained if written.shard)
        place = max(done, default=HELDOUT) + 1
        if place:
            states = [written.data for written in done[place - 1] if written.data is not None]
            self.source.rows.load_state_dict(tokens.merge_states(states))
        buffer = self._buffer(self.num_forwards * self.micro_rows)
        ended = total >= config.tokens
        first = total
        with Progress("writing", config.tokens, "activations", total, shown=mesh.is_main) as progress:

            def show(done: int) -> None:
                speed = (done - first) / progress.seconds
                progress.reach(min(done, config.tokens), f"{speed:,.0f} tokens/s")

            while not ended:
                total, ended = self._gather(buffer, total, show)
                written = self._write_place(buffer, place, self.source.rows.state_dict())
                if any(one.shard for one in written):
                    done[place] = written
                    place += 1
        return done

    def _buffer(self, num_rows: int) -> ShardBuffer:
        dtype = getattr(torch, self.config.dtype)
        return ShardBuffer(num_rows, self.config.ctx_len, self.widths, dtype)

    def _gather(self, buffer: ShardBuffer, total: int, show: Callable[[int], None]) -> tuple[int, bool]:
        """Forwards of one shard. Returns the activations so far, of all ranks, and whether these are all.

        What one rank finds wrong with its own data all raise, so that the first of them has it to print.
        """
        finite = torch.ones(len(self.widths), dtype=torch.bool, device=self.mesh.device)
        ended = False
        for _ in range(self.num_forwards):
            before = buffer.num_activations
            chosen, message = None, ""
            try:
                chosen = self._next_rows()
            except UserError as error:
                message = str(error)
            if chosen is not None:
                self._harvest(*chosen, buffer, finite)
            else:  # a sharded model needs all ranks for each forward
                self.source.extract(torch.zeros(1, self.config.ctx_len, dtype=torch.int64))
            goes_on = chosen is not None and len(chosen[0]) == self.micro_rows
            counts = torch.tensor(
                [buffer.num_activations - before, goes_on, self.stop.number is not None, bool(message)]
            )
            num_new, num_going_on, num_stopping, wrong = collectives.sum_(counts, self.mesh.control).tolist()
            if wrong:
                raise UserError(collectives.first_text(message, self.mesh.control))
            if num_stopping:
                logger.info("told to stop: what all ranks have written stays, --resume goes on from there")
                raise Preempted(self.stop.number)
            total += num_new
            show(total)
            ended = total >= self.config.tokens or not num_going_on
            if ended:
                break
        self._refuse_non_finite(finite)
        return total, ended

    def _next_rows(self) -> tuple[Tensor, Tensor] | None:
        """Rows [rows, ctx_len], and which of their activations are kept [rows, ctx_len]; None: no more."""
        rows = list(itertools.islice(self.source.rows, self.micro_rows))
        return self._with_kept(torch.stack(rows)) if rows else None

    def _with_kept(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        kept = self.source.kept(rows)
        self.rows_in_vain = 0 if kept.any() else self.rows_in_vain + len(rows)
        if self.rows_in_vain >= _ROWS_IN_VAIN:
            raise UserError(
                f"{self.rows_in_vain} rows in a row hold special tokens alone: look at --dataset, or keep them with "
                "--data.no-drop-special-tokens"
            )
        return rows, kept

    def _harvest(self, rows: Tensor, kept: Tensor, buffer: ShardBuffer, finite: Tensor) -> None:
        """Run the LM on `rows` [rows, ctx_len], and put what is `kept` of them into the buffer."""
        chosen = kept.flatten().nonzero().squeeze(1)
        taken = {}
        for i, (name, values) in enumerate(self.source.extract(rows).items()):
            activations = values.flatten(0, 1)[chosen.to(values.device)].to(getattr(torch, self.config.dtype))
            finite[i] &= torch.isfinite(activations).all()
            taken[name] = activations.cpu()
        buffer.add(rows, kept, taken)

    def _refuse_non_finite(self, finite: Tensor) -> None:
        broken = collectives.max_ints([int(not ok) for ok in finite.tolist()], self.mesh.control)
        for name, is_broken in zip(self.widths, broken, strict=True):
            if is_broken:
                raise UserError(
                    f"non-finite activations at {name}: the model overflows in this data type (try --lm.dtype "
                    "bfloat16 or float32) or its weights are broken"
                )

    def _write_heldout(self) -> list[Written]:
        self.source.kept(
            self.source.heldout
        )  # all ranks have them all: what is wrong with one is raised by each
        own = self.source.heldout[self.mesh.rank :: self.mesh.num_ranks]
        buffer = self._buffer(len(own))
        finite = torch.ones(len(self.widths), dtype=torch.bool, device=self.mesh.device)
        for part in own.split(self.micro_rows):
            self._harvest(*self._with_kept(part), buffer, finite)
        self._refuse_non_finite(finite)
        return self._write_place(buffer, HELDOUT, None)

    def _write_place(self, buffer: ShardBuffer, place: int, data: dict[str, Any] | None) -> list[Written]:
        """Write this rank's shard of `place`; once all ranks have, it counts. Returns those of all ranks."""
        mesh = self.mesh
        any_rows = collectives.max_ints([buffer.num_rows], mesh.control)[0]
        written = Written(place, mesh.rank, mesh.num_ranks, None, data)
        if any_rows:
            with errors_shared(mesh):
                try:
                    written = replace(written, shard=buffer.write(self.folder, place, mesh.rank))
                    write_progress(self.folder, written)
                except OSError as error:
                    raise UserError(
                        f"--output-dir {self.config.output_dir} cannot be written ({error.strerror}): make room, and "
                        "go on with --resume"
                    ) from error
        return collectives.objects(written, mesh.control)

    def _finish(self, done: dict[int, list[Written]], commit: str | None, prepend_bos: bool) -> None:
        """Write the index, which makes the folder a cache."""
        config = self.config
        shards = [written.shard for part in done.values() for written in part if written.shard]
        data = asdict(self.as_run.data)
        index = Index(
            bigsae_version=version("bigsae"),
            model=config.model,
            model_commit=commit,
            dataset=config.dataset,
            ctx_len=config.ctx_len,
            seed=config.seed,
            prepend_bos=prepend_bos,
            lm={name: getattr(config.lm, name) for name in _LM},
            data={name: value for name, value in data.items() if name not in _NOT_DATA},
            dtype=config.dtype,
            hookpoints=self.widths,
            num_rows=0,
            num_activations=0,
            num_heldout_rows=0,
            num_heldout_activations=0,
            shards=(),
        )
        index = with_shards(index, shards)
        if index.num_activations < config.tokens:
            logger.info("the data ended after %s activations", f"{index.num_activations:,}")
        write_json(self.folder / INDEX, to_json(index))
        finish(self.folder)
        logger.info("%s holds %s activations of %d hookpoints in %d shards", self.folder,
                    f"{index.num_activations:,}", len(self.widths), len(shards))  # fmt: skip
