"""Real certificates, made by openssl: authorities, and what they sign."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

LOOPBACK = "IP:127.0.0.1,DNS:localhost"


@dataclass(frozen=True)
class Pair:
    cert: Path
    key: Path

    def install(self, folder: Path) -> "Pair":
        """A copy as `tls.crt` and `tls.key`, over what was there."""
        copy = Pair(folder / "tls.crt", folder / "tls.key")
        for old, new in ((self.cert, copy.cert), (self.key, copy.key)):
            new.write_bytes(old.read_bytes())
        return copy


@dataclass(frozen=True)
class Authority:
    """Keeps all its files in one folder."""

    folder: Path
    name: str

    @property
    def cert(self) -> Path:
        return self.folder / f"{self.name}.crt"

    @property
    def key(self) -> Path:
        return self.folder / f"{self.name}.key"

    def issue(self, name: str, san: str = LOOPBACK, *, ended: bool = False) -> Pair:
        """A certificate for the names in `san`; with `ended` one whose time is over."""
        pair = Pair(self.folder / f"{name}.crt", self.folder / f"{name}.key")
        request, extensions = self.folder / f"{name}.csr", self.folder / f"{name}.ext"
        _openssl("req", "-new", *_new_key(pair.key), "-out", str(request), "-subj", f"/CN={name}")
        extensions.write_text(f"subjectAltName={san}\nbasicConstraints=critical,CA:FALSE", encoding="utf-8")
        signer = ("-CA", str(self.cert), "-CAkey", str(self.key), "-CAcreateserial", "-extfile", str(extensions))
        days = "-1" if ended else "3650"
        _openssl("x509", "-req", "-in", str(request), "-out", str(pair.cert), *signer, "-days", days)
        return pair


def authority(folder: Path, name: str = "ca") -> Authority:
    made = Authority(folder, name)
    _openssl("req", "-x509", *_new_key(made.key), "-out", str(made.cert), "-subj", f"/CN={name}", "-days", "3650")
    return made


def _new_key(path: Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path))


def _openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)
