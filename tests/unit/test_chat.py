"""The system turn of a chat, found by rendering it."""

import copy
import importlib
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from laq_gguf import _lib
from laq_gguf.chat import system_prefix

GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set prefix = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set prefix = '' %}{% set rest = messages %}{% endif %}"
    "{% for message in rest %}<start_of_turn>{{ message['role'] }}\n"
    "{% if loop.first %}{{ prefix }}{% endif %}{{ message['content'] | trim }}<end_of_turn>\n"
    "{% endfor %}<start_of_turn>model\n"
)
SYSTEM = {"role": "system", "content": "Answer in one word."}
USER = {"role": "user", "content": "Why is the sky blue?"}
CHAT = [SYSTEM, USER, {"role": "assistant", "content": "Light."}, {"role": "user", "content": "?"}]
#: what the template puts between the system's words and the user's
BOUNDARY = {
    "chatml": "<|im_end|>\n<|im_start|>user\n",
    "llama-3": "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n",
    "gemma": "\n\n",
}


class FakeLlama:
    """A tokenizer that merges: runs of blanks, or of word characters, with up to two newlines
    before them. Whatever touches the context fails."""

    verbose = False
    metadata: dict[str, str] = {}  # noqa: RUF012
    pattern = re.compile(r"<[|\w]+>|\n{0,2}\w+|\s+|.", re.DOTALL)

    def __init__(self, add_bos: bool = False) -> None:
        self._model = SimpleNamespace(token_cls=lambda: -1, add_bos_token=lambda: add_bos)
        self.pieces: list[str] = ["<s>", "</s>"]
        self.touched: list[str] = []

    def tokenize(self, text: bytes, add_bos: bool = True, special: bool = False) -> list[int]:
        pieces = self.pattern.findall(text.decode("utf-8"))
        for piece in pieces:
            if piece not in self.pieces:
                self.pieces.append(piece)
        return [0] * add_bos + [self.pieces.index(piece) for piece in pieces]

    def detokenize(self, tokens: list[int]) -> bytes:
        return "".join(self.pieces[token] for token in tokens).encode("utf-8")

    def token_bos(self) -> int:
        return 0

    def token_eos(self) -> int:
        return 1

    def _touch(self, *_: Any, **__: Any) -> None:
        self.touched.append("touched")

    eval = reset = generate = create_completion = _create_completion = __call__ = _touch
    load_state = create_chat_completion = embed = sample = _touch

    @property
    def model(self) -> None:
        self.touched.append("model")

    @property
    def _ctx(self) -> None:
        self.touched.append("_ctx")


@pytest.fixture(scope="session")
def formats() -> Any:
    """llama_cpp.llama_chat_format"""
    if _lib.select_library() is None:
        pytest.skip(f"no libllama in {_lib.library_dir()}: pip install . or set LAQ_LIB_PATH")
    return importlib.import_module("llama_cpp.llama_chat_format")


def _handler(formats: Any, name: str) -> Callable[..., Any]:
    template = {
        "chatml": formats.CHATML_CHAT_TEMPLATE,
        "llama-3": formats.LLAMA3_INSTRUCT_CHAT_TEMPLATE,
        "mistral": formats.MISTRAL_INSTRUCT_CHAT_TEMPLATE,
        "gemma": GEMMA,
    }[name]
    return formats.Jinja2ChatFormatter(template, "</s>", "<s>").to_chat_handler()


def _text(llama: Any, handler: Callable[..., Any], messages: list, **kwargs: Any) -> str:
    """The text of the prefix."""
    prefix = system_prefix(llama, handler, messages, **kwargs)
    assert prefix

    class Taken(Exception):
        pass

    def take(prompt: Any, **_: Any) -> None:
        raise Taken(prompt)

    taker = copy.copy(llama)
    taker.create_completion = take
    with pytest.raises(Taken) as taken:
        handler(llama=taker, messages=messages, **kwargs)
    prompt = taken.value.args[0]
    if isinstance(prompt, str):
        prompt = llama.tokenize(prompt.encode(), add_bos=llama._model.add_bos_token())
    assert len(prefix) < len(prompt) and prefix == prompt[: len(prefix)]
    return llama.detokenize(prefix).decode("utf-8")


