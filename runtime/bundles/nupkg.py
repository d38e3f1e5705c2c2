"""A NuGet package: a zip file with a fixed order and fixed times, so the same files give the same
bytes. Its layout is that of the Open Packaging Conventions, as `nuget pack` writes it."""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape, quoteattr

_CONTENT_TYPES = "http://schemas.openxmlformats.org/package/2006/content-types"
_RELATIONSHIPS = "http://schemas.openxmlformats.org/package/2006/relationships"
_MANIFEST = "http://schemas.microsoft.com/packaging/2010/07/manifest"
_NUSPEC = "http://schemas.microsoft.com/packaging/2013/05/nuspec.xsd"
_XML = '<?xml version="1.0" encoding="utf-8"?>\n'
_TIME = (1980, 1, 1, 0, 0, 0)
"""The earliest that a zip file can hold."""


@dataclass(frozen=True)
class Description:
    """What a NuGet package says of itself."""

    name: str
    version: str
    authors: str
    description: str
    tags: str
    framework: str
    licence: str
    readme: str


def nuget_version(version: str) -> str:
    """Return a version of Python's as a semantic version.

    >>> nuget_version("0.2.0"), nuget_version("1.0rc1"), nuget_version("0.3.0.dev4+local")
    ('0.2.0', '1.0.0-rc1', '0.3.0-dev4')
    """
    public = version.partition("+")[0]
    found = re.fullmatch(r"(\d+(?:\.\d+){0,2})\.?([a-z].*)?", public)
    if found is None:
        raise ValueError(f"{version} is not a version that NuGet can have.")
    numbers = [*found[1].split("."), "0", "0"][:3]
    suffix = f"-{found[2].replace('.', '-')}" if found[2] else ""
    return ".".join(numbers) + suffix


def write_nupkg(out: Path, about: Description, files: Mapping[str, Path]) -> None:
    """Write `files`, name in the package -> file, and what describes them to the new file `out`."""
    nuspec = f"{about.name}.nuspec"
    texts = {
        "[Content_Types].xml": _content_types([*files, nuspec]),
        "_rels/.rels": _relationships(nuspec),
        nuspec: _describe(about),
    }
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in texts.items():
            archive.writestr(_entry(name), text.encode(), zipfile.ZIP_DEFLATED)
        for name in sorted(files):
            archive.writestr(_entry(name), files[name].read_bytes(), zipfile.ZIP_DEFLATED)


def _entry(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name, _TIME)
    entry.create_system, entry.external_attr = 3, 0o100644 << 16  # the same on Windows
    return entry


def _content_types(names: Iterable[str]) -> str:
    """Say for each extension, and for each file without one, that it is a file like any other."""
    last = [name.rpartition("/")[2] for name in names]
    extensions = sorted({name.rpartition(".")[2] for name in last if "." in name})
    types = [
        '<Default Extension="rels" '
        'ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
    ]
    types += [
        f'<Default Extension={quoteattr(extension)} ContentType="application/octet"/>'
        for extension in extensions
    ]
    types += [
        f'<Override PartName={quoteattr("/" + name)} ContentType="application/octet"/>'
        for name in sorted(names)
        if "." not in name.rpartition("/")[2]
    ]
    return f'{_XML}<Types xmlns="{_CONTENT_TYPES}">{"".join(types)}</Types>'


def _relationships(nuspec: str) -> str:
    target = f'Type="{_MANIFEST}" Target={quoteattr("/" + nuspec)} Id="R1"'
    return f'{_XML}<Relationships xmlns="{_RELATIONSHIPS}"><Relationship {target}/></Relationships>'


def _describe(about: Description) -> str:
    return f"""{_XML}<package xmlns="{_NUSPEC}">
  <metadata minClientVersion="4.10">
    <id>{escape(about.name)}</id>
    <version>{escape(about.version)}</version>
    <authors>{escape(about.authors)}</authors>
    <license type="file">{escape(about.licence)}</license>
    <readme>{escape(about.readme)}</readme>
    <description>{escape(about.description)}</description>
    <tags>{escape(about.tags)}</tags>
    <dependencies>
      <group targetFramework={quoteattr(about.framework)}/>
    </dependencies>
  </metadata>
</package>
"""
