"""Versions that processes compare when they meet."""

VERSION = "0.1.0"
# Raised when an internal message changes its meaning; processes of different numbers refuse each other.
PROTOCOL_VERSION = 1
