"""`python -m gateway`"""

from common.server import run_service
from gateway.config import GatewayConfig
from gateway.service import serve

if __name__ == "__main__":
    run_service("gateway", GatewayConfig, serve)
