"""`edgemoe serve`: the protocols over HTTP, with Starlette and uvicorn (the extra `server`)."""
