"""Write a checkpoint as GGUF for llama.cpp, then have llama.cpp quantize it (Q4_0 by default).

    python benchmarks/make_gguf.py work/1.1b work/1.1b-q4_0.gguf
    python benchmarks/make_gguf.py work/1.1b work/1.1b.gguf --type F16

Needs llama-cpp-python, except for F16. The vocabulary is a stand-in: only speed and size are
compared.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import gguf
import numpy as np

from llama_onnx.exporter.model.checkpoint import Checkpoint
from llama_onnx.exporter.sources import open_checkpoint

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def gguf_name(name: str) -> str:
    if name in OUTER:
        return OUTER[name]
    _, _, layer, *rest = name.split(".")
    return f"blk.{layer}.{NAMES['.'.join(rest[:-1])]}.weight"


def write_f16(checkpoint: Checkpoint, path: Path) -> None:
    config = checkpoint.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("llama")
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [f"t{index}" for index in range(config.vocab_size - len(tokens))]
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)])
    shapes = config.tensor_shapes()
    for name, shape in shapes.items():
        nbytes = math.prod(shape) * _dtype(shape).itemsize
        writer.add_tensor_info(gguf_name(name), shape, _dtype(shape), nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, shape in shapes.items():  # one in memory at a time
        writer.write_tensor_data(checkpoint.tensor(name).rows(0, shape[0]).astype(_dtype(shape)))
    writer.close()


def _dtype(shape: tuple[int, ...]) -> np.dtype[np.floating]:
    return np.dtype(np.float32 if len(shape) == 1 else np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--type", default="Q4_0", help="llama.cpp's name: F16, Q4_0, Q4_K_M, ...")
    arguments = parser.parse_args()
    if arguments.type == "F16":
        write_f16(open_checkpoint(arguments.source), arguments.out)
        return
    import llama_cpp

    f16 = arguments.out.with_suffix(".f16.gguf")
    write_f16(open_checkpoint(arguments.source), f16)
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{arguments.type}")
    paths = str(f16).encode(), str(arguments.out).encode()
    if llama_cpp.llama_model_quantize(*paths, params):
        raise SystemExit("llama.cpp could not quantize the file.")
    f16.unlink()
    print(f"{arguments.out}: {arguments.out.stat().st_size / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
