"""`python -m adapter_store`: one adapter store."""

from adapter_store.config import StoreConfig
from adapter_store.service import serve
from common.server import run_service

if __name__ == "__main__":
    run_service("adapter_store", StoreConfig, serve)
