"""A dataset to rows of tokens on disk: checks, packing, files, upload."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from bigsae.config import UserError
from bigsae.data.opening import open_dataset
from bigsae.data.origin import ORIGIN_FILE, tokenizer_fingerprint
from bigsae.data.packing import Layout
from bigsae.data.sources import MapSource
from bigsae.data.tokenizer import load_tokenizer
from bigsae.hub.dataset_repository import FLAG, open_dataset_repository
from bigsae.hub.files import write_atomic, write_json
from bigsae.hub.repository import check_repo_id
from bigsae.pretokenizing import files, folder
from bigsae.pretokenizing.options import PretokenizeConfig
from bigsae.pretokenizing.push import CARD, card, push
from bigsae.pretokenizing.special import layout_of, resolve_special
from bigsae.pretokenizing.spool import Spool, Tell, fill
from bigsae.pretokenizing.workers import Workers, alone_in
from bigsae.progress import Progress

logger = logging.getLogger("bigsae")

_SAELENS_VERSION = "6.54.12"  # whose sae_lens.json this is
_MOST_TOKENS_PER_FILE = 1 << 30  # a column's offsets are int32


@dataclass(frozen=True)
class Pretokenized:
    """What was written."""

    output_dir: str
    num_files: int
    num_rows: int
    num_tokens: int
    num_documents: int
    num_skipped_documents: int
    """Documents without text."""
    num_dropped_tokens: int
    """Tokens at the ends of virtual shards, which fill no row."""


def pretokenize_dataset(config: PretokenizeConfig) -> Pretokenized:
    """Write the rows of `config.dataset` to `config.output_dir`, and push them where that is asked for.

    Raises UserError for what the user can mend. What was done until then is kept, for `config.resume`.
    """
    _check(config)
    source = open_dataset(config.dataset, config.as_data())
    if source.pretokenised:
        raise UserError(f"--dataset {config.dataset} holds input_ids already: bigsae.train reads it as it is")
    tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
    layout = layout_of(config, tokenizer)
    made = config.deciding() | source.identity(config.as_data())
    made |= {"tokenizer": tokenizer_fingerprint(tokenizer)}
    out = Path(config.output_dir).expanduser()
    work = folder.open_folder(out, made, config.resume)
    if work is None:
        logger.info("%s is whole already", out)
    else:
        if config.push_to_hub is not None:
            open_dataset_repository(config.push_to_hub, config.private)
        folder.begin(work, made)
        total = len(source.dataset) if isinstance(source, MapSource) else None
        with folder.disk_errors(out), alone_in(work):
            if not folder.is_written(work):
                _write(config, work, layout, total, made, tokenizer)
            folder.move_out(work, work / "files")
    counts = json.loads((out / ORIGIN_FILE).read_text())["bigsae"]["counts"]
    done = Pretokenized(output_dir=str(out), **counts)
    _announce(done, layout)
    if config.push_to_hub is not None:
        logger.info("pushed to %s", push(out, config.push_to_hub, config.private))
    return done


def _check(config: PretokenizeConfig) -> None:
    if config.ctx_len < 2:
        raise UserError(f"--ctx-len {config.ctx_len} must be at least 2")
    if config.data.num_shards < 1:
        raise UserError(f"--data.num-shards {config.data.num_shards} must be at least 1")
    if config.num_workers is not None and config.num_workers < 1:
        raise UserError(f"--num-workers {config.num_workers} must be at least 1")
    if config.commit_tokens < 1:
        raise UserError(f"--commit-tokens {config.commit_tokens} must be at least 1")
    if not config.ctx_len <= config.tokens_per_file <= _MOST_TOKENS_PER_FILE:
        raise UserError(
            f"--tokens-per-file {config.tokens_per_file} must be between --ctx-len {config.ctx_len} and "
            f"{_MOST_TOKENS_PER_FILE}"
        )
    if config.private and config.push_to_hub is None:
        raise UserError("--private does nothing without --push-to-hub: set it")
    if config.push_to_hub is not None:
        check_repo_id(config.push_to_hub, FLAG)
    if config.push_to_hub is not None and config.format != "parquet":
        raise UserError("--push-to-hub needs --format parquet, which the Hub can show and stream")


def _write(
    config: PretokenizeConfig,
    work: Path,
    layout: Layout,
    num_documents: int | None,
    made: dict[str, Any],
    tokenizer: Any,
) -> None:
    """Documents to spools, spools to files, and beside them how they were made."""
    num_workers = config.num_workers or len(os.sched_getaffinity(0))
    with Workers(num_workers, work) as workers:
        _tokenise(config, work, layout, num_documents, workers, num_workers)
        spools = _spools(config, work, layout)
        num_rows = sum(spool.num_rows for spool in spools)
        if not num_rows:
            shutil.rmtree(work)  # other options are other work
            raise _no_row(config, spools)
        count = files.num_files(num_rows, config.ctx_len, config.tokens_per_file)
        with Progress("writing", count, "files") as progress:
            workers.run(_WriteFile(config, work, layout, count), list(range(count)), _teller(progress))
    _write_origin(config, work / "files", made, tokenizer, spools, count)
    if config.format == "arrow":
        digest = hashlib.sha256(json.dumps(made, sort_keys=True).encode()).hexdigest()
        files.write_saved_dataset(work / "files", count, layout.dtype, digest[:16])
    folder.set_written(work)


def _tokenise(
    config: PretokenizeConfig,
    work: Path,
    layout: Layout,
    num_documents: int | None,
    workers: Workers,
    num_workers: int,
) -> None:
    (work / "spool").mkdir(exist_ok=True)
    spools = _spools(config, work, layout)
    unfinished = [spool for spool in spools if spool.end is None]
    done = sum(spool.cursor.position for spool in unfinished)
    done += sum(spool.end["num_documents"] for spool in spools if spool.end is not None)
    shards = [spool.shard for spool in unfinished]
    parts = [part for i in range(num_workers) if (part := shards[i::num_workers])]
    with Progress("tokenising", num_documents, "documents", done) as progress:
        workers.run(_Fill(config, work, layout), parts, _teller(progress))


def _teller(progress: Progress) -> Callable[[int, int], None]:
    """What workers tell of things and tokens that are done, to be shown."""
    num_tokens = 0

    def tell(num_more: int, num_more_tokens: int) -> None:
        nonlocal num_tokens
        num_tokens += num_more_tokens
        progress.advance(num_more, f"{num_tokens / progress.seconds:,.0f} tokens/s")

    return tell


def _spools(config: PretokenizeConfig, work: Path, layout: Layout) -> list[Spool]:
    return [Spool(work / "spool", shard, layout) for shard in range(config.data.num_shards)]


@dataclass(frozen=True)
class _Fill:
    """A worker's task: pack some shards."""

    config: PretokenizeConfig
    work: Path
    layout: Layout

    def __call__(self, shards: list[int], tell: Tell) -> None:
        config = self.config
        source = open_dataset(config.dataset, config.as_data())
        tokenizer = load_tokenizer(config.model, config.revision, config.trust_remote_code)
        spools = [Spool(self.work / "spool", shard, self.layout) for shard in shards]
        fill(source, tokenizer, config.as_data(), config.seed, spools, config.commit_tokens, tell)


