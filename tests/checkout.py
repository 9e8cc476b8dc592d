"""The files of this checkout, for tests that look at the tree itself."""

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def tree_files(folder: str = ".") -> list[Path]:
    """Paths below `folder`, relative to the root, that are in git or would be with `git add`, sorted."""
    # A checkout may belong to another user than the one who runs the tests, as in a container.
    command = ["git", "-c", "safe.directory=*", "ls-files", "--cached", "--others", "--exclude-standard", "--", folder]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    return [Path(name) for name in sorted(names) if (ROOT / name).is_file()]


def read(path: str | Path) -> str:
    return (ROOT / path).read_text(encoding="utf-8")
