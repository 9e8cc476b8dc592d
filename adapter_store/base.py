"""The base model that adapters must fit, as its checkpoint folder describes it."""

from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from common import base_model
from common.base_model import BaseGeometry


@dataclass(frozen=True, slots=True)
class ServedBase:
    """Geometry of the base, and the names an adapter may have recorded for it."""

    geometry: BaseGeometry
    names: frozenset[str]

    def has_name(self, recorded: str) -> bool:
        """Whether `recorded`, a hub id or a path, or its last part, is one of the names."""
        return recorded in self.names or PurePosixPath(recorded).name in self.names


def read_base(model_dir: Path, name: str = "") -> ServedBase:
    """Raises ValueError that names the file or the field that is missing."""
    config = base_model.read_config(model_dir)
    recorded = config.get("_name_or_path")
    candidates = {name, model_dir.resolve().name, recorded if isinstance(recorded, str) else ""}
    candidates |= {PurePosixPath(candidate).name for candidate in candidates}
    return ServedBase(base_model.geometry(config), frozenset(candidates - {""}))