@dataclass(frozen=True)
class _WriteFile:
    """A worker's task: write one file."""

    config: PretokenizeConfig
    work: Path
    layout: Layout
    count: int

    def __call__(self, number: int, tell: Tell) -> None:
        config = self.config
        seed = config.seed if config.shuffle else None
        spools = _spools(config, self.work, self.layout)
        rows = files.write_file(self.work / "files", spools, config.format, seed, number, self.count)
        tell(1, rows * config.ctx_len)


def _write_origin(
    config: PretokenizeConfig,
    to: Path,
    made: dict[str, Any],
    tokenizer: Any,
    spools: list[Spool],
    count: int,
) -> None:
    ends = [spool.end for spool in spools if spool.end is not None]
    num_rows = sum(spool.num_rows for spool in spools)
    counts = {
        "num_files": count,
        "num_rows": num_rows,
        "num_tokens": num_rows * config.ctx_len,
        "num_documents": sum(end["num_documents"] for end in ends),
        "num_skipped_documents": sum(end["skipped_documents"] for end in ends),
        "num_dropped_tokens": sum(end["dropped_tokens"] for end in ends),
    }
    origin = {
        "sae_lens_version": _SAELENS_VERSION,
        "tokenizer_name": config.model,
        "original_dataset": config.dataset,
        "original_dataset_name": config.data.name,
        "original_split": config.data.split,
        "original_data_files": None,
        "original_column_name": config.data.text_column,
        "context_size": config.ctx_len,
        "shuffled": config.shuffle,
        "seed": config.seed,
        **asdict(resolve_special(config, tokenizer)),
        "disable_concat_sequences": False,
        "use_chat_formatting": False,
        "bigsae": {
            "bigsae_version": version("bigsae"),
            "tokenizer_sha256": tokenizer_fingerprint(tokenizer),
            "counts": counts,
            "made": made,
        },
    }
    write_json(to / ORIGIN_FILE, origin)
    if config.format == "parquet":
        write_atomic(to / CARD, lambda p: p.write_text(card(origin), encoding="utf-8"))


def _no_row(config: PretokenizeConfig, spools: list[Spool]) -> UserError:
    num_tokens = sum(spool.end["dropped_tokens"] for spool in spools if spool.end is not None)
    row = f"one row of --ctx-len {config.ctx_len}"
    if num_tokens == 0:
        return UserError(f"--dataset {config.dataset} holds no text")
    if num_tokens < config.ctx_len:
        return UserError(
            f"--dataset {config.dataset} holds {num_tokens} tokens, less than {row}: lower --ctx-len"
        )
    return UserError(
        f"--dataset {config.dataset} holds {num_tokens} tokens, but spread over {config.data.num_shards} virtual "
        f"shards none has enough for {row}: lower --data.num-shards"
    )


def _announce(done: Pretokenized, layout: Layout) -> None:
    logger.info(
        "%s: %s rows of %d tokens in %d files, from %s documents (%s without text skipped, %s tokens dropped at the "
        "ends of virtual shards)",
        done.output_dir, f"{done.num_rows:,}", layout.ctx_len, done.num_files, f"{done.num_documents:,}",
        f"{done.num_skipped_documents:,}", f"{done.num_dropped_tokens:,}",
    )  # fmt: skip
