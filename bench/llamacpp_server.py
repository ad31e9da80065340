"""The peer llama.cpp: its HTTP server, from the package xllamacpp. Run by peers.py with that package's interpreter."""

import argparse
import signal

from xllamacpp import CommonAdapterLoraInfo, CommonParams, Server


def main() -> None:
    """Serve until a signal comes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True, help="GGUF of the base model")
    parser.add_argument("--lora", action="append", default=[], help="GGUF of an adapter; its number is its place")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True)
    options = parser.parse_args()

    params = CommonParams()
    params.model.path = options.model
    params.hostnames = ["127.0.0.1"]
    params.port = options.port
    params.n_parallel = options.slots
    params.n_ctx = 1024 * options.slots
    params.cpuparams.n_threads = options.threads
    params.lora_adapters = [CommonAdapterLoraInfo(path, 1.0) for path in options.lora]
    params.lora_init_without_apply = True
    server = Server(params)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    del server


if __name__ == "__main__":
    main()
