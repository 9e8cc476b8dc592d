"""`python -m gpu_worker`: one worker, its face and its engine."""

from common.server import run_service
from gpu_worker.config import WorkerConfig
from gpu_worker.service import serve

if __name__ == "__main__":
    run_service("gpu_worker", WorkerConfig, serve)
