"""The OpenAI-compatible server: `python -m internvl3_jax.serve --checkpoint DIR`.

arguments.py, __main__.py
                         the command line
app.py                   the ASGI application: `make_app`
service.py               what all requests share: model, engine, limits, metrics
body.py, chat_request.py, messages.py, grammar.py
                         a request's body, checked field by field
media.py, files.py, fetch.py
                         images by data URL, by path and by address
preparing.py             a checked request as requests to the engine
pending.py, engine_thread.py
                         requests in the engine; the thread that runs it
answer_text.py, choice.py, replies.py, event_stream.py
                         pieces of the engine as text, JSON and server-sent events
running.py               signals, draining, exit statuses
"""
