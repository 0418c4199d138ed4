"""The service: one instance behind HTTP, with batches, limits, metrics and a page.

    server.py     starts it, stops it without losing a request
    app.py        the endpoints
    gate.py       who is let in; every request is counted and timed here
    batching.py   the one thread that owns the session; batches of requests, refinements one by one
    images.py     bytes to image and back, within limits
    options.py    the limits
    page.html     the page at /

FastAPI, uvicorn and prometheus_client come with the extra "serve" and are imported when a service is started.
"""

from messnet.apps.serving.options import ServeOptions
from messnet.apps.serving.server import serve

__all__ = ["ServeOptions", "serve"]
