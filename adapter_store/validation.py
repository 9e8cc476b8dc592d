"""Admission: from staged files that nobody trusts to a version that a worker can load as it is."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass

from adapter_store.base import ServedBase
from adapter_store.blobs import CHAT_TEMPLATE, CONFIG, WEIGHTS, StagedAdapter
from adapter_store.effects import MeasuredWeights
from adapter_store.lane import Lane
from adapter_store.manifest import write_version
from adapter_store.modules import pair_tensors
from adapter_store.packed import write_packed
from adapter_store.peft_config import AdapterConfig, parse_config
from adapter_store.registry import Version
from adapter_store.weights import read_header
from common.errors import FailedPrecondition, InvalidArgument
from common.packing import PackedLayout, check_layout, plan


@dataclass(frozen=True, slots=True)
class Admitted:
    """What an upload is, once it is known to be sound."""

    version: Version
    warnings: tuple[str, ...]


def admit(staged: StagedAdapter, base: ServedBase | None) -> Admitted:
    """Checks the sealed files, and writes the packed string and the manifest beside them; all of them are durable then.

    Blocks; holds a few modules in memory at a time.

    Raises InvalidArgument naming what is wrong, FailedPrecondition when the adapter does not fit `base`,
    ResourceExhausted when the disk is full.
    """
    for name in (CONFIG, WEIGHTS):
        if name not in staged.sha256:
            raise InvalidArgument("FILE_MISSING", f"the upload holds no {name}")
    config = parse_config(staged.read(CONFIG))
    chat_template = _chat_template(staged)
    with staged.open(WEIGHTS) as file, Lane() as syncing:
        tensors = read_header(file, os.fstat(file.fileno()).st_size)
        modules = pair_tensors(tensors, config)
        layout = plan([module.spec for module in modules], tensors[0].dtype)
        if base is not None:
            _check_base(layout, base)
        staged.check_room(layout.total_bytes)
        syncing.give(staged.sync)
        measured = MeasuredWeights(file, modules)
        layout = write_packed(staged.directory, layout, measured)
        syncing.finish()
    version = Version(
        digest=_digest(config, staged),
        base_model=config.base_model,
        dtype=layout.dtype,
        packed_bytes=layout.total_bytes,
        stored_bytes=staged.total_bytes(),
        max_lora_rank=max(module.lora_rank for module in layout.modules),
        modules=measured.effects(),
        chat_template=chat_template,
    )
    write_version(staged.directory, version, staged.sha256)
    return Admitted(version, tuple(_warnings(version, base)))


def _digest(config: AdapterConfig, staged: StagedAdapter) -> str:
    """sha256, hex, over the canonical config and the sha256 of the weights and of a chat template."""
    identity = {"config": config.canonical(), "weights": staged.sha256[WEIGHTS]}
    if CHAT_TEMPLATE in staged.sha256:
        identity["chat_template"] = staged.sha256[CHAT_TEMPLATE]
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _chat_template(staged: StagedAdapter) -> str:
    if CHAT_TEMPLATE not in staged.sha256:
        return ""
    try:
        return staged.read(CHAT_TEMPLATE).decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidArgument("CHAT_TEMPLATE_INVALID", f"{CHAT_TEMPLATE} is not valid UTF-8") from None


def _check_base(layout: PackedLayout, base: ServedBase) -> None:
    try:
        check_layout(layout, base.geometry.num_layers, base.geometry.module_shapes)
    except ValueError as error:
        raise FailedPrecondition("BASE_MODEL_MISMATCH", str(error)) from None


def _warnings(version: Version, base: ServedBase | None) -> Iterator[str]:
    if not any(effect.delta_norm for effect in version.modules):
        yield "the adapter changes nothing: its delta is all zero"
    if base is not None and version.base_model and not base.has_name(version.base_model):
        names = " or ".join(map(repr, sorted(base.names)))
        yield f"the adapter was made for {version.base_model!r}; the base model here is {names}"
