"""PowerInfer as it answers an evaluation: a server that follows a formula, and the real one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from bench_programs import FakePrograms
from conftest import TEXT, refused
from engine_programs import FakeServer
from processes import alive, wait_for
from stand_ins import TIMINGS, build, in_one_line

from common.errors import EngineError
from evaluation.backends.backend import KINDS, Decoding, Prompt, Score, Scoring
from evaluation.backends.embedded import EmbeddedBackend
from evaluation.backends.powerinfer import PowerInferBackend
from gguf_export.bundle import Bundle
from gguf_export.contract import OpenedFile
from gguf_export.tokens.vocabulary import Vocabulary
from powerinfer_bridge.programs.completion import Completion, shown, unpushed
from powerinfer_bridge.programs.server import Server

GREEDY = Decoding(stop=(), max_new_tokens=12)
SAMPLED = Decoding(stop=(), max_new_tokens=12, temperature=1.0, seed=5)


@pytest.fixture(scope="module")
def vocabulary(exact_bundle: Bundle) -> Vocabulary:
    return OpenedFile(exact_bundle.model_file).vocabulary


def choices(vocabulary: Vocabulary, length: int, count: int = 3) -> list[Scoring]:
    """Make the choices of a question: one context, several continuations."""
    ids = vocabulary.text_ids(TEXT)
    context, ends = ids[:length], [ids[at : at + 4] for at in range(60, 60 + count)]
    return [Scoring(ids=(*context, *end[:-1]), targets=(tuple(end),)) for end in ends]


def prompt(vocabulary: Vocabulary, text: str) -> Prompt:
    return Prompt(text=text, ids=tuple(vocabulary.text_ids(text)))


@pytest.fixture
def fake(tmp_path: Path, vocabulary: Vocabulary) -> FakeServer:
    return FakeServer(tmp_path / "build", vocabulary)


@pytest.fixture
def started(exact_bundle: Bundle, fake: FakeServer) -> Iterator[Callable[..., PowerInferBackend]]:
    made = list[PowerInferBackend]()

    def start(**options: float) -> PowerInferBackend:
        settings = {"timeout": 30.0, **options}
        made.append(PowerInferBackend(exact_bundle.model_file, fake.directory, **settings))  # type: ignore[arg-type]
        return made[-1]

    yield start
    for backend in made:
        backend.close()


Start = Callable[..., PowerInferBackend]


def expected_score(fake: FakeServer, request: Scoring, target: tuple[int, ...]) -> Score:
    first = len(request.ids) - len(target) + 1
    steps = [fake.logs(request.ids[: first + at]) for at in range(len(target))]
    chosen = [logs[token] for logs, token in zip(steps, target, strict=True)]
    return Score(sum(chosen), all(c == max(logs) for c, logs in zip(chosen, steps, strict=True)))


def test_a_server_s_pushed_probabilities_give_the_plain_ones(
    fake: FakeServer, started: Start, vocabulary: Vocabulary
) -> None:
    """Of every token: control tokens, halves of characters, texts that two tokens share."""
    backend, base = started(), choices(vocabulary, 9)[0]
    tokens = [*range(8), *range(60, 320, 9)]
    request = replace(base, targets=tuple((*base.targets[0][:-1], n) for n in tokens))
    shared = [vocabulary.decode([n]) for n in range(320)]
    assert sum(shared.count(shared[n]) > 1 for n in tokens) > 5
    assert sum(shared[n] == b"" for n in tokens) > 1
    assert sum(shared[n] >= b"\x80" for n in tokens) > 5
    [scores] = backend.score([request])
    expected = [expected_score(fake, request, target) for target in request.targets]
    found = [score.loglikelihood for score in scores]
    assert found == pytest.approx([score.loglikelihood for score in expected], abs=1e-4)
    assert [score.greedy for score in scores] == [score.greedy for score in expected]
    assert min(found) < -15, "far from the likeliest too"


def test_a_server_scores_a_whole_text(
    fake: FakeServer, started: Start, vocabulary: Vocabulary
) -> None:
    ids = tuple(vocabulary.text_ids(TEXT)[:60])
    request = Scoring(ids=ids[:-1], targets=(ids[1:],))
    [[score]] = started().score([request])
    expected = expected_score(fake, request, ids[1:])
    assert score.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-3)
    prompts = [line["prompt"] for line in fake.requests()]
    assert prompts[0] == [ids[0]], "BOS is there, once"
    assert all(line["repeat_penalty"] == 1.0 for line in fake.requests())


def test_the_written_token_is_none_of_the_request(
    fake: FakeServer, started: Start, vocabulary: Vocabulary
) -> None:
    """A prompt that goes on with what was written is misread from the server's cache."""
    letters = (n for n in range(320) if vocabulary.decode([n]).isalpha())
    ids = (1, *islice((n for n in letters if vocabulary.decode([n]).isascii()), 60))
    request = Scoring(ids=ids[:-1], targets=(ids[1:],))
    [[score]] = started().score([request])
    expected = expected_score(fake, request, ids[1:])
    assert score.loglikelihood == pytest.approx(expected.loglikelihood, abs=1e-3)


