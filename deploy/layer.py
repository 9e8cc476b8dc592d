"""`python deploy/layer.py .venv`: lets the running virtual environment import what another one has, too."""

import sys
import sysconfig
from pathlib import Path

folder = Path(sysconfig.get_paths()["purelib"])
(other,) = Path(sys.argv[1]).resolve().glob("lib/python3*/site-packages")
(folder / "layer.pth").write_text(f"import site; site.addsitedir({str(other)!r})\n", encoding="utf-8")
