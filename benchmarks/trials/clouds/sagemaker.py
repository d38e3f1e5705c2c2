"""SageMaker: the server outside its container, deploy.py with moto, and the Dockerfile."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.trials.clouds.server import Place, Server, environment, text_of
from tests.support.tables import Case

ROLE = "arn:aws:iam::123456789012:role/service"
IMAGE = "123456789012.dkr.ecr.eu-west-1.amazonaws.com/llama-onnx:1"
AWS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "eu-west-1",
}


def unpack(bundle: Path, folder: Path) -> Path:
    """Unpack model.tar.gz, as SageMaker does."""
    with tarfile.open(bundle / "model.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def place(bundle: Path) -> Place:
    """How the image runs: its ENTRYPOINT with the argument "serve", which SageMaker adds."""

    def start(package: Path, log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as file:
            return subprocess.Popen(
                [sys.executable, "serve.py", "serve"],
                cwd=bundle / "container",
                env=environment(LLAMA_ONNX_MODEL=str(package)),
                stdout=file,
                stderr=subprocess.STDOUT,
            )

    return Place("sagemaker", start, 8080, "/invocations", "/invocations", "/ping")


def stream_cases(server: Server) -> Iterator[Case]:
    """Stream answers, and disconnect during one."""
    request = {"prompt": "the quick", "max_tokens": 40}
    whole = text_of(server.ask(request)[1])
    connection = server.connect()
    connection.request("POST", "/invocations", json.dumps({**request, "stream": True}))
    lines = [line.removeprefix(b"data: ").strip() for line in connection.getresponse()]
    events = [line for line in lines if line]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    holds = text == whole and events[-1] == b"[DONE]"
    yield Case("a streamed answer", holds, f"the same text in {len(events) - 1} events")
    long = {"prompt": "the quick", "max_tokens": 1000}
    started = time.monotonic()
    server.ask(long)
    full = time.monotonic() - started
    connection = server.connect()
    connection.request("POST", "/invocations", json.dumps({**long, "stream": True}))
    first = connection.getresponse()
    first.readline()
    first.close()
    connection.close()
    took = server.seconds_until_idle()
    said = f"its place was free after {took:.1f} s; the whole answer takes {full:.1f} s"
    yield Case("a client disconnects", took < full / 2, said)
    connection = server.connect()
    connection.request("POST", "/invocations", json.dumps({"prompt": 3, "stream": True}))
    refused = connection.getresponse().status
    yield Case("an invalid request to stream", refused == 400, str(refused))


def docker_case(bundle: Path) -> Case:
    """Check the Dockerfile with hadolint; there is no engine here to build it."""
    linter = Path(sys.executable).parent / "hadolint"
    done = subprocess.run(
        [str(linter), "Dockerfile"], cwd=bundle / "container", capture_output=True, text=True
    )
    said = (done.stdout + done.stderr).strip() or "no remark"
    return Case("hadolint: Dockerfile", done.returncode == 0, said)


def deploy_cases(bundle: Path) -> Iterator[Case]:
    """Run deploy.py unchanged with moto's server."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    os.environ.update(AWS, AWS_ENDPOINT_URL=f"http://{host}:{port}")
    try:
        yield from _deploy(bundle)
    finally:
        server.stop()


def _deploy(bundle: Path) -> Iterator[Case]:
    import boto3

    clients: dict[str, Any] = {name: boto3.client(name) for name in ("s3", "sagemaker")}
    place_ = {"LocationConstraint": "eu-west-1"}
    clients["s3"].create_bucket(Bucket="models", CreateBucketConfiguration=place_)
    command = [sys.executable, "deploy.py", "--image", IMAGE, "--role", ROLE, "--bucket", "models"]
    done = subprocess.run(command, cwd=bundle, capture_output=True, text=True)
    last = (done.stdout + done.stderr).strip().splitlines()[-1]
    yield Case("moto: deploy.py", done.returncode == 0 and "in service" in last, last)
    sagemaker = clients["sagemaker"]
    (endpoint,) = sagemaker.list_endpoints()["Endpoints"]
    name = endpoint["EndpointName"]
    status = sagemaker.describe_endpoint(EndpointName=name)["EndpointStatus"]
    yield Case("moto: the endpoint", status == "InService", f"{name}: {status}")
    config = sagemaker.describe_endpoint_config(EndpointConfigName=name)
    (variant,) = config["ProductionVariants"]
    said = f"{variant['InitialInstanceCount']} x {variant['InstanceType']}"
    yield Case("moto: its configuration", variant["ModelName"] == name, said)
    container = sagemaker.describe_model(ModelName=name)["PrimaryContainer"]
    bucket, _, key = container["ModelDataUrl"].removeprefix("s3://").partition("/")
    stored = clients["s3"].get_object(Bucket=bucket, Key=key)["Body"].read()
    listed = json.loads((bundle / "bundle.json").read_text("utf-8"))["files"]["model.tar.gz"]
    holds = hashlib.sha256(stored).hexdigest() == listed["sha256"] and container["Image"] == IMAGE
    yield Case("moto: its model", holds, f"{container['ModelDataUrl']}, sha256 as in bundle.json")
