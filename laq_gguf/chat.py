"""Where the system turn of a chat ends, found by rendering the chat; nothing is evaluated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

SYSTEM_ROLES = frozenset({"system", "developer"})

#: user messages without a common beginning, in whatever way they are split into tokens
_PROBES = ("What is this?", "1 + 1 = ?")

#: keywords of create_chat_completion that templates render
RENDERED = ("functions", "function_call", "tools", "tool_choice", "reasoning_budget")

#: what could evaluate tokens or change the context; raw handles among it. A handler that wants one
#: does not go through create_completion, or not yet.
_OUT_OF_BOUNDS = frozenset(
    {"eval", "generate", "sample", "reset", "embed", "create_embedding", "create_chat_completion",
     "create_chat_completion_openai_v1", "load_state", "save_state", "set_cache", "set_seed",
     "close", "ctx", "model", "_ctx", "_batch", "input_ids", "scores"}
)  # fmt: skip


class _Stop(BaseException):
    """Leaves a chat handler; no Exception, so that no handler takes it for an error of its own."""

    def __init__(self, prompt: Any = None) -> None:
        super().__init__()
        self.prompt = prompt


class _PromptTaker:
    """A Llama up to the point where a completion is asked for."""

    def __init__(self, llama: Any) -> None:
        object.__setattr__(self, "_PromptTaker__llama", llama)

    def create_completion(self, prompt: Any, suffix: Any = None, **_: Any) -> Any:
        """Take the prompt. With a suffix it would be another one, made by infilling."""
        raise _Stop(prompt if suffix is None else None)

    __call__ = _create_completion = create_completion

    def __getattr__(self, name: str) -> Any:
        if name in _OUT_OF_BOUNDS:
            raise _Stop
        return getattr(self.__llama, name)

    def __setattr__(self, name: str, value: Any) -> None:
        raise _Stop


def _tokens(llama: Any, prompt: str | Sequence[int]) -> list[int]:
    """Tokens of a prompt as `llama_cpp.Llama.create_completion` takes it, but for a last EOS."""
    if not isinstance(prompt, str):
        return [int(token) for token in prompt]
    cls = llama._model.token_cls()
    first = cls if cls != -1 else llama.token_bos()
    bos = [first] if first != -1 and llama._model.add_bos_token() else []
    if not prompt:
        return bos
    return bos + list(llama.tokenize(prompt.encode("utf-8"), add_bos=False, special=True))


def _render(
    llama: Any, handler: Callable[..., Any], messages: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[int] | None:
    """Tokens of the prompt that the handler makes, or None where it makes none."""
    try:
        # a copy: some handlers write into the messages
        handler(llama=_PromptTaker(llama), messages=copy.deepcopy(list(messages)), **kwargs)
    except _Stop as stop:
        return None if stop.prompt is None else _tokens(llama, stop.prompt)
    except Exception:  # a template that refuses these messages; the real call says why
        return None
    return None


def _n_common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y),
                min(len(a), len(b)))  # fmt: skip


def _n_system(messages: Sequence[Any]) -> int:
    """Leading messages of the system."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or message.get("role") not in SYSTEM_ROLES:
            return i
    return len(messages)


def system_prefix(
    llama: Any, handler: Callable[..., Any], messages: Sequence[Any], **kwargs: Any
) -> list[int]:
    """The tokens of a chat's system turn, with which its prompt begins.

    They are what the prompt has in common with two others that go on differently after the system
    messages. So they end where the words of the user begin: the header of the user's turn belongs
    to them, and tools where the template puts them there.

    Args:
        llama: the model whose tokenizer the handler uses. Nothing is evaluated.
        handler: a chat handler of llama_cpp.
        messages: as for create_chat_completion.
        **kwargs: what the handler gets besides llama and messages.

    Returns:
        Tokens; none where the chat does not begin with a message of the system, where the handler
        does not go through create_completion (multimodal ones), or where its template refuses
        such messages.
    """
    n_system = _n_system(messages)
    if n_system == 0:
        return []
    if kwargs.get("stream"):  # a handler may not begin before it is iterated over
        kwargs["stream"] = False
    prompts = []
    for text in _PROBES:
        probe = [*messages[:n_system], {"role": "user", "content": text}]
        # the real prompt comes last: its messages may name images, which would be loaded
        prompt = _render(llama, handler, probe, kwargs)
        if prompt is None:
            return []
        prompts.append(prompt)
    if prompts[0] == prompts[1]:  # nothing shows where the user's words begin
        return []
    prompt = _render(llama, handler, messages, kwargs)
    if prompt is None:
        return []
    return prompt[: min(_n_common(prompt, other) for other in prompts)]