@pytest.mark.parametrize("name", list(BOUNDARY))
@pytest.mark.parametrize("n_messages", [2, 4])
def test_prefix_ends_where_the_user_begins(formats: Any, name: str, n_messages: int) -> None:
    llama, handler = FakeLlama(), _handler(formats, name)
    messages = CHAT[:n_messages]
    text = _text(llama, handler, messages)
    # the tokenizer merges the last newlines with the user's first word
    assert text.endswith(SYSTEM["content"] + BOUNDARY[name].rstrip("\n"))
    assert llama.touched == [] and messages == CHAT[:n_messages]


@pytest.mark.parametrize("name", list(BOUNDARY))
@pytest.mark.parametrize("first", ["What is this? And that?", "1 + 1 = ?", "W", "1", "<", "é", ""])
def test_words_of_the_user_never_belong_to_it(formats: Any, name: str, first: str) -> None:
    handler = _handler(formats, name)
    text = _text(FakeLlama(), handler, [SYSTEM, {"role": "user", "content": first}])
    assert text.rstrip("\n").endswith(SYSTEM["content"] + BOUNDARY[name].rstrip("\n"))


def test_several_system_messages(formats: Any) -> None:
    developer = {"role": "developer", "content": "No jokes."}
    text = _text(FakeLlama(), _handler(formats, "chatml"), [SYSTEM, developer, USER])
    assert text.endswith("<|im_start|>developer\nNo jokes." + BOUNDARY["chatml"].rstrip("\n"))


def test_system_message_later_in_the_chat_is_not_leading(formats: Any) -> None:
    text = _text(FakeLlama(), _handler(formats, "chatml"), [SYSTEM, USER, SYSTEM, USER])
    assert text.count("system") == 1


def test_system_message_alone(formats: Any) -> None:
    text = _text(FakeLlama(), _handler(formats, "chatml"), [SYSTEM])
    assert text.endswith(SYSTEM["content"] + "<|im_end|>\n<|im_start|>")


def test_tools_belong_to_it_where_the_template_puts_them_first(formats: Any) -> None:
    template = "{{ tools }}\n" + formats.CHATML_CHAT_TEMPLATE
    handler = formats.Jinja2ChatFormatter(template, "</s>", "<s>").to_chat_handler()
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    assert "look_up" in _text(FakeLlama(), handler, CHAT, tools=tools, tool_choice="auto")


@pytest.mark.parametrize("messages", [[], [USER], CHAT[1:], [USER, SYSTEM], ["text"]])
def test_chats_without_a_system_turn(formats: Any, messages: list) -> None:
    assert system_prefix(FakeLlama(), _handler(formats, "chatml"), messages) == []


def test_template_that_refuses(formats: Any) -> None:
    # no system role at all
    assert system_prefix(FakeLlama(), _handler(formats, "mistral"), CHAT) == []
    # these messages: the real call says what is wrong
    broken = [SYSTEM, {"role": "user"}]
    assert system_prefix(FakeLlama(), _handler(formats, "chatml"), broken) == []


def test_template_that_drops_the_user(formats: Any) -> None:
    template = "{{ messages[0]['content'] }}"
    handler = formats.Jinja2ChatFormatter(template, "</s>", "<s>").to_chat_handler()
    assert system_prefix(FakeLlama(), handler, CHAT) == []


@pytest.mark.parametrize("name", ["llama-2", "chatml", "zephyr", "llama-3"])
def test_registered_formats(formats: Any, name: str) -> None:
    text = _text(FakeLlama(), formats.get_chat_completion_handler(name), CHAT)
    assert SYSTEM["content"] in text and "sky" not in text


