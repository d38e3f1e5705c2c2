"""llama.cpp's C API by ctypes, for the libraries of the npm package @node-llama-cpp/linux-x64.

That package has a build for each instruction set; ggml loads the best one for the processor. The
structures are those of include/llama.h in llama.cpp 0.5.0, and `open_library` checks the defaults
that the library puts into them, so that another release is noticed.
"""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_bool, c_char_p, c_float, c_int, c_int32, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

VERSION = "3.22.1"
PACKAGE = f"@node-llama-cpp/linux-x64@{VERSION}"
LLAMA_CPP = "0.5.0"

FTYPES = {"F32": 0, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}


class ModelParams(ctypes.Structure):
    """`struct llama_model_params`."""

    _fields_ = (
        ("devices", c_void_p),
        ("tensor_buft_overrides", c_void_p),
        ("n_gpu_layers", c_int32),
        ("split_mode", c_int),
        ("load_mode", c_int),
        ("lazy_mode", c_int),
        ("main_gpu", c_int32),
        ("tensor_split", c_void_p),
        ("progress_callback", c_void_p),
        ("progress_callback_user_data", c_void_p),
        ("kv_overrides", c_void_p),
        *((name, c_bool) for name in ("vocab_only", "check_tensors", "use_extra_bufts")),
        *((name, c_bool) for name in ("no_host", "no_alloc", "load_mtp")),
    )


class ContextParams(ctypes.Structure):
    """`struct llama_context_params`."""

    _fields_ = (
        *((name, c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "n_rs_seq")),
        *((name, c_uint32) for name in ("n_outputs_max", "n_outputs_max_per_seq")),
        *((name, c_int32) for name in ("n_threads", "n_threads_batch")),
        *((name, c_int) for name in ("ctx_type", "rope_scaling_type", "pooling_type")),
        *((name, c_int) for name in ("attention_type", "flash_attn_type")),
        *((name, c_float) for name in ("rope_freq_base", "rope_freq_scale")),
        *((name, c_float) for name in ("yarn_ext_factor", "yarn_attn_factor")),
        *((name, c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c_uint32),
        ("defrag_thold", c_float),
        ("cb_eval", c_void_p),
        ("cb_eval_user_data", c_void_p),
        ("type_k", c_int),
        ("type_v", c_int),
        ("abort_callback", c_void_p),
        ("abort_callback_data", c_void_p),
        *((name, c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload")),
        *((name, c_bool) for name in ("swa_full", "kv_unified")),
        ("samplers", c_void_p),
        ("n_samplers", c_size_t),
        ("ctx_other", c_void_p),
    )


class ImatrixData(ctypes.Structure):
    """`struct llama_model_imatrix_data`."""

    _fields_ = (("name", c_char_p), ("data", POINTER(c_float)), ("size", c_size_t))


class QuantizeParams(ctypes.Structure):
    """`struct llama_model_quantize_params`."""

    _fields_ = (
        ("nthread", c_int32),
        ("ftype", c_int),
        ("output_tensor_type", c_int),
        ("token_embedding_type", c_int),
        *((name, c_bool) for name in ("allow_requantize", "quantize_output_tensor", "only_copy")),
        *((name, c_bool) for name in ("pure", "keep_split", "dry_run")),
        ("imatrix", POINTER(ImatrixData)),
        ("kv_overrides", c_void_p),
        ("tt_overrides", c_void_p),
        ("prune_layers", c_void_p),
        ("max_buf_size", c_size_t),
    )


class Batch(ctypes.Structure):
    """`struct llama_batch`."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", c_void_p),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(ctypes.c_int8)),
    )


LogCallback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)
SILENCE = LogCallback(lambda *_: None)  # here, because it must live as long as the library

FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_quantize_default_params": (QuantizeParams, []),
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [LogCallback, c_void_p]),
    "llama_model_load_from_file": (c_void_p, [c_char_p, ModelParams]),
    "llama_init_from_model": (c_void_p, [c_void_p, ContextParams]),
    "llama_model_get_vocab": (c_void_p, [c_void_p]),
    "llama_vocab_n_tokens": (c_int32, [c_void_p]),
    "llama_get_memory": (c_void_p, [c_void_p]),
    "llama_memory_clear": (None, [c_void_p, c_bool]),
    "llama_batch_get_one": (Batch, [POINTER(c_int32), c_int32]),
    "llama_batch_init": (Batch, [c_int32, c_int32, c_int32]),
    "llama_batch_free": (None, [Batch]),
    "llama_decode": (c_int32, [c_void_p, Batch]),
    "llama_get_logits": (POINTER(c_float), [c_void_p]),
    "llama_get_logits_ith": (POINTER(c_float), [c_void_p, c_int32]),
    "llama_print_system_info": (c_char_p, []),
    "llama_model_quantize": (c_uint32, [c_char_p, c_char_p, POINTER(QuantizeParams)]),
}


def open_library(folder: Path) -> Any:
    """Load the libraries in `folder` and check that the structures above are theirs."""
    ggml = next(iter(sorted(folder.glob("libggml.v*.so"))))
    loader = ctypes.CDLL(str(ggml), ctypes.RTLD_GLOBAL)
    loader.ggml_backend_load_all_from_path.argtypes = [c_char_p]
    loader.ggml_backend_load_all_from_path.restype = None
    library = ctypes.CDLL(str(next(iter(sorted(folder.glob("libllama.v*.so"))))))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    check(library)
    library.llama_log_set(SILENCE, None)
    loader.ggml_backend_load_all_from_path(str(folder).encode())
    library.llama_backend_init()
    return library


def check(library: Any) -> None:
    """Raise if the defaults do not look as they do in llama.cpp's source."""
    context = library.llama_context_default_params()
    model = library.llama_model_default_params()
    quantize = library.llama_model_quantize_default_params()
    found: tuple[Any, ...] = (context.n_ctx, context.n_batch, context.type_k, context.defrag_thold)
    found += (context.offload_kqv, context.kv_unified, context.n_samplers, context.ctx_other)
    found += (model.n_gpu_layers, model.use_extra_bufts, model.load_mtp)
    found += (quantize.ftype, quantize.quantize_output_tensor, quantize.max_buf_size)
    if found != (512, 2048, 1, -1.0, True, False, 0, None, -1, True, False, 7, True, 8 << 30):
        raise SystemExit(f"the structures of this llama.cpp are not those of {LLAMA_CPP}: {found}.")
