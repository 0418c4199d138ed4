"""The service: one instance behind HTTP, with batches, limits, metrics and a page.

    server.py       starts it, stops it without losing a request
    draining.py     the HTTP server, and how it ends
    connections.py  connections that keep it waiting are closed; how much it logs
    gate.py         who is let in; every request is counted and timed here
    app.py          the endpoints
    openapi.yaml    how to ask them, for programs
    description.py  what it says of the model
    decoders.py     bytes to image, in processes that can be ended; decoding.py runs in them
    batching.py     the one thread that owns the session; batches of requests, refinements one by one
    options.py      the limits

The page at / is in ``apps/page``. Nothing is imported here, so that a process that decodes is soon ready:
``server.serve`` starts a service.
"""
