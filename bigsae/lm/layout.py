"""How the ranks hold the language model: flags first, then what `accelerate launch` exported.

The variables are those that accelerate 1.15 sets in `accelerate.utils.launch`: `ACCELERATE_USE_FSDP` with
`FSDP_SHARDING_STRATEGY` in `prepare_multi_gpu_env`, `PARALLELISM_CONFIG_*_SIZE` in
`prepare_extend_env_parallelism_config`. With `use_cpu` it exports neither, and the flags decide.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bigsae.config import LMConfig, UserError

# Names and numbers of torch's FSDP1 ShardingStrategy, which accelerate passes through as they stand in its file.
_FULL_SHARD = ("FULL_SHARD", "SHARD_GRAD_OP", "1", "2")
_NO_SHARD = ("NO_SHARD", "3")
_HYBRID_SHARD = ("HYBRID_SHARD", "HYBRID_SHARD_ZERO2", "_HYBRID_SHARD_ZERO2", "4", "5")


@dataclass(frozen=True)
class LMLayout:
    """How the ranks hold the language model."""

    kind: Literal["replicate", "fsdp", "hsdp"]
    """A copy on each rank; one copy over all ranks; several copies, each over neighbouring ranks."""
    shard_size: int
    """Ranks that hold one copy between them."""
    replicate_size: int
    """Copies."""
    source: str
    """Where this was decided, for the log."""

    def __str__(self) -> str:
        sizes = f"{self.replicate_size} x {self.shard_size} ranks" if self.kind == "hsdp" else ""
        return " ".join(part for part in (self.kind, sizes, f"({self.source})") if part)


def resolve_layout(
    lm: LMConfig, num_ranks: int, local_num_ranks: int, env: Mapping[str, str] = os.environ
) -> LMLayout:
    """The layout for `num_ranks` ranks, `local_num_ranks` of them on each node.

    `--lm.shard-size` and `--lm.replicate-size` decide; one of them alone leaves the other to the number of ranks.
    Without them the accelerate configuration does, as found in `env`; without one, each rank holds a copy. Raises
    UserError where the sizes do not multiply to the ranks, or accelerate is told of a layout that is not supported.
    """
    shard, replicate = lm.shard_size, lm.replicate_size
    if shard is None and replicate is None:
        shard, replicate, source = _from_accelerate(num_ranks, local_num_ranks, env)
    else:
        source = "flags"
        if shard is None:
            assert replicate is not None
            shard = max(1, num_ranks // replicate)
        elif replicate is None:
            replicate = max(1, num_ranks // shard)
    if shard * replicate != num_ranks:
        raise UserError(
            f"the language model's layout ({source}) is {replicate} copies of {shard} ranks, which makes "
            f"{shard * replicate}, but there are {num_ranks} ranks: set --lm.shard-size to a divisor of {num_ranks} "
            f"and --lm.replicate-size to {num_ranks} / shard-size, or leave the latter out"
        )
    kind = "replicate" if shard == 1 else "fsdp" if replicate == 1 else "hsdp"
    return LMLayout(kind, shard, replicate, source)


def _from_accelerate(num_ranks: int, local_num_ranks: int, env: Mapping[str, str]) -> tuple[int, int, str]:
    for variable, name in (
        ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed"),
        ("ACCELERATE_USE_MEGATRON_LM", "Megatron-LM"),
    ):
        if _true(env.get(variable)):
            raise UserError(
                f"the accelerate configuration asks for {name}, which does not hold the language model here: "
                "use distributed_type FSDP or MULTI_GPU, or set --lm.shard-size"
            )
    if _true(env.get("ACCELERATE_USE_PARALLELISM_CONFIG")):
        return _from_parallelism_config(env)
    if not _true(env.get("ACCELERATE_USE_FSDP")):
        return 1, num_ranks, "default"
    strategy = env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD").upper()
    if strategy in _HYBRID_SHARD:
        return local_num_ranks, num_ranks // local_num_ranks, f"accelerate FSDP {strategy}"
    if strategy in _NO_SHARD:
        return 1, num_ranks, f"accelerate FSDP {strategy}"
    if strategy in _FULL_SHARD:
        return num_ranks, 1, "accelerate FSDP"
    raise UserError(
        f"fsdp_sharding_strategy {strategy} of the accelerate configuration is not known: "
        "set FULL_SHARD or HYBRID_SHARD, or --lm.shard-size"
    )


def _from_parallelism_config(env: Mapping[str, str]) -> tuple[int, int, str]:
    sizes = {
        name: int(env.get(f"PARALLELISM_CONFIG_{name}_SIZE", "1"))
        for name in ("DP_SHARD", "DP_REPLICATE", "TP", "CP", "SP")
    }
    for name in ("TP", "CP", "SP"):
        if sizes[name] > 1:
            raise UserError(
                f"parallelism_config_{name.lower()}_size {sizes[name]} of the accelerate configuration is not "
                f"supported: set it to 1 and use parallelism_config_dp_shard_size, or set --lm.shard-size"
            )
    return sizes["DP_SHARD"], sizes["DP_REPLICATE"], "accelerate parallelism_config"


def _true(value: str | None) -> bool:
    return value is not None and value.lower() in ("1", "true", "yes", "on", "y", "t")
