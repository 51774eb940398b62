"""The demo's real model: padding changes nothing, the tokenizer is its own, and it answers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from vllm_flying.demo import checkpoint

pytest.importorskip("gguf", reason="the extra `demo` is not installed: gguf is missing")
try:
    checkpoint.gguf_file()
except FileNotFoundError as missing:
    pytest.skip(str(missing), allow_module_level=True)

TEXTS = ["In 2024, 12345 + 67 = 12412.", "  def f(x):\n\treturn x**2  # naïve ☃ 日本語", "It's ok, isn't it?   \n\n"]


@pytest.fixture(scope="module", autouse=True)
def the_file_is_read_once() -> Iterator[None]:
    """That takes half a minute; what is done with it comes after."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "read_gguf", cache(checkpoint.read_gguf))
        yield


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make_checkpoint(tmp_path_factory.mktemp("smollm2") / "padded")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoint.make_checkpoint(tmp_path_factory.mktemp("smollm2") / "plain", pad=False)


def load(directory: Path) -> Any:
    import torch
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def chat(tokenizer: Any, question: str) -> Any:
    messages = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def test_padded_model_gives_the_logits_of_the_plain_one_and_answers(padded: Path, plain: Path) -> None:
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(padded)
    wide, narrow = load(padded), load(plain)
    assert (wide.config.num_attention_heads, wide.config.num_key_value_heads, wide.config.head_dim) == (12, 4, 64)
    assert (narrow.config.num_attention_heads, narrow.config.num_key_value_heads) == (9, 3)
    prompt = chat(tokenizer, "What is the capital of France?")
    with torch.inference_mode():
        assert torch.allclose(wide(**prompt).logits, narrow(**prompt).logits, atol=1e-3)  # logits reach 38
        output = wide.generate(**prompt, max_new_tokens=16, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(output, skip_special_tokens=True)
    assert output[-1] == tokenizer.eos_token_id


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip_and_single_digits(padded: Path, text: str) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(padded)
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert all(len(piece) == 1 for piece in tokenizer.convert_ids_to_tokens(tokens) if any(map(str.isdigit, piece)))


def test_interrupted_conversion_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.make_checkpoint(tmp_path / "model")
    assert list(tmp_path.iterdir()) == []
