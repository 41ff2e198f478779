#!/bin/sh
# langchain 1.5.2 on langgraph 1.2.24: an agent's run ends, as if it were finished, at a call whose arguments are no JSON.
#
# langchain-openai puts such a call into `invalid_tool_calls` of the message. The graph of `create_agent` goes on to the tools while
# the last message has `tool_calls`, and looks at nothing else: where every call of a turn is broken, `invoke` returns. No exception
# comes, no warning, and the text of the last message is empty. Beside a call that is whole the same broken call is told to the model
# as an error, with the request after the tools, and the model can mend it. So it depends on the other calls of a turn whether a
# slip of one character is told to the model or ends the task with an empty answer. Small and untrained models write such calls
# often; who counts what `invoke` returns as answers grades them as wrong answers, and who trains on them punishes whole attempts
# that the harness broke off. `invalid_tool_calls` of the last message tells. That a run ends so is known upstream (langchain-ai,
# langchain 33504, open since 2025); that these versions tell the model of the same call beside another one is not said there.
#
# Here: a server on the loopback says one turn with calls of `add`, then an answer.
#
# Seen (Python 3.11), requests that the server got and what the run returned:
#   whole             2  'It is 2.'
#   broken            1  ''            one invalid call in the last message
#   broken and whole  2  'It is 2.'    the second request tells of the error
set -eu
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"${PYTHON:-python3}" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet langchain==1.5.2 langgraph==1.2.24 langgraph-prebuilt==1.1.3 langchain-core==1.8.3 \
    langchain-openai==1.7.4 openai==3.57.0
cat > "$work/broken.py" <<'PROGRAM'
import json
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from langchain.agents import create_agent
from langchain_openai import ChatOpenAI

WHOLE, BROKEN = '{"a": 1, "b": 1}', '{"a": 1, "b": 1'
ANSWER = "It is 2."
TURNS = {"whole": [WHOLE], "broken": [BROKEN], "broken and whole": [BROKEN, WHOLE]}


def add(a: float, b: float) -> float:
    """Adds."""
    return a + b


class Server(ThreadingHTTPServer):
    """Answers the first request with calls of these arguments, and all others with ANSWER."""

    def __init__(self, arguments: list[str]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.arguments, self.bodies = arguments, []

    def message(self) -> dict:
        if len(self.bodies) > 1:
            return {"role": "assistant", "content": ANSWER}
        functions = [{"name": "add", "arguments": each} for each in self.arguments]
        calls = [{"id": f"call_{n}", "type": "function", "function": each} for n, each in enumerate(functions)]
        return {"role": "assistant", "content": None, "tool_calls": calls}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.bodies.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        choice = {"index": 0, "message": self.server.message(), "finish_reason": "stop"}
        body = json.dumps({"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


def seen(arguments: list[str]) -> tuple[int, str, int, bool]:
    """Requests, the text that the run returned, invalid calls in its last message, whether the model was told of an error."""
    with Server(arguments) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        model = ChatOpenAI(model="m", base_url=f"http://127.0.0.1:{server.server_port}/v1", api_key="none")
        last = create_agent(model, [add]).invoke({"messages": [{"role": "user", "content": "1 + 1?"}]})["messages"][-1]
        server.shutdown()
    results = [message["content"] for message in server.bodies[-1]["messages"] if message["role"] == "tool"]
    return len(server.bodies), last.text, len(last.invalid_tool_calls), any("2" not in each for each in results)


warnings.simplefilter("error", UserWarning)  # a warning would be a word
found = {name: seen(arguments) for name, arguments in TURNS.items()}
for name, (requests, text, invalid, told) in found.items():
    print(f"{name:17} requests {requests}  text {text!r}  invalid calls {invalid}  told of an error: {told}")
expected = {"whole": (2, ANSWER, 0, False), "broken": (1, "", 1, False), "broken and whole": (2, ANSWER, 0, True)}
raise SystemExit(found != expected)
PROGRAM
if "$work/venv/bin/python" "$work/broken.py"; then
    echo "as described: a run ends without a word at a call that is no JSON"
else
    echo "the behaviour has changed" >&2
    exit 1
fi
