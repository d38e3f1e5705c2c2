"""Packages of a stranger: a sound one, changed in every way that we could think of.

Each change is made by a forger: sizes and hashes in the manifest agree with the files.
`python -m tests.support.hostile_packages` prints how many there are of each kind.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file

from llama_onnx.targets.listing import hash_file

Change = Callable[[Path], object]

SOUND = Path(__file__).parent / "earlier_packages" / "0.1.0-int4"
"""A certified package of one layer."""

MANIFEST, SETTINGS = "manifest.json", "genai_config.json"
CERTIFICATE, REFERENCE = "parity/certificate.json", "parity/reference.safetensors"


def read(package: Path, name: str) -> Any:
    return json.loads((package / name).read_text("utf-8"))


def write(package: Path, name: str, content: Any) -> None:
    (package / name).write_text(json.dumps(content), "utf-8")


def agree(package: Path, *more: str) -> None:
    """Let the manifest, and the certificate, list the files as they are, and `more` files."""
    certificate = read(package, CERTIFICATE)
    for name in certificate["files"]:
        certificate["files"][name] = hash_file(package / name)
    certificate["reference"]["sha256"] = hash_file(package / REFERENCE)
    write(package, CERTIFICATE, certificate)
    manifest = read(package, MANIFEST)
    for name in (*manifest["files"], *more):
        path = package / name
        if path.is_file():
            entry = {"size": path.stat().st_size, "sha256": hash_file(path)}
            manifest["files"][name] = entry
    write(package, MANIFEST, manifest)


# ---- genai_config.json ---------------------------------------------------------------------------


def _set(path: str, value: Any) -> Change:
    """Set the key at `path`, such as "model.decoder.filename", in genai_config.json."""

    def change(package: Path) -> None:
        settings = read(package, SETTINGS)
        *parents, key = path.split(".")
        place = settings
        for parent in parents:
            place = place.setdefault(parent, {})
        place[key] = value
        write(package, SETTINGS, settings)
        agree(package)

    return change


def _settings_text(edit: Callable[[str], str]) -> Change:
    def change(package: Path) -> None:
        file = package / SETTINGS
        file.write_text(edit(file.read_text("utf-8")), "utf-8")
        agree(package)

    return change


_OPTIONS = "model.decoder.session_options"
_PIPELINE = [{"decoder": {"filename": "/tmp/other.onnx"}}]

SETTINGS_CHANGES: Mapping[str, Change] = {
    **{
        f"{path.rpartition('.')[2]}={value!r}"[:60]: _set(path, value)
        for path, value in [
            (f"{_OPTIONS}.custom_ops_library", "/tmp/evil.so"),
            (f"{_OPTIONS}.custom_ops_library", "evil.so"),
            (f"{_OPTIONS}.enable_profiling", "/tmp/written"),
            (f"{_OPTIONS}.enable_profiling", ""),
            (f"{_OPTIONS}.profile_file_prefix", "/tmp/written"),
            (f"{_OPTIONS}.optimized_model_filepath", "/tmp/written.onnx"),
            (f"{_OPTIONS}.graph_optimization_level", "ORT_DISABLE_ALL"),
            (f"{_OPTIONS}.register_custom_ops", "f"),
            (f"{_OPTIONS}.ep_library_path", "/tmp/evil.so"),
            (f"{_OPTIONS}.config_entries", {"session.load_model_format": "ORT"}),
            (f"{_OPTIONS}.session.load_model_format", "ORT"),
            (f"{_OPTIONS}.log_id", "/tmp/log"),
            (f"{_OPTIONS}.log_severity_level", 0),
            (f"{_OPTIONS}.intra_op_num_threads", 10**9),
            (f"{_OPTIONS}.intra_op_num_threads", "1"),
            (f"{_OPTIONS}.intra_op_num_threads", True),
            (f"{_OPTIONS}.provider_options", {"cuda": {}}),
            (f"{_OPTIONS}.provider_options", [{"evil": {}}]),
            (f"{_OPTIONS}.provider_options", [{"dml": {"enable_graph_capture": "2"}}]),
            (f"{_OPTIONS}.provider_options", [{"dml": {"device_id": ["0"]}}]),
            (f"{_OPTIONS}.provider_options", [{"cuda": {"user_compute_stream": "1"}}]),
            (f"{_OPTIONS}.provider_options", [{"qnn": {"backend_path": "/tmp/evil.so"}}]),
            (f"{_OPTIONS}.provider_options", [{"OpenVINO": {"cache_dir": "/tmp"}}]),
            (f"{_OPTIONS}.provider_options", [{"cuda": {}}, {"cuda": {}}]),
            ("model.decoder.filename", "/etc/passwd"),
            ("model.decoder.filename", "../model.onnx"),
            ("model.decoder.filename", "model.onnx.data"),
            ("model.decoder.filename", "model.ort"),
            ("model.decoder.filename", ["model.onnx"]),
            ("model.decoder.pipeline", _PIPELINE),
            ("model.decoder.run_options", {"x": "y"}),
            ("model.decoder.inputs.input_ids", "other"),
            ("model.decoder.inputs.position_ids", "position_ids"),
            ("model.decoder.inputs.past_key_names", "past_%s_%s_%s"),
            ("model.decoder.outputs.logits", "other"),
            ("model.decoder.num_hidden_layers", 10**9),
            ("model.decoder.num_hidden_layers", -1),
            ("model.decoder.num_key_value_heads", 10**6),
            ("model.decoder.head_size", 10**6),
            ("model.decoder.hidden_size", "32"),
            ("model.encoder", {"filename": "/tmp/other.onnx"}),
            ("model.vision", {"filename": "/tmp/other.onnx"}),
            ("model.speech", {"config_filename": "/tmp/other.json"}),
            ("model.type", "phi3v"),
            ("model.type", "nonsense"),
            ("model.vocab_size", 2**31),
            ("model.vocab_size", 10),
            ("model.eos_token_id", [10**6]),
            ("model.eos_token_id", []),
            ("model.eos_token_id", "2"),
            ("model.pad_token_id", -1),
            ("model.bos_token_id", 288),
            ("model.context_length", 10**12),
            ("model.context_length", 1.5),
            ("search.max_length", 10**12),
            ("search.num_beams", 10**6),
            ("search.num_return_sequences", 10**6),
            ("search.past_present_share_buffer", "yes"),
            ("search.temperature", "hot"),
            ("search.chunk_size", 1),
            ("engine", {"x": 1}),
        ]
    },
    "a key twice": _settings_text(lambda s: s.replace('"type"', '"type": "llama", "type"', 1)),
    "an escape in a key": _settings_text(lambda s: s.replace('"type"', '"t\\u0079pe"', 1)),
    "a comment": _settings_text(lambda s: "// x\n" + s),
    "NaN": _settings_text(lambda s: s.replace('"top_p": 1.0', '"top_p": NaN')),
    "nesting": _settings_text(lambda s: "[" * 100_000),
    "a number of 5,000 digits": _settings_text(
        lambda s: s.replace('"min_length": 0', f'"min_length": {"1" * 5000}')
    ),
    "a list": _settings_text(lambda s: "[]"),
    "nothing": _settings_text(lambda s: ""),
}


# ---- model.onnx ----------------------------------------------------------------------------------


def _model(edit: Callable[[onnx.ModelProto], object]) -> Change:
    def change(package: Path) -> None:
        model = onnx.load(package / "model.onnx", load_external_data=False)
        edit(model)
        (package / "model.onnx").write_bytes(model.SerializeToString())
        agree(package)

    return change


def _node(operator: str, domain: str = "", **attributes: Any) -> Change:
    """Put a node with `operator` in front; it reads the ids."""

    def edit(model: onnx.ModelProto) -> None:
        node = helper.make_node(operator, ["input_ids"], ["extra"], domain=domain, **attributes)
        model.graph.node.insert(0, node)

    return _model(edit)


def _loop(model: onnx.ModelProto) -> None:
    initializer = numpy_helper.from_array(np.array(True), "true")
    model.graph.initializer.append(initializer)
    model.graph.node.insert(0, endless_loop("true"))


def endless_loop(true: str) -> onnx.NodeProto:
    """Return a loop without end: no trip count, and a condition, `true`, that stays true."""
    names = ("more", "value")
    kinds = {name: helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in names}
    body = helper.make_graph(
        [
            helper.make_node("Identity", ["more"], ["more out"]),
            helper.make_node("Identity", ["value"], ["value out"]),
        ],
        "body",
        [helper.make_tensor_value_info("step", TensorProto.INT64, []), *kinds.values()],
        [helper.make_tensor_value_info(f"{name} out", TensorProto.BOOL, []) for name in names],
    )
    return helper.make_node("Loop", ["", true, true], ["never"], body=body)


def _initializer(array: np.ndarray[Any, Any], name: str = "big") -> Callable[[Any], object]:
    return lambda model: model.graph.initializer.append(numpy_helper.from_array(array, name))


def _huge(node: str, *inputs: str) -> Change:
    """Add an operator that makes a tensor of 10^12 values out of one."""

    def edit(model: onnx.ModelProto) -> None:
        _initializer(np.array([10**12], np.int64))(model)
        model.graph.node.insert(0, helper.make_node(node, [*inputs, "big"], ["extra"]))

    return _model(edit)


def _range(model: onnx.ModelProto) -> None:
    for name, value in (("zero", 0), ("much", 10**12), ("one", 1)):
        _initializer(np.array(value, np.int64), name)(model)
    model.graph.node.insert(0, helper.make_node("Range", ["zero", "much", "one"], ["extra"]))


def _range_of_product(model: onnx.ModelProto) -> None:
    _initializer(np.array(2**20, np.int64), "much")(model)
    for name, value in (("zero", 0), ("one", 1)):
        _initializer(np.array(value, np.int64), name)(model)
    model.graph.node.insert(0, helper.make_node("Mul", ["much", "much"], ["more"]))
    model.graph.node.insert(1, helper.make_node("Range", ["zero", "more", "one"], ["extra"]))


def _doubled(model: onnx.ModelProto) -> None:
    """2^45 numbers out of one, without an input: made when the graph is opened."""
    _initializer(np.zeros(1, np.float32), "d0")(model)
    for i in range(45):
        node = helper.make_node("Concat", [f"d{i}", f"d{i}"], [f"d{i + 1}"], axis=0)
        model.graph.node.insert(i, node)


def _joined(model: onnx.ModelProto) -> None:
    """2^28 numbers for each token of an input, made when the graph runs."""
    names = ["input_ids", *(f"j{number}" for number in range(28))]
    for name, made in pairwise(names):
        model.graph.node.append(helper.make_node("Concat", [name, name], [made], axis=0))


def _joined_products(model: onnx.ModelProto) -> None:
    """A tensor as wide as 2,000."""
    product = next(node for node in model.graph.node if "MatMul" in node.op_type)
    names = [product.output[0]] * 2000
    model.graph.node.append(helper.make_node("Concat", names, ["wide"], axis=-1))


def _multiplied(model: onnx.ModelProto) -> None:
    """The same by a product, with operators that convert between; the nodes in another order."""
    _initializer(np.zeros((100_000, 1), np.float32), "column")(model)
    model.graph.node.extend(
        [
            helper.make_node("Mul", ["column", "row"], ["extra"]),
            helper.make_node("Cast", ["turned"], ["row"], to=1),
            helper.make_node("Transpose", ["column"], ["turned"]),
        ]
    )


def _terminal(model: onnx.ModelProto) -> None:
    """A name that a terminal obeys, of a node that fails: ONNX Runtime prints it."""
    model.graph.node[0].name = "\x1b]0;title\x07"


def _long_name(model: onnx.ModelProto) -> None:
    """Ten thousand operators that look for a tensor with a name of 4 MB."""
    name = "x" * (4 << 20)
    _initializer(np.array(0, np.int64), "zero")(model)
    shape = helper.make_node("Shape", ["input_ids"], [name])
    model.graph.node.extend([shape, helper.make_node("Squeeze", [name], ["length"])])
    many = [helper.make_node("Range", ["zero", "length"], ["extra"]) for _ in range(10_000)]
    model.graph.node.extend(many)


def _entry(key: str, value: str) -> Change:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        next(entry for entry in tensor.external_data if entry.key == key).value = value

    return _model(edit)


def _entry_twice(model: onnx.ModelProto) -> None:
    tensor = next(t for t in model.graph.initializer if t.external_data)
    tensor.external_data.add(key="location", value="../other")


def _dims(*dims: int) -> Change:
    def edit(model: onnx.ModelProto) -> None:
        tensor = next(t for t in model.graph.initializer if t.external_data)
        del tensor.dims[:]
        tensor.dims.extend(dims)

    return _model(edit)


def _shape(name: str, index: int, length: int) -> Change:
    def edit(model: onnx.ModelProto) -> None:
        value = next(v for v in (*model.graph.input, *model.graph.output) if v.name == name)
        value.type.tensor_type.shape.dim[index].dim_value = length

    return _model(edit)


def _same_bytes(model: onnx.ModelProto) -> None:
    """A thousand weights in the same bytes: as many copies in memory, if each were read."""
    tensor = max(
        (t for t in model.graph.initializer if t.external_data),
        key=lambda t: int(next(e.value for e in t.external_data if e.key == "length")),
    )
    for index in range(1000):
        copy = model.graph.initializer.add()
        copy.CopyFrom(tensor)
        copy.name = f"copy {index}"


def _attribute(node: str, **values: Any) -> Change:
    def edit(model: onnx.ModelProto) -> None:
        found = next(n for n in model.graph.node if n.op_type == node)
        found.attribute.extend(helper.make_attribute(key, value) for key, value in values.items())

    return _model(edit)


def _function(model: onnx.ModelProto) -> None:
    inner = helper.make_node("Identity", ["x"], ["y"])
    opset = [helper.make_opsetid("", 23)]
    model.functions.append(helper.make_function("", "Add", ["x"], ["y"], [inner], opset))


def _sparse(model: onnx.ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "indices")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [10**12]))


def _raw(edit: Callable[[bytes], bytes]) -> Change:
    def change(package: Path) -> None:
        file = package / "model.onnx"
        file.write_bytes(edit(file.read_bytes()))
        agree(package)

    return change


def _length(value: int) -> bytes:
    """Return a varint."""
    groups = []
    while value >= 0x80:
        groups.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*groups, value])


GRAPH_CHANGES: Mapping[str, Change] = {
    "a loop without end": _model(_loop),
    "If": _node("If"),
    "Scan": _node("Scan"),
    "SequenceMap": _node("SequenceMap"),
    "PyOp": _node("PyOp", "com.microsoft"),
    "EPContext": _node(
        "EPContext", "com.microsoft", ep_cache_context="/etc/passwd", main_context=1
    ),
    "a domain of custom operators": _node("Evil", "evil"),
    "an operator of another domain": _node("Add", "com.microsoft"),
    "Constant": _node("Constant", value_string="x"),
    "Expand to 10^12": _huge("Expand", "input_ids"),
    "Tile to 10^12": _huge("Tile", "input_ids"),
    "ConstantOfShape of 10^12": _huge("ConstantOfShape"),
    "Concat doubles an input": _model(_joined),
    "Concat of one tensor 2,000 times": _model(_joined_products),
    "Range to 10^12": _model(_range),
    "Range to a product": _model(_range_of_product),
    "a name of 4 MB": _model(_long_name),
    "a node called by an escape sequence": _model(_terminal),
    "weights doubled 45 times": _model(_doubled),
    "weights multiplied by themselves": _model(_multiplied),
    "weights outside the folder": _entry("location", "../model.onnx.data"),
    "weights in /etc/passwd": _entry("location", "/etc/passwd"),
    "weights in a device": _entry("location", "/dev/zero"),
    "weights in the manifest": _entry("location", MANIFEST),
    "weights in memory": _entry("location", "*/_ORT_MEM_ADDR_/*"),
    "weights past the end": _entry("offset", "100000000"),
    "weights at a negative place": _entry("offset", "-4096"),
    "weights at no place": _entry("offset", "x"),
    "weights of another length": _entry("length", "1000000000000"),
    "a place twice": _model(_entry_twice),
    "weights of 10^12 rows": _dims(10**12, 1),
    "weights of a negative length": _dims(-1, -1),
    "weights of 2^63 rows": _dims(2**63 - 1),
    "a thousand weights in the same bytes": _model(_same_bytes),
    "a cache of 10^9 heads": _shape("past_key_values.0.key", 1, 10**9),
    "a cache of a negative size": _shape("past_key_values.0.key", 3, -1),
    "a batch of 10^9": _shape("past_key_values.0.value", 0, 10**9),
    "logits of 10^9": _shape("logits", 2, 10**9),
    "a text attribute": _attribute("MatMulNBits", path="/etc/passwd"),
    "a tensor attribute": _attribute(
        "MatMulNBits", value=numpy_helper.from_array(np.zeros(1, np.float32))
    ),
    "functions": _model(_function),
    "sparse weights": _model(_sparse),
    "settings of ONNX Runtime": _model(
        lambda m: m.metadata_props.add(key="ort_config", value='{"session_options": {}}')
    ),
    "another input": _model(
        lambda m: m.graph.input.append(
            helper.make_tensor_value_info("other", TensorProto.FLOAT, [10**6])
        )
    ),
    "no cache": _model(lambda m: [m.graph.input.pop() for _ in range(2)]),
    "training": _model(lambda m: m.training_info.add()),
    "a random file": _raw(lambda b: os.urandom(len(b))),
    "half of it": _raw(lambda b: b[: len(b) // 2]),
    "nothing": _raw(lambda b: b""),
    "two graphs": _raw(lambda b: b + b),
    "ONNX Runtime's own format": _raw(lambda b: b[:4] + b"ORTM" + b[8:]),
    "17 MB": _raw(lambda b: b + bytes(17 << 20)),
    "a million operator sets": _raw(lambda b: b + b"\x42\x00" * 10**6),
    "a million shapes": _raw(lambda b: b"\x3a" + _length(2 * 10**6) + b"\x6a\x00" * 10**6),
    "a varint without end": _raw(lambda b: b + b"\xff" * 1000),
    "a group": _raw(lambda b: b + b"\x0b\x0c"),
}


# ---- manifest.json -------------------------------------------------------------------------------


def _manifest(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(package: Path) -> None:
        manifest = read(package, MANIFEST)
        edit(manifest)
        write(package, MANIFEST, manifest)

    return change


def _list(name: str, **entry: Any) -> Change:
    values = {"size": 0, "sha256": "0" * 64} | entry
    return _manifest(lambda manifest: manifest["files"].__setitem__(name, values))


def _unlist(name: str) -> Change:
    def change(package: Path) -> None:
        _manifest(lambda manifest: manifest["files"].pop(name))(package)

    return change


def _instead(name: str, make: Callable[[Path], object]) -> Change:
    """Replace the file `name` by what `make` makes at its path."""

    def change(package: Path) -> None:
        (package / name).unlink()
        make(package / name)

    return change


def _socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as unix:
            unix.bind(path.name)
    finally:
        os.chdir(here)


def _link_out(path: Path) -> None:
    outside = path.parents[1] / f"outside of {path.parent.name}"
    outside.write_bytes((SOUND / path.name).read_bytes())
    path.symlink_to(outside)


def _add(name: str, content: bytes = b"x", *, listed: bool = False) -> Change:
    def change(package: Path) -> None:
        (package / name).parent.mkdir(exist_ok=True, parents=True)
        (package / name).write_bytes(content)
        if listed:
            agree(package, name)

    return change


MANIFEST_CHANGES: Mapping[str, Change] = {
    **{
        f"without {name}": _unlist(name)
        for name in ("model.onnx", "model.onnx.data", SETTINGS, "tokenizer.json", CERTIFICATE)
    },
    **{
        f"lists {name!r}"[:60]: _list(name)
        for name in (
            "../outside",
            "/etc/passwd",
            "a/../../outside",
            "C:\\windows",
            "nul",
            "a/./b",
            "",
            "file\0",
            "new\nline",
            "tokenizer.json ",
        )
    },
    "lists a file twice": lambda package: (package / MANIFEST).write_text(
        (package / MANIFEST).read_text("utf-8").replace('"files": {', '"files": {}, "files": {', 1),
        "utf-8",
    ),
    "lists a name in another case": _add("MODEL.ONNX", listed=True),
    "a size of True": _list("x", size=True),
    "a negative size": _list("x", size=-1),
    "a size of 10^30": _list("x", size=10**30),
    "a short hash": _list("x", sha256="00"),
    "a hash in capitals": _list("x", sha256="A" * 64),
    "a precision with a line of YAML": _manifest(lambda m: m.update(precision="int4\nx: y")),
    "a precision of another kind": _manifest(lambda m: m.update(precision="int2")),
    "a target outside": _manifest(lambda m: m.update(target="../../outside")),
    "a target that is a path": _manifest(lambda m: m.update(target="/tmp/outside")),
    "no files": _manifest(lambda m: m["files"].clear()),
    "20,000 files": _manifest(
        lambda m: m["files"].update(
            {f"f{i}": {"size": 0, "sha256": "0" * 64} for i in range(20_000)}
        )
    ),
    "a format of True": _manifest(lambda m: m.update(format_version=-1)),
    "an adapter outside": _manifest(lambda m: m.update(adapters={"x": {"file": "../x"}})),
    "nesting": lambda package: (package / MANIFEST).write_text("[" * 100_000, "utf-8"),
    "a manifest of 4 GB": lambda package: os.truncate(package / MANIFEST, 4 << 30),
    "a listed FIFO": _instead("tokenizer.json", os.mkfifo),
    "a manifest that is a FIFO": _instead(MANIFEST, os.mkfifo),
    "a graph that is a FIFO": _instead("model.onnx", os.mkfifo),
    "settings that are a FIFO": _instead(SETTINGS, os.mkfifo),
    "a certificate that is a FIFO": _instead(CERTIFICATE, os.mkfifo),
    "a listed socket": _instead("LICENSE.txt", _socket),
    "a listed device": _instead("LICENSE.txt", lambda path: path.symlink_to("/dev/zero")),
    "a listed folder": _instead("LICENSE.txt", Path.mkdir),
    "a listed link to the outside": _instead("LICENSE.txt", _link_out),
    "weights that are a link to the outside": _instead("model.onnx.data", _link_out),
    "a loop of links": _instead("LICENSE.txt", lambda path: path.symlink_to(path.name)),
    "a name of 1,200 folders": _list("/".join("d" * 1200)),
    "a listed library": _add("evil.so", listed=True),
    "a listed tokenizer module": _add("tokenizer_module.json", b"{}", listed=True),
}


def _tokenizer_settings(content: str) -> Change:
    return _add("tokenizer_config.json", content.encode(), listed=True)


TOKENIZER_CHANGES: Mapping[str, Change] = {
    "a file outside": _tokenizer_settings('{"tiktoken_file": "../../etc/passwd"}'),
    "a FIFO by another spelling": _tokenizer_settings('{"\\u0074iktoken_file": "pipe"}'),
    "the same entry twice": _tokenizer_settings('{"tiktoken_file": "x", "tiktoken_file": null}'),
    "a list": _tokenizer_settings('["tiktoken_file"]'),
    "what only some readers take": _tokenizer_settings('{/**/"tiktoken_file": "x"}'),
    "nesting": _tokenizer_settings("[" * 100_000),
    "a file of 4 GB": lambda package: os.truncate(package / "tokenizer_config.json", 4 << 30),
}
"""What leads genai's tokenizer out of the package, or may."""