@pytest.mark.parametrize("name", ["functionary", "chatml-function-calling"])
@pytest.mark.parametrize("add_bos", [True, False])
def test_handlers_that_give_a_text(formats: Any, name: str, add_bos: bool) -> None:
    chat = [*CHAT, {"role": "function", "name": "look_up", "content": "1"}]
    before = copy.deepcopy(chat)
    handler = formats.get_chat_completion_handler(name)
    llama = FakeLlama(add_bos)
    prefix = system_prefix(llama, handler, chat)
    assert chat == before, "the handler's changes must not reach the caller"
    text = _text(llama, handler, chat[:4])
    assert prefix and text.startswith("<s>") == add_bos
    assert SYSTEM["content"] in text and "sky" not in text and llama.touched == []


def test_streaming_handlers(formats: Any) -> None:
    handler = _handler(formats, "chatml")
    expected = system_prefix(FakeLlama(), handler, CHAT)
    assert system_prefix(FakeLlama(), handler, CHAT, stream=True) == expected

    def lazy(*, llama: Any, messages: list, stream: bool = False) -> Any:
        if not stream:
            return handler(llama=llama, messages=messages)
        return (chunk for chunk in handler(llama=llama, messages=messages, stream=True))

    assert system_prefix(FakeLlama(), lazy, CHAT, stream=True) == expected


@pytest.mark.parametrize(
    "use",
    [
        lambda llama: llama.model,
        lambda llama: llama._ctx.kv_cache_clear(),
        lambda llama: llama.reset(),
        lambda llama: llama.eval([1, 2]),
        lambda llama: list(llama.generate([1, 2])),
        lambda llama: llama.load_state(None),
        lambda llama: llama.create_chat_completion([]),
        lambda llama: setattr(llama, "n_tokens", 0),
        lambda llama: llama.create_completion("a", suffix="b"),
        lambda llama: None,
    ],
)
def test_handlers_that_go_another_way(use: Callable[[Any], Any]) -> None:
    llama = FakeLlama()
    rendered: list[Any] = []

    def handler(*, llama: Any, messages: list) -> None:
        rendered.append(messages)
        try:
            use(llama)
        except Exception:  # a handler that goes on whatever happens
            llama.eval([1])

    assert system_prefix(llama, handler, CHAT) == []
    assert llama.touched == [] and not hasattr(llama, "n_tokens")
    assert all(messages != CHAT for messages in rendered), "images of the chat would be loaded"


def test_multimodal_handlers_load_nothing(formats: Any) -> None:
    handler = formats.Llava15ChatHandler.__new__(formats.Llava15ChatHandler)
    handler.clip_model_path, handler.verbose, handler.mtmd_ctx = "none", False, None
    handler._mtmd_cpp = importlib.import_module("llama_cpp.mtmd_cpp")
    llama = FakeLlama()
    assert system_prefix(llama, handler, CHAT) == []
    assert llama.touched == [] and handler.mtmd_ctx is None


def test_real_tokenizer(formats: Any, tiny_gguf: Callable[..., Path]) -> None:
    import llama_cpp

    llama = llama_cpp.Llama(str(tiny_gguf()), vocab_only=True, verbose=False)
    handler = _handler(formats, "chatml")
    for first in ("Why?", " Why?", "\nWhy?", "W", "1"):
        prefix = system_prefix(llama, handler, [SYSTEM, {"role": "user", "content": first}])
        tokens = llama.tokenize(
            f"<|im_start|>system\n{SYSTEM['content']}{BOUNDARY['chatml']}{first}".encode(),
            add_bos=False, special=True,
        )  # fmt: skip
        text = llama.detokenize(tokens[: len(prefix)]).decode()
        assert text.strip().endswith(SYSTEM["content"] + BOUNDARY["chatml"].strip())
    llama.close()
