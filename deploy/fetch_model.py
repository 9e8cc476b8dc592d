"""Fetches a model archive, verifies its sha256 and unpacks it: what an init container of a worker pool does.

`python -m deploy.fetch_model URL SHA256 FOLDER`. The archive is a tar file, compressed or not, with `config.json` at
its top. Nothing is unpacked before the whole archive was verified, and a second start with the same model does nothing.
"""

import hashlib
import sys
import tarfile
import urllib.request
from pathlib import Path

_CHUNK_BYTES = 1024 * 1024


def fetch(url: str, sha256: str, folder: Path) -> str:
    """What was done. Raises ValueError when the archive is another, OSError when it cannot be had."""
    mark = folder / ".sha256"
    if mark.is_file() and mark.read_text(encoding="utf-8") == sha256:
        return f"{folder} has the model already"
    archive = folder / ".archive"
    digest = hashlib.sha256()
    try:
        with urllib.request.urlopen(url, timeout=60) as source, archive.open("wb") as target:
            while chunk := source.read(_CHUNK_BYTES):
                digest.update(chunk)
                target.write(chunk)
        if digest.hexdigest() != sha256:
            raise ValueError(f"the sha256 of {url} is {digest.hexdigest()}, not {sha256}")
        with tarfile.open(archive) as tar:
            # Refuses links and names that lead outside, devices and odd modes.
            tar.extractall(folder, filter="data")
    finally:
        archive.unlink(missing_ok=True)
    if not (folder / "config.json").is_file():
        raise ValueError(f"{url} has no config.json at its top")
    mark.write_text(sha256, encoding="utf-8")
    return f"{url} is in {folder}"


def main() -> int:
    url, sha256, folder = sys.argv[1:]
    try:
        print(fetch(url, sha256, Path(folder)))
    except (OSError, ValueError, tarfile.TarError) as problem:
        print(f"failed: {problem}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
