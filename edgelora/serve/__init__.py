"""`edgelora serve BUNDLE`: OpenAI's HTTP interface over a bundle; numpy and onnxruntime as in run/, and starlette with uvicorn.

    POST /v1/chat/completions  POST /v1/completions      bundles that write text; whole, or streamed as server-sent events
    POST /v1/classify                                    classifiers of text, and other tasks that read text
    POST /v1/embeddings                                  embeddings of text
    GET /v1/models  GET /v1/models/NAME  GET /health

refusal (an error as OpenAI writes it) ← fields (JSON to checked values) ← requests (what is asked) and replies (what is
answered) ← worker (one thread, one session, one queue) ← follow (a request's events, its deadline, its client) ← app (the
routes) ← server (sockets, signals).
"""
