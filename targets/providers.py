"""The execution providers. To add one, add an entry here."""

from __future__ import annotations

from llama_onnx.targets.errors import UsageError
from llama_onnx.targets.provider import Library, Provider

_CUDA = 'run `pip install "onnxruntime-gpu[cuda,cudnn]"`'
_DRIVER = "install NVIDIA's driver"

CPU = Provider(
    name="cpu",
    ort_name="CPUExecutionProvider",
    genai_name=None,
    device="CPU",
    wheel="onnxruntime",
    genai_wheel="onnxruntime-genai",
    extra="cpu",
    platforms=("linux", "win32", "darwin"),
    views=True,
    # 0 makes ONNX Runtime count the physical cores. By default genai uses half of the logical ones,
    # which is half of a machine without hyper-threading.
    session_options={"intra_op_num_threads": 0},
)

CUDA = Provider(
    name="cuda",
    ort_name="CUDAExecutionProvider",
    genai_name="cuda",
    device="CUDA",
    wheel="onnxruntime-gpu",
    genai_wheel="onnxruntime-genai-cuda",
    extra="cuda",
    platforms=("linux", "win32"),
    ort_device="cuda",
    views=True,
    # The libraries that onnxruntime-gpu 1.31 and onnxruntime-genai-cuda 0.18 are linked with
    # (CUDA 13). cuDNN is loaded when an operator needs it, and no operator of a Llama does.
    libraries={
        "linux": (
            Library("libcuda.so.1", _DRIVER),
            Library("libcudart.so.13", _CUDA),
            Library("libcublasLt.so.13", _CUDA),
            Library("libcublas.so.13", _CUDA),
            Library("libcurand.so.10", _CUDA),
            Library("libcufft.so.12", _CUDA),
        ),
        "win32": (
            Library("nvcuda.dll", _DRIVER),
            Library("cudart64_13.dll", _CUDA),
            Library("cublasLt64_13.dll", _CUDA),
            Library("cublas64_13.dll", _CUDA),
            Library("cufft64_12.dll", _CUDA),
        ),
    },
)

DIRECTML = Provider(
    name="directml",
    ort_name="DmlExecutionProvider",
    genai_name="dml",
    device="DirectML",
    wheel="onnxruntime-directml",
    # onnxruntime-genai-directml needs an onnxruntime-directml that was never published.
    genai_wheel="onnxruntime-genai-winml",
    extra="directml",
    platforms=("win32",),
    ort_device="dml",
    # DmlOperatorGroupQueryAttention assumes an empty cache when there is more than one token.
    continues=False,
    # Capture is on in onnxruntime-genai unless it is turned off. Then early packages do not open,
    # and on some devices a captured graph computes wrong logits, by genai's own comments.
    # Without a device_id, ONNX Runtime asks DXCore, which older Windows and Wine do not have.
    provider_options={"device_id": "0", "enable_graph_capture": "0"},
    other_options={"enable_graph_capture": "1"},
    libraries={"win32": (Library("d3d12.dll", "update Windows and the graphics driver"),)},
)

WEBGPU = Provider(
    name="webgpu",
    ort_name="WebGpuExecutionProvider",
    genai_name="webgpu",
    device="WebGPU",
    wheel="onnxruntime-webgpu",
    # onnxruntime-genai depends on the CPU wheel of onnxruntime, which would overwrite this one.
    genai_wheel=None,
    extra="webgpu",
    platforms=("linux", "win32", "darwin"),
    libraries={
        "linux": (Library("libvulkan.so.1", "install a Vulkan driver and its loader"),),
        "win32": (Library("d3d12.dll", "update Windows and the graphics driver"),),
    },
)

PROVIDERS = {provider.name: provider for provider in (CPU, CUDA, DIRECTML, WEBGPU)}
"""Name on the command line -> provider."""


def provider_of(ort_name: str) -> Provider | None:
    """Return the provider that ONNX Runtime calls `ort_name`, or None if it is not known here."""
    return next((one for one in PROVIDERS.values() if one.ort_name == ort_name), None)


def get_provider(name: str) -> Provider:
    """Return the provider called `name`. Raises `UsageError`, listing the known ones."""
    try:
        return PROVIDERS[name]
    except (KeyError, TypeError):
        raise UsageError(
            f"there is no provider {name!r}: choose one of {', '.join(PROVIDERS)}."
        ) from None