class Scripted:
    """A server whose model always gives the same logits."""

    def __init__(self, vocabulary: Vocabulary, logits: list[float]) -> None:
        self._texts = [vocabulary.decode([number]) for number in range(len(logits))]
        self._logits = logits

    def complete(self, request: dict[str, Any]) -> bytes:
        pushes = {token: push for token, push in request["logit_bias"]}
        pushed = [number + pushes.get(token, 0) for token, number in enumerate(self._logits)]
        total = sum(math.exp(number - max(pushed)) for number in pushed)
        shares = [
            {"tok_str": shown(text), "prob": math.exp(number - max(pushed)) / total}
            for text, number in zip(self._texts, pushed, strict=True)
        ]
        shares.sort(key=lambda entry: -float(str(entry["prob"])))
        first = {"completion_probabilities": [{"probs": shares}]}
        final = {"truncated": False, "tokens_evaluated": len(request["prompt"])}
        return b"".join(b"data: " + json.dumps(event).encode() + b"\n" for event in (first, final))


def test_a_likelier_token_of_the_same_text_is_not_mistaken(vocabulary: Vocabulary) -> None:
    """The byte is 40 nats below the letter that is shown like it: the first push is too weak."""
    letter, byte = vocabulary.ids[b"e"], vocabulary.ids[b"<0x65>"]
    logits = [-5.0] * 320
    logits[letter], logits[byte] = 0.0, -40.0
    server = cast(Server, Scripted(vocabulary, logits))
    [[found], [other]] = Completion(server, vocabulary).score((1, 5), ((byte,), (letter,)))
    total = math.log(sum(map(math.exp, logits)))
    assert found.log == pytest.approx(-40 - total, abs=1e-6)
    assert other.log == pytest.approx(-total, abs=1e-6)


def test_a_greedy_token_is_known_as_such(fake: FakeServer, started: Start) -> None:
    logs = fake.logs((1, 5, 9))
    best = logs.index(max(logs))
    [scores] = started().score([Scoring(ids=(1, 5, 9), targets=((best,), (best ^ 1,)))])
    assert [score.greedy for score in scores] == [True, False]


def test_pushes_are_taken_off_again() -> None:
    shares = [0.5, 0.3, 0.15, 0.05]
    for push in ((60.0, 30.0), (75.0, 45.0)):
        raw = [
            shares[0] * torch.tensor(push[0]).double().exp(),
            shares[1] * 2.718281828459045 ** push[1],
        ]
        pushed = [float(number) for number in (*raw, *shares[2:])]
        found = unpushed([number / sum(pushed) for number in pushed], push)
        assert found is not None
        assert found.log == pytest.approx(torch.tensor(0.3).log().item(), abs=1e-6)
        assert not found.greedy
    assert unpushed([1.0, 0.0, 0.0], (60.0, 30.0)) is None
    assert unpushed([float("nan"), 1.0], (60.0, 30.0)) is None


def test_tokens_are_shown_as_the_server_does() -> None:
    assert shown(b" the") == " the"
    assert shown(b"\xe4") == "byte: \\xe4"
    assert shown(b"\xe4\xb8") is None


@pytest.mark.parametrize("count", [1, 3, 4, 12])
def test_a_server_writes_as_many_tokens_as_asked(
    fake: FakeServer, started: Start, vocabulary: Vocabulary, count: int
) -> None:
    ids, made = (1, 5, 9), list[int]()
    while len(made) < count:
        logs = fake.logs((*ids, *made))
        made.append(logs.index(max(logs)))
    [text] = started().generate([Prompt(text="", ids=ids)], replace(GREEDY, max_new_tokens=count))
    assert text == vocabulary.decode(made).decode("utf-8", "replace")