# ---- files that nobody lists ---------------------------------------------------------------------


def _link(name: str, target: str) -> Change:
    def change(package: Path) -> None:
        (package / name).parent.mkdir(exist_ok=True)
        (package / name).symlink_to(target)

    return change


BESIDE_CHANGES: Mapping[str, Change] = {
    **{
        f"a file {name!r}": _add(name)
        for name in (
            "notes.txt",
            ".hidden",
            ".DS_Store",
            "Thumbs.db",
            "desktop.ini",
            ".env",
            ".git/hooks/post-checkout",
            ".cache/x",
            "__pycache__/x.pyc",
            "parity/added.json",
            "sub/folder/file",
            "sha256sums",
            "Model.onnx",
            "model.ort",
            "evil.so",
            "evil.dll",
            "chat_template.json",
            "tokenizer_module.json",
            "audio_processor_config.json",
            "new\nline",
            "\x1b]0;title\x07",
        )
    },
    "an empty folder": lambda package: (package / "empty").mkdir(),
    "a FIFO": lambda package: os.mkfifo(package / "pipe"),
    "a socket": lambda package: _socket(package / "socket"),
    "a link to a file": _link("link", "/etc/passwd"),
    "a link to a folder": _link("link", "/"),
    "a link to itself": _link("link", "link"),
    **{
        f"{name} as a link out": _link(name, "/etc/hosts")
        for name in ("SHA256SUMS", "manifest.json.sig", "README.md", ".gitattributes", "model.sig")
    },
    "sums that are a FIFO": lambda package: os.mkfifo(package / "SHA256SUMS"),
    "a signature that is a FIFO": lambda package: os.mkfifo(package / "manifest.json.sig"),
    "a bill of materials that is a folder": lambda package: (package / "sbom.cdx.json").mkdir(),
    "a link among what a download leaves": _link(".cache/huggingface", "/"),
    "20,000 files": lambda package: [(package / f"f{i}").write_bytes(b"") for i in range(20_000)],
}


