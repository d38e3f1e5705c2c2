"""The places that bundles can be made for. To add one, add a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llama_onnx.runtime.bundles.azureml import AzureML
from llama_onnx.runtime.bundles.foundry import Foundry
from llama_onnx.runtime.bundles.hub import Hub
from llama_onnx.runtime.bundles.nuget import NuGet
from llama_onnx.runtime.bundles.place import Option, Place
from llama_onnx.runtime.bundles.sagemaker import SageMaker
from llama_onnx.runtime.bundles.web import Web
from llama_onnx.runtime.bundles.windows import Windows
from llama_onnx.targets.errors import UsageError

PLACES: dict[str, type[Place]] = {
    place.name: place for place in (Windows, NuGet, AzureML, SageMaker, Hub, Foundry, Web)
}
"""Value of `--for` -> place."""

OPTIONS: dict[str, Option] = {
    option.name: option for place in PLACES.values() for option in place.options
}
"""Name -> an option that at least one place takes."""


def get_place(name: str, given: Mapping[str, Any] | None = None) -> Place:
    """Return the place called `name`, configured by the options `given`: name -> value.

    Raises `UsageError` for an unknown place and for an option that this place does not take.
    """
    if name not in PLACES:
        raise UsageError(f"there is no place {name!r}: choose one of {', '.join(PLACES)}.")
    given = given or {}
    for option in given:
        takers = places_with(option)
        if name not in takers:
            flag = OPTIONS[option].flag if option in OPTIONS else option
            others = f", only for {' and '.join(takers)}" if takers else ""
            raise UsageError(f"{flag} is not an option for the place {name}{others}: leave it out.")
    return PLACES[name].from_options(given)


def places_with(option: str) -> list[str]:
    """Return the names of the places that take the option called `option`."""
    return [
        place.name
        for place in PLACES.values()
        if any(taken.name == option for taken in place.options)
    ]
