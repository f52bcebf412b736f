"""Stands in for an inference server where the real one cannot be made to fail: STANDIN_ENGINE says how."""

import argparse
import os
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("--run-dir", type=Path)
parser.add_argument("--step")
parser.add_argument("--index", type=int)
parser.add_argument("--host")
parser.add_argument("--port", type=int)
arguments = parser.parse_args()
behaviour = os.environ["STANDIN_ENGINE"]


PUBLIC = ("/health_generate", "/health")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        token = (arguments.run_dir / "secrets/engine-token").read_text().strip()
        known = self.headers["Authorization"] == f"Bearer {token}" and self.path == "/model_info"
        welcome = known or self.path in PUBLIC
        self.send_response(200 if welcome else 401)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: the tests read the log."""


print("engine standing in", flush=True)
if behaviour == "crash" or (behaviour == "one-crashes" and arguments.index == 1):
    print("cannot load the weights", flush=True)
    sys.exit(3)
if behaviour == "robbed" and not (arguments.run_dir / "robbed").exists():
    (arguments.run_dir / "robbed").write_text(str(arguments.port))
    robber = f"import socket, time; s = socket.create_server(('127.0.0.1', {arguments.port})); time.sleep(600)"
    subprocess.Popen([sys.executable, "-c", robber])
    while True:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", arguments.port)) == 0:
                sys.exit(1)
        time.sleep(0.02)
if behaviour == "fragile":
    starts = arguments.run_dir / f"starts-{arguments.index}"
    with starts.open("a") as file:
        file.write("+")
    if starts.read_text() != "+":
        print("cannot load the weights again", flush=True)
        sys.exit(4)
while behaviour == "patient" and not (arguments.run_dir / "go").exists():
    time.sleep(0.02)
if behaviour == "silent":
    time.sleep(600)
HTTPServer((arguments.host, arguments.port), Handler).serve_forever()