# ---- the certificate -----------------------------------------------------------------------------


def _certificate(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(package: Path) -> None:
        content = read(package, CERTIFICATE)
        edit(content)
        write(package, CERTIFICATE, content)
        manifest = read(package, MANIFEST)
        path = package / CERTIFICATE
        entry = {"size": path.stat().st_size, "sha256": hash_file(path)}
        manifest["files"][CERTIFICATE] = entry
        write(package, MANIFEST, manifest)

    return change


def _arrays(edit: Callable[[dict[str, Any]], object]) -> Change:
    def change(package: Path) -> None:
        arrays = load_file(package / REFERENCE)
        edit(arrays)
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, package / REFERENCE)
        agree(package)

    return change


def _fill(name: str, value: float) -> Change:
    def edit(arrays: dict[str, Any]) -> None:
        arrays[name] = np.full_like(arrays[name], value)

    return _arrays(edit)


def _backtracking(package: Path) -> None:
    """A pattern of the tokenizer that tries for ever to match the text of a passage."""
    tokenizer = read(package, "tokenizer.json")
    pattern = {"Regex": r"(?:(a+)+\1)+d"}
    split = {"type": "Split", "pattern": pattern, "behavior": "Isolated", "invert": False}
    tokenizer["pre_tokenizer"] = split
    write(package, "tokenizer.json", tokenizer)
    content = read(package, CERTIFICATE)
    for passage in content["passages"]:
        passage["text"] = "a" * 8000
    write(package, CERTIFICATE, content)
    agree(package)


