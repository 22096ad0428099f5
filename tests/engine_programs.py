"""A PowerInfer server that runs no model: it answers by a formula, with the real one's habits.

It shares their consequences: what a request must avoid gives another answer here too.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

from stand_ins import write_program

from gguf_export.tokens.vocabulary import Vocabulary

FORMULA = """
import math
def logits(ids, size):
    state = sum((at + 1) * number for at, number in enumerate(ids))
    return [9 * math.sin(state * 0.37 + token * 1.7) for token in range(size)]
"""
SERVER = (
    FORMULA
    + """
import json, os, struct, sys, time
from http.server import BaseHTTPRequestHandler, HTTPServer
def option(name):
    return sys.argv[sys.argv.index(name) + 1]
with open(LOG, 'a') as file:
    print(json.dumps({'pid': os.getpid(), 'argv': sys.argv[1:],
                      'threshold': os.environ.get('LLAMA_SPARSE_PRED_THRESHOLD')}), file=file)
START
TEXTS = [bytes.fromhex(text) for text in json.load(open(TOKENS))]
EOS = 2
def narrow(number):
    return struct.unpack('f', struct.pack('f', number))[0]
def shown(text):
    if len(text) == 1 and text[0] & 0x80:
        return 'byte: \\\\x%x' % text[0]
    return text.decode('utf-8', 'replace')
def probabilities(ids, request):
    found = logits(ids, len(TEXTS))
    for token, push in request.get('logit_bias', []):
        found[token] = narrow(found[token] + push)
    largest = max(found)
    shares = [narrow(math.exp(number - largest)) for number in found]
    total = math.fsum(shares)
    pairs = [(narrow(share / total), token) for token, share in enumerate(shares)]
    return sorted(pairs, key=lambda pair: -pair[0])
class Server(BaseHTTPRequestHandler):
    last, written, asked = [], [], 0
    def log_message(self, *arguments):
        pass
    def reply(self, body, status=200):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply(json.dumps({'model': option('--alias')}).encode())
    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers['Content-Length'])))
        Server.asked += 1
        asked = Server.asked
        if asked % 3 == 2:  # still letting go of the last one
            if request['stream']:
                return self.reply(b'')
            return self.reply(b'File Not Found', 404)
        ids = request['prompt']
        with open(LOG, 'a') as file:
            print(json.dumps(request), file=file)
        ANSWER
        read = list(ids)
        if request['cache_prompt']:
            held = Server.last + Server.written
            same = next((n for n, (a, b) in enumerate(zip(held, ids)) if a != b), len(ids))
            if same > len(Server.last) or same == len(ids):
                read = ids + ids[-1:]  # a token twice, or one missing
        count = max(4, request['n_predict'] + 1)
        events, written, text = [], [], b''
        for _ in range(count):
            pairs = probabilities(read + written, request)
            token = pairs[0][1]
            written.append(token)
            sent = TEXTS[token]
            event = {'content': sent.decode('utf-8', 'replace'), 'stop': False}
            if sent and not (len(sent) == 1 and sent[0] & 0x80) and request.get('n_probs'):
                best = pairs[:request['n_probs']]
                told = [{'tok_str': shown(TEXTS[t]), 'prob': p} for p, t in best]
                event['completion_probabilities'] = [{'content': shown(sent), 'probs': told}]
            events.append(event)
            text += sent
            ends = [text.find(stop.encode()) for stop in request.get('stop', [])]
            ends = [end for end in ends if end >= 0]
            if ends:
                text = text[:min(ends)]
            if ends or token == EOS:
                break
        Server.last, Server.written = ids, written
        final = {'content': '' if request['stream'] else text.decode('utf-8', 'replace'),
                 'stop': True, 'truncated': False, 'tokens_evaluated': len(ids)}
        FINAL
        if request['stream']:
            lines = [b'data: ' + json.dumps(event).encode() for event in [*events, final]]
            return self.reply(b'\\n\\n'.join(lines) + b'\\n\\n')
        self.reply(json.dumps(final).encode())
HTTPServer(('127.0.0.1', int(option('--port'))), Server).serve_forever()
"""
)


class FakeServer:
    """A build with a server alone, and the log of its starts and requests."""

    def __init__(self, directory: Path, vocabulary: Vocabulary) -> None:
        self.directory, self.log = directory, directory / "log"
        self._tokens = directory / "tokens.json"
        self._size = len(vocabulary.tokens)
        directory.mkdir(parents=True, exist_ok=True)
        texts = [vocabulary.decode([number]).hex() for number in range(self._size)]
        self._tokens.write_text(json.dumps(texts))
        self.write()

    def write(self, *, start: str = "", answer: str = "", final: str = "") -> None:
        """Write the program, which does more before it listens, answers, or ends an answer."""
        body = SERVER.replace("LOG", repr(str(self.log))).replace("TOKENS", repr(str(self._tokens)))
        for name, code in (("START", start), ("ANSWER", answer), ("FINAL", final)):
            body = body.replace(name, code)
        write_program(self.directory / "server", body)

    def lines(self) -> list[dict[str, object]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def pid(self) -> int:
        return int(str(self.lines()[0]["pid"]))

    def requests(self) -> list[dict[str, object]]:
        return [line for line in self.lines() if "prompt" in line]

    def logs(self, ids: tuple[int, ...]) -> list[float]:
        """Return the formula's log-probabilities after ids."""
        names: dict[str, object] = {}
        exec(FORMULA, names)
        found: list[float] = names["logits"](list(ids), self._size)  # type: ignore[operator]
        largest = max(found)
        total = largest + math.log(math.fsum(math.exp(number - largest) for number in found))
        return [number - total for number in found]