def test_a_server_stops_at_a_stop_text(fake: FakeServer, started: Start) -> None:
    backend, asked = started(), [Prompt(text="", ids=(1, 5, 9))]
    [whole] = backend.generate(asked, GREEDY)
    stop = "ty"
    assert 0 < whole.index(stop) < len(whole) - 2
    [text] = backend.generate(asked, replace(GREEDY, stop=(stop,)))
    assert text == whole[: whole.index(stop)]


@pytest.mark.parametrize(("cuda", "threads"), [(None, "2"), (False, "1"), (True, "2")])
def test_as_many_threads_as_keep_sums_exact(
    fake: FakeServer, started: Start, tmp_path: Path, cuda: bool | None, threads: str
) -> None:
    if cuda is not None:
        programs = FakePrograms(tmp_path / "programs", cuda=cuda)
        for name in ("main", "perplexity"):
            (programs.powerinfer / name).rename(fake.directory / name)
    started()
    argv = fake.lines()[0]["argv"]
    assert isinstance(argv, list)
    assert argv[argv.index("--threads") + 1] == threads


def test_options_reach_the_server(
    fake: FakeServer, started: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLAMA_SPARSE_PRED_THRESHOLD", "0.75")
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    backend = started(threshold=0.25, threads=3)
    assert (tuple(backend.kinds), backend.why_not) == (KINDS, "")
    told = fake.lines()[0]
    argv = told["argv"]
    assert isinstance(argv, list)
    assert argv[argv.index("--host") + 1] == "127.0.0.1"
    assert argv[argv.index("--threads") + 1] == "3"
    assert int(argv[argv.index("-c") + 1]) > backend.max_length == 128
    assert told["threshold"] == "0.25"
    assert backend.zeros() is None


def test_temperatures_are_refused(started: Start) -> None:
    with refused(EngineError, "temperature 1", "use temperature 0"):
        started().generate([Prompt(text="x", ids=(1, 5))], SAMPLED)


STARTS = {
    "exit": ("sys.stderr.write('error loading model: bad\\n'); sys.exit(1)", "error loading model"),
    "silent exit": ("sys.exit(0)", "ended"),
    "crash": ("os.kill(os.getpid(), 11)", "SIGSEGV"),
    "hang": ("time.sleep(600)", "no answer after 2 s"),
}


@pytest.mark.parametrize(("start", "problem"), STARTS.values(), ids=STARTS)
def test_a_server_that_does_not_start_is_named(
    fake: FakeServer, started: Start, start: str, problem: str
) -> None:
    fake.write(start=start)
    with pytest.raises(EngineError) as caught:
        started(timeout=2.0 if "sleep" in start else 30.0)
    assert problem in in_one_line(caught.value, str(fake.directory / "server"))
    assert not alive(fake.pid())


ANSWERS = {
    "crash": ({"answer": "os.kill(os.getpid(), 11)"}, "SIGSEGV"),
    "exit": ({"answer": "os._exit(3)"}, "ended with code 3"),
    "hang": ({"answer": "time.sleep(600)"}, "no answer after 2 s"),
    "status": ({"answer": "return self.reply(b'no such thing', 500)"}, "status 500"),
    "garbage": ({"answer": "return self.reply(b'data: {nonsense')"}, "no JSON"),
    "no event": ({"answer": "return self.reply(b'hello')"}, "no event"),
    "list": ({"answer": "return self.reply(b'data: [1]')"}, "no JSON object"),
    "cut": ({"final": "final['truncated'] = True"}, "not all 3 tokens"),
    "other prompt": ({"final": "final['tokens_evaluated'] = 2"}, "not all 3 tokens"),
    "no shares": ({"final": "events[0] = {'content': 'x'}"}, "no probabilities"),
    "no numbers": (
        {"final": "events[0]['completion_probabilities'][0]['probs'][0]['prob'] = 'x'"},
        "no probabilities",
    ),
    "nan": (
        {"final": "events[0]['completion_probabilities'][0]['probs'][5]['prob'] = float('nan')"},
        "cannot be read after 3 tokens",
    ),
    "never free": ({"answer": "return self.reply(b'')"}, "no answer after 2 s"),
}


@pytest.mark.parametrize(("faults", "problem"), ANSWERS.values(), ids=ANSWERS)
def test_an_answer_that_cannot_be_read_is_an_error(
    fake: FakeServer, started: Start, faults: dict[str, str], problem: str
) -> None:
    fake.write(**faults)
    backend = started(timeout=2.0)
    with pytest.raises(EngineError) as caught:
        backend.score([Scoring(ids=(1, 5, 9), targets=((7,),))])
    assert problem in in_one_line(caught.value, "server")


def test_a_closed_server_is_gone(fake: FakeServer, started: Start) -> None:
    backend = started()
    pid = fake.pid()
    assert alive(pid)
    backend.close()
    assert not alive(pid)
    backend.close()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot end it with psp")
@pytest.mark.parametrize("ending", ["kill", "term", "raise", "nothing"])
def test_a_server_ends_with_psp(fake: FakeServer, exact_bundle: Bundle, ending: str) -> None:
    ends = {"kill": "os.kill(os.getpid(), 9)", "term": "os.kill(os.getpid(), 15)"}
    ends |= {"raise": "raise SystemExit(1)", "nothing": ""}
    body = (
        "import os\nfrom pathlib import Path\n"
        "from powerinfer_bridge.programs.server import Server\n"
        f"server = Server(Path({str(fake.directory / 'server')!r}), "
        f"Path({str(exact_bundle.model_file)!r}), context=128, threads=1)\n{ends[ending]}\n"
    )
    root = Path(__file__).parent.parent
    environment = {**os.environ, "PYTHONPATH": str(root)}
    subprocess.run(
        [sys.executable, "-c", body], cwd=root, env=environment, timeout=120, check=False
    )
    pid = fake.pid()
    wait_for(lambda: not alive(pid))


def test_without_a_server_texts_alone_are_answered(
    exact_bundle: Bundle, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    log = tmp_path / "log"
    body = (
        "import sys\nif '--help' in sys.argv:\n    print('--vram-budget'); sys.exit()\n"
        "prompt = sys.argv[sys.argv.index('--prompt') + 1] if '--prompt' in sys.argv else ''\n"
        f"open({str(log)!r}, 'a').write(repr(prompt) + '\\n')\n"
        f"print(prompt + ' text', end='')\nsys.stderr.write({TIMINGS!r})"
    )
    build(tmp_path, body, "print('--vram-budget')")
    backend = PowerInferBackend(exact_bundle.model_file, tmp_path, timeout=30)
    assert tuple(backend.kinds) == ("generate_until",)
    assert "build its server" in backend.why_not
    with refused(EngineError, "tells no probabilities"):
        backend.score([Scoring(ids=(1,), targets=((7,),))])
    asked = [prompt(vocabulary, text) for text in ("The quick", "def f(\n")]
    assert backend.generate(asked, GREEDY) == [" text", " text"]
    assert log.read_text().splitlines()[-2:] == [repr(" The quick"), repr(" def f(\n")]
    special = Prompt(text="a</s>b", ids=tuple(vocabulary.text_ids("a</s>b")))
    with refused(EngineError, "other ids of 1 of 3 prompts", "build its server"):
        backend.generate([*asked, special], GREEDY)
    backend.close()


@pytest.mark.powerinfer
def test_the_real_programs_answer_as_the_embedded_engine(
    powerinfer_bin: Path, exact_bundle: Bundle, vocabulary: Vocabulary
) -> None:
    real = PowerInferBackend(exact_bundle.model_file, powerinfer_bin, timeout=300)
    embedded = EmbeddedBackend(exact_bundle.model_file)
    try:
        asked = [prompt(vocabulary, text) for text in ("The quick", "def f(\n", " two  spaces ")]
        assert real.generate(asked, GREEDY) == embedded.generate(asked, GREEDY)
        if "loglikelihood" not in real.kinds:
            pytest.skip("this build of PowerInfer has no server")
        requests = choices(vocabulary, 40)
        ids = tuple(vocabulary.text_ids(TEXT)[:100])
        requests += [Scoring(ids=ids[:-1], targets=(ids[1:],))]
        requests += [Scoring(ids=ids[:30], targets=tuple((n,) for n in range(0, 320, 7)))]
        for ours, theirs in zip(embedded.score(requests), real.score(requests), strict=True):
            for one, other in zip(ours, theirs, strict=True):
                assert other.loglikelihood == pytest.approx(one.loglikelihood, abs=0.02)
    finally:
        real.close()
