"""What workers must have in common before one scheduler serves them."""

from scheduler.core.model import Identity


class IdentityMismatchError(Exception):
    """A worker serves something else than the fleet."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message


def check_identity(worker_id: str, identity: Identity, other_id: str, other: Identity) -> None:
    """Raises IdentityMismatchError naming both workers and both values of the first thing that differs."""
    pairs = [
        ("BASE_MODEL_MISMATCH", "base model fingerprint", identity.base_fingerprint, other.base_fingerprint),
        ("TOKENIZER_MISMATCH", "tokenizer digest", identity.tokenizer_digest, other.tokenizer_digest),
    ]
    for name in sorted({*identity.geometry, *other.geometry}):
        mine, theirs = identity.geometry.get(name, 0), other.geometry.get(name, 0)
        pairs.append(("GEOMETRY_MISMATCH", name, str(mine), str(theirs)))
    for reason, name, mine_text, theirs_text in pairs:
        if mine_text != theirs_text:
            message = f"worker {worker_id} has {name} {mine_text!r}; worker {other_id} of the fleet has {theirs_text!r}"
            raise IdentityMismatchError(reason, message)
