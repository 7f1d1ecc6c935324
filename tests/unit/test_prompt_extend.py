"""Longer prompts by a language model."""

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from wan import Engine
from wan.errors import Cancelled, UsageError
from wan.media import read_settings
from wan.options import build_request
from wan.options.replay import replay_options

QUICK = {"frame_num": 1, "sample_steps": 1, "seed": 1, "prompt": "a red circle"}
LONG = "a large red circle moves slowly to the right"


@pytest.fixture(scope="module")
def engine():
    with Engine(task="t2v-tiny", device="cpu") as engine:
        yield engine


@pytest.fixture
def service():
    """A service that answers as its `answer` says, and what it was asked."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            server.asked.append({"path": self.path, "key": self.headers["authorization"], **body})
            message = {"role": "assistant", "content": server.answer}
            told = {"choices": [{"index": 0, "finish_reason": "stop", "message": message}]}
            told = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", **told}
            data = json.dumps(told).encode() if server.status == 200 else b"broken"
            self.send_response(server.status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answer, server.status = [], f'<think>hm\nhm</think>\n"{LONG}"', 200
    server.options = {
        "use_prompt_extend": True,
        "prompt_extend_method": "api",
        "prompt_extend_model": "some-chat",
        "prompt_extend_url": f"http://127.0.0.1:{server.server_port}/v1",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_a_service_writes_the_prompt_that_is_used_shown_and_stored(engine, service, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    events = []
    video = engine.generate(**QUICK, **service.options, on_event=events.append)
    [asked] = service.asked
    assert (asked["path"], asked["key"], asked["model"]) == ("/v1/chat/completions", "Bearer secret", "some-chat")
    assert "Chinese" in asked["messages"][0]["content"] and asked["messages"][1]["content"] == "a red circle"
    assert [one.text for one in events if one.kind == "note" and "prompt" in one.text] == [f"prompt: {LONG}"]
    assert video.request.sample.prompt == LONG and video.request.sample.extended_from == ("a red circle",)
    plain = engine.generate(**QUICK | {"prompt": LONG})
    assert plain.report["sha256"] == video.report["sha256"]
    settings = read_settings(video.save(tmp_path / "a.png"))
    assert (settings["prompt"], settings["extended_from"]) == (LONG, ["a red circle"]) and "secret" not in str(settings)
    warnings = []
    again = replay_options(settings, {}, files=True, warnings=warnings)
    assert again["prompt"] == LONG and "use_prompt_extend" not in again and not warnings


def test_the_language_and_a_first_frame_are_told(service):
    with Engine(task="i2v-tiny", device="cpu") as engine:
        engine.generate(**QUICK | {"frame_num": 5}, **service.options, prompt_extend_target_lang="en")
    system = service.asked[0]["messages"][0]["content"]
    assert "English" in system and "begins with a picture" in system


def test_what_a_terminal_would_obey_is_left_out(engine, service):
    service.answer, events = "a \x1b[31m red\x00 circle\ud800", []
    video = engine.generate(**QUICK, **service.options, on_event=events.append)
    assert video.request.sample.prompt == "a [31m red circle"


@pytest.mark.parametrize("answer, status", [("", 200), ("<think>for ever", 200), (None, 200), ("fine", 500)])
def test_a_failure_leaves_the_prompt_with_a_warning(engine, service, answer, status):
    service.answer, service.status, events = answer, status, []
    video = engine.generate(**QUICK, **service.options, on_event=events.append)
    assert [one.text for one in events if one.kind == "warning"][0].startswith("the prompt stays as it is")
    assert video.request.sample.prompt == "a red circle" and video.request.sample.extended_from == ()


def chat_model(folder):
    """A random chat model of transformers."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    letters = ["<unk>", "<end>", *"abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRSTUVWXYZ.,:"]
    inner = Tokenizer(models.WordLevel({one: at for at, one in enumerate(letters)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", eos_token="<end>")
    tokenizer.chat_template = "{% for one in messages %}{{ one.content }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=len(letters), **sizes)).save_pretrained(folder)
    return {"use_prompt_extend": True, "prompt_extend_model": str(folder)}


def test_a_local_chat_model_writes_the_same_each_time(engine, tmp_path):
    options = chat_model(tmp_path / "chat")
    first, second = (engine.generate(**QUICK, **options).request.sample for _ in range(2))
    assert first.extended_from == ("a red circle",) and first.prompt == second.prompt != "a red circle"


def test_it_can_be_cancelled(engine, tmp_path, monkeypatch):
    stop = threading.Event()
    options = chat_model(tmp_path / "chat")
    from transformers import LlamaForCausalLM

    forward = LlamaForCausalLM.forward

    def spy(*args, **kwargs):
        stop.set()
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaForCausalLM, "forward", spy)
    with pytest.raises(Cancelled):
        engine.generate(**QUICK, **options, cancel=stop)


def test_a_model_that_is_not_there_is_a_warning(engine, tmp_path):
    events = []
    engine.generate(**QUICK, use_prompt_extend=True, prompt_extend_model=str(tmp_path / "none"), on_event=events.append)
    assert "could not be extended" in [one.text for one in events if one.kind == "warning"][0]


@pytest.mark.parametrize(
    "options, told",
    [
        ({"prompt_extend_model": "a"}, "--prompt_extend_model is for --use_prompt_extend"),
        ({"use_prompt_extend": True, "prompt_extend_method": "qwen"}, "choose one of: local, api"),
        ({"use_prompt_extend": True, "prompt_extend_method": "api"}, "needs --prompt_extend_model"),
        ({"use_prompt_extend": True, "prompt_extend_target_lang": "fr"}, "choose one of: zh, en"),
        ({"use_prompt_extend": True, "prompt_extend_url": "http://a"}, "is for --prompt_extend_method api"),
        (
            {
                **{"use_prompt_extend": True, "prompt_extend_method": "api", "prompt_extend_model": "a"},
                "prompt_extend_url": "file:///etc/passwd",
            },
            "must be an address",
        ),
    ],
)
def test_wrong_options_are_one_line(options, told):
    with pytest.raises(UsageError, match=told.replace("(", r"\(")):
        build_request({"task": "t2v-tiny", **options})
