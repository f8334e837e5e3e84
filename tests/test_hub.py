"""No network: said at once, in one line, by whatever would have to be downloaded."""

from __future__ import annotations

import http.server
import logging
import socket
import threading
import time

import pytest

from fixtures.hub import point_to as point_to
from saekit.errors import OfflineError
from saekit.hub import Unreachable, ask_hub
from saekit.inputs.texts import read_texts
from saekit.models.loading import load_model
from saekit.store.native import load

WAYS = {
    "model": (lambda: load_model("nobody/model"), r"must be downloaded .*{}.*--model PATH"),
    "data": (lambda: read_texts("nobody/texts"), r"must be downloaded .*{}.*--data FILE"),
    "SAE": (lambda: load("hf:nobody/saes/layer_12"), r"would have to be downloaded.*{}.*local path"),
}


def closed_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.fixture
def answers():
    """A hub that refuses every request with a status; its port."""
    servers = []

    def make(status, body=b""):
        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(status)
                self.end_headers()
                self.wfile.write(body)

            do_HEAD = do_GET

            def log_message(self, *_):
                pass

        servers.append(http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return servers[-1].server_port

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("what", WAYS)
def test_without_network_it_is_said_at_once_and_in_one_line(what, point_to, capfd, caplog):
    point_to(closed_port())
    action, message = WAYS[what]
    begin = time.monotonic()
    with caplog.at_level(logging.WARNING), pytest.raises(OfflineError, match=message.format("no network")):
        action()
    # the first of the hub library's retries waits a second, all of them half a minute
    assert time.monotonic() - begin < 10
    assert "etry" not in "".join(capfd.readouterr()) + caplog.text


@pytest.mark.parametrize(
    ("status", "why"), [(503, "it answers 503"), (429, "it answers 429"), (200, "proxy in the way")]
)
@pytest.mark.parametrize("what", WAYS)
def test_a_hub_that_answers_with_something_else(what, status, why, point_to, answers):
    point_to(answers(status, b"log in first"))
    action, message = WAYS[what]
    with pytest.raises(OfflineError, match=message.format(why)):
        action()


def test_offline_mode_is_the_reason_where_it_is_set():
    with pytest.raises(Unreachable, match="HF_HUB_OFFLINE is set"):
        ask_hub("model", "nobody/model")
