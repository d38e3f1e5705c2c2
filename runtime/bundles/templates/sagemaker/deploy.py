"""Create a SageMaker endpoint of this bundle: upload, model, endpoint configuration, endpoint.

python deploy.py --image IMAGE --role ROLE_ARN --bucket BUCKET [--name NAME] [--instance TYPE]

IMAGE is what `docker build` made of container/, pushed to Amazon ECR. Needs boto3, and credentials
where boto3 looks for them.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import boto3

HERE = Path(__file__).parent


def deploy(arguments: argparse.Namespace) -> str:
    """Create everything under the same name; returns the ARN of the endpoint."""
    session: Any = boto3.session.Session(region_name=arguments.region)
    name, key = arguments.name, f"{arguments.name}/model.tar.gz"
    session.client("s3").upload_file(str(HERE / "model.tar.gz"), arguments.bucket, key)
    sagemaker = session.client("sagemaker")
    sagemaker.create_model(
        ModelName=name,
        ExecutionRoleArn=arguments.role,
        PrimaryContainer={
            "Image": arguments.image,
            "ModelDataUrl": f"s3://{arguments.bucket}/{key}",
            "Environment": {"ORT_DISABLE_TELEMETRY": "1"},
        },
    )
    sagemaker.create_endpoint_config(
        EndpointConfigName=name,
        ProductionVariants=[
            {
                "VariantName": "all",
                "ModelName": name,
                "InstanceType": arguments.instance,
                "InitialInstanceCount": 1,
                # Unpacking and opening a large model takes minutes.
                "ModelDataDownloadTimeoutInSeconds": 1800,
                "ContainerStartupHealthCheckTimeoutInSeconds": 900,
            }
        ],
    )
    made = sagemaker.create_endpoint(EndpointName=name, EndpointConfigName=name)
    print(f"{made['EndpointArn']}: waiting until it is in service", flush=True)
    sagemaker.get_waiter("endpoint_in_service").wait(EndpointName=name)
    return str(made["EndpointArn"])


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image", required=True)
    parser.add_argument("--role", required=True, help="ARN of the role that SageMaker takes on")
    parser.add_argument("--bucket", required=True, help="S3 bucket for model.tar.gz")
    parser.add_argument("--name", default="$name")
    parser.add_argument("--instance", default="$instance")
    parser.add_argument("--region", help="otherwise boto3's default")
    print(f"{deploy(parser.parse_args())}: in service")


if __name__ == "__main__":
    main()