def _loose(package: Path) -> None:
    """Weights that compute something else, and thresholds that allow it."""
    data = np.memmap(package / "model.onnx.data", np.uint8, mode="r+")
    data[len(data) // 2 :: 7] ^= 0x55
    data.flush()
    content = read(package, CERTIFICATE)
    for row in content["thresholds"]:
        row["limit"] = 1e30
    write(package, CERTIFICATE, content)
    agree(package)


def _both(first: Change, second: Change) -> Change:
    def change(package: Path) -> None:
        first(package)
        second(package)

    return change


CERTIFICATE_CHANGES: Mapping[str, Change] = {
    "thresholds of 1e30": _loose,
    "thresholds of infinity": _both(
        _loose, _certificate(lambda c: [row.update(limit="inf") for row in c["thresholds"]])
    ),
    "a threshold of NaN": _certificate(lambda c: c["thresholds"][0].update(limit="nan")),
    "thresholds of another kind": _certificate(lambda c: c.update(precision="fp32")),
    "activations of another kind": _both(
        _loose, _certificate(lambda c: c.update(activations="nonsense"))
    ),
    "activations that allow more": _both(
        _loose, _certificate(lambda c: c.update(activations="bf16"))
    ),
    "covers no files": _certificate(lambda c: c["files"].clear()),
    "covers no graph": _certificate(lambda c: c["files"].pop("model.onnx")),
    "no passages": _certificate(lambda c: c["passages"].clear()),
    "a thousand passages": _certificate(lambda c: c.update(passages=c["passages"] * 300)),
    "a text of 10 MB": _certificate(lambda c: c["passages"][0].update(text="a" * 10**7)),
    "a text of 100 KB": _certificate(lambda c: c["passages"][0].update(text="a" * 10**5)),
    "a prompt of True": _certificate(lambda c: c["passages"][0].update(prompt=True)),
    "a prompt of 10^9": _certificate(lambda c: c["passages"][0].update(prompt=10**9)),
    "a vocabulary of 10^12": _certificate(lambda c: c.update(vocab_size=10**12)),
    "a vocabulary as text": _certificate(lambda c: c.update(vocab_size="288")),
    "NaN among the logits": _fill("0.package.logits", float("nan")),
    "infinite logits": _fill("0.original.logits", float("inf")),
    "NaN as log-sum-exp": _fill("0.package.logsumexp", float("nan")),
    "ids outside the vocabulary": _fill("0.ids", 10**6),
    "negative ids": _fill("0.ids", -1),
    "negative kept ids": _fill("0.package.ids", -1),
    "positions outside": _fill("0.full.positions", 10**6),
    "another reference": _both(lambda p: (p / REFERENCE).write_bytes(b"x"), agree),
    "a reference of 10^12 values": _both(lambda p: (p / REFERENCE).write_bytes(_bomb()), agree),
    "a pattern that backtracks for ever": _backtracking,
    "not an object": lambda package: (
        (package / CERTIFICATE).write_text("[]"),
        _unlist(CERTIFICATE)(package),
        _list(CERTIFICATE, size=2, sha256=hash_file(package / CERTIFICATE))(package),
    ),
}


def _bomb() -> bytes:
    """A safetensors file whose header says that it has 10^12 values."""
    header = {"0.ids": {"dtype": "I32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text


KINDS: Mapping[str, Mapping[str, Change]] = {
    "settings of genai": SETTINGS_CHANGES,
    "settings of the tokenizer": TOKENIZER_CHANGES,
    "graph": GRAPH_CHANGES,
    "manifest and listed files": MANIFEST_CHANGES,
    "unlisted files": BESIDE_CHANGES,
    "certificate": CERTIFICATE_CHANGES,
}
"""Kind of attack -> its name -> how to make it."""

if __name__ == "__main__":
    for kind, changes in KINDS.items():
        print(f"{len(changes):4} {kind}")
