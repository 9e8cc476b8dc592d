"""`python -m scheduler`"""

from common.server import run_service
from scheduler.config import SchedulerConfig
from scheduler.service import serve

if __name__ == "__main__":
    run_service("scheduler", SchedulerConfig, serve)
