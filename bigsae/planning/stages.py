"""Operations and bytes of each stage of a step, on one rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from bigsae.parallel.choose import step_shape
from bigsae.parallel.flops import centre_flops, decode_flops, encode_flops, gradient_flops
from bigsae.parallel.memory import DTYPE_BYTES, SAEShape
from bigsae.parallel.traffic import Payload, sent_bytes, step_payloads
from bigsae.planning.gpus import GPU, Resource, seconds
from bigsae.planning.model import LMFacts
from bigsae.planning.options import PlanConfig

# Vector operations of projection, norm, Adam and renormalisation, for each weight.
_OPTIMISER_FLOPS = 20


@dataclass(frozen=True)
class Mesh:
    """The ranks of a planned run."""

    num_ranks: int
    num_local: int
    """Ranks of a node."""
    shard_size: int
    """Ranks that hold one copy of the language model."""
    num_latent: int
    """Ranks that hold one SAE."""
    distribute: bool = False
    """Each SAE belongs to one rank, which sees the whole batch."""

    @property
    def num_data(self) -> int:
        """Copies of each SAE."""
        return 1 if self.distribute else self.num_ranks // self.num_latent


@dataclass(frozen=True)
class Stage:
    """What one rank does in one step."""

    name: str
    matmul_dtype: str
    flops: float = 0.0
    moved: float = 0.0
    """Bytes read and written in its own memory, but for `gathered`."""
    gathered: float = 0.0
    """Bytes of single rows, read where a token's latents or a latent's tokens lie."""
    selected: float = 0.0
    """Pre-activations that a selection looks through."""
    allocated: float = 0.0
    """Bytes of large tensors that are made in each step and given back."""
    nvlink: float = 0.0
    """Bytes sent to ranks of its node."""
    network: float = 0.0
    """Bytes sent to other nodes."""

    def busy(self, gpu: GPU) -> dict[Resource, float]:
        """Seconds of each resource; they work at the same time."""
        return seconds(
            gpu, self.matmul_dtype, self.flops, self.moved, self.gathered, self.nvlink, self.network
        )

    def seconds(self, gpu: GPU) -> float:
        """How long it takes: as long as the slowest resource; on a CPU selection and fresh memory come on top of it."""
        selecting = self.selected / gpu.select if gpu.select else 0.0
        mapping = self.allocated / gpu.fresh if gpu.fresh else 0.0
        return max(self.busy(gpu).values()) + selecting + mapping

    def bound(self, gpu: GPU) -> Resource:
        """Which resource that is."""
        busy = self.busy(gpu)
        return max(busy, key=lambda resource: busy[resource])


def lm_stage(config: PlanConfig, facts: LMFacts, mesh: Mesh) -> Stage:
    """The language model's forward of as many tokens as a step uses."""
    lm = config.lm
    # Position 0 of each row is computed and not trained on.
    num_tokens = config.batch_size_tokens / mesh.num_ranks * config.ctx_len / (config.ctx_len - 1)
    micro_batch = lm.chosen_rows * config.ctx_len
    num_forwards = num_tokens / micro_batch
    sent = num_forwards * facts.gathered_bytes(lm) * (mesh.shard_size - 1) / mesh.shard_size
    nvlink, network = _by_link(sent, mesh.shard_size, min(mesh.shard_size, mesh.num_local))
    return Stage(
        "LM forward",
        "bfloat16" if lm.autocast else lm.dtype,
        flops=num_tokens * facts.flops(config.ctx_len),
        moved=num_forwards * facts.moved_bytes(lm, micro_batch),
        nvlink=nvlink,
        network=network,
    )


def buffer_stage(config: PlanConfig, facts: LMFacts, mesh: Mesh) -> Stage:
    """Into the buffer and out of it again, each read and written."""
    num_tokens = config.batch_size_tokens / mesh.num_ranks
    width = sum(facts.widths.values())
    per_token = 2 * DTYPE_BYTES[config.lm.dtype] + 2 * DTYPE_BYTES[config.buffer.dtype]
    nvlink = network = 0.0
    if mesh.distribute:  # each activation to every rank that owns an SAE of its hookpoint
        owners = min(config.variants, mesh.num_ranks)
        sent = num_tokens * width * DTYPE_BYTES[config.buffer.dtype] * owners
        sent *= (mesh.num_ranks - 1) / mesh.num_ranks
        network = sent * (mesh.num_ranks - mesh.num_local) / max(mesh.num_ranks - 1, 1)
        nvlink = sent - network
    return Stage("buffer", "float32", moved=num_tokens * width * per_token, nvlink=nvlink, network=network)


def sae_stages(config: PlanConfig, saes: Sequence[SAEShape], mesh: Mesh, *, with_auxk: bool) -> list[Stage]:
    """Encode, decode, gradients, optimiser and collectives, and AuxK where it is on, of all SAEs of a rank."""
    each = [_stages_of_one(config, shape, mesh, with_auxk) for shape in saes]
    merged: dict[str, Stage] = {}
    for stage in (stage for stages in each for stage in stages):
        merged[stage.name] = _sum(merged[stage.name], stage) if stage.name in merged else stage
    return list(merged.values())


def _sum(a: Stage, b: Stage) -> Stage:
    return Stage(
        a.name,
        a.matmul_dtype,
        a.flops + b.flops,
        a.moved + b.moved,
        a.gathered + b.gathered,
        a.selected + b.selected,
        a.allocated + b.allocated,
        a.nvlink + b.nvlink,
        a.network + b.network,
    )


