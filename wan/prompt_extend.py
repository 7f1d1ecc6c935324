"""Longer prompts, written by a language model: those that Wan was trained on are a paragraph each.

What the official code does by --use_prompt_extend, with any chat model of transformers, or any service that speaks
OpenAI's chat completions. Whatever fails, the prompt stays as it is, with a warning.
"""

from __future__ import annotations

import gc
import json
import os
import re
import urllib.request
from collections.abc import Callable
from typing import Any

import torch

from wan.errors import Cancelled, SwanError, described
from wan.files import parse_json
from wan.options import Request
from wan.options.names import MAX_CHARS

_MOST_TOKENS, _MOST_BYTES, _SECONDS = 512, 1_000_000, 120.0
_LANGUAGES = {"zh": "Chinese", "en": "English"}
_TASK = (
    "You write prompts for a model that makes videos of a few seconds from text. Rewrite what the user asks for as one"
    " paragraph of 80 to 100 words in {language}. Keep every subject, number and action, and in its own language every"
    " text that is to be read in the picture. Add what a camera would see: how the subjects look, where they are, the"
    " light, colours, style, what moves and how, and where the camera is and how it moves. Describe nothing that cannot"
    " be seen. Answer with the paragraph alone."
)
_FROM_PICTURE = (
    " The video begins with a picture that you do not see: write what happens from there on, not how it looks at first."
)
Say = Callable[[str, str], object]  # (kind of the event, its text)


def extended(request: Request, device: torch.device, say: Say, check: Callable[[], None]) -> Request:
    """The request with longer prompts; what they were is in its `extended_from`.

    check: is called between tokens, and ends it by raising. Raises nothing else.
    """
    sample = request.sample
    prompts = sample.prompts or (sample.prompt,)
    system = _TASK.format(language=_LANGUAGES[sample.prompt_extend_target_lang])
    system += _FROM_PICTURE if sample.image is not None else ""
    ask = _ask_local if sample.prompt_extend_method == "local" else _ask_api
    try:
        answers = [_cleaned(one) for one in ask(sample, system, prompts, device, check)]
    except Cancelled:
        raise
    except Exception as error:  # whatever a service, a network or a model of others can meet
        say("warning", f"the prompt stays as it is, it could not be extended: {described(error)[:300]}")
        return request.changed(use_prompt_extend=False)
    for answer in answers:
        say("note", f"prompt: {answer}")
    longer = {"prompts": tuple(answers)} if sample.prompts else {}
    return request.changed(prompt=answers[0], **longer, extended_from=tuple(prompts), use_prompt_extend=False)


def _cleaned(answer: str) -> str:
    """One line without what a model thought, or the quotation marks around all."""
    answer = re.sub(r"<think>[\s\S]*?(</think>|$)", "", answer)
    answer = re.sub(r"[\x00-\x1f\x7f]+", " ", answer).encode("utf-8", "ignore").decode()  # nothing for a terminal
    answer = " ".join(answer.split()).strip("\"'“”")
    if not answer:
        raise SwanError("the model has answered nothing")
    return answer[: MAX_CHARS["text"]]


def _messages(system: str, prompt: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": system}, {"role": "user", "content": prompt}]


def _ask_local(sample: Any, system: str, prompts: Any, device: torch.device, check: Callable[[], None]) -> list[str]:
    """By a chat model of transformers, which is gone afterwards."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, StoppingCriteriaList

    def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        check()
        return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

    tokenizer = AutoTokenizer.from_pretrained(sample.prompt_extend_model)
    check()
    model = AutoModelForCausalLM.from_pretrained(sample.prompt_extend_model, dtype="auto").to(device).eval()
    answers = []
    try:
        for prompt in prompts:
            asked = tokenizer.apply_chat_template(
                _messages(system, prompt),
                add_generation_prompt=True,
                enable_thinking=False,
                return_tensors="pt",
                return_dict=True,
            ).to(device)
            ids = model.generate(
                **asked, max_new_tokens=_MOST_TOKENS, do_sample=False, stopping_criteria=StoppingCriteriaList([stop])
            )
            answers.append(tokenizer.decode(ids[0, asked["input_ids"].shape[1] :], skip_special_tokens=True))
    finally:
        del model
        gc.collect()
    return answers


def _ask_api(sample: Any, system: str, prompts: Any, device: torch.device, check: Callable[[], None]) -> list[str]:
    """By a service; its key is OPENAI_API_KEY of the environment."""
    key = os.environ.get("OPENAI_API_KEY")
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    url, answers = f"{sample.prompt_extend_url.rstrip('/')}/chat/completions", []
    for prompt in prompts:
        check()
        body = {"model": sample.prompt_extend_model, "messages": _messages(system, prompt), "max_tokens": _MOST_TOKENS}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)  # http and https alone: it is checked
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            told = parse_json(answer.read(_MOST_BYTES))
        answers.append(told["choices"][0]["message"]["content"] or "")
    return answers
