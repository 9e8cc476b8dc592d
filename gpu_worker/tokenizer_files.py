"""The tokenizer files that a worker hands to gateways, read as a gateway will read them."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from common import base_model


def read_tokenizer_files(model_dir: Path) -> dict[str, bytes]:
    """Name -> content. Raises ValueError naming a file that is missing or that no gateway could read.

    A gateway would refuse this worker, again and again, and never be ready.
    """
    files = base_model.tokenizer_files(model_dir)
    for name in (name for name in files if name.endswith(".json")):
        try:
            text = files[name].decode()
            Tokenizer.from_str(text) if name == base_model.TOKENIZER_FILES[0] else json.loads(text)
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{model_dir / name} cannot be read: {error}") from None
    return files
