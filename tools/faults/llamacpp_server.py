"""llama.cpp's own server out of PyPI's wheel `xllamacpp`, for `tools.faults.upstreams`.

    python tools/faults/llamacpp_server.py FILE.gguf PORT

It imports nothing of this project, so that it runs in an environment of its own.
"""

import sys
import threading

import xllamacpp

SLOTS, CONTEXT = 4, 4096


def main(file: str, port: str) -> None:
    """Serve until it is ended."""
    params = xllamacpp.CommonParams()
    params.model.path = file
    params.hostnames, params.port = ["127.0.0.1"], int(port)
    params.n_ctx, params.n_parallel, params.kv_unified = CONTEXT, SLOTS, False
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.warmup = False
    params.endpoint_props = params.endpoint_slots = True
    server = xllamacpp.Server(params)
    print(server.listening_address, xllamacpp.BUILD_INFO, flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main(*sys.argv[1:])
