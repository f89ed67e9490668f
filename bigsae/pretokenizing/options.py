"""The options of `bigsae.pretokenize`."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from bigsae.config import DataConfig

_DECIDE_NOTHING = (
    "output_dir", "num_workers", "commit_tokens", "resume", "push_to_hub", "private", "trust_remote_code",
)  # fmt: skip


@dataclass(frozen=True)
class CorpusConfig:
    """Which documents are read; the same flags as those of training."""

    split: str = "train"
    """Split of the dataset."""
    name: str | None = None
    """Configuration name of a Hub dataset, e.g. sample-10BT."""
    revision: str | None = None
    """Branch, tag or commit of the dataset on the Hub."""
    text_column: str = "text"
    """Column that holds the text."""
    streaming: bool = False
    """Stream the dataset instead of downloading and indexing it. With fewer files than --data.num-shards each worker
    reads all of it, and tokenises its part."""
    num_shards: int = 64
    """Virtual shards that the documents are dealt to. Each is packed by itself, and what fills no row at its end is
    dropped: lower it for little text."""


@dataclass(frozen=True)
class PretokenizeConfig:
    """Tokenise a dataset once, into rows of tokens on disk, from which any number of runs can train."""

    model: str
    """Hub id or folder of the language model, of which only the tokenizer is read."""
    dataset: str
    """Hub id, or a local path: a save_to_disk folder, .jsonl, .parquet, .txt, or a folder of those."""
    output_dir: str
    """Folder to write; --dataset of bigsae.train then."""
    ctx_len: int = 256
    """Tokens in a row."""
    begin_batch_token: str = "auto"
    """Token at the beginning of each row: bos, eos, sep, an id, or none. auto: BOS, where the tokenizer has one, as in
    training from text."""
    begin_sequence_token: str = "none"
    """Token at the beginning of each document: bos, eos, sep, an id, or none."""
    sequence_separator_token: str = "auto"
    """Token after each document: bos, eos, sep, an id, or none. auto: EOS, else BOS, else none, as in training from
    text."""
    shuffle: bool = True
    """Bring all rows into a random order. Else those of a long document follow each other; documents are in the
    seeded order in which training packs them, either way."""
    seed: int = 0
    """Decides the order of documents and rows; with the --seed of a run on the text itself, the same rows."""
    format: Literal["parquet", "arrow"] = "parquet"
    """parquet: read by load_dataset, streamed, and pushed to the Hub. arrow: read by load_from_disk, memory-mapped as
    it lies."""
    tokens_per_file: int = 1 << 25
    """About so many tokens in each file; decides how much a worker holds in memory, 4 to 8 bytes each."""
    num_workers: int | None = None
    """Processes that tokenise and write. Default: the cores there are. Decides the time alone."""
    commit_tokens: int = 1 << 22
    """Each worker puts what it has on disk after so many tokens: a kill loses no more."""
    resume: bool = False
    """Go on where an interrupted call with the same options stopped; starts afresh where there is nothing."""
    push_to_hub: str | None = None
    """Repository of datasets on the Hub, user/name, to upload the folder to when it is whole."""
    private: bool = False
    """Make that repository private; one that is there and public is refused."""
    revision: str | None = None
    """Branch, tag or commit of the model on the Hub."""
    trust_remote_code: bool = False
    """Run the Python code that the model's repository carries."""
    data: CorpusConfig = field(default_factory=CorpusConfig)

    def as_data(self) -> DataConfig:
        """The data of one pass over the documents, as training describes it."""
        return DataConfig(**dataclasses.asdict(self.data), epochs=1)

    def deciding(self) -> dict[str, Any]:
        """What decides the bytes that are written, as plain JSON values by their flags."""
        values = dataclasses.asdict(self)
        corpus = values.pop("data")
        for name in _DECIDE_NOTHING:
            values.pop(name)
        values |= {f"data.{name}": value for name, value in corpus.items()}
        return {"--" + name.replace("_", "-"): value for name, value in values.items()}
