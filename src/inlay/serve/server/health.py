"""`/health`: whether the server answers, for load balancers and people."""

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from inlay.serve.server.service import Service

router = APIRouter()


@router.get("/health")
async def show_health(request: Request) -> Response:
    """Status 200 while requests are answered; 503 before, while the server drains, and once it has failed."""
    service: Service = request.app.state.service
    facts = {"status": service.state, "waiting": len(service.queue), "adapters": len(service.bank.names)}
    return JSONResponse(facts, 200 if service.state == "ready" else 503)
