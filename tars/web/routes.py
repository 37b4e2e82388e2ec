"""All faces but JSON-RPC on one application.

Law of this file: it joins the faces and decides nothing. The application's first middleware must be `rpc.access.access_middleware`, given
`PUBLIC_PATHS` and, for the paths that are not JSON-RPC's, `render_refusal`.
"""

from __future__ import annotations

import secrets

from aiohttp import hdrs, web

from tars.errors import MethodNotFound, TarsError
from tars.rpc.admission import Admission
from tars.rpc.options import RpcOptions
from tars.serving.service import NodeService
from tars.web import status_page
from tars.web.exchange import Exchange, json_response
from tars.web.openai_answers import error_body as openai_error_body
from tars.web.openai_api import add_openai_routes
from tars.web.rest import add_rest_routes, rest_face
from tars.web.rest import error_body as rest_error_body
from tars.web.status_feed import StatusFeed

PUBLIC_PATHS = status_page.PUBLIC_PATHS | {"/health"}
"""What needs no API key (Host and Origin are checked all the same): the page without its data, and what a load balancer asks."""


def add_web_routes(
    app: web.Application,
    service: NodeService,
    options: RpcOptions,
    *,
    admission: Admission | None = None,
    feed: StatusFeed | None = None,
) -> None:
    """Serve the OpenAI API, the REST facade, the metrics and the status page.

    `admission` is `Dispatcher.admission`, so that the bound on calls under way is one for all faces; `feed` is given by tests that
    want a faster page.
    """
    admission = admission or Admission(options)
    add_openai_routes(app, service, options, admission)
    add_rest_routes(app, service, options, admission)
    status_page.add_status_page(app, service, options, admission, feed)
    # Last: whatever no face has, and every other method of what it has.
    app.router.add_route(hdrs.METH_ANY, "/{nothing:.*}", rest_face(service, options, admission).look(_nothing_here))


async def _nothing_here(exchange: Exchange) -> web.Response:
    raise MethodNotFound(
        f"This node does not serve {exchange.request.method} at this address; nothing was run. JSON-RPC is POST /rpc, the OpenAI API "
        "is below /v1, and GET / is a page for people."
    )


def render_refusal(request: web.Request, error: TarsError, *, node: str = "") -> web.Response:
    """A refusal of the access checks in the shape of the face that was asked."""
    trace_id = secrets.token_hex(16)
    openai = request.path.startswith("/v1/")
    body = openai_error_body(error, trace_id) if openai else rest_error_body(error, node, trace_id)
    return json_response(body, status=error.http_status)