def _stages_of_one(config: PlanConfig, shape: SAEShape, mesh: Mesh, with_auxk: bool) -> list[Stage]:
    batch = config.batch_size_tokens // mesh.num_data
    own = shape.d_sae // mesh.num_latent
    dtype = "bfloat16" if shape.encoder_bytes == 2 else "float32"
    pairs = batch * shape.k / mesh.num_latent
    parts = mesh.num_data if config.mesh.shard_optimizer else 1
    updates = 1 / config.optim.accumulation_steps
    stages = [
        _encode("SAE encode", shape, batch, own, dtype),
        _decode("SAE decode", shape, batch, pairs),
        _gradients("SAE gradients", shape, batch, own, pairs),
        _optimiser(shape, own // parts, updates),
    ]
    if with_auxk and shape.k_aux:
        pairs = batch * shape.k_aux / mesh.num_latent
        parts_of_auxk = [
            Stage("", dtype, moved=2 * batch * own * shape.encoder_bytes, selected=batch * own),
            _decode("", shape, batch, pairs),
            _gradients("", shape, batch, 0, pairs),
        ]
        whole = Stage("SAE AuxK", dtype)
        for stage in parts_of_auxk:
            whole = _sum(whole, stage)
        stages.append(whole)
    if not mesh.distribute:
        stages.append(_collectives(config, shape, mesh, with_auxk))
    return stages


def _encode(name: str, shape: SAEShape, batch: int, own: int, dtype: str) -> Stage:
    """The matmul by slabs, each written once and read twice by the selection; a working copy made before."""
    e = shape.encoder_bytes
    slab_rows = min(max(1, shape.slab_mb * 2**20 // (own * e)), batch)
    num_slabs = -(-batch // slab_rows)
    moved = num_slabs * own * shape.d_in * e + 3 * batch * own * e + batch * shape.d_in * e
    if e != shape.weight_bytes:
        moved += own * shape.d_in * (shape.weight_bytes + e)
    return Stage(name, dtype, flops=encode_flops(shape, batch, own), moved=moved, selected=batch * own)


def _decode(name: str, shape: SAEShape, batch: int, pairs: float) -> Stage:
    """A row of W_dec for each selected latent."""
    return Stage(
        name,
        "float32",
        flops=decode_flops(shape, pairs),
        moved=4 * batch * shape.d_out,
        gathered=pairs * shape.d_out * shape.weight_bytes,
    )


def _gradients(name: str, shape: SAEShape, batch: int, own: int, pairs: float) -> Stage:
    """For each selected latent its row of W_dec, x and the residual's gradient; W_enc once, for b_dec's.

    Gradients are written whole (`own` 0: added to those that are there).
    """
    rows = pairs * (shape.weight_bytes * shape.d_out + 4 * (shape.d_in + shape.d_out))
    written = own * (shape.d_in + shape.d_out) * shape.grad_bytes
    moved = written + 8 * batch * shape.d_out
    if shape.centred:
        moved += own * shape.d_in * shape.weight_bytes
    flops = gradient_flops(shape, pairs) + centre_flops(shape, own)
    return Stage(name, "float32", flops=flops, moved=moved, gathered=rows, allocated=written)


def _optimiser(shape: SAEShape, own: int, updates: float) -> Stage:
    """Norm, Adam, and for unit rows projection and renormalisation, each a pass over the matrices."""
    g, w = shape.grad_bytes, shape.weight_bytes
    moment = {"int8": 1, "bfloat16": 2, "float32": w}[shape.moments_dtype]
    adam = 2 * g + 2 * w + 4 * moment
    unit = 3 * g + 5 * w if shape.unit_decoder else 0
    moved = own * (shape.d_in * adam + shape.d_out * (adam + unit))
    flops = _OPTIMISER_FLOPS * own * (shape.d_in + shape.d_out)
    return Stage("SAE optimiser", "float32", flops=updates * flops, moved=updates * moved)


def _collectives(config: PlanConfig, shape: SAEShape, mesh: Mesh, with_auxk: bool) -> Stage:
    """What training/ and sae/ send (parallel/traffic.py), of updates as often as there are some."""
    nvlink = network = 0.0
    act_bytes = DTYPE_BYTES[config.buffer.dtype]
    step = step_shape(
        shape,
        mesh.num_ranks,
        mesh.num_latent,
        config.batch_size_tokens,
        config.mesh.shard_optimizer,
        act_bytes,
        with_auxk=with_auxk,
    )
    for payload in step_payloads(step):
        size, local = group_size(payload, mesh)
        near, far = _by_link(sent_bytes(payload, size), size, local)
        nvlink, network = nvlink + near, network + far
    return Stage("SAE collectives", "float32", nvlink=nvlink, network=network)


def group_size(payload: Payload, mesh: Mesh) -> tuple[int, int]:
    """Ranks of the group in which a payload travels, and how many of them lie on one node."""
    if payload.group == "latent":
        return mesh.num_latent, min(mesh.num_latent, mesh.num_local)
    return mesh.num_data, min(max(mesh.num_local // mesh.num_latent, 1), mesh.num_data)


def _by_link(sent: float, size: int, local: int) -> tuple[float, float]:
    """Bytes over NVLink and over the network of `sent`, in a group of `size` ranks with `local` on each node.

    A ring leaves the node once in `local` hops; with several rings at once each of its ranks has an equal part of that.
    """
    if local >= size:
        return sent, 0.0
    return sent * (local - 1) / local, sent / local
