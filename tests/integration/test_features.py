"""What llama_cpp.Llama does goes on working on an evicted cache."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from integration.decoding import greedy, open_llama, tokens_of

pytestmark = pytest.mark.model
TEXT = (
    "The lighthouse keeper wrote down the weather every evening, and the notebook was never "
    "lost, although the sea took the boat, the bell and most of the roof. "
) * 6 + "\nThe keeper wrote down"


@pytest.fixture(scope="module")
def llm(smollm2: Path) -> Any:
    """One model for this file; a budget far below the prompts."""
    return open_llama(smollm2, kv_budget=64, lookahead="pseudo", n_batch=512)


@pytest.fixture(autouse=True)
def fresh(llm: Any) -> None:
    llm.reset()


def streamed(chunks: Any) -> str:
    return "".join(chunk["choices"][0]["text"] for chunk in chunks)


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_streaming_gives_the_text_of_not_streaming(smollm2: Path, lookahead: str) -> None:
    settings = {"max_tokens": 24, "temperature": 0.9, "seed": 11}
    llm = open_llama(smollm2, kv_budget=64, lookahead=lookahead, n_batch=512)
    whole = llm.create_completion(TEXT, **settings)["choices"][0]["text"]
    assert llm.kv_stats().n_evictions == 1
    llm.reset()
    assert streamed(llm.create_completion(TEXT, stream=True, **settings)) == whole
    assert len(whole) > 20


def test_abandoned_stream_leaves_the_model_usable(llm: Any) -> None:
    expected = llm.create_completion(TEXT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    llm.reset()
    chunks = llm.create_completion(TEXT, max_tokens=30, temperature=0.0, stream=True)
    next(chunks)
    chunks.close()
    llm.reset()
    again = llm.create_completion(TEXT, max_tokens=8, temperature=0.0)["choices"][0]["text"]
    assert again == expected


def test_seeds(llm: Any) -> None:
    def text(seed: int) -> str:
        llm.reset()
        done = llm.create_completion(TEXT, max_tokens=16, temperature=1.5, seed=seed)
        return done["choices"][0]["text"]

    assert text(3) == text(3)
    assert len({text(seed) for seed in (3, 4, 5)}) > 1


def test_grammar(llm: Any) -> None:
    from llama_cpp import LlamaGrammar

    grammar = LlamaGrammar.from_string('root ::= "[" [0-9]{12} "]"', verbose=False)
    done = llm.create_completion(TEXT, max_tokens=40, temperature=0.7, seed=1, grammar=grammar)
    text = done["choices"][0]["text"]
    assert len(text) == 14 and text[1:-1].isdigit() and (text[0], text[-1]) == ("[", "]")


def test_stop_strings(llm: Any) -> None:
    whole = llm.create_completion(TEXT, max_tokens=20, temperature=0.0)["choices"][0]["text"]
    stop = whole.split()[2]
    llm.reset()
    done = llm.create_completion(TEXT, max_tokens=20, temperature=0.0, stop=[stop])["choices"][0]
    assert done["finish_reason"] == "stop"
    assert done["text"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("lookahead", ["deferred", "pseudo"])
def test_logprobs(smollm2: Path, lookahead: str) -> None:
    settings = {"max_tokens": 12, "temperature": 0.0, "logprobs": 2}

    def logprobs(**kwargs: Any) -> dict[str, Any]:
        model = open_llama(smollm2, logits_all=True, n_ctx=512, **kwargs)
        return model.create_completion(TEXT, **settings)["choices"][0]["logprobs"]

    full = logprobs()
    evicted = logprobs(kv_budget=64, lookahead=lookahead)
    assert len(evicted["tokens"]) == len(evicted["token_logprobs"]) == 12
    # the first token comes from the logits of the prompt, which no eviction touches
    assert evicted["token_logprobs"][0] == full["token_logprobs"][0]
    if lookahead == "deferred":
        assert evicted["token_logprobs"][:9] == full["token_logprobs"][:9]
    assert evicted["token_logprobs"] != full["token_logprobs"]
    same = logprobs(kv_budget=512, lookahead=lookahead)
    assert same["token_logprobs"] == full["token_logprobs"]


def test_chat(llm: Any) -> None:
    messages = [{"role": "user", "content": f"{TEXT}\n\nWhat did the sea take?"}]
    done = llm.create_chat_completion(messages, max_tokens=16, temperature=0.0)
    text = done["choices"][0]["message"]["content"]
    assert len(text) > 10 and llm.kv_stats().n_evictions >= 1
    llm.reset()
    chunks = llm.create_chat_completion(messages, max_tokens=16, temperature=0.0, stream=True)
    assert "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks) == text
    answer = {"role": "assistant", "content": text}
    more = [*messages, answer, {"role": "user", "content": "And what did it leave?"}]
    n_before = llm.n_tokens
    totals: list[int] = []
    llm.progress = lambda n_done, n_total: totals.append(n_total)
    llm.create_chat_completion(more, max_tokens=8, temperature=0.0)
    llm.progress = None
    assert len(totals) == 1 and totals[0] < 60 < n_before, "only the new turn is read"


def test_chat_json(llm: Any) -> None:
    messages = [{"role": "user", "content": f"{TEXT}\n\nAnswer in JSON: who wrote?"}]
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["n"],
    }
    done = llm.create_chat_completion(
        messages, max_tokens=60, temperature=0.0,
        response_format={"type": "json_object", "schema": schema},
    )  # fmt: skip
    assert 0 <= json.loads(done["choices"][0]["message"]["content"])["n"] <= 99


def test_chat_handler_and_positional_path(smollm2: Path) -> None:
    from laq_gguf import Llama

    seen = []

    def handler(*, llama: Any, messages: Any, **kwargs: Any) -> dict[str, Any]:
        seen.append((llama, messages))
        return {"choices": []}

    llm = Llama(str(smollm2), kv_budget=64, chat_handler=handler, verbose=False)
    assert llm.create_chat_completion([{"role": "user", "content": "?"}]) == {"choices": []}
    assert seen[0][0] is llm


def test_flash_attention_is_on_by_default(tiny_gguf: Callable[..., Path]) -> None:
    import llama_cpp

    enabled = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
    assert open_llama(tiny_gguf("llama")).context_params.flash_attn_type == enabled
    off = open_llama(tiny_gguf("llama"), flash_attn=False)
    assert off.context_params.flash_attn_type == llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED


def test_pickle_carries_the_settings(tiny_gguf: Callable[..., Path]) -> None:
    llm = open_llama(
        tiny_gguf("llama"), kv_budget=0.125, kv_policy="laq", lookahead="pseudo", pinned=[(9, 12)]
    )
    copy = pickle.loads(pickle.dumps(llm))
    assert type(copy) is type(llm) and copy.laq_config == llm.laq_config
    assert copy.kv_budget == llm.kv_budget == 128
    prompt = tokens_of(300)
    assert greedy(copy, prompt, 10) == greedy(llm, prompt, 10)


def test_from_pretrained(
    tiny_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    from laq_gguf import Llama

    path = tiny_gguf("llama")

    class Repo:
        def ls(self, repo_id: str, recursive: bool) -> list[dict[str, str]]:
            return [{"name": f"{repo_id}/{path.name}"}, {"name": f"{repo_id}/README.md"}]

    monkeypatch.setattr(huggingface_hub, "HfFileSystem", Repo)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda **kwargs: str(path))
    llm = Llama.from_pretrained(
        "some/model", "*.gguf", local_dir=str(path.parent), kv_budget=64, verbose=False
    )
    assert type(llm) is Llama and llm.kv_budget == 64
    with pytest.raises(TypeError, match="kv_bugdet"):
        Llama.from_pretrained("some/model", "*.gguf", local_dir=str(path.parent), kv_bugdet=64)


def test_sending_tokens_into_generate(tiny_gguf: Callable[..., Path]) -> None:
    """llama_cpp takes what is sent for a draft: it keeps what the model would have said."""

    def answers(**kwargs: Any) -> tuple[list[int], int]:
        model = open_llama(tiny_gguf("llama"), logits_all=True, **kwargs)
        tokens = model.generate(tokens_of(200), temp=0.0)
        got = [next(tokens)]
        got.append(tokens.send([got[0], 300]))
        got += [next(tokens), next(tokens)]
        tokens.close()
        return got, model.n_tokens

    assert answers(kv_budget=512, lookahead="pseudo") == answers()
    (_, n_tokens), (_, expected) = answers(kv_budget=64, lookahead="pseudo"), answers()
    assert n_tokens == expected
