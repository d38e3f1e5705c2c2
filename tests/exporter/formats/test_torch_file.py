"""pytorch_model.bin: the same rows as safetensors, nothing run, nothing mapped for longer."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

from llama_onnx.exporter.formats.torch_file import read_torch_file
from llama_onnx.exporter.model.checkpoint import check_tensors
from llama_onnx.exporter.packaging.export import export_package
from llama_onnx.exporter.packaging.options import Options
from llama_onnx.exporter.sources import open_checkpoint
from llama_onnx.targets.cpu import TARGET
from llama_onnx.targets.errors import CheckpointError, UnsupportedError
from tests.support import tiny


def saved(path: Path, content: Any, **options: Any) -> Path:
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_every_row_is_the_one_written(tmp_path: Path, dtype: str, shards: int) -> None:
    folder = tmp_path / "ä ü 日本"
    checkpoint = open_checkpoint(
        tiny.write_huggingface(folder, dtype=dtype, shards=shards, pickled=True)
    )
    check_tensors(checkpoint)
    assert not list(folder.glob("*.safetensors"))
    for name, values in tiny.weights(tiny.GQA).items():
        expected = values.astype(tiny._NUMPY_DTYPES[dtype]).astype(np.float32)
        tensor = checkpoint.tensor(name)
        assert (tensor.shape, tensor.dtype) == (values.shape, dtype.upper().replace("P", ""))
        np.testing.assert_array_equal(tensor.rows(0, len(values)), expected)
        np.testing.assert_array_equal(tensor.rows(3, 11), expected[3:11])


def test_the_package_is_that_of_the_same_weights_as_safetensors(tmp_path: Path) -> None:
    for kind in ("safetensors", "bin"):
        source = tiny.write_huggingface(tmp_path / kind, pickled=kind == "bin", shards=2)
        export_package(source, tmp_path / f"{kind}-out", TARGET, Options("int4", quantizer="rtn"))
    for name in ("model.onnx", "model.onnx.data"):
        first, second = (tmp_path / f"{kind}-out" / name for kind in ("safetensors", "bin"))
        assert first.read_bytes() == second.read_bytes()


def test_safetensors_win_where_both_are(tmp_path: Path) -> None:
    tiny.write_huggingface(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never opened")
    assert "model.safetensors" in open_checkpoint(tmp_path).fingerprint()


def test_views_transposed_shared_and_sliced(tmp_path: Path) -> None:
    base = torch.arange(60, dtype=torch.float32).reshape(10, 6)
    content = {
        "base": base,
        "tied": base,
        "transposed": base.T,
        "slice": base[2:5],
        "columns": base[:, 1:4],
        "repeated": base[:1].expand(4, 6),
        "vector": base[:, 2],
        "parameter": torch.nn.Parameter(base + 1),
    }
    tensors = read_torch_file(saved(tmp_path / "x.bin", content))
    for name, value in content.items():
        expected = value.detach().numpy()
        for start, stop in ((0, len(expected)), (1, 3), (2, 3)):
            rows = tensors[name].rows(start, stop)
            np.testing.assert_array_equal(rows, expected[start:stop])
            assert rows.flags.c_contiguous


class Harm:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_does_not_run_it(tmp_path: Path) -> None:
    mark = tmp_path / "harm was done"
    path = saved(tmp_path / "evil.bin", {"weight": torch.ones(2), "other": Harm(mark)})
    with pytest.raises(CheckpointError, match=r"mkdir .*could run any code") as failure:
        read_torch_file(path)
    assert "\n" not in str(failure.value)
    assert not mark.exists()
    torch.load(path, weights_only=False)
    assert mark.exists()  # the file was harmful


def test_a_pickle_that_runs_code_in_a_folder_stops_the_export(tmp_path: Path) -> None:
    source, mark = tiny.write_huggingface(tmp_path / "source", pickled=True), tmp_path / "harm"
    saved(source / "pytorch_model.bin", {"weight": Harm(mark)})
    with pytest.raises(CheckpointError, match="could run any code"):
        export_package(source, tmp_path / "out", TARGET, Options("fp32"))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["source"]


def test_the_old_format_is_refused_with_the_reason(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.ones(2)}, _use_new_zipfile_serialization=False)
    with pytest.raises(UnsupportedError, match=r"before PyTorch 1\.6"):
        read_torch_file(path)


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_a_truncated_zip_is_one_sentence(tmp_path: Path, kept: float) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.ones(500, 7)})
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(CheckpointError, match="truncated or damaged") as failure:
        read_torch_file(path)
    assert "\n" not in str(failure.value)


@pytest.mark.parametrize("seed", range(40))
def test_damage_never_escapes_as_a_traceback(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    path = saved(tmp_path / "x.bin", {"w": torch.ones(5, 7), "v": torch.ones(3)})
    data = bytearray(path.read_bytes())
    place = int(rng.integers(40, 900))
    data[place : place + 4] = rng.bytes(4)
    path.write_bytes(data)
    try:
        for tensor in read_torch_file(path).values():
            tensor.rows(0, tensor.shape[0])
    except (CheckpointError, UnsupportedError) as error:
        assert "\n" not in str(error)


def test_a_file_cut_after_it_was_opened(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.ones(500, 7)})
    tensor = read_torch_file(path)["w"]
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(CheckpointError, match="ends too early"):
        tensor.rows(0, 500)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(2)], "holds list instead of a dict"),
        ({}, "holds dict instead"),
        ({"state_dict": {"w": torch.ones(2)}}, "state_dict is dict, not a tensor"),
        ({"w": torch.eye(3).to_sparse()}, "w is not stored as plain numbers"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, message: str) -> None:
    with pytest.raises((CheckpointError, UnsupportedError), match=message):
        read_torch_file(saved(tmp_path / "x.bin", content))


def test_a_dtype_that_is_no_float_is_refused_when_it_is_read(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.ones(2, dtype=torch.int8)})
    with pytest.raises(UnsupportedError, match="w is stored as int8"):
        read_torch_file(path)["w"].rows(0, 1)


def test_a_compressed_zip_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "x.bin", {"w": torch.ones(2)})
    with zipfile.ZipFile(path) as plain, zipfile.ZipFile(tmp_path / "y.bin", "w", 8) as packed:
        for name in plain.namelist():
            packed.writestr(name, plain.read(name))
    with pytest.raises(UnsupportedError, match="is compressed"):
        read_torch_file(tmp_path / "y.bin")


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's /proc")
def test_reading_leaves_nothing_resident(tmp_path: Path) -> None:
    shape = (8192, 2048)  # 64 MiB
    path = saved(tmp_path / "x.bin", {"w": torch.ones(shape)})
    tensor = read_torch_file(path)["w"]
    tensor.rows(0, 64)

    def resident() -> int:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGESIZE")

    before = resident()
    for start in range(0, shape[0], 64):
        assert tensor.rows(start, start + 64)[0, 0] == 1
    assert resident() - before < 8 << 20
    assert path.name not in Path("/proc/self/maps").read_text()


def test_bfloat16_bits_are_those_of_numpy(tmp_path: Path) -> None:
    values = np.arange(-4, 4, 0.37, dtype=np.float32).astype(ml_dtypes.bfloat16)
    tiny.save_torch({"w": values}, tmp_path / "x.bin")
    rows = read_torch_file(tmp_path / "x.bin")["w"].rows(0, len(values))
    np.testing.assert_array_equal(rows, values.astype(np.float32))
